"Render README.md from nbs/index.ipynb; with --check, say whether it is what the notebook renders to."
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import RegexRemovePreprocessor
from traitlets.config import Config

root = Path(__file__).resolve().parents[1]


def render():
    nb = nbformat.read(root / 'nbs' / 'index.ipynb', as_version=4)
    hide = RegexRemovePreprocessor(patterns=[r'^\s*#\|\s*hide\b'])
    nb, _ = hide.preprocess(nb, {})
    text, _ = MarkdownExporter(config=Config()).from_notebook_node(nb)
    text = re.sub(r'\]\((?=images/|tutorials/|\d\d_)', '](nbs/', text)   # the notebook sits one folder deeper
    lines = [l.rstrip() for l in text.splitlines() if not l.startswith('#|')]
    return '\n'.join(lines).strip() + '\n'


if __name__ == '__main__':
    text, readme = render(), root / 'README.md'
    if '--check' not in sys.argv: readme.write_text(text)
    elif not readme.exists() or readme.read_text() != text:
        sys.exit('README.md is not what nbs/index.ipynb renders to; run `make readme` and commit it')

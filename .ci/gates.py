"The gates beside the tests. Each prints a line; the first that fails ends the run with its reason."
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

root = Path(__file__).resolve().parents[1]
bin = Path(sys.executable).parent


def sh(*cmd, **kw):
    r = subprocess.run([str(c) for c in cmd], cwd=root, capture_output=True, text=True, **kw)
    if r.returncode: sys.exit(f'{" ".join(map(str, cmd))} failed:\n{(r.stdout + r.stderr)[-6000:]}')
    return r.stdout


def snapshot(*folders):
    return {p: p.read_bytes() for f in folders for p in sorted((root / f).rglob('*')) if p.suffix in ('.ipynb', '.py') and '.ipynb_checkpoints' not in p.parts}


def same(before, after, remedy):
    changed = [str(p.relative_to(root)) for p in sorted(before.keys() | after.keys()) if before.get(p) != after.get(p)]
    if changed: sys.exit(f'{", ".join(changed)} would change: {remedy}')


def clean():
    "nbdev-clean leaves every notebook as it is."
    before = snapshot('nbs', 'experiments')
    sh(bin / 'nbdev-clean'); sh(bin / 'nbdev-clean', '--fname', 'experiments')
    same(before, snapshot('nbs', 'experiments'), 'run nbdev-clean (and nbdev-clean --fname experiments)')


def export():
    "The modules are what the notebooks export."
    before = snapshot('genai_lab')
    sh(bin / 'nbdev-export')
    same(before, snapshot('genai_lab'), 'run nbdev-export')


def readme():
    "README.md is what nbs/index.ipynb renders to."
    sh(sys.executable, '.ci/readme.py', '--check')


def bare():
    "Experiments are committed without outputs: their results live in MLflow."
    for p in sorted((root / 'experiments').glob('*.ipynb')):
        if any(c.get('outputs') for c in json.loads(p.read_text())['cells']): sys.exit(f'{p.relative_to(root)} has stored outputs; clear them')


def cells(nb):
    return [c for c in json.loads(nb)['cells'] if c['cell_type'] == 'code']


def pictures_alike(a, b):
    "Two PNG files of the same size whose pixels differ by less than 1% on average: fonts are drawn a little differently by processor."
    import base64

    import numpy as np
    from PIL import Image
    x, y = (np.asarray(Image.open(io.BytesIO(base64.b64decode(p))).convert('RGB'), dtype=float) for p in (a, b))
    return x.shape == y.shape and abs(x - y).mean() < 2.55


def outputs_alike(a, b):
    "Whether two lists of outputs are equal, pictures compared by their pixels."
    a, b = json.loads(json.dumps(a)), json.loads(json.dumps(b))
    for x, y in zip(a, b):
        px, py = (o.get('data', {}).pop('image/png', None) for o in (x, y))
        if (px is None) != (py is None) or (px and px != py and not pictures_alike(px, py)): return False
    return a == b


def fresh():
    "The stored outputs are what the notebooks give today."
    before = snapshot('nbs')
    sh(bin / 'nbdev-test', 'nbs', '--save', env=os.environ | dict(TQDM_DISABLE='1')); sh(bin / 'nbdev-clean')
    after = snapshot('nbs')
    stale = []
    for p, old in before.items():
        for c, d in zip(cells(old), cells(after[p])):
            if not outputs_alike(c['outputs'], d['outputs']):
                src = ''.join(c['source'])
                stale.append(f'{p.relative_to(root)}: an output is stale. The cell:\n{src[:800]}\nstored: {json.dumps(c["outputs"])[:1500]}\nnow:    {json.dumps(d["outputs"])[:1500]}')
        if old != after[p] and not stale: p.write_bytes(old)   # only pixels differed
    if stale: sys.exit('\n\n'.join(stale))


def wheel():
    "The wheel builds, installs with nothing but what it declares, and every module imports from it."
    with tempfile.TemporaryDirectory() as tmp:
        sh(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '-w', tmp, '.')
        [whl] = Path(tmp).glob('*.whl')
        venv.create(f'{tmp}/env', with_pip=True)
        py = f'{tmp}/env/bin/python'
        sh(py, '-m', 'pip', 'install', '--quiet', '-c', 'constraints.txt', whl)
        names = sorted(p.stem for p in (root / 'genai_lab').glob('*.py') if not p.stem.startswith('_'))
        code = f'import importlib, sys, genai_lab\nassert genai_lab.__file__.startswith(sys.prefix)\nfor m in {names}: importlib.import_module("genai_lab." + m)'
        r = subprocess.run([py, '-c', code], cwd=tmp, capture_output=True, text=True)
        if r.returncode: sys.exit(f'{whl.name} does not import in a clean environment:\n{r.stderr[-3000:]}')
        sh(f'{tmp}/env/bin/genai-lab', '--help')


if __name__ == '__main__':
    gates = [clean, export, readme, bare, wheel, fresh]
    chosen = [g for g in gates if len(sys.argv) == 1 or g.__name__ in sys.argv[1:]]
    for g in chosen:
        start = time.time(); g()
        print(f'{g.__name__:8} ok  {time.time() - start:5.1f} s  {g.__doc__}', flush=True)

"The structure of the house: floors, environments, and what is committed."
import ast
import json
import re
import tomllib
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
notebooks = sorted((root / 'nbs').rglob('*.ipynb'))


def code(path):
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']


def exported(path):
    "Number and module name of a notebook that exports, and the source of its exported cells."
    cells = code(path)
    name = next((m[1] for c in cells if (m := re.search(r'#\|\s*default_exp\s+(\S+)', c))), None)
    return name, '\n'.join(c for c in cells if re.search(r'^#\|\s*export', c, re.M))


def imported(source):
    "Modules of the library that a piece of source imports, at the top or inside a function."
    mods = set()
    for n in ast.walk(ast.parse(re.sub(r'^[%!].*$', '', source, flags=re.M))):
        if isinstance(n, ast.ImportFrom) and n.module:
            if n.module == 'genai_lab': mods |= {a.name for a in n.names}
            elif n.module.startswith('genai_lab.'): mods.add(n.module.split('.')[1])
        if isinstance(n, ast.Import): mods |= {a.name.split('.')[1] for a in n.names if a.name.startswith('genai_lab.')}
    return mods - {'__version__'}


floors = {name: int(p.stem.split('_')[0]) for p in notebooks if (name := exported(p)[0])}


def test_every_module_comes_from_a_notebook():
    modules = {p.stem for p in (root / 'genai_lab').glob('*.py') if not p.stem.startswith('_')}
    assert modules == set(floors) and len(set(floors.values())) == len(floors)


@pytest.mark.parametrize('name', floors)
def test_imports_go_only_downward(name):
    path = next(p for p in notebooks if exported(p)[0] == name)
    above = {m for m in imported(exported(path)[1]) if floors[m] >= floors[name]}
    assert not above, f'{path.name} imports {sorted(above)}, which stand on the same floor or above'


def test_the_check_for_upward_imports_finds_one():
    assert imported('def f():\n    from genai_lab.cli import main\n    import genai_lab.tracking') == {'cli', 'tracking'}


def test_experiments_and_tests_are_never_imported_by_the_library():
    for p in (root / 'genai_lab').glob('*.py'):
        for n in ast.walk(ast.parse(p.read_text())):
            mods = [n.module or ''] if isinstance(n, ast.ImportFrom) and n.level == 0 else [a.name for a in n.names] if isinstance(n, ast.Import) else []
            assert not [m for m in mods if m.split('.')[0] in ('experiments', 'tests')], p.name


def test_conda_and_pip_install_the_same_requirements():
    import yaml
    env = yaml.safe_load((root / 'environment.yml').read_text())
    [pip] = [d['pip'] for d in env['dependencies'] if isinstance(d, dict)]
    make = re.search(r'pip install .*?(-c \S+) (-e "?\.\[dev\]"?)', (root / 'Makefile').read_text())
    assert pip == [make[1], make[2].replace('"', '')]
    project = tomllib.loads((root / 'pyproject.toml').read_text())['project']
    assert f'python{project["requires-python"]}' in env['dependencies']


def test_every_requirement_is_constrained_to_a_tested_version_that_satisfies_it():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name as canon
    pins = dict(l.split('==') for l in (root / 'constraints.txt').read_text().splitlines() if '==' in l)
    pins = {canon(k): v for k, v in pins.items()}
    project = tomllib.loads((root / 'pyproject.toml').read_text())['project']
    extras = [r for rs in project['optional-dependencies'].values() for r in rs if not r.startswith('genai-lab[')]
    for r in map(Requirement, [*project['dependencies'], *extras]):
        assert canon(r.name) in pins, f'{r.name} is not in constraints.txt'
        assert r.specifier.contains(pins[canon(r.name)]), f'{r} is not satisfied by {pins[canon(r.name)]}'


def test_the_tags_that_papermill_needs_survive_cleaning():
    keys = tomllib.loads((root / 'pyproject.toml').read_text())['tool']['nbdev']['allowed_cell_metadata_keys']
    assert {'tags', 'slideshow'} <= set(keys)
    for p in (root / 'experiments').glob('*.ipynb'):
        assert any('parameters' in c['metadata'].get('tags', []) for c in json.loads(p.read_text())['cells']), f'{p.name} has no parameters cell'


def test_every_key_of_the_settings_file_is_used():
    from genai_lab.core import LabSettings, ModelEntry
    source = '\n'.join(p.read_text() for p in (root / 'genai_lab').glob('*.py') if p.stem != 'core')
    for cls in (LabSettings, ModelEntry):
        for key in cls.model_fields: assert re.search(rf'\.{key}\b|[\'"]{key}[\'"]|\b{key}=', source) or key == 'cache_dir' and '.cache' in source, f'nothing reads "{key}"'


def test_notebooks_open_with_a_title_and_one_line():
    for p in notebooks:
        if exported(p)[0]:
            first = ''.join(json.loads(p.read_text())['cells'][0]['source'])
            assert re.fullmatch(r'# \S.*\n> \S.*', first.strip()), p.name

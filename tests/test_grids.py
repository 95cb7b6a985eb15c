"Grids: what is in them, in which order, what is wrong with them, and what guided search makes of results."
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from genai_lab.core import LabError
from genai_lab.grids import Cell, axes_grid, count_axes, dry_run_table, history, read_grid, wall_seconds, walk_axes
from genai_lab.notebooks import notebook_fingerprint, read_notebook
from genai_lab.tracking import connect

page = Path(__file__).resolve().parents[1] / 'nbs' / '34_grids.ipynb'


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook('a.ipynb', "n: int = 1\nrate: float = 0.5\nmodel = 'small'\nshops: list[str] = ['north']\nloaded = len('abc')\napi_key: str | None = None")
    notebook('b.ipynb', "adapter = ''\nheat: float = 0.0\nseed: int = 7\nruns: list[str] = []\nn: int = 1")


def notebook(name, parameters, source='print(1)'):
    cells = [dict(cell_type='code', id=f'c{i}', source=s, metadata=dict(tags=['parameters'] * (i == 0)), outputs=[], execution_count=None) for i, s in enumerate([parameters, source])]
    Path(name).write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells)))


def grid_of(text, **kw):
    Path('g.yaml').write_text(text)
    return read_grid('g.yaml', **kw)


def labels(grid):
    return [c.label for c in grid.cells]


def play(grid, outcome, pick=lambda n: 0, workers=4):
    "Run a grid as a scheduler would; `outcome` gives metrics, or None for a failure."
    states, running, seen = {}, [], 0
    while True:
        def bad(c): return any(states.get(i) in ('bad', 'skipped') for i in c.needs)
        for c in grid.cells:
            if c.index not in states and bad(c): states[c.index] = 'skipped'
        ready = [c for c in grid.cells if c.index not in states and all(states.get(i) == 'good' for i in c.needs)]
        while len(running) < workers and (ready or not [c for c in grid.cells if c.index not in states] and grid.more(1)):
            ready = ready or [c for c in grid.cells if c.index not in states and all(states.get(i) == 'good' for i in c.needs)]
            if not ready: break
            c = ready.pop(0)
            states[c.index] = 'running'
            running.append(c)
        if not running:
            if len(grid.cells) == seen: return states
            seen = len(grid.cells)
            continue
        c = running.pop(pick(len(running)))
        metrics = outcome(c)
        states[c.index] = 'bad' if metrics is None else 'good'
        grid.tell(c, metrics or {}, metrics is not None)


# what is in a grid

def test_axes_make_every_combination_in_the_types_of_the_notebook():
    grid = axes_grid('a.ipynb', ['n=1,2', 'rate=1,1e-3', 'shops=["x"],["x","y"]'], dict(model='m'), dict(api_key='null'))
    assert (len(grid.cells), grid.total, grid.name, grid.varying()) == (8, 8, 'a', ['n', 'rate', 'shops'])
    assert grid.cells[0].params == dict(model='m', api_key=None, n=1, rate=1.0, shops=['x']) and isinstance(grid.cells[0].params['rate'], float)
    assert [c.index for c in grid.cells] == list(range(1, 9)) and len({c.key for c in grid.cells}) == 8
    assert [c.params['shops'] for c in grid.cells[:2]] == [['x'], ['x', 'y']]   # the last axis fastest
    assert axes_grid('a.ipynb', []).total == 1


def test_values_of_an_axis_are_separated_by_commas_outside_of_quotes_and_brackets():
    grid = axes_grid('a.ipynb', ['model="salt, pepper",sugar,7,""'])
    assert [c.params['model'] for c in grid.cells] == ['salt, pepper', 'sugar', '7', '']


def test_sections_add_up_and_exclusions_leave_out():
    grid = grid_of('''
name: all of it
notebook: a.ipynb
params: {n: 2}
grid: {rate: [1e-4, 3e-4, 1], model: [a, b]}
exclude:
- {model: b, rate: [1e-4, 1]}
- {rate: 3e-4, model: a, n: 2}
list:
- {model: c, n: 5}
random: {n: 3, seed: 1, space: {rate: {low: 2, high: 9}, loaded: {low: 1, high: 3}}}
''')
    assert labels(grid)[:4] == ['n=2 rate=0.0001 model=a', 'n=2 rate=0.0003 model=b', 'n=2 rate=1.0 model=a', 'n=5 model=c'] and grid.name == 'all of it'
    assert len(grid.cells) == grid.total == 7 and all(2 <= c.params['rate'] <= 9 and c.params['loaded'] in (1, 2, 3) for c in grid.cells[4:])


def test_random_cells_are_the_same_for_the_same_seed_and_never_twice():
    text = 'notebook: a.ipynb\ngrid: {model: [a]}\nrandom: {n: 6, seed: SEED, space: {n: {low: 1, high: 3}, model: [a, b], rate: {low: 1e-6, high: 1, log: true}}}'
    one, same, other = (grid_of(text.replace('SEED', str(s))) for s in (1, 1, 2))
    assert labels(one) == labels(same) != labels(other)
    assert all(isinstance(c.params['n'], int) and 1e-6 <= c.params['rate'] <= 1 for c in one.cells[1:])
    small = grid_of('notebook: a.ipynb\nrandom: {n: 6, space: {n: {low: 1, high: 3}, model: [a, b]}}')
    assert len({c.key for c in small.cells}) == 6
    steps = grid_of('notebook: a.ipynb\nrandom: {n: 5, space: {rate: {low: 0, high: 1, step: 0.25}}}')
    assert sorted(c.params['rate'] for c in steps.cells) == [0, .25, .5, .75, 1]
    with pytest.raises(LabError, match='found only 4 of 6 different cells'): grid_of('notebook: a.ipynb\nrandom: {n: 6, space: {n: [1, 2, 3], model: [a, b]}}\nexclude: [{model: b, n: [1, 2]}]')


def test_counting_agrees_with_making():
    rng = random.Random(3)
    for _ in range(200):
        axes = [(f'p{i}', list(range(rng.randint(1, 4)))) for i in range(rng.randint(1, 4))]
        rules = [{n: {str(rng.choice(v)) for _ in range(rng.randint(1, 2))} for n, v in rng.sample(axes, rng.randint(1, len(axes)))} for _ in range(rng.randint(0, 3))]
        assert count_axes(axes, rules) == len(list(walk_axes(axes, rules)))


def test_yaml_habits(tmp_path):
    grid = grid_of('notebook: a.ipynb\ngrid:\n  rate: [1e-4, 2.5E+1, -3e0]\nlist:\n- &c {n: 2, model: "on"}\n- {<<: *c, n: 3}\n')
    assert [c.params['rate'] for c in grid.cells[:3]] == [1e-4, 25, -3]
    assert [c.params for c in grid.cells[3:]] == [dict(n=2, model='on'), dict(n=3, model='on')]
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub' / 'g.yaml').write_text('notebook: ../a.ipynb\n')
    assert read_grid(Path('sub') / 'g.yaml').cells[0].path.resolve() == tmp_path / 'a.ipynb'   # from the file's folder


def test_the_key_of_a_cell_is_its_content():
    key = lambda *axes, **kw: axes_grid('a.ipynb', list(axes), **kw).cells[0].key
    assert key('n=1') == key() == key(params=dict(n=1, model='small')) != key('n=2')
    before = key()
    notebook('a.ipynb', 'n: int = 1', 'print(2)')
    assert key() != before


# mistakes

@pytest.mark.parametrize('axes, words', [
    (['m=1'], r'a\.ipynb has no parameter "m"\. Its parameters: n: int = 1'),
    (['modle=x'], r'Did you mean "model"\?'),
    (['n=1,x'], r'"n" takes a whole number, and "x" is not'),
    (['n='], r'-g n=: there are no values'),
    (['model=a,,b'], r'a value is empty; for an empty text write ""'),
    (['n'], r'-g n: write name=value,value'),
    (['n=1', 'n=2'], r'"n" is varied twice'),
    (['n=1,2,1'], r'the value 1 is there twice'),
    (['rate=1,1.0'], r'the value 1\.0 is there twice'),
])
def test_wrong_axes(axes, words):
    with pytest.raises(LabError, match=words) as e: axes_grid('a.ipynb', axes)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('text, words', [
    ('', r'^g\.yaml: a grid file has "key: value" lines.* is empty'),
    ('- a\n', r'^g\.yaml: a grid file has "key: value" lines'),
    ('notebook: a.ipynb\ngrid:\n  n: [1, 2\n', r'^g\.yaml, line 4: this is not YAML: '),
    ('notebook: a.ipynb\ngrid:\n\tn: [1]\n', r'^g\.yaml, line 3: this is not YAML: '),
    ('notebook: a.ipynb\ngrid: {n: [1]}\ngrid: {n: [2]}\n', r'^g\.yaml, line 3: the key "grid" is there twice'),
    ('notebook: a.ipynb\nparams: {n: !!python/object/apply:os.system [x]}\n', r'^g\.yaml, line 2: '),
    ('notebook: a.ipynb\nparams: {n: !secret x}\n', r'^g\.yaml, line 2: this is not YAML: could not determine a constructor'),
    ('notebook: a.ipynb\n\ngird: {n: [1]}\n', r'^g\.yaml, line 3: the file has no key "gird"\. Did you mean "grid"\?'),
    ('grid: {n: [1]}\n', r'a step needs a "notebook"'),
    ('notebook: c.ipynb\n', r'^g\.yaml, line 1: c\.ipynb: there is no such notebook'),
    ('notebook: a.ipynb\ngrid: {}\n', r'^g\.yaml, line 2: an empty grid has nothing to run'),
    ('notebook: a.ipynb\ngrid:\n  n: []\n', r'^g\.yaml, line 3: "n" has no values'),
    ('notebook: a.ipynb\nlist: []\n', r'^g\.yaml, line 2: an empty list'),
    ('notebook: a.ipynb\ngrid:\n  n: 5\n', r'^g\.yaml, line 3: "n" is to be a list of values, such as \[5\]'),
    ('notebook: a.ipynb\ngrid:\n  modle: [a]\n', r'^g\.yaml, line 3: a\.ipynb has no parameter "modle"\. Did you mean "model"\?'),
    ('notebook: a.ipynb\ngrid:\n  n:\n  - 1\n  - x\n', r'^g\.yaml, line 5: a\.ipynb: the parameter "n" takes a whole number, and "x" is not'),
    ('notebook: a.ipynb\ngrid:\n  n:\n  - 1\n  - 1\n', r'^g\.yaml, line 5: "n" has the value 1 twice'),
    ('notebook: a.ipynb\ngrid: {model: [2026-01-01]}\n', r'a date needs quotes'),
    ('notebook: a.ipynb\nparams:\n  n: 1\n  rate: fast\n', r'^g\.yaml, line 4: .*"rate" takes a number'),
    ('notebook: a.ipynb\nparams: {n: 1}\ngrid: {n: [1, 2]}\n', r'^g\.yaml, line 3: "n" is fixed .* and varied'),
    ('notebook: a.ipynb\nlist:\n- {n: 1}\n- {m: 1}\n', r'^g\.yaml, line 4: a\.ipynb has no parameter "m"'),
    ('notebook: a.ipynb\ngrid: {n: [1, 2]}\nlist:\n- {n: 2, model: small}\n', r'the same run is there twice \(a: n=2 model=small; grid and g\.yaml, line 4\)'),
    ('notebook: a.ipynb\ngrid: {n: [1, 2]}\nexclude:\n- {n: 3}\n', r'^g\.yaml, line 4: this rule of "exclude" leaves out nothing'),
    ('notebook: a.ipynb\ngrid: {n: [1, 2]}\nexclude:\n- {n: [1, 2]}\n', r'^g\.yaml, line 3: "exclude" leaves nothing to run'),
    ('notebook: a.ipynb\ngrid: {n: [1, 2]}\nexclude:\n- {m: 3}\n', r'^g\.yaml, line 4: a\.ipynb has no parameter "m"'),
    ('notebook: a.ipynb\nrandom: {space: {n: [1]}}\n', r'^g\.yaml, line 2: "random" needs "n"'),
    ('notebook: a.ipynb\nrandom: {n: 0, space: {n: [1]}}\n', r'"random" needs a whole number from 1'),
    ('notebook: a.ipynb\nrandom: {n: 7, space: {n: {low: 1, high: 3}, model: [a, b]}}\n', r'7 runs are asked for, and the space has only 6 combinations'),
    ('notebook: a.ipynb\nrandom: {n: 7, space: {n: {low: 3, high: 1}}}\n', r'low is to be below high'),
    ('notebook: a.ipynb\nrandom: {n: 7, space: {rate: {low: 0, high: 1, log: true}}}\n', r'"log" needs a low above 0'),
    ('notebook: a.ipynb\nrandom: {n: 7, space: {n: {low: 1.5, high: 3}}}\n', r'"n" takes a whole number'),
    ('notebook: a.ipynb\nrandom: {n: 7, space: {rate: {from: 0, to: 1}}}\n', r'the span of "rate" has no key "from"'),
    ('notebook: a.ipynb\noptuna: {n: 7, space: {n: [1, 2]}}\n', r'^g\.yaml, line 2: "optuna" needs to know which metric'),
    ('notebook: a.ipynb\nmetric: x\ndirection: up\noptuna: {n: 7, space: {n: [1, 2]}}\n', r'^g\.yaml, line 3: "direction" is to be maximize or minimize'),
    ('steps: []\n', r'^g\.yaml, line 1: "steps" is empty'),
    ('steps:\n- a.ipynb\n', r'^g\.yaml, line 2: a step has "key: value" lines'),
    ('steps:\n- notebook: a.ipynb\n- notebook: a.ipynb\n', r'^g\.yaml, line 3: two steps are called "a"'),
    ('steps:\n- notebook: a.ipynb\n- notebook: b.ipynb\n  after: c\n', r'^g\.yaml, line 4: step "b" waits for "c", and there is no such step'),
    ('steps:\n- notebook: a.ipynb\n- notebook: b.ipynb\n  params:\n    n: 1\n    adapter: ${train.run_id}\n', r'^g\.yaml, line 6: step "b" waits for "train", and there is no such step'),
    ('steps:\n- {name: x, notebook: a.ipynb, after: z}\n- {name: y, notebook: b.ipynb, after: [x]}\n- {name: z, notebook: a.ipynb, params: {model: "${y.run_id}"}}\n', r'^g\.yaml: the steps wait for each other: x → z → y → x$'),
    ('steps:\n- {name: x, notebook: a.ipynb, after: x}\n', r'wait for each other: x → x$'),
    ('steps:\n- notebook: a.ipynb\n- notebook: b.ipynb\n  params: {adapter: "${a.id}"}\n', r'^g\.yaml, line 3: the reference "\$\{a\.id\}" is not understood|line 4: the reference'),
    ('steps:\n- notebook: a.ipynb\n- notebook: b.ipynb\n  params:\n    heat: ${a.params.rat}\n', r'^g\.yaml, line 5: a\.ipynb \(step "a"\) has no parameter "rat"\. Did you mean "rate"\?'),
    ('steps:\n- notebook: a.ipynb\n- notebook: b.ipynb\n  params:\n    seed: ${a.run_id}\n', r'^g\.yaml, line 5: \$\{a\.run_id\} gives text, and the parameter "seed" takes a whole number'),
    ('steps:\n- notebook: a.ipynb\n- notebook: b.ipynb\n  params:\n    adapter: ${a.run_ids}\n', r'gives a list of texts, and the parameter "adapter" takes text'),
    ('steps:\n- notebook: a.ipynb\n- notebook: b.ipynb\n  params: {adapter: "${a.best.run_id}"}\n', r'Add "metric: NAME" to that step'),
    ('steps:\n- notebook: a.ipynb\n- notebook: b.ipynb\n  grid: {adapter: ["${a.run_id}"]}\n', r'can only be the text of a parameter in "params"'),
    ('steps:\n- notebook: a.ipynb\n- notebook: b.ipynb\n  params: {runs: ["${a.run_id}"]}\n', r'can only be the text of a parameter in "params"'),
    ('steps:\n- notebook: a.ipynb\nparams: {m: 1}\n', r'^g\.yaml, line 3: no notebook of the grid has a parameter "m"'),
    ('steps:\n- notebook: a.ipynb\ngrid: {n: [1]}\n', r'^g\.yaml, line 3: a file with "steps" has no key "grid"'),
])
def test_mistakes_in_a_file_are_named_with_their_line(text, words):
    with pytest.raises(LabError, match=words) as e: grid_of(text)
    assert '\n' not in str(e.value)


def test_files_that_are_none(tmp_path):
    Path('grid.yaml').write_bytes(b'notebook: \xff\xfe\n')
    with pytest.raises(LabError, match=r'grid\.yaml cannot be read as YAML'): read_grid('grid.yaml')
    with pytest.raises(LabError, match=r'there is no such grid file\. Did you mean "grid\.yaml"\?'): read_grid('gird.yaml')
    Path('loop.yaml').write_text('&a [*a]')
    with pytest.raises(LabError): read_grid('loop.yaml')


def test_what_the_command_line_says_wins_and_is_checked():
    text = 'steps:\n- notebook: a.ipynb\n  params: {n: 1, model: x}\n- notebook: b.ipynb\n  grid: {seed: [1, 2]}\n'
    grid = grid_of(text, texts=dict(n='5'), params=dict(n=4, heat=1))
    assert [c.params for c in grid.cells] == [dict(n=5, model='x'), dict(n=5, heat=1.0, seed=1), dict(n=5, heat=1.0, seed=2)]
    for kw, words in [(dict(texts=dict(m='1')), '-p m: no notebook of the grid'), (dict(texts=dict(seed='1')), 'is fixed'), (dict(texts=dict(n='x')), 'takes a whole number')]:
        with pytest.raises(LabError, match=words): grid_of(text, **kw)
    with pytest.raises(LabError, match=r'line 3: "n" is fixed with -p as well'): grid_of('notebook: a.ipynb\nlist:\n- {n: 1}\n', texts=dict(n='2'))
    with pytest.raises(LabError, match='is fixed with -p as well'): axes_grid('a.ipynb', ['n=1'], texts=dict(n='2'))
    assert axes_grid('a.ipynb', [], texts=dict(n='2')).cells[0].params == dict(n=2)


def test_secrets_are_not_in_messages_and_tables():
    grid = axes_grid('a.ipynb', ['n=1,2'], dict(api_key='amber-stoat-99', model='is amber-stoat-99'))
    said = str(grid) + repr(grid) + grid._repr_html_() + str(dry_run_table(grid, [], limit=1)) + grid.to_frame().to_string() + ' '.join(c.label for c in grid.cells)
    with pytest.raises(LabError) as e: axes_grid('a.ipynb', ['api_key=mauve-walrus-42,mauve-walrus-42'])
    assert '[redacted]' in said and not [w for w in ('walrus', 'stoat') if w in said + str(e.value)]


# size

def test_a_very_large_grid_asks_first_and_is_counted_without_being_made(mlflow_home):
    axes = [f'n={",".join(map(str, range(1000)))}', f'rate={",".join(str(i / 100) for i in range(100))}']
    with pytest.raises(LabError, match='has 100,000 runs, and no earlier run says how long one takes.*--yes'): axes_grid('a.ipynb', axes)
    remember('a.ipynb', 36, 100)
    with pytest.raises(LabError, match=r'has 100,000 runs, about 1,000 hours of work'): axes_grid('a.ipynb', axes)
    wide = 'notebook: a.ipynb\ngrid:\n' + ''.join(f'  {k}: [{v}]\n' for k, v in dict(n=', '.join(map(str, range(100))), rate=', '.join(map(str, range(100))), model=', '.join(f'm{i}' for i in range(100)), loaded=', '.join(map(str, range(100)))).items())
    with pytest.raises(LabError, match='has 100,000,000 runs; more than 1,000,000 cannot be held'): grid_of(wide, yes=True)
    with pytest.raises(LabError, match='has 99,000,000 runs'): grid_of(wide + 'exclude: [{model: m3}]\n')
    with pytest.raises(LabError, match='has 1,000,000,000 runs'): grid_of('notebook: a.ipynb\nrandom: {n: 1000000000, space: {rate: {low: 0, high: 1}}}')


def test_ten_thousand_runs_are_fine_and_more_with_yes():
    axes = lambda n: [f'n={",".join(map(str, range(n)))}', f'rate={",".join(str(i / 100) for i in range(100))}']
    assert len(axes_grid('a.ipynb', axes(100)).cells) == 10_000
    with pytest.raises(LabError, match='10,100 runs'): axes_grid('a.ipynb', axes(101))
    assert axes_grid('a.ipynb', axes(101), yes=True).total == 10_100
    steps = 'steps:\n- notebook: a.ipynb\n  grid: {n: [%s]}\n- notebook: b.ipynb\n  params: {adapter: "${a.run_id}"}\n  grid: {seed: [%s]}\n' % ((', '.join(map(str, range(110))),) * 2)
    with pytest.raises(LabError, match='has 12,210 runs'): grid_of(steps)


# steps

def test_references_multiply_and_waiting_does_not():
    grid = grid_of('''
steps:
- {name: report, notebook: b.ipynb, params: {runs: "${eval.run_ids}"}}
- {name: eval, notebook: b.ipynb, params: {adapter: "${train.folder}/x", n: "${data.params.n}"}, grid: {seed: [1, 2]}}
- {name: train, notebook: a.ipynb, params: {model: "${data.artifact_uri}"}, grid: {rate: [1, 2, 3]}}
- {name: data, notebook: a.ipynb, grid: {n: [10, 20]}}
- {name: last, notebook: a.ipynb, after: [report, data]}
''')
    by = {n: [c for c in grid.cells if c.step == n] for n in ('data', 'train', 'eval', 'report', 'last')}
    assert {k: len(v) for k, v in by.items()} == dict(data=2, train=6, eval=12, report=1, last=1) and grid.total == 22
    assert all(max(c.needs, default=0) < c.index for c in grid.cells)
    trained_on = {c.index: c.needs for c in by['train']}
    assert all(trained_on[t] == (d,) for t, d in (c.needs for c in by['eval']))   # the data of the very training
    assert by['report'][0].needs == tuple(c.index for c in by['eval']) and set(by['last'][0].needs) == {by['report'][0].index, 1, 2}


def result(cell, **metrics):
    return SimpleNamespace(run_id=f'run{cell.index}', metrics=metrics, params=cell.params, artifact_uri=f'file:///files/{cell.index}')


def test_references_are_filled_in_with_types():
    grid = grid_of('''
steps:
- {notebook: a.ipynb, name: first, grid: {rate: [0.1, 0.2]}}
- {notebook: b.ipynb, params: {adapter: "${first.folder}/x of ${first.run_id} costs $${5}", heat: "${first.params.rate}", seed: "${first.metrics.a/b.low}", n: "${first.params.n}"}}
''')
    results = {c.index: result(c, **{'a/b.low': 3.0}) for c in grid.cells[:2]}
    assert grid.resolve(grid.cells[3], results) == dict(adapter='/files/2/x of run2 costs ${5}', heat=0.2, seed=3, n=1)
    assert grid.resolve(grid.cells[0], results) == dict(rate=0.1)
    results[1].metrics = {'a/b': 3.0}
    with pytest.raises(LabError, match=r'takes the metric "a/b\.low" of run run1 \(first\), which has none of that name\. Did you mean "a/b"\?'): grid.resolve(grid.cells[2], results)
    results[1].metrics = {'a/b.low': 3.5}
    with pytest.raises(LabError, match='"seed" takes a whole number, and 3.5 is not'): grid.resolve(grid.cells[2], results)
    results[1] = result(grid.cells[0], **{'a/b.low': 3.0})
    results[1].artifact_uri = 's3://bucket/1'
    with pytest.raises(LabError, match='refer to artifact_uri instead'): grid.resolve(grid.cells[2], results)
    with pytest.raises(LabError, match='has no finished run'): grid.resolve(grid.cells[2], {})


def test_the_best_run_goes_on_even_if_others_fail():
    text = 'steps:\n- {name: s, notebook: a.ipynb, metric: loss, direction: minimize, grid: {n: [1, 2, 3, 4]}}\n- {name: t, notebook: b.ipynb, params: {adapter: "${s.best.run_id}", n: "${s.best.params.n}"}, grid: {seed: [1, 2]}}\n- {name: u, notebook: b.ipynb, params: {adapter: "${t.run_id}"}}\n'
    grid = grid_of(text)
    assert (len(grid.cells), grid.total, [p.n for p in grid.pending]) == (4, 8, [2, 2])
    states = play(grid, lambda c: {} if c.step != 's' else None if c.params['n'] == 2 else dict(loss=abs(c.params['n'] - 2.9)))
    assert len(grid.cells) == 8 and grid.pending == [] and sum(v == 'good' for v in states.values()) == 7
    t = next(c for c in grid.cells if c.step == 't')
    assert t.needs == (3,) and grid.resolve(t, {3: result(grid.cells[2])}) == dict(adapter='run3', n=3, seed=1)
    none = grid_of(text)
    assert list(play(none, lambda c: None).values()) == ['bad'] * 4 + ['skipped'] * 4


def test_steps_behind_a_failure_are_skipped():
    grid = grid_of('steps:\n- {name: s, notebook: a.ipynb, grid: {n: [1, 2]}}\n- {name: t, notebook: b.ipynb, params: {adapter: "${s.run_id}"}}\n- {name: u, notebook: b.ipynb, after: t}\n')
    assert play(grid, lambda c: None if c.params.get('n') == 1 else {}) == {1: 'bad', 2: 'good', 3: 'skipped', 4: 'good', 5: 'skipped'}


# guided search

bowl = 'notebook: a.ipynb\nmetric: y\ndirection: minimize\noptuna: {n: 30, seed: 5, parallel: 3, space: {rate: {low: 1e-4, high: 1, log: true}, n: {low: 1, high: 50}, model: [a, b]}}\n'


def depth(c):
    return dict(y=abs(c.params['rate'] - .03) + abs(c.params['n'] - 40) / 10 + (c.params['model'] == 'a'))


def test_a_search_gives_the_same_cells_whatever_the_order_and_the_number_of_workers():
    told = [dict(pick=lambda n: 0, workers=1), dict(pick=lambda n: n - 1, workers=2), dict(pick=random.Random(3).randrange, workers=8)]
    seen = []
    for how in told:
        grid = grid_of(bowl)
        assert (grid.cells, grid.total) == ([], 30)
        play(grid, depth, **how)
        seen.append([(c.index, c.params, c.key) for c in grid.cells])
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 30 and len({k for _, _, k in seen[0]}) == 30
    last = [depth(c)['y'] for c in grid.cells[20:]]
    assert min(last) < .5 and depth(grid.best())['y'] == min(depth(c)['y'] for c in grid.cells)


def test_a_search_does_not_run_ahead():
    grid = grid_of(bowl)
    first = grid.more(10)
    assert len(first) == 3 and grid.more(10) == []
    grid.tell(first[1], dict(y=1.), True)
    assert grid.more(10) == []      # the first one is not over
    grid.tell(first[0], {}, False)  # a failure is a result
    assert len(grid.more(10)) == 2


def test_failures_and_excluded_cells_do_not_stop_a_search():
    grid = grid_of(bowl + 'exclude: [{model: a}]\n')
    play(grid, lambda c: None if c.index % 3 == 0 else depth(c))
    assert len(grid.cells) == 30 and {c.params['model'] for c in grid.cells} == {'b'}


def test_a_search_of_a_small_space_ends_when_nothing_new_is_left():
    grid = grid_of('notebook: a.ipynb\nmetric: y\noptuna: {n: 50, parallel: 2, space: {n: [1, 2, 3], model: [a, b]}}\nlist: [{n: 9}]\n')
    assert grid.total == 7
    play(grid, lambda c: dict(y=c.params['n']))
    assert len({c.key for c in grid.cells}) == len(grid.cells) == 7 == grid.total and grid.best().params['n'] == 9
    left = grid_of('notebook: a.ipynb\nmetric: y\noptuna: {n: 50, space: {n: [1, 2, 3], model: [a, b]}}\nexclude: [{n: 3}]\n')
    play(left, lambda c: dict(y=c.params['n']))
    assert len(left.cells) == left.total == 4 and 'nothing new was found' in left.notes[-1]


def test_a_search_for_a_metric_that_is_not_logged_ends_at_once():
    grid = grid_of(bowl)
    play(grid, lambda c: dict(yy=1.), workers=1)
    assert len(grid.cells) == 1 == grid.total and 'has not logged the metric "y". Did you mean "yy"?' in grid.notes[0] and 'search of a ended after 1 run' in grid.notes[1]


def test_a_search_between_other_steps():
    text = 'steps:\n- {name: base, notebook: a.ipynb}\n- {name: s, notebook: b.ipynb, params: {adapter: "${base.run_id}"}, metric: y, optuna: {n: 6, space: {heat: {low: 0, high: 2}}}}\n- {name: each, notebook: b.ipynb, params: {adapter: "${s.run_id}"}}\n- {name: one, notebook: b.ipynb, params: {heat: "${s.best.params.heat}"}}\n'
    grid = grid_of(text)
    assert grid.total == 14 and grid.more(5) == []
    states = play(grid, lambda c: dict(y=-abs(c.params.get('heat', 9) - 1)) if c.step == 's' else {})
    assert [c.step for c in grid.cells] == ['base'] + ['s'] * 6 + ['each'] * 6 + ['one'] and set(states.values()) == {'good'} and grid.cells[1].needs == (1,)
    failed = grid_of(text)
    states = play(failed, lambda c: None)
    assert [(c.step, states[c.index]) for c in failed.cells] == [('base', 'bad'), ('s', 'skipped'), ('each', 'skipped'), ('one', 'skipped')] and failed.total == 4
    with pytest.raises(LabError, match='would have to be made anew for each run of base'): grid_of(text.replace('name: base, notebook: a.ipynb', 'name: base, notebook: a.ipynb, grid: {n: [1, 2]}'))


# what it costs

def remember(path, seconds, mib, experiment='a', **params):
    client = connect()
    found = client.get_experiment_by_name(experiment)
    eid = found.experiment_id if found else client.create_experiment(experiment)
    run = client.create_run(eid, tags={'seconds': str(seconds), 'peak_memory_mib': str(mib), 'fingerprint.notebook': notebook_fingerprint(read_notebook(path))})
    for k, v in params.items(): client.log_param(run.info.run_id, k, v)
    client.set_terminated(run.info.run_id)
    return run.info.run_id


def test_costs_come_from_the_most_similar_finished_runs(mlflow_home):
    grid = axes_grid('a.ipynb', ['n=1,100', 'model=small,large'])
    assert history(connect(), grid) == [None] * 4
    for n, model, seconds in [(1, 'small', 10), (1, 'small', 30), (1, 'small', 11), (100, 'large', 500)]: remember('a.ipynb', seconds, 200 + n, n=n, model=model)
    client = connect()
    failed = remember('a.ipynb', 9999, 9999, n=1, model='small')
    client.set_terminated(failed, 'FAILED')
    client.set_terminated(client.create_run(client.get_experiment_by_name('a').experiment_id, tags={'grid.key': 'x'}).info.run_id)   # the parent of a grid
    costs = history(client, grid)
    assert (costs[0].seconds, costs[0].memory, costs[0].runs, costs[0].exact) == (11, 201 * 2**20, 3, True)
    assert costs[3].seconds == 500 and costs[1].runs == 4   # one parameter in common with each
    notebook('a.ipynb', 'n: int = 1\nmodel = "small"', 'print("changed")')
    [cost] = history(client, axes_grid('a.ipynb', ['n=1']))
    assert (cost.seconds, cost.exact) == (11, False)
    assert history(client, grid_of('notebook: a.ipynb\nmetric: y\noptuna: {n: 9, space: {n: {low: 1, high: 9}}}'))[0].runs == 3   # for a pending search


def test_the_dry_run_shows_what_varies_what_waits_and_what_it_costs(mlflow_home):
    remember('a.ipynb', 60, 500)
    grid = grid_of('steps:\n- {notebook: a.ipynb, params: {model: m}, grid: {n: [1, 2, 3]}}\n- {notebook: b.ipynb, params: {adapter: "${a.run_id}"}, metric: y}\n- {name: s, notebook: a.ipynb, after: b, metric: y, optuna: {n: 5, space: {rate: {low: 0, high: 1}}}}\n')
    columns, rows, line = dry_run_table(grid, history(connect(), grid), workers=3)
    assert columns == ['cell', 'step', 'model', 'n', 'adapter', 'waits for', 'time', 'memory'] and len(rows) == 7
    assert rows[4] == ['5', 'b', '', '', '${a.run_id}', '2', '–', '–'] and rows[0][-2:] == ['1:00', '500 MiB']
    assert rows[6][0] == '+ 5' and 'chosen by Optuna for y: rate from 0 … 1' in rows[6]
    assert line == '11 runs of 2 notebooks: about 3:40 with 3 workers, 11:00 of work, up to 500 MiB each; 3 runs of unknown cost, taken as 1:00'
    many = axes_grid('a.ipynb', [f'n={",".join(map(str, range(300)))}'])
    _, rows, line = dry_run_table(many, [])
    assert len(rows) == 101 and rows[-1][0] == '… 200 more' and line == '300 runs of 1 notebook; no finished run says how long they will take'


def test_waiting_is_part_of_the_time():
    cells = [Cell(1, 'a', Path(), {}), Cell(2, 'b', Path(), {}, needs=(1,)), Cell(3, 'a', Path(), {})]
    assert wall_seconds(cells, [10, 10, 5], workers=2) == 20 and wall_seconds(cells, [10, 10, 5], workers=1) == 25 and wall_seconds([], []) == 0


# the page

def test_the_file_on_the_page_works_as_it_stands():
    text = next(m[1] for c in json.loads(page.read_text())['cells'] if (m := re.search(r'```yaml\n(.*?)```', ''.join(c['source']), re.S)))
    notebook('05_finetune.ipynb', "epochs: int = 1\nrate: float = 1e-3\nmodel = ''")
    notebook('06_decode.ipynb', "adapter = ''\ntemperature: float = 0.0\nprompt = 'short'")
    notebook('07_report.ipynb', 'runs: list[str] = []')
    grid = grid_of(text)
    assert (grid.name, len(grid.cells), grid.total) == ('small-models', 9, 50)
    states = play(grid, lambda c: dict(accuracy=c.params['rate']) if c.step == 'train' else dict(exact_match=.5) if c.step == 'decode' else {})
    assert set(states.values()) == {'good'} and len(grid.cells) == 50 and len(grid.cells[-1].needs) == 40

"Summaries of grids: what is claimed holds on made-up grids whose truth is known, and odd grids do not break the page."
import base64
import itertools
import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from genai_lab.core import LabError, register_secret
from genai_lab.summaries import (factors, failure_groups, less_is_better, main_metric, read_summary, run_link, runs_table, study, summary_frame, summary_html, summary_notebook, told, verdict, write_summary)


def cell(i, params, value=None, half=None, status='finished', reason='', step='', n=400, **more):
    metrics = {} if value is None else {'accuracy': value} if half is None else {'accuracy': value, 'accuracy.low': value - half, 'accuracy.high': value + half, 'accuracy.n': n}
    return dict(index=i, step=step, notebook='x.ipynb', params=params, status=status, reason=reason, seconds=10., memory=2**30, attempts=1, metrics=metrics, run_id=f'{i * 2654435761 % 2**32:08x}' * 4, experiment_id='7') | more


def grid(truth, noise=.01, half=.02, seed=0, **axes):
    "A full grid over the axes, with a true value and some noise."
    rng, names = np.random.default_rng(seed), list(axes)
    combos = [dict(zip(names, v)) for v in itertools.product(*axes.values())]
    return [cell(i, p, truth(**p) + rng.normal(0, noise), half) for i, p in enumerate(combos)]


# numbers

def test_plain_means_in_a_full_grid_and_adjusted_ones_where_cells_are_missing():
    truth = lambda a, b: .3 + .1 * a + (.2 if b == 'y' else 0)
    rows = grid(truth, 0, a=[0, 1, 2], b=['x', 'y'])
    full, part = study(summary_frame(rows)), study(summary_frame(rows[:5]))   # without a = 2, b = 'y'
    for s in (full, part):
        e = {e.parameter: e for e in s.effects()}
        assert np.diff(e['a'].means['mean']) == pytest.approx([.1, .1]) and np.diff(e['b'].means['mean']) == pytest.approx([.2])
    assert all(e.balanced for e in full.effects()) and not any(e.balanced for e in part.effects())


def test_intervals_of_means_cover_the_truth():
    truth, hits = (lambda a, b, c: .4 + .05 * a + (.1 if b == 'y' else 0)), []
    for seed in range(5000, 5080):
        s = study(summary_frame(grid(truth, .03, None, seed, a=[0, 1], b=['x', 'y'], c=[1, 2, 3])))
        m = {e.parameter: e for e in s.effects()}['a'].means
        hits += [lo <= .45 + .05 * a <= hi for a, lo, hi in zip((0, 1), m.low, m.high)]
    assert .9 <= np.mean(hits) <= .99


def test_a_parameter_that_does_nothing_is_seldom_called_one_that_does():
    p = [study(summary_frame(grid(lambda a, b: .4, .03, None, seed, a=[0, 1, 2], b=[0, 1, 2]))).effects() for seed in range(80)]
    assert np.mean([min(e.p for e in es) < .05 for es in p]) <= .1


def test_interactions_are_found_where_they_are_and_nowhere_else():
    truth = lambda a, b, c: .3 + .1 * (a == 1) * (b == 'y') + .05 * c
    s = study(summary_frame(grid(truth, .01, None, a=[0, 1], b=['x', 'y'], c=[0, 1, 2])))
    first, second = s.interactions()
    assert {first.a, first.b} == {'a', 'b'} and first.p < .01 and second.p > .05
    flat = [study(summary_frame(grid(lambda a, b, c: .3 + .1 * a + .1 * c, .02, None, k, a=[0, 1], b=['x', 'y'], c=[0, 1, 2]))).interactions() for k in range(40)]
    assert np.mean([min(i.p for i in f) < .05 for f in flat]) <= .15


def test_the_best_of_many_equal_cells_is_not_believed():
    "All cells have the same true value: what is expected of the best is that value, not the record."
    errors, naive, missed = [], [], []
    for seed in range(40):
        s = study(summary_frame(grid(lambda a, b: .5, .025, 1.96 * .025, seed, a=list(range(6)), b=list('wxyz'))))
        b = s.best()
        errors.append(s.expected() - .5); naive.append(b.value[0] - .5); missed.append(not b.low_all[0] <= .5 <= b.high_all[0])
    assert np.mean(naive) > .04 and abs(np.mean(errors)) < .01 and np.mean(missed) <= .08


def test_a_cell_that_is_as_good_as_the_best_is_seldom_called_behind():
    wrong = []
    for seed in range(100):
        b = study(summary_frame(grid(lambda a: .5, .025, 1.96 * .025, seed, a=list(range(8))))).best()
        wrong.append(b.behind.any())
    assert np.mean(wrong) <= .1
    b = study(summary_frame(grid(lambda a: .5 + .3 * (a == 2), .01, .02, a=[0, 1, 2]))).best()
    assert b.a.iloc[0] == 2 and b.behind.tolist() == [False, True, True]


def test_seeds_are_repetitions():
    rng = np.random.default_rng(1)
    rows = [cell(i, dict(a=a, seed=k), .5 + .1 * a + rng.normal(0, .05), .01) for i, (a, k) in enumerate((a, k) for a in (0, 1) for k in range(5))]
    s = study(summary_frame(rows))
    assert s.factors == ['a'] and s.cells.runs.tolist() == [5, 5] and '5 seeds' in s.sentence()
    assert (s.cells.high - s.cells.low > .04).all()   # the scatter of seeds is much wider than the interval of one run


def test_less_is_better_where_it_is():
    rows = [dict(cell(i, dict(a=i)), metrics={'few shot/perplexity': float(v)}) for i, v in enumerate((9, 3, 5))]
    s = study(summary_frame(rows))
    assert s.lower and s.best().a.tolist() == [1, 2, 0] and s.sentence().startswith('Lowest few shot/perplexity: 3') and 'without intervals' in s.sentence()
    assert not study(summary_frame(rows), lower=False).lower and not less_is_better('lossless')


def test_the_main_metric_is_said_and_can_be_asked_for():
    rows = [cell(i, dict(a=i), .5, .1) | dict(metrics={'speed': 1., 'speedy': 2., 'accuracy': .5, 'accuracy.low': .4, 'accuracy.high': .6, 'accuracy.n': 10, 'x/n.failed': 0}) for i in range(3)]
    f = summary_frame(rows)
    assert main_metric(f)[0] == 'accuracy' and 'with an interval' in main_metric(f)[1] and main_metric(f, 'speed') == ('speed', 'as asked')
    with pytest.raises(LabError, match='Did you mean "speed"'): main_metric(f, 'sped')
    with pytest.raises(LabError, match='which of its columns'): main_metric(pd.DataFrame(dict(a=[1])))


# failures

def test_failures_are_grouped_and_what_they_share_is_named():
    rows = [cell(i, dict(words=w, tone=t), None if w == 80 else .5, .1, 'failed' if w == 80 else 'finished', f'cell 4 of 5 raised AssertionError: a message of {w} words, {i}' if w == 80 else '') for i, (w, t) in enumerate((w, t) for w in (5, 20, 80) for t in 'ab')]
    rows += [cell(6, dict(words=5, tone='c'), status='failed', reason='the kernel died (SIGKILL)'), cell(7, dict(words=5, tone='d'), status='skipped', reason='it needs cell 6 (x), which failed')]
    a, b, c = failure_groups(summary_frame(rows))
    assert (a['cells'], a['common']) == ([4, 5], 'words = 80') and (b['cells'], b['common']) == ([6], 'tone = c') and (c['status'], c['common']) == ('skipped', '')
    doc = summary_html(summary_frame(rows), 'replies')
    assert doc.index('class="verdict"') < doc.index('AssertionError') < doc.index('Best cells') < doc.index('All runs') < doc.index('What it cost')
    assert 'of 8 cells, 4 finished, 3 failed, 1 were not run' in doc and 'about the cells that finished' in doc


# odd grids

def odd_grids():
    yield 'one cell', [cell(0, dict(a=1), .5, .1)]
    yield 'no parameters', [cell(0, {}, .5, .1), cell(1, {}, .6, .1)]
    yield 'all failed', [cell(i, dict(a=i), status='failed', reason='KeyError: 1') for i in range(3)]
    yield 'no metrics', [cell(i, dict(a=i)) for i in range(3)]
    yield 'nothing ran', [cell(i, dict(a=i), status='skipped', reason='not started: interrupted') for i in range(3)]
    yield 'no intervals', grid(lambda a, b: a / 10, .01, None, a=[1, 2, 3], b=['x', 'y'])
    yield 'no spread', grid(lambda a, b: .5, 0, None, a=[1, 2, 3], b=['x', 'y'])
    yield 'two cells', grid(lambda a: a / 10, .01, .02, a=[1, 2])
    yield 'not finite', [cell(i, dict(a=i), v, .1) for i, v in enumerate((.5, math.nan, math.inf, .6))]
    yield 'names that collide', [cell(i, dict(n=i, value='x' * i, status=i % 2, low=i, accuracy=i, behind=i, order=i, cell=i), .5 + i / 50, .02) for i in range(6)]
    yield 'kinds of values', [cell(i, dict(a=v, b=i % 2 == 0, c=[1, i], d=None if i else 'x', e={'k': i}), .5 + i / 50, .02) for i, v in enumerate((1, 2.5, None, 'x', True))]
    yield 'text to escape', [cell(i, {'<b>p</b>': f'<script>{i}</script> $x_1$ `a` | *b*'}, .5 + i / 50, .02, step='s<i>"', reason='') for i in range(3)] + [cell(3, {'<b>p</b>': '&'}, status='failed', reason='<img src=x>\nsecond line', step='s<i>"')]
    yield 'long text', [cell(i, {f'parameter_with_a_long_name_{k}': f'value {i} ' * 30 for k in range(12)}, .5 + i / 50, .02) for i in range(4)]
    yield 'random numbers', [cell(i, dict(lr=10 ** -r, k=i, t=r), .5 + r / 20, .02) for i, r in enumerate(np.random.default_rng(1).uniform(1, 5, 30))]
    yield 'confounded', [cell(i, dict(a=i % 3, b=i % 3), .5 + i / 90, .02) for i in range(6)]
    yield 'other scripts', [cell(i, dict(wählt=w), .5 + i / 50, .02) for i, w in enumerate(('青', 'ä', '🙂'))]
    yield 'done before and retried', [cell(i, dict(a=i), .5 + i / 10, .02, status='done' if i else 'finished', attempts=i) for i in range(3)]
    yield 'still at it', [cell(0, dict(a=0), .5, .1), cell(1, dict(a=1), status='running'), cell(2, dict(a=2), status='waiting')]
    yield 'two steps', [cell(i, dict(rank=i), .5 + i / 10, .02, step='train') for i in range(3)] + [cell(3 + i, dict(adapter=f'runs:/{i}/adapter', t=t), .6 + i / 20 + t / 10, .02, step='judge') for i in range(3) for t in (0., 1.)]
    yield 'steps with different metrics', [cell(i, dict(rank=i), step='train') | dict(metrics=dict(loss=1. - i / 10)) for i in range(3)] + [cell(3 + i, dict(a=i), .6 + i / 20, .02, step='judge') for i in range(3)]
    yield 'heat map', grid(lambda a, b: (a * int(b[1]) % 5) / 10, .001, .01, a=list(range(8)), b=[f'v{i}' for i in range(8)])


@pytest.mark.parametrize('rows', [pytest.param(r, id=n) for n, r in odd_grids()])
def test_odd_grids_make_a_page_and_a_notebook(rows):
    import nbformat
    f = summary_frame(rows)
    parts = told(f, 'odd <b>grid</b> & co')
    doc, nb = summary_html(f, 'odd <b>grid</b> & co', parts=parts), summary_notebook(f, 'odd <b>grid</b> & co', parts=parts)
    nbformat.validate(nbformat.from_dict(nb))
    assert '<script' not in doc and '<img src=x' not in doc and '<b>' not in doc and not re.findall(r'(?:src|href)="(?!#|data:|http://127)[^"]*"', doc)
    assert doc.count('<h1>') == 1 and 'nan' not in re.sub(r'base64,[^"]*', '', doc).lower().replace('finance', '')
    back = read_summary(write_summary(f))
    assert verdict(back) == verdict(f) and back.attrs == f.attrs


def test_a_grid_without_runs_is_refused():
    with pytest.raises(LabError, match='no runs to summarise'): summary_html(summary_frame([]))


def test_parameters_that_are_ids_are_no_factors():
    rows = [cell(i, dict(adapter=f'runs:/{i:032x}', t=i % 2), .5, .1) for i in range(30)]
    assert factors(summary_frame(rows)) == ['t']


def test_names_that_collide_are_kept_apart():
    f = summary_frame([cell(0, dict(status='x', accuracy=3, n=5), .5, .1)])
    assert f['params.status'][0] == 'x' and f['params.accuracy'][0] == 3 and f['status'][0] == 'finished' and f['accuracy'][0] == .5 and f['n'][0] == 5


def test_secrets_do_not_reach_the_page():
    register_secret('violet-otter-77')
    f = summary_frame([cell(i, dict(api_key='mauve-walrus-42', a=i, note='violet-otter-77'), .5, .1, 'finished' if i else 'failed', 'said violet-otter-77', verdict='violet-otter-77 wins') for i in range(3)])
    for text in (summary_html(f), json.dumps(summary_notebook(f)), f.to_csv()): assert 'walrus' not in text and 'otter' not in text


def test_links_lead_to_mlflow():
    f = summary_frame([cell(1, dict(a=1), .5, .1)])
    run = f.run_id[0]
    assert run_link(run, '7') == f'http://127.0.0.1:5000/#/experiments/7/runs/{run}' and run_link(run, '') == ''
    assert f'href="https://mlflow.example/#/experiments/7/runs/{run}"' in summary_html(f, base='https://mlflow.example/')
    assert '<a ' not in runs_table(summary_frame([cell(1, dict(a=1), .5, .1) | dict(experiment_id='')])).body


# the notebook

def test_the_notebook_runs_and_shows_what_it_showed(tmp_path):
    "What was put in directly is what a kernel makes of the code."
    from genai_lab.hygiene import static_findings
    f = summary_frame(grid(lambda a, b: .3 + .1 * a, .01, .02, a=[0, 1, 2], b=['x', 'y']) + [cell(9, dict(a=3, b='x'), status='failed', reason='KeyError: 1')])
    nb = summary_notebook(f, 'a grid')
    assert [x for x in static_findings(json.loads(json.dumps(nb)) | dict(cells=[c | dict(source=''.join(c['source'])) for c in nb['cells']])) if x.rule in ('undefined', 'syntax', 'order', 'path')] == []
    import nbformat
    from nbclient import NotebookClient
    again = NotebookClient(nbformat.reads(json.dumps(nb), 4), kernel_name='python3').execute()
    shown = lambda cells: [{k: ''.join(v) for k, v in o.get('data', {}).items() if k != 'text/plain' or len(o['data']) == 1} for c in cells if c['cell_type'] == 'code' for o in c['outputs']]
    assert shown(again.cells) == shown(nb['cells'])
    assert sum('image/png' in o for o in shown(nb['cells'])) == 3 and base64.b64decode(next(o['image/png'] for o in shown(nb['cells']) if 'image/png' in o)).startswith(b'\x89PNG')


def test_a_thousand_runs_are_summarised():
    rng = np.random.default_rng(0)
    rows = [cell(i, dict(lr=float(10 ** -rng.uniform(1, 5)), rank=int(rng.choice([4, 8, 16])), model=str(rng.choice(list('abc'))), t=float(rng.choice([0, .5, 1]))), float(rng.uniform(.4, .6)), .02) for i in range(1000)]
    doc = summary_html(summary_frame(rows), 'large')
    assert doc.count('<tr>') > 1000 and len(doc) < 2_000_000

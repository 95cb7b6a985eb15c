"Figures, tables and the sample browser: what they say, what they survive, and the browser in a real Chromium."
import json
import subprocess
import sys
import warnings
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from genai_lab import reports as rp
from genai_lab.core import LabError
from genai_lab.evaluation import compare, summarise
from genai_lab.prompts import Prompt
from genai_lab.tasks import Task

labels = ['Produce', 'Meat', 'Bakery', 'Floral']
nasty = ['$5 off $10 $\\frac{$', '<script>hit=1</script><img src=x onerror=hit=1>', 'ice 🍦 cream\x00\x07', '冷凍食品 مجمدة', 'x' * 300, "a'b\"c&d</script><!--", 'line\none\ttwo', '   ']


def make(n=200, skill=.6, seed=0, names=labels, label='', fails=0, inputs=None, metrics=('accuracy', 'macro_f1'), target=None):
    "An evaluation whose answers are right with probability `skill`."
    rng = np.random.default_rng(seed)
    ref = np.random.default_rng(99).integers(len(names), size=n) if target is None else target
    said = np.where(rng.random(n) < skill, ref, rng.integers(len(names), size=n))
    data = pd.DataFrame(dict(product=inputs or [f'product {i}' for i in range(n)], department=[names[i] for i in ref], band=[('low', 'mid', 'high')[i % 3] for i in range(n)]))
    task = Task('departments', data, Prompt('Sort: {{ product }}\nIn:', name='plain'), 'department', choices=names, metrics=metrics, slices=['band'])
    odds = np.full((n, len(names)), .1)
    odds[np.arange(n), said] += .5 + rng.random(n)
    r = pd.DataFrame(dict(id=range(n), band=data.band, prompt=[f'Sort: {p}\nIn:' for p in data['product']], target=data.department, prediction=[names[i] for i in said], error=''))
    r['confidence'], r['choices'], r['logprobs'] = odds.max(1) / odds.sum(1), [names] * n, np.log(odds).tolist()
    for k in ('prediction', 'confidence', 'logprobs'): r[k] = r[k].astype(object).where(np.arange(n) >= fails, None)
    r.loc[:fails - 1, 'error'] = 'too long'
    return summarise(task, r, label or f'skill {skill}', fingerprints=dict(data=task.data_fingerprint), model='made up')


@pytest.fixture(scope='module')
def three():
    return compare(make(skill=.3, label='weak'), make(skill=.76, seed=1, label='good'), make(skill=.84, seed=2, label='better', fails=9), unit='product')


def texts(fig):
    fig.settle()
    return [t for t in fig.findobj(mpl.text.Text) if t.get_visible() and t.get_text()]


def all_figures(c):
    e = c.evaluations[0]
    return [rp.plot_metric(c), rp.plot_metric(c.evaluations), rp.plot_differences(c), rp.plot_confusion(e), rp.plot_slices(e.by('band')), rp.plot_calibration(e)]


def test_importing_reports_does_not_import_seaborn_or_pyplot():
    code = 'import sys, genai_lab.reports; print([m for m in ("seaborn", "matplotlib.pyplot", "torch", "mlflow", "sklearn") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_drawing_leaves_matplotlib_as_it_was(three):
    before = dict(mpl.rcParams)
    for f in all_figures(three): f.png()
    assert dict(mpl.rcParams) == before and 'matplotlib.pyplot' not in sys.modules or not mpl.pyplot.get_fignums()
    with pytest.raises(KeyError), rp.use_style(no_such_setting=1): pass
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize('kind', ['png', 'svg'])
def test_files_are_the_same_bytes_whatever_was_shown_before(three, tmp_path, kind):
    shown, fresh = rp.plot_metric(three), rp.plot_metric(three)
    shown.png(); shown._repr_mimebundle_()
    with mpl.rc_context({'font.size': 30, 'figure.dpi': 50}): shown.savefig(tmp_path / f'a.{kind}')
    fresh.savefig(tmp_path / f'b.{kind}'); fresh.savefig(tmp_path / f'c.{kind}')
    a, b, c = ((tmp_path / f'{x}.{kind}').read_bytes() for x in 'abc')
    assert a == b == c


def test_all_text_stays_inside_the_figure_and_apart(three):
    long = 'a label that is so long that nobody would ever read it to its end in a figure'
    names = [f'{long} {i}' for i in range(24)]
    wide = compare(make(names=names, label=long + ' 1'), make(names=names, label=long + ' 2', seed=3, fails=5))
    for f in all_figures(three) + all_figures(wide):
        f.settle()
        (w, h), box = f.get_size_inches(), f.get_tightbbox()
        assert box.x0 >= -.02 and box.y0 >= -.02 and box.x1 <= w + .02 and box.y1 <= h + .02, f.finding
        axes = f.axes[0].get_tightbbox()
        for t in f.texts:
            b = t.get_window_extent()
            assert b.y0 >= axes.y1 - 1 or b.y1 <= axes.y0 + 1, (t.get_text(), f.finding)


def test_hostile_labels_are_drawn_as_they_stand():
    c = compare(make(names=nasty[:-1] + ['z'], label=nasty[0]), make(names=nasty[:-1] + ['z'], label=nasty[3] + ' half an emoji: \ud83c', seed=2))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for f in all_figures(c): f.png()
    assert any('$5 off $10 $\\frac{$' in t.get_text() for t in texts(rp.plot_metric(c)))


def test_titles_claim_only_what_the_comparison_claims(three):
    assert rp.plot_metric(three).finding == f'better reaches {three.best.metrics["accuracy"].value:.1%} accuracy and beats weak; no lead over good can be claimed'
    assert rp.plot_differences(three).finding == '2 of the 3 differences in accuracy can be claimed'
    same = compare(make(skill=.5, seed=4, label='a'), make(skill=.5, seed=6, label='b'))
    assert not same.pairs['a', 'b'].claimed
    assert 'No variant can be claimed to be best' in rp.plot_metric(same).finding and rp.plot_differences(same).finding == 'No difference between a and b can be claimed'
    two = compare(*three.evaluations[:2])
    assert rp.plot_metric(two).finding == f'good beats weak by {100 * two.pairs["weak", "good"].difference.value:.1f} points of accuracy'
    assert 'not tested' in rp.plot_metric(three.evaluations).finding and 'not tested' in rp.plot_metric(three, 'macro_f1').finding


def test_variants_that_were_not_tested_against_the_best_one_are_named(three):
    c = compare(*three.evaluations, baseline='weak')
    f = rp.plot_metric(c)
    assert f.finding == f'better beats weak with {c.best.metrics["accuracy"].value:.1%} accuracy'
    assert any('Not tested against the best one: good.' in t.get_text() for t in texts(f))


def test_records_that_were_stored_show_the_same(three, tmp_path):
    e = three.evaluations[2]
    e.samples.to_parquet(tmp_path / 's.parquet')
    back = summarise(e.task, pd.read_parquet(tmp_path / 's.parquet'), e.label, fingerprints=e.fingerprints, model=e.model)
    assert rp.browser_data(back) == rp.browser_data(e)
    for f in (rp.plot_metric, rp.plot_confusion, rp.plot_calibration): assert f(back).png() == f(e).png()


def test_every_figure_shows_its_n_and_its_interval(three):
    for f in all_figures(three):
        said = ' '.join(t.get_text() for t in texts(f))
        assert '200' in said and 'interval' in said, f.finding
    said = ' '.join(t.get_text() for t in texts(rp.plot_metric(three)))
    bound = three.evaluations[2].bounds['accuracy'][1]
    assert f'9 failed; at best {bound:.1%}' in said and '200 products each' in said and 'guessing 25.0%' in said


def test_a_baseline_far_below_is_told_and_not_drawn():
    said = [t.get_text() for t in texts(rp.plot_metric(make(skill=.99)))]
    assert any('Not drawn, far to the left: guessing 25.0%' in s for s in said)


def test_when_everything_failed_the_figure_says_so():
    e = make(n=30, fails=30)
    assert rp.plot_metric(e).finding == 'Nothing could be scored: of 30 samples all failed'
    rp.plot_confusion(e).png()
    with pytest.raises(LabError, match='none of 30 samples could be scored'): rp.plot_calibration(e)


def test_one_sample_and_one_label():
    e = make(n=1)
    for f in (rp.plot_metric(e), rp.plot_confusion(e), rp.plot_slices(e.by('band')), rp.plot_calibration(e)): f.png()
    assert rp.browse(e).page


def test_less_perplexity_is_better():
    data = pd.DataFrame(dict(text=[f'some words {i}' for i in range(40)]))
    task = Task('texts', data, Prompt('{{ text }}'), output='perplexity')
    r = pd.DataFrame(dict(id=range(40), prompt=data.text, target='', prediction=None, error='', logprob=-np.arange(1., 41), tokens=4, greedy=False, words=3, bytes=12))
    a, b = summarise(task, r, 'a', fingerprints={}), summarise(task, r.assign(logprob=r.logprob * 2), 'b', fingerprints={})
    assert rp.plot_metric([b, a]).finding.startswith('Lowest word perplexity: a,')
    assert set(rp.statuses(a, 'word_perplexity')) == {'answered'}
    assert 'log-probability -1.00 over 4 tokens' in rp.browse(a).page


def test_confusion_counts_every_sample_once():
    names = [f'intent {i}' for i in range(77)]
    e = make(n=3000, names=names, fails=40)
    table = rp.confusion_table(e, 20)
    s = e.samples
    assert table.shape == (20, 21) and table.to_numpy().sum() == 3000 and table['(failed)'].sum() == 40
    top = table.index[0]
    assert table.loc[top, top] == ((s.target == top) & (s.prediction == top) & (s.error == '')).sum()
    assert sum(round(x.value * x.n) for x in rp._right(e, table)) == ((s.target == s.prediction) & (s.error == '')).sum()


def test_confusion_needs_labels():
    e = make()
    with pytest.raises(LabError, match='one label as reference'): rp.plot_confusion(replace(e, samples=e.samples.drop(columns='prediction')))


def test_calibration_tells_over_from_underconfidence():
    e = make(n=2000, skill=.5)
    right = (e.samples.prediction == e.samples.target).to_numpy(float)
    p = np.where(np.random.default_rng(1).random(2000) < .5, .9, .4)
    honest = np.random.default_rng(2).random(2000) < p
    said = e.samples.target.where(honest, 'none of them')
    assert rp.plot_calibration(replace(e, samples=e.samples.assign(confidence=p, prediction=said))).finding.startswith('No over- or underconfidence')
    assert rp.plot_calibration(replace(e, samples=e.samples.assign(confidence=.99))).finding.startswith('Overconfident')
    assert rp.plot_calibration(replace(e, samples=e.samples.assign(confidence=.05))).finding.startswith('Underconfident')
    table, gap = rp.calibration(replace(e, samples=e.samples.assign(confidence=.9)))
    assert gap.value == pytest.approx(.9 - right.mean()) and table.n.sum() == 2000 and len(table) == 10


def test_a_slice_that_differs_is_named():
    e = make(n=600, skill=.9)
    bad = e.samples.assign(prediction=e.samples.prediction.where(e.samples.band != 'mid', 'Floral'))
    worse = summarise(e.task, bad, 'worse', fingerprints=e.fingerprints)
    assert 'the lowest is mid with' in rp.plot_slices(worse.by('band')).finding
    assert rp.plot_slices(e.by('band')).finding == 'No band can be claimed to differ from the rest'


def test_tables_hold_intervals_counts_and_bounds(three):
    t = rp.result_table(three)
    assert list(t.columns) == ['variant', 'accuracy', 'macro_f1', 'attempted', 'failed', 'accuracy at best', 'macro_f1 at best'] and len(t) == 3
    x = three.evaluations[0].metrics['accuracy']
    assert t.accuracy[0] == f'{100 * x.value:.1f}% [{100 * x.low:.1f}, {100 * x.high:.1f}]'
    assert rp.result_table(three, text=False).accuracy_low[0] == x.low
    with pytest.raises(LabError, match='an evaluation, a list'): rp.result_table([1])


def test_disagreements_are_marked_escaped_and_really_disagree(monkeypatch):
    monkeypatch.setenv('SHOP_API_KEY', 'geheim-123456')
    inputs = [nasty[1] + ' geheim-123456'] * 60
    c = compare(make(60, .3, 1, inputs=inputs, label='<b>a</b>'), make(60, .9, 2, inputs=inputs, label='b', fails=3))
    t = rp.disagreement_table(c, 60)
    rows = t.body.split('<tbody>')[1].split('</tr>')[:-1]
    words = np.array([rp.statuses(e, 'accuracy') for e in c.evaluations])
    assert len(rows) == int(((words == 'right').any(0) & (words != 'right').any(0)).sum())
    assert all('✓' in r and ('✗' in r or '>!</b>' in r) for r in rows)
    assert '<script' not in t.body and '<img' not in t.body and '<b>a' not in t.body and 'geheim' not in t.body


def test_packing_keeps_every_value():
    values = ['a', None, 'b', 'a', float('nan'), 3, 2.5, ('x', 'y'), 'a', 'a', 'b', 'b', 'a', 'a']
    p = rp.pack(values)
    back = [p['c'][i] if i >= 0 else None for i in p['i']]
    assert back == ['a', None, 'b', 'a', None, '3', '2.5', 'x | y', 'a', 'a', 'b', 'b', 'a', 'a']


@pytest.mark.parametrize('texts', [['one'], [None], [], ['same', 'same'], ['ab cd', 'ab cd ef'], ['a b a', 'a b'], ['x y z', 'x q z', None, 'x  z']])
def test_shared_ends_join_to_the_whole(texts):
    head, tail, mids = rp.shared_ends(texts)
    assert [m if m is None else head + m + tail for m in mids] == texts


def test_likeliest_choices_with_lists_of_different_length():
    s = pd.DataFrame(dict(choices=[['a', 'b'], ['c', 'd', 'e'], ['f', 'g']], logprobs=[[-1., -2.], [-3., -1., -2.], None]))
    t = rp.likeliest(s, 2)
    names = t['names'].get('v') or [t['names']['c'][i] if i >= 0 else None for i in t['names']['i']]
    assert names == ['a', 'b', 'd', 'e', None, None] and t['odds'][4:] == [-1, -1] and t['odds'][0] == round(1000 / (1 + np.exp(-1)))


def test_too_much_is_left_out_and_said():
    e = make(n=300, inputs=['word ' * 400] * 300)
    d = rp.browser_data(e, limit=100, budget=40_000)
    assert d['n'] == 100 and d['total'] == 300 and d['notes'][0] == 'A random 100 of 300 samples is shown.' and 'cut after' in d['notes'][1]
    assert d == rp.browser_data(e, limit=100, budget=40_000)


def test_evaluations_of_different_samples_are_not_browsed_together():
    with pytest.raises(LabError, match='not of the same samples'): rp.browse([make(20), make(30)])


@pytest.mark.parametrize('secret', ['sk-abcdefghij0123456789', 'hf_abcdefghij0123456789', 'ghp_abcdefghij0123456789xyz', 'AKIAABCDEFGHIJKLMNOP', 'xoxb-1234567890-abc', 'eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlMTIz', 'https://user:word@host/x', 'geheim "12" 34'])
def test_no_secret_gets_into_the_browser(secret, monkeypatch):
    monkeypatch.setenv('SHOP_API_KEY', 'geheim "12" 34')
    page = rp.browse(make(5, inputs=[f'the key is {secret} indeed'] * 5)).page
    assert json.dumps(secret)[1:-1] not in page and secret.split('@')[0] not in page and '[redacted]' in page


ready = 'document.body.className === "ready"'


def shown(chromium): return chromium.js('rows.map(r => at(D.id, r))')


def test_the_browser_filters_what_pandas_filters(chromium, three, tmp_path):
    chromium.open(rp.browse(three).save(tmp_path / 'b.html')); chromium.until(ready)
    weak, good, better = (pd.Series(rp.statuses(e, 'accuracy')) for e in three.evaluations)
    s = three.evaluations[0].samples
    ids = lambda mask: [str(i) for i in s.id[mask]]
    click = lambda text: chromium.js(f'[...document.querySelectorAll("button")].find(b => b.textContent.includes({json.dumps(text)})).click()')
    pick = lambda name, text: chromium.js(f'(() => {{ const l = [...document.querySelectorAll("label")].find(l => l.firstChild.textContent === {json.dumps(name)}).lastChild; '
                                          f'l.value = [...l.options].find(o => o.textContent.startsWith({json.dumps(text)})).value; l.dispatchEvent(new Event("change")) }})()')
    assert len(shown(chromium)) == 200
    click('wrong'); assert shown(chromium) == ids(weak == 'wrong')
    click('reset'); pick('variant', 'better'); click('failed'); assert shown(chromium) == ids(better == 'failed') and len(shown(chromium)) == 9
    click('reset'); pick('flips', 'weak right, good not'); assert shown(chromium) == ids((weak == 'right') & (good != 'right'))
    click('reset'); pick('flips', 'variants disagree'); pick('band', 'mid'); assert shown(chromium) == ids(~((weak == 'right') & (good == 'right') & (better == 'right') | (weak != 'right') & (good != 'right') & (better != 'right')) & (s.band == 'mid'))
    click('reset'); pick('variant', 'weak'); pick('reference', 'Meat'); pick('answer', 'Bakery'); assert shown(chromium) == ids((s.target == 'Meat') & (s.prediction == 'Bakery'))
    click('reset'); pick('order', 'surest first'); assert shown(chromium) == [str(i) for i in s.sort_values('confidence', key=lambda c: (1000 * c.astype(float)).round(), ascending=False, kind='stable').id]


def test_the_browser_searches_by_typing_and_walks_by_keys(chromium, three, tmp_path):
    chromium.open(rp.browse(three).save(tmp_path / 'b.html')); chromium.until(ready)
    chromium.js('document.getElementById("search").focus()')
    chromium.call('Input.insertText', text='PRODUCT 17'); chromium.until('rows.length < 200')
    assert shown(chromium) == ['17', '117', *(str(i) for i in range(170, 180))]
    chromium.js('document.getElementById("search").value = ""')
    chromium.call('Input.insertText', text='"PRODUCT 17" 7'); chromium.until('rows.length < 12')
    chromium.js('list.focus()')
    for _ in range(2): chromium.call('Input.dispatchKeyEvent', type='keyDown', key='ArrowDown', code='ArrowDown')
    assert chromium.js('document.getElementById("detail").textContent').startswith('id171productproduct 171')
    assert '11 of 200' in chromium.js('document.getElementById("sum").textContent')
    chromium.js('S.text = "no such product"; update()')
    assert 'No sample passes' in chromium.js('document.getElementById("detail").textContent')


def test_the_line_under_the_filters_has_the_interval_that_stats_gives(chromium, tmp_path):
    e = make(n=150)
    chromium.open(rp.browse(e).save(tmp_path / 'b.html')); chromium.until(ready)
    x = e.metrics['accuracy']
    assert f'right {100 * x.value:.1f}% [{100 * x.low:.1f}, {100 * x.high:.1f}]' in chromium.js('document.getElementById("sum").textContent')
    chromium.js('S.status = "0"; update()')
    assert '%' not in chromium.js('document.getElementById("sum").textContent')


def test_hostile_samples_run_nothing_and_load_nothing(chromium, tmp_path):
    inputs = [x + f' <img src="http://127.0.0.1:9/{i}" onerror="top.hit=hit=1">' for i, x in enumerate(nasty)] * 5
    e = make(40, inputs=inputs, names=nasty[:-1] + ['z'], label=nasty[1])
    for save in (lambda p: rp.browse(e).save(p), lambda p: p.write_text(f'<!doctype html><meta charset="utf-8">{rp.browse(e).body}') and p):
        path = save(tmp_path / 'b.html')
        chromium.open(path)
        if '<iframe' in path.read_text()[:200]: chromium.enter_frame()
        chromium.until(ready)
        chromium.js('rows.forEach(choose)')
        assert chromium.js('typeof hit') == 'undefined' and chromium.js('document.querySelectorAll("img, main script").length') == 0
        assert not [u for u in chromium.asked_for() if not u.startswith(('file:', 'about:', 'blob:'))]
        shown = chromium.js('Array.from({length: 8}, (_, r) => at(D.inputs[0].col, r))')
        assert shown[1] == inputs[1] and shown[3] == inputs[3] and shown[5] == inputs[5]


def test_the_frame_cannot_reach_the_notebook(chromium, three, tmp_path):
    path = tmp_path / 'nb.html'
    path.write_text(f'<!doctype html><title>notebook</title>{rp.browse(three).body}')
    chromium.open(path)
    chromium.enter_frame(); chromium.until(ready)
    with pytest.raises(RuntimeError, match='SecurityError'): chromium.js('parent.document.title')
    with pytest.raises(RuntimeError, match='fetch'): chromium.js('fetch("http://127.0.0.1:9/")')
    assert len(shown(chromium)) == 200


def test_the_browser_works_in_the_html_of_a_notebook(chromium, three, tmp_path):
    import nbformat
    from nbconvert import HTMLExporter
    v4 = nbformat.v4
    out = v4.new_output('execute_result', data={'text/html': rp.browse(three)._repr_html_()})
    page, _ = HTMLExporter(template_name='basic').from_notebook_node(v4.new_notebook(cells=[v4.new_code_cell('browse(c)', outputs=[out])]))
    path = tmp_path / 'nb.html'
    path.write_text('<!doctype html><meta charset="utf-8">' + page)
    chromium.open(path)
    chromium.enter_frame(); chromium.until(ready)
    assert len(shown(chromium)) == 200


def test_a_hundred_thousand_samples(chromium, tmp_path):
    n = 100_000
    e = make(n=n, metrics=['accuracy'])
    b = rp.browse(e)
    assert len(b.page) < 25_000_000 and 'data-packed="yes"' in b.page and b.page == rp.browse(e).page
    chromium.open(b.save(tmp_path / 'b.html')); chromium.until(ready)
    assert chromium.js('document.querySelectorAll(".row").length') < 80
    chromium.js('list.scrollTop = 30 * 50000; draw()')
    assert any(f'product {i}' in chromium.js('sight.textContent') for i in (50_000, 50_001)) and chromium.js('document.querySelectorAll(".row").length') < 80
    chromium.js('S.status = "0"; S.text = String.raw`"product 99"`; update()')
    s = e.samples
    want = s.id[(s.prediction != s.target) & e.task.data['product'].str.contains('product 99')]
    assert shown(chromium) == [str(i) for i in want]

"Labelling: draws with known probabilities, sheets that resume, a keyboard in a real Chromium, and agreement between raters."
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from genai_lab import labelling as lb
from genai_lab.core import LabError
from genai_lab.judges import Rule, passport

nasty = ['$5 off', '<img src=x onerror="window.hit=1">', '<script>window.hit=1</script>', 'line\none', '冷凍食品 مجمدة 🍦']


def items(n=6): return pd.DataFrame(dict(id=[f'q{i}' for i in range(n)], question='How long can I return shoes?', answer=[f'{i} days, says {"gpt-9" if i % 2 else "llama"}.' for i in range(n)], model=['gpt-9', 'llama'] * (n // 2)))


# Drawing

@pytest.mark.parametrize('how', ['uncertain', 'equal', 'random'])
def test_estimates_from_drawn_labels_are_unbiased_and_cover(how):
    rng = np.random.default_rng(0)
    good = rng.random(1500) < .93
    pool = pd.DataFrame(dict(id=range(1500), good=good, score=np.clip(np.where(good, .8, .5) + rng.normal(0, .2, 1500), 0, 1)))
    pool.loc[:20, 'score'] = np.nan
    found = [lb.labelled_share(d.good, d.band, d.band_size) for s in range(60) for d in [lb.draw(pool, 100, how=how, seed=s)]]
    assert np.mean([e.value for e in found]) == pytest.approx(good.mean(), abs=.012)
    assert np.mean([e.low <= good.mean() <= e.high for e in found]) >= .93


def test_a_draw_is_repeatable_and_spends_labels_where_the_judge_is_unsure():
    pool = pd.DataFrame(dict(id=range(1000), score=np.r_[np.linspace(.98, 1, 800), np.linspace(.3, .7, 200)]))
    d = lb.draw(pool, 90, seed=3)
    assert d.equals(lb.draw(pool, 90, seed=3)) and not d.equals(lb.draw(pool, 90, seed=4))
    assert (1 / d.probability).sum() == pytest.approx(1000) and d.probability[d.score < .9].mean() > 1.5 * d.probability[d.score > .9].mean()
    assert len(lb.draw(pool, 1000)) == 1000 and lb.draw(pool, 3).id.nunique() == 3
    for bad, why in ((dict(n=0), '0 of 1,000'), (dict(n=2000), '2000 of'), (dict(n=5, score='scores'), 'Did you mean "score"'), (dict(n=5, how='sure'), 'Accepted')):
        with pytest.raises(LabError, match=why): lb.draw(pool, **bad)


def test_answers_that_were_drawn_and_not_labelled_leave_the_estimate_alone():
    values, band, size = [1, 1, 0, np.nan, 1, np.nan], [0, 0, 0, 0, 1, 1], [100] * 4 + [300] * 2
    assert lb.labelled_share(values, band, size).value == pytest.approx(.25 * 2 / 3 + .75)
    none = lb.labelled_share([1, 0, np.nan], [0, 0, 1], [100, 100, 100])
    assert none.low < .1 and none.high > .9   # nothing is known about half of the answers
    with pytest.raises(LabError, match='none of the answers'): lb.labelled_share([np.nan], [0], [1])


# Sheets and their store

@pytest.fixture
def home(mlflow_home): return mlflow_home


def test_a_sheet_is_blind_shuffled_and_resumes(home):
    a, b = (lb.Sheet(items(), 'returns', r, hide=('gpt-9', 'llama')) for r in ('anna', 'bert'))
    assert a.order != b.order and a.order == lb.Sheet(items(), 'x', 'anna', keep=False).order
    assert not any('gpt-9' in t or 'llama' in t for _, t in a.card())
    first = a.current
    a.answer('yes'); a.skip(); a.answer('no'); a.answer('yes'); a.back()
    again = lb.Sheet(items(), 'returns', 'anna')
    assert again.labels == a.labels and len(again.labels) == 2 and again.labels[first] == 'yes'
    got = lb.read_labels('returns', 'anna')
    assert set(got.label) == {'yes', 'no'} and (got.rater == 'anna').all() and pd.to_datetime(got.time).notna().all() and (got.seconds >= 0).all()
    assert not len(lb.read_labels('returns', 'bert')) and not len(lb.read_labels('nothing'))
    while again.current is not None: again.answer('no')
    with pytest.raises(LabError, match='everything is labelled'): again.answer('no')
    assert len(lb.read_labels('returns')) == 6


def test_skipping_ends_and_taking_back_at_the_start_does_nothing():
    s = lb.Sheet(items(4), 'x', 'anna', keep=False)
    seen = []
    for _ in range(9): seen.append(s.current); s.skip()
    assert set(seen) == {0, 1, 2, 3}
    s.back()
    assert s.labels == {}


def test_draws_and_keys_that_cannot_be_meant():
    pool = pd.DataFrame(dict(id=range(20), score=.5))
    for odd, why in ((dict(n=5.5), 'cannot be drawn'), (dict(n=0), 'cannot be drawn'), (dict(items=pool.assign(score=7.)), 'scores from 0 to 1'), (dict(items=pool.assign(score='x')), 'scores from 0 to 1'), (dict(items=[1]), 'a DataFrame')):
        with pytest.raises(LabError, match=why): lb.draw(**{**dict(items=pool, n=5), **odd})
    for place in (-1, 2):
        with pytest.raises(LabError, match='there are 2'): lb.Sheet(items(), 'x', 'anna', keep=False).say(place)
    with pytest.raises(LabError, match='column "rater"'): lb.agreement(items().assign(label='yes'), ['no', 'yes'])


def test_a_sheet_has_a_picture_in_which_nothing_runs():
    s = lb.Sheet(items().assign(answer='<script>alert(1)</script>'), 'x', 'anna', guide='Is it <b>good</b>?', keep=False)
    page = s._repr_html_()
    assert '<script>' not in page and '<b>good' not in page and '0 of 6' in page and '2  yes' in page
    while s.current is not None: s.answer('no')
    assert 'Everything is labelled' in s._repr_html_() and '2  yes' not in s._repr_html_()


def test_two_sittings_of_one_rater_do_not_overwrite_each_other(home):
    a, b = lb.Sheet(items(), 'returns', 'anna'), lb.Sheet(items(), 'returns', 'anna')
    a.answer('yes'); b.skip(); b.answer('no'); a.skip(); a.answer('no')
    assert len(lb.read_labels('returns')) == len({*a.labels, *b.labels})
    with ThreadPoolExecutor(2) as pool: list(pool.map(lambda s: s.answer('yes'), (a, b)))
    assert lb.read_labels('returns').id.is_unique


def test_labels_survive_a_kill(home, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_labelling import items, lb\ns = lb.Sheet(items(), 'returns', 'anna')\ns.answer('yes'); s.answer('no'); print('two', flush=True)\nimport time; time.sleep(60)"
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'two\n'
    p.kill(); p.wait()
    s = lb.Sheet(items(), 'returns', 'anna')
    assert len(s.labels) == 2
    f = next((home / 'artifacts').rglob('*.jsonl'))
    f.write_text(f.read_text() + '{"id": "q3", "lab')   # a line that was cut off
    assert len(lb.Sheet(items(), 'returns', 'anna').labels) == 2


def test_pairs_are_shown_with_sides_drawn_and_labels_turned_back():
    df = pd.DataFrame(dict(id=range(40), question='q', answer_a=[f'a{i}' for i in range(40)], answer_b=[f'b{i}' for i in range(40)]))
    s = lb.Sheet(df, 'x', 'anna', pairs=True, keep=False)
    left = 0
    while s.current is not None:
        card = dict(s.card())
        left += card['left'].startswith('a')
        s.say(0 if card['left'].startswith('a') else 1)   # always the one called a
    assert set(s.labels.values()) == {'a'} and 8 < left < 32


@pytest.mark.parametrize('change, why', [(dict(show=('question', 'model')), '"model" would tell'), (dict(show=('answr',)), 'Did you mean "answer"'), (dict(options=('yes',)), 'between two and nine'),
                                         (dict(items=items(0)), 'nothing to label'), (dict(items=items().assign(id='q')), 'more than once'), (dict(items=items().assign(answer=' ')), 'is empty'), (dict(rater="o'neil; drop"), 'no name for a rater'),
                                         (dict(rater=None), 'a rater has a name'), (dict(items=[1]), 'a DataFrame is needed'), (dict(items=items().assign(id=[None, *'bcdef'])), '1 item without an id'), (dict(options='yes'), 'options is a list'), (dict(hide='gpt'), 'hide is a list')])
def test_bad_sheets_are_refused(change, why, home):
    with pytest.raises(LabError, match=why): lb.Sheet(**{**dict(items=items(), name='x', rater='anna'), **change})


def test_labels_for_other_items_are_refused(home):
    lb.Sheet(items(), 'returns', 'anna').answer('yes')
    for other, why in ((items().assign(answer='other'), 'its text was another one'), (items().assign(id=lambda d: 'x' + d.id), 'not among these items')):
        with pytest.raises(LabError, match=why): lb.Sheet(other, 'returns', 'anna')
    lb.Sheet(items(8).assign(answer=lambda d: [*items().answer, 'new', 'newer']), 'returns', 'anna')   # more items are welcome


# The widget

def key(chromium, k): chromium.call('Input.dispatchKeyEvent', type='keyDown', key=k, code=f'Digit{k}' if k.isdigit() else k, text=k if len(k) == 1 else '')


@pytest.fixture
def page(chromium, tmp_path):
    "The widget's JavaScript in a page, with the page's side of anywidget's interface; what it sends is fetched and given to the real widget."
    def open_(widget):
        file = tmp_path / 'sheet.html'
        file.write_text('<!doctype html><meta charset="utf-8"><body></body>')
        chromium.open(file)
        host = f'''(async () => {{
            const code = {json.dumps(lb._js)};
            const mod = (await import('data:text/javascript;charset=utf-8,' + encodeURIComponent(code))).default;
            window.sent = []; window.state = {json.dumps(widget.state)}; window.heard = [];
            const model = {{ get: k => window.state, send: m => window.sent.push(m), on: (e, f) => window.heard.push(f), off: () => {{}} }};
            mod.render({{ model, el: document.body }}); return true }})()'''
        assert chromium.js(host)
    def deliver(widget):
        for m in chromium.js('window.sent.splice(0)'): widget.act(**m)
        chromium.js(f'(() => {{ window.state = {json.dumps(widget.state)}; window.heard.forEach(f => f()) }})()')
    return open_, deliver


def test_keys_label_skip_and_take_back_in_a_browser(chromium, page):
    df = pd.DataFrame(dict(id=range(5), question='q', answer=nasty))
    s = lb.Sheet(df, 'x', 'anna', guide='Is it safe?', options=('no', 'perhaps', 'yes'), keep=False)
    w, (open_, deliver) = s.widget(), page
    open_(w)
    text = lambda: chromium.js('document.querySelectorAll(".genai-text")[1].textContent')
    assert text() == df.answer[s.current] and chromium.js('document.querySelector(".genai-count").textContent') == '0 of 5'
    first = s.current
    key(chromium, '3'); key(chromium, '3')   # twice in a hurry
    deliver(w)
    assert s.labels == {first: 'yes'} and text() == df.answer[s.current]
    key(chromium, '7'); key(chromium, 'x'); deliver(w)
    assert len(s.labels) == 1
    second = s.current
    key(chromium, 's'); deliver(w)
    assert s.current != second
    key(chromium, 'Backspace'); deliver(w)
    assert s.labels == {} and s.current == first
    for _ in range(5): key(chromium, '1'); deliver(w)
    assert set(s.labels.values()) == {'no'} and len(s.labels) == 5 and 'Everything is labelled' in chromium.js('document.body.textContent')
    assert chromium.js('typeof window.hit') == 'undefined' and chromium.js('document.querySelectorAll("img, .genai-sheet script").length') == 0
    chromium.js('[...document.querySelectorAll("button")].find(b => b.textContent.includes("back")).click()'); deliver(w)
    assert len(s.labels) == 4


def test_messages_that_make_no_sense_do_nothing():
    s = lb.Sheet(items(), 'x', 'anna', keep=False)
    w = s.widget()
    for m in (dict(), dict(what='say', place=9, serial=1), dict(what='say', place='0', serial=1), dict(what='say', place=-1, serial=1), dict(what='answer', place=0, serial=1), dict(what='_write', serial=1), dict(what='say', place=0, serial=99)): w.act(**m)
    assert not s.labels


def test_a_label_that_cannot_be_kept_is_said(home):
    s = lb.Sheet(items(), 'x', 'anna')
    w = s.widget()
    (home / 'artifacts').write_text('in the way')
    w.act('say', 0, serial=1)
    assert 'Not kept' in w.state['error'] and 'cannot be written' in w.state['error'] and not s.labels


@pytest.mark.skipif('GENAI_LAB_JUPYTER' not in os.environ, reason='starts JupyterLab; set GENAI_LAB_JUPYTER')
def test_a_sheet_in_jupyterlab(chromium, tmp_path, mlflow_home):
    import nbformat
    cells = ["import pandas as pd\nfrom genai_lab.labelling import Sheet\nsheet = Sheet(pd.DataFrame(dict(id=[1, 2, 3], question='q', answer=['x', 'y', 'z'])), 'lab', 'anna')\nsheet"]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))), tmp_path / 'sheet.ipynb')
    port = 18_000 + os.getpid() % 2000
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={port}', '--ip=127.0.0.1', '--IdentityProvider.token=', '--ServerApp.disable_check_xsrf=True', '--LabApp.expose_app_in_browser=True', f'--ServerApp.root_dir={tmp_path}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        import urllib.request
        for _ in range(300):
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api').close(); break
            except OSError: time.sleep(.2)
        chromium.session = chromium.page
        chromium.call('Page.navigate', url=f'http://127.0.0.1:{port}/lab/tree/sheet.ipynb?reset')
        chromium.until('document.querySelector(".jp-Notebook .cm-content") !== null', 120)
        chromium.until('document.querySelector(".jp-Dialog .jp-mod-accept, .jp-Notebook-ExecutionIndicator[data-status=idle]") !== null', 120)
        time.sleep(2)   # Lab may still ask which kernel
        chromium.js('document.querySelector(".jp-Dialog .jp-mod-accept")?.click()')
        chromium.until('document.querySelector(".jp-Dialog") === null && document.querySelector(".jp-Notebook-ExecutionIndicator[data-status=idle]") !== null', 120)
        chromium.js('window.jupyterapp.commands.execute("notebook:run-all-cells"), true')
        chromium.until('document.querySelector(".genai-sheet") !== null', 120)
        for n in (1, 2, 3):
            chromium.js('document.querySelector(".genai-sheet").focus()')
            chromium.call('Input.dispatchKeyEvent', type='keyDown', key='2', code='Digit2', text='2')
            chromium.until(f'document.querySelector(".genai-count").textContent === "{n} of 3"')
        assert 'Everything is labelled' in chromium.js('document.querySelector(".genai-sheet").textContent')
        assert lb.read_labels('lab').label.tolist() == ['yes'] * 3
    finally: server.terminate(); server.wait(20)


# Raters

def test_agreement_between_raters():
    rng = np.random.default_rng(2)
    one = pd.DataFrame(dict(id=range(80), rater='anna', label=rng.choice(['1', '2', '3'], 80)))
    two = one.assign(rater='bert', label=one.label.where(rng.random(80) < .7, '2'))
    a = lb.agreement(pd.concat([one, two]), ['1', '2', '3'], ordered=True)
    assert a.pairs.n[0] == 80 and a.pairs.low[0] < a.pairs.kappa[0] < a.pairs.high[0] and len(a.disagreements) == (one.label != two.label).sum()
    same = lb.agreement(pd.concat([one, two.assign(label='2')]), ['1', '2', '3'])
    assert same.pairs.kappa[0] == pytest.approx(0) and 'bert said the same of every answer' in repr(same)
    for df, why in ((one, 'only anna'), (pd.concat([one, two.assign(id=range(100, 180))]), 'different answers'), (pd.concat([one, one]), 'two labels'), (one.head(0), 'there is none')):
        with pytest.raises(LabError, match=why): lb.agreement(df, ['1', '2', '3'])


def test_from_draw_to_passport(home):
    rng = np.random.default_rng(3)
    good = rng.random(600) < .9
    pool = pd.DataFrame(dict(id=range(600), question='q', answer=np.where(good ^ (rng.random(600) < .05), '30 days', 'no idea')))
    def days(row): return 'yes' if 'days' in row['answer'] else 'no'
    judge = Rule('days', days)
    graded = judge.grade(pool)
    drawn = lb.draw(pool.assign(score=graded.frame.score), 80, how='equal', seed=1)
    for rater in ('anna', 'bert'):
        s = lb.Sheet(drawn, 'returns', rater)
        while s.current is not None and len(s.labels) < 70: s.answer('yes' if good[s.items.loc[s.current, 'id']] else 'no')
    labels = lb.settled(lb.read_labels('returns'))
    assert labels.label.notna().all() and (1 / labels.probability).sum() == pytest.approx(600)
    p = passport(judge, labels, 'returns', items=pool, progress=False)
    c = p.correct(graded)
    assert c.estimate.low < good.mean() < c.estimate.high
    done = [labels.rename(columns={'label': 'said'}).merge(drawn[['id']], on='id')]
    assert len(done[0]) == len(labels) and lb.labelled_share((labels.label == 'yes') * 1., labels.band, labels.band_size).n == len(labels)
    with pytest.raises(LabError, match='no answer "999"'): lb.settled(labels.assign(rater='x'), {999: 'yes'})

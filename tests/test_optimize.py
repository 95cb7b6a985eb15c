"The search for better prompts: honest, within its budget, the same after a crash."
import json
import math
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from genai_lab import stats
from genai_lab.core import LabError
from genai_lab.data import retail_departments, row_keys, split
from genai_lab.evaluation import evaluate
from genai_lab.optimize import (Board, Budget, GepaProposer, LabOptimizer, ModelProposer, Space, choose, dspy_prompts, make_parts, optimize, race, rungs)
from genai_lab.prompts import Prompt
from genai_lab.store import Store, remember
from genai_lab.tasks import Task

start = Prompt('Product: {{ product }}\nDepartment:', system='Departments: {{ choices | join(", ") }}. Each product belongs to one.', name='start')
small = Space(shots=(1, 3), examples=('none', 'balanced'), sets=3, casing=('start',), order=('mixed',))


def shop():
    df = retail_departments(3, per_department=40)[['product', 'label']]
    return Task('shop', df, target='label', choices=sorted(df.label.unique()))


def search(model, store, task=None, prompt=start, budget=Budget(calls=230), space=small, run=False, **kw):
    return optimize(prompt, task or shop(), model, space, budget, seed=3, chat=False, store=store, run=run, progress=False, **kw)


@pytest.fixture(scope='module')
def found(model, tmp_path_factory):
    "One search, and the store with its answers."
    store = tmp_path_factory.mktemp('found') / 'answers.db'
    return search(model, store), store


# ---- the decision, on tables of simulated scores

def simulated(p, n, rng):
    cells = (rng.random((len(p), n)) < np.array(p)[:, None]).astype(float)
    return Board(lambda need: [cells[c, a:b] for c, a, b in need], n)


def test_the_best_of_twelve_flatters_by_seven_points_and_the_report_by_none():
    rng, k, n, most, tested = np.random.default_rng(5), 12, 100, [], []
    for _ in range(1200):
        board = simulated([.7] * k, n, rng)
        board.fill(range(k), n)
        most.append(max(board.mean(c) for c in range(k)) - .7)
        board = simulated([.7] * k, n, rng)
        choose(board, race(board, range(k), rungs(n)), 0, dict.fromkeys(range(k), 1))
        tested.append(rng.binomial(n, .7) / n - .7)      # whichever was chosen, the test part is new to it
    assert 6.5 < 100 * np.mean(most) < 8 and abs(100 * np.mean(tested)) < .5


def test_equal_candidates_rarely_replace_the_start():
    rng, replaced = np.random.default_rng(6), 0
    for _ in range(400):
        board = simulated([.6] * 12, 200, rng)
        pick = choose(board, race(board, range(12), rungs(200)), 0, dict.fromkeys(range(12), 1))
        if pick == 0: continue
        wins, losses = rng.binomial(300, .24), rng.binomial(300, .24)       # on the test part nobody is better
        from scipy.stats import binomtest
        replaced += wins > losses and binomtest(wins, wins + losses).pvalue <= .05
    assert replaced / 400 < .05


@pytest.mark.parametrize('lead, least', [(.1, .6), (.2, .93)])
def test_racing_keeps_the_best(lead, least):
    rng, kept, asked = np.random.default_rng(7), 0, 0
    for _ in range(300):
        board = simulated([.6] * 11 + [.6 + lead], 192, rng)
        kept += race(board, rng.permutation(12).tolist(), rungs(192))[0] == 11
        asked += sum(map(len, board.scores.values())) / (12 * 192) / 300
    assert kept / 300 >= least and asked < .4


# ---- a search on the embedded model

def test_what_a_search_reports(found, model):
    o, _ = found
    assert o.spent['calls'] <= 230 and o.parts == dict(train=48, selection=36, test=36)
    assert o.candidates.id[0] == 0 and o.candidates.source[0] == 'start' and o.candidates.chosen.sum() == 1
    assert o.bias == pytest.approx(o.selection.value - o.evaluations[-1][0].value)
    assert o.prompt.fingerprint == (o.best if o.improved else o.start).fingerprint
    assert ('beats' in o.verdict) == o.improved and ('No improvement found' in o.verdict) != o.improved
    assert o.pareto.expected.is_monotonic_increasing and o.pareto.tokens.is_monotonic_increasing
    child = o.candidates[o.candidates.parent.notna()].iloc[0]
    assert child.changed and child.parent < child.id
    assert 'candidate' in o._repr_html_() and str(o).startswith(o.verdict)


def test_the_score_is_that_of_the_prompt_on_rows_nobody_saw(found, model):
    o, store = found
    parts, _ = make_parts(start, shop(), None, 3, 230)
    assert set(parts['test']['product']).isdisjoint(e['product'] for e in (o.best.examples or ()))
    e = evaluate(replace(shop(), data=parts['test']), remember(model, store), o.best, chat=False, progress=False)
    assert e.metrics['accuracy'].value == o.evaluations[-1][0].value
    assert o.seen == dict(columns=['product'], keys=sorted({k for p in parts.values() for k in row_keys(p, ['product'])}))


def test_the_same_seed_gives_the_same_result_and_costs_nothing(found, model):
    o, store = found
    again = search(model, store)
    pd.testing.assert_frame_equal(again.candidates, o.candidates)
    assert again.spent['new'] == 0 and again.spent['calls'] == o.spent['calls'] and again.estimate == o.estimate


def test_the_budget_of_calls_is_what_the_store_holds(found):
    o, store = found
    assert o.spent['new'] == len(Store(store))     # every answer was asked once
    pairs = {(r['prompt']) for r in Store(store).rows()}
    assert len(pairs) <= o.spent['calls'] <= 230    # a call is a prompt with its sample


def test_a_search_continues_after_a_kill(found, tmp_path):
    "Kill -9 in the middle; the next process ends where an uninterrupted one does, and pays only for the rest."
    o, _ = found
    store, file = tmp_path / 'answers.db', Path(__file__)
    code = f'import sys; sys.path.insert(0, {str(file.parent)!r}); import test_optimize as t; from genai_lab.models import load_model; t.search(load_model("smollm2-135m"), {str(store)!r})'
    child = subprocess.Popen([sys.executable, '-c', code])
    kept = 0
    try:
        while child.poll() is None and kept < o.spent['new'] // 4:
            time.sleep(.05)
            with suppress(LabError): kept = len(Store(store, readonly=True)) if store.exists() and store.stat().st_size else 0   # an error: the store is being made
    finally: child.kill(); child.wait()
    assert child.returncode == -signal.SIGKILL
    from genai_lab.models import load_model
    kept = len(Store(store))
    again = search(load_model('smollm2-135m'), store)
    assert 0 < kept < o.spent['new'] and again.spent['new'] == o.spent['new'] - kept
    pd.testing.assert_frame_equal(again.candidates, o.candidates, atol=1e-9)
    assert again.verdict == o.verdict


@pytest.mark.parametrize('budget', [Budget(tokens=45_000), Budget(money=.45)])
def test_tokens_and_money_are_never_exceeded(model, tmp_path, budget):
    m = remember(model, tmp_path / 'answers.db')
    m.price_in = 10.
    before = model.usage.tokens_in
    o = optimize(start, shop(), m, small, budget, parts=dict(train=60, selection=30, test=30), seed=3, chat=False, run=False, progress=False)
    used = model.usage.tokens_in - before
    assert used <= o.spent['tokens'] <= (budget.tokens or budget.money * 1e5) and used > .5 * o.spent['tokens']
    assert o.spent['money'] == pytest.approx(o.spent['tokens'] * 1e-5)


def test_the_record_in_mlflow(found, model, mlflow_home):
    import mlflow
    o, store = found
    again = search(model, store, run=None)
    client = mlflow.MlflowClient(f'sqlite:///{mlflow_home}/mlflow.db')
    r = client.get_run(again.run_id)
    assert r.info.status == 'FINISHED' and r.data.metrics['optimize/test'] == again.estimate.value and r.data.tags['verdict'] == again.verdict
    folder = Path(client.download_artifacts(again.run_id, ''))
    assert json.loads((folder / 'seen.json').read_text()) == o.seen
    table = pd.read_parquet(folder / 'optimize/candidates.parquet')
    assert table.parent.notna().sum() == len(table) - 1 and set(table.id) == set(map(int, json.loads((folder / 'optimize/prompts.json').read_text())))
    assert len(client.get_metric_history(again.run_id, 'candidate.selection')) == len(table)


@pytest.mark.parametrize('calls', [150, 260])
def test_every_budget_ends_in_a_result(found, model, calls):
    o = search(model, found[1], budget=Budget(calls=calls), parts=dict(train=50, selection=40, test=30))
    assert o.spent['calls'] <= calls and o.candidates.samples.max() <= 40 and o.evaluations[0][0].n == 30


def test_rows_that_a_split_keeps_together_are_one_unit_of_the_interval(found, model):
    df = shop().data.assign(kind=lambda d: d['product'].str.split().str[0].str.lower())
    parts = split(df, dict(train=50, selection=35, test=35), text='product', group='kind', on_leak='group', seed=3)
    o = search(model, found[1], budget=Budget(calls=220), parts=parts)
    kinds = parts['test'].kind.head(o.evaluations[0][0].n)
    assert 2 < kinds.nunique() < len(kinds)
    for e, ev in o.evaluations:
        right = (ev.samples.prediction == ev.samples.target).astype(float)
        assert e == stats.mean(right, clusters=kinds.tolist(), seed=3) and e != ev.metrics['accuracy']
    assert o.test is None or f'{kinds.nunique()} clusters' in o.test.difference.method


# ---- proposers and guards

def test_nonsense_is_refused_and_counted(found, model):
    _, store = found
    parts, _ = make_parts(start, shop(), None, 3, 230)
    secret = max(parts['test']['product'], key=lambda t: len(t.split()))
    def babbler(s): return ['', 17, ('only one',), Prompt('Department:'), Prompt('{{ product }} {{ price }}'), f'One is {secret} of course: {{{{ product }}}}' if len(secret.split()) > 3 else None, 'word ' * 400]
    def broken(s): raise LabError('nobody at home')
    o = search(model, store, proposers=[babbler, broken])
    assert o.refused.source.tolist().count('babbler') == 7 and o.refused.source.tolist().count('broken') == 1
    assert {'not a prompt', 'lost variable', 'unknown variable', 'bloat', 'no proposals'} <= set(o.refused.reason)
    assert 'Refused' in o._repr_html_()


def test_text_of_the_selection_and_test_parts_is_not_copied():
    from genai_lab.optimize import Guard
    task = Task('t', pd.DataFrame(dict(q=['where is my blue parcel today', 'x'], a=['yes', 'no'])), target='a', choices=['yes', 'no'])
    guard = Guard(Prompt('{{ q }}'), task, task.data, lambda t: len(t.split()))
    assert 'copied' in guard(Prompt('{{ q }}', system='WHERE is my blue parcel, today?'))
    assert 'copied' in guard(Prompt('{{ q }}', examples=[dict(q='Where is my blue parcel today', a='yes')], answer='{{ a }}'))
    assert guard(Prompt('{{ q }}', system='Say yes or no.')) == ''


def test_a_model_proposes(found, model):
    _, store = found
    o = search(model, store, proposers=[ModelProposer(remember(model, store), n=2, max_tokens=15)])
    assert (o.refused.source == 'model smollm2-135m').any() or (o.candidates.source == 'model smollm2-135m').any()
    assert o.spent['calls'] <= 230


def test_gepa_is_a_proposer_within_the_budget(found, model):
    pytest.importorskip('gepa')
    _, store = found
    o = search(model, store, proposers=[GepaProposer(remember(model, store), calls=16, rows=8, max_tokens=15)])
    assert o.spent['calls'] <= 230 and ((o.candidates.source == 'gepa').any() or (o.refused.source == 'gepa').any() or o.candidates.instruction.eq('start').any())
    assert not o.refused.detail.str.contains('Error').any()


def test_a_saved_program_of_dspy(tmp_path):
    with pytest.raises(LabError, match='no saved DSPy program'): dspy_prompts(tmp_path / 'none.json', start)
    (tmp_path / 'p.json').write_text(json.dumps(dict(signature=dict(instructions='Sort it.', fields=[]), demos=[dict(product='Pears', label='Produce'), dict(product='Soap')])))
    p, = dspy_prompts(tmp_path / 'p.json', replace(start, answer='{{ label }}'))
    assert p.system == 'Sort it.' and [e['product'] for e in p.examples] == ['Pears']


def test_mlflow_optimises_with_it(model, mlflow_home, mlflow_forgets, monkeypatch):
    "optimize_prompts on a real function of the embedded model; the registered prompt has its variable."
    import mlflow
    from mlflow.genai.optimize.optimizers import BasePromptOptimizer
    from mlflow.genai.scorers import scorer
    monkeypatch.setenv('MLFLOW_GENAI_EVAL_MAX_WORKERS', '1')
    mlflow.set_tracking_uri(f'sqlite:///{mlflow_home}/mlflow.db')
    mlflow.set_experiment('optimize-prompts')
    prompt = mlflow.genai.register_prompt(name='tone', template='You are kind. Say if this is good or bad: {{text}}')
    words = dict(good=['lovely', 'great', 'nice', 'superb', 'tasty'], bad=['awful', 'poor', 'nasty', 'broken', 'stale'])
    rows = [dict(inputs=dict(text=f'The {n} is {w}'), outputs=l) for l, ws in words.items() for w in ws for n in ('bread', 'soup', 'chair', 'lamp')]
    def tone(text):
        asked = mlflow.genai.load_prompt(prompt.uri).format(text=text)
        good, bad = model.loglikelihood([(f'{asked}\nAnswer:', ' good'), (f'{asked}\nAnswer:', ' bad')])
        return 'good' if good.logprob > bad.logprob else 'bad'
    @scorer
    def right(outputs, expectations): return float(outputs == expectations['expected_response'])
    lab = LabOptimizer(calls=60, candidates=['Nothing to fill in', 'Is it good or bad? {{text}}'], seed=1)
    assert isinstance(lab, BasePromptOptimizer)
    r = mlflow.genai.optimize_prompts(predict_fn=tone, train_data=rows, prompt_uris=[prompt.uri], optimizer=lab, scorers=[right])
    assert '{{text}}' in r.optimized_prompts[0].template and r.optimizer_name == 'LabOptimizer'
    assert lab.report['refused'] == ['tone: text'] and lab.report['calls'] <= 60
    assert r.final_eval_score == (lab.report['best'] if lab.report['improved'] else lab.report['start']).value >= r.initial_eval_score - 1e-9


# ---- bad input

@pytest.mark.parametrize('bad, says', [(dict(calls=0), 'buys nothing'), (dict(tokens=-5), 'buys nothing'), (dict(money=math.nan), 'buys nothing'), (dict(), 'no limit')])
def test_a_budget_of_nothing(bad, says):
    with pytest.raises(LabError, match=says): Budget(**bad)


def test_a_budget_that_is_too_small_says_what_it_takes(model, tmp_path):
    with pytest.raises(LabError, match='too small.*the test at the end takes 72 .* give [0-9]+ calls or more'): search(model, tmp_path / 'a.db', budget=Budget(calls=90))
    assert len(Store(tmp_path / 'a.db')) == 0


def test_all_candidates_failing(model, tmp_path):
    from genai_lab.models import load_model
    narrow = load_model('smollm2-135m', context_length=12)
    with pytest.raises(LabError, match='all [0-9]+ candidates failed on every sample, most often because: .*window of 12'): search(narrow, tmp_path / 'a.db', space=Space(examples='none'), candidates=['Where is it?'])


def test_one_class(model, tmp_path):
    df = pd.DataFrame(dict(q=[f'question number {i} about {w}' for i, w in enumerate(['bread', 'soup', 'lamps'] * 30)], a='yes'))
    with pytest.raises(LabError, match='one label only'): search(model, tmp_path / 'a.db', Task('t', df, target='a', choices=['yes', 'no']), Prompt('{{ q }}'), parts=dict(train=30, selection=30, test=30))


def test_a_metric_without_a_number(found, model):
    with pytest.raises(LabError, match='the metric gave nan for sample'): search(model, found[1], metric=lambda prediction, target: math.nan)
    with pytest.raises(LabError, match='raised ZeroDivisionError'): search(model, found[1], metric=lambda prediction, target: 1 / 0)
    with pytest.raises(LabError, match='no value by sample'): search(model, found[1], metric='macro_f1')
    with pytest.raises(LabError, match='has no metric "acuracy"'): search(model, found[1], metric='acuracy')


def test_a_test_part_that_is_too_small(model, tmp_path):
    with pytest.raises(LabError, match='36 rows, too few for the question: [0-9,]+ test rows would be needed'): search(model, tmp_path / 'a.db', effect=.1)
    with pytest.raises(LabError, match='the test part has 5 rows'): search(model, tmp_path / 'a.db', parts=dict(train=80, selection=35, test=5))


def test_prompts_and_parts_that_do_not_fit(model, tmp_path):
    with pytest.raises(LabError, match='uses "produkt".*Did you mean "product"'): search(model, tmp_path / 'a.db', prompt=Prompt('{{ produkt }}'))
    df = shop().data
    with pytest.raises(LabError, match='"train" and "test" share'): search(model, tmp_path / 'a.db', parts=dict(train=df.head(50), selection=df.tail(40), test=df.head(30)))
    with pytest.raises(LabError, match='no part "test"'): search(model, tmp_path / 'a.db', parts=dict(train=df.head(50), selection=df.tail(40)))
    with pytest.raises(LabError, match='give train, selection and test'): search(model, tmp_path / 'a.db', parts=dict(train=50, test=40))
    with pytest.raises(LabError, match='Did you mean "balanced"'): Space(examples='balancd')
    with pytest.raises(LabError, match='label "Groceries" is not among the choices'): search(model, tmp_path / 'a.db', space=Space(labels=dict(short=dict(Groceries='food'))))


def test_label_words_bring_their_task(found, model):
    names = sorted(shop().choices)
    words = {n: w for n, w in zip(names, ('aaa', 'bbb', 'ccc'))}
    o = search(model, found[1], space=replace(small, labels=dict(odd=words)), candidates=())
    assert set(o.task.choices) in (set(names), set(words.values()))

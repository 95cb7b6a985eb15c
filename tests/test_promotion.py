"The promotion gate: its rates by simulation, what it refuses, two at once, and the way back."
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtri
from scipy.stats import binom

from genai_lab import promotion, stats
from genai_lab.core import LabError
from genai_lab.data import row_keys
from genai_lab.fewshot import bm25_examples
from genai_lab.promotion import attempt_level, attempts, decide, latencies, noted_rows, promote, rollback, untouched
from genai_lab.prompts import Prompt
from genai_lab.registry import alias_history, load, register, set_alias
from genai_lab.tasks import Task
from genai_lab.tracking import connect, start_run


def fails(f, *words):
    with pytest.raises(LabError) as e: f()
    for w in words: assert w in str(e.value), str(e.value)
    return str(e.value)


# --- the rule, by simulation ---

def scores(wins, losses, n): return np.r_[np.ones(wins), np.zeros(n - wins)], np.r_[np.zeros(wins), np.ones(losses), np.zeros(n - wins - losses)]


def better(wins, losses, n, level):
    "The rule of `decide` for right and wrong without a margin, for arrays of counts."
    ok = (wins > losses) & (2 * binom.sf(wins - 1, wins + losses, .5) <= 1 - level)
    ok[ok] = stats._tango(wins[ok], losses[ok], n, level)[0] > 0
    return ok


def answers(series, k, n, rho, p=.7, seed=20):
    "Right or wrong for a champion and k equal candidates; difficult samples are difficult for all."
    rng = np.random.default_rng(seed)
    return np.sqrt(rho, dtype='f4') * rng.standard_normal((series, 1, n), 'f4') + np.sqrt(1 - rho, dtype='f4') * rng.standard_normal((series, k + 1, n), 'f4') < ndtri(p)


def counts(x): return (x[:, 1:] & ~x[:, :1]).sum(2), (~x[:, 1:] & x[:, :1]).sum(2)


def test_the_fast_form_of_the_rule_is_the_rule():
    rng = np.random.default_rng(5)
    wins, losses = rng.integers(0, 45, 60), rng.integers(0, 25, 60)
    for k in (0, 3):
        level = attempt_level([False] * k)
        fast = better(wins, losses, 300, level)
        assert [bool(decide(*scores(w, l, 300), verdicts=[False] * k)) for w, l in zip(wins, losses)] == fast.tolist()
        assert 5 < fast.sum() < 55


@pytest.mark.parametrize('rho', [.5, .85])
def test_equal_candidates_are_promoted_in_at_most_five_percent_of_ten_attempts(rho):
    wins, losses = counts(answers(2000, 10, 300, rho))
    hit = np.stack([better(wins[:, k], losses[:, k], 300, attempt_level([False] * k)) for k in range(10)], 1)
    plain = np.stack([better(wins[:, k], losses[:, k], 300, .95) for k in range(10)], 1)
    assert hit[:, 0].mean() <= .02           # 0.010 and 0.011 of 2,000: the first attempt
    assert hit.any(1).mean() <= .025         # 0.012 and 0.014: any of ten
    assert plain.any(1).mean() > .08         # what ten tests at 5% would have done


def test_candidates_chosen_after_each_refusal_are_still_bounded():
    "After a refusal the next candidate is the refused one, changed on a tenth of the samples: what is revealed is the verdict."
    rng, n, series = np.random.default_rng(7), 300, 2000
    old, new, hit = rng.random((series, n)) < .7, rng.random((series, n)) < .7, np.zeros(series, bool)
    for k in range(10):
        hit |= better((new & ~old).sum(1), (old & ~new).sum(1), n, attempt_level([False] * k))
        new = np.where(rng.random((series, n)) < .1, rng.random((series, n)) < .7, new)
    assert hit.mean() <= .05 / 2 + 3 * np.sqrt(.025 * .975 / series)


def test_equal_candidates_of_equal_cost_do_not_come_through_the_cheaper_door():
    "Both doors open: a margin, and noise in the length of the answers."
    rng, hits, n, series = np.random.default_rng(3), 0, 60, 1000
    right = answers(series, 1, n, .8).astype(float)
    for x, cost in zip(right, rng.normal(100, 10, (series, 2, n)).round()):
        saved = cost[0] - cost[1]
        if saved.mean() * np.sqrt(n) > 1.5 * saved.std() or x[1].sum() > x[0].sum() + 4:   # the others have no chance
            hits += bool(decide(x[1], x[0], margin=.3, cost=cost))                          # a margin that is nearly always kept
    assert 0 < hits / series <= .03


def test_a_candidate_worse_by_exactly_the_margin():
    rng, n = np.random.default_rng(20), 400
    pairs, often = np.unique(rng.multinomial(n, [.08, .12, .80], 2000)[:, :2], axis=0, return_counts=True)
    low = stats._tango(*pairs.T, n, attempt_level())[0]
    cost = np.full(n, 9.), np.full(n, 8.)
    wrong = sum(int(k) for (w, l), x, k in zip(pairs, low, often) if x > -.04 and decide(*scores(w, l, n), margin=.04, cost=cost))
    assert 0 < wrong / 2000 <= .025          # 0.016
    assert not any(decide(*scores(w, l, n), margin=.04, cost=cost) for (w, l), x in list(zip(pairs, low))[::40] if x <= -.04)


@pytest.mark.parametrize('n, discordance', [(200, .2), (300, .3), (1000, .15)])
def test_power_at_the_effect_that_is_said(n, discordance):
    rng, level = np.random.default_rng(n), attempt_level()
    d = stats.detectable(n, discordance=discordance, level=level).difference
    wins, losses, _ = rng.multinomial(n, [(discordance + d) / 2, (discordance - d) / 2, 1 - discordance], 20_000).T
    assert better(wins, losses, n, level).mean() >= .8 - 3 * np.sqrt(.16 / 20_000)


def test_levels_sum_to_the_level():
    assert sum(1 - attempt_level([False] * k) for k in range(3000)) <= .05
    # after a promotion: all ways of being refused i times, promoted, refused j times and promoted again
    assert sum(1 - attempt_level([False] * i + [True] + [False] * j) for i in range(40) for j in range(40)) <= .05
    assert 1 - attempt_level() == pytest.approx(.0303, abs=1e-9)


# --- decide ---

def test_what_decide_refuses():
    a, b = scores(30, 10, 100)
    fails(lambda: decide(np.where(np.arange(100) == 3, np.nan, b), a), 'no number for 1 sample of 100', 'NaN')
    fails(lambda: decide(b[:50], a), '100 scores', '50')
    fails(lambda: decide([], []), 'at least one')
    fails(lambda: decide(b, a, margin=-.1), 'margin')
    fails(lambda: decide(b, a, guard=dict(langage=.1), groups=pd.DataFrame(dict(language=['en'] * 100))), 'Did you mean "language"')
    fails(lambda: decide(b, a, guard=dict(id=.1), groups=pd.DataFrame(dict(id=range(100)))), '100 different values')
    fails(lambda: decide(b, a, guard=dict(id=0), groups=pd.DataFrame(dict(id=['x'] * 100))), 'positive')


def test_a_guard_blocks_and_says_why():
    b, a = scores(60, 10, 400)
    lang = pd.DataFrame(dict(language=['en'] * 60 + ['fr'] * 10 + ['en'] * 330))     # all losses are in French
    d = decide(b, a, groups=lang, guard=dict(language=.1))
    g = d.guards.set_index('group')
    assert (d.ground, bool(d)) == ('guard', False) and g.state['en'] == 'not worse' and g.state['fr'] == 'worse'
    assert 'shown to be worse' in d.sentence() and 'fr' in d.sentence()
    few = decide(b, a, groups=pd.DataFrame(dict(language=['en'] * 397 + ['no'] * 3)), guard=dict(language=.1))
    assert few.ground == 'guard' and few.guards.set_index('group').needed['no'] > 100 and 'samples needed' in few.sentence()
    wide = decide(b, a, groups=pd.DataFrame(dict(language=['en', 'fr'] * 200)), guard=dict(language=.1))
    assert wide and wide.guards.holds.all()


def test_failures_of_the_champion_do_not_promote():
    b, a = scores(30, 5, 400)
    away = np.r_[np.ones(20), np.zeros(380)].astype(bool)                              # wins that are only the champion's failures
    assert decide(b, a) and decide(b, a, failed=away).ground == 'failures'
    assert decide(b, a, failed=np.zeros(400, bool))
    assert 'had they been right' in decide(b, a, failed=away).sentence()


def test_limits_and_scores_and_minimum():
    b, a = scores(40, 5, 400)
    d = decide(b, a, limits=[('tokens of the longest prompt', 100, 120, False)])
    assert d.ground == 'limit' and '120' in d.sentence() and len(d.to_frame()) == 2
    rng = np.random.default_rng(1)
    x = rng.random(200)
    d = decide(np.clip(x + rng.normal(.1, .1, 200), 0, 1), x, margin=.05, cost=(np.full(200, 5.), np.full(200, 5.)))
    assert d.ground == 'better' and d.test.test.startswith('sign-flip') and json.dumps(d.to_dict())
    assert decide(np.r_[np.ones(80), np.zeros(20)], .6).ground == 'enough' and not decide(np.r_[np.ones(65), np.zeros(35)], .6)
    assert not decide(np.r_[np.ones(40), np.zeros(60)], .6)                             # significantly below
    deep = decide(rng.normal(.2, .1, 40), np.zeros(40), verdicts=[False] * 15)          # permutations reach down to this level
    assert deep and deep.attempt == 16


# --- promote, with the embedded model ---

labels = ['Bakery', 'Dairy', 'Frozen']
weak = Prompt('{{ product }}\nDepartment:', name='sort')
strong = Prompt('{{ product }} is in {{ hint }}.\nDepartment: {{ hint }}\nDepartment:', name='sort')
words = ['Ice', 'Rye', 'Brie', 'Peas', 'Roll', 'Milk', 'Pizza', 'Bun', 'Kefir', 'Sorbet', 'Toast', 'Quark', 'Waffle', 'Bagel', 'Cream']


def rows(n=45, start=0):
    product = [f'{words[i % 15]} {i}' for i in range(start, start + n)]
    hint = [labels[(i * 7 + i // 4) % 3] for i in range(start, start + n)]
    return pd.DataFrame(dict(product=product, hint=hint, label=hint, lang=['en', 'fr'] * (n // 2) + ['en'] * (n % 2)))


def task(data=None, **kw): return Task(**{**dict(name='sorting', data=rows() if data is None else data, target='label', choices=labels, metrics='accuracy', slices=['lang']), **kw})


@pytest.fixture(scope='module')
def model(model, tmp_path_factory):
    "The embedded model, which is not asked twice."
    from genai_lab.store import remember
    return remember(model, tmp_path_factory.mktemp('answers') / 'answers.db')


@pytest.fixture
def registry(mlflow_home):
    promotion._read.clear()
    register(weak, 'weak'); register(strong, 'strong')
    set_alias('sort', 'champion', 1)
    return mlflow_home


def tags_of(run_id): return connect().get_run(run_id).data.tags


def test_a_better_candidate_takes_the_place(registry, model):
    d = promote('sort/2', 'sort@champion', task(), model, guard=dict(lang=.6), max_tokens=100, progress=False)
    assert d and d.ground == 'better' and d.attempt == 1 and load('sort@champion').version == 2
    assert '80% power' in d.sentence() and d._repr_html_()
    v, run = load('sort/2'), connect().get_run(d.run_id)
    assert v.tags['promotion.champion.decision'] == 'promoted' and v.tags['promotion.champion.run_id'] == d.run_id and v.tags['promotion.champion.attempt'] == '1'
    assert {'promotion.champion.p', 'promotion.champion.estimate', 'promotion.champion.interval'} <= set(v.tags)
    files = {f.path for f in connect().list_artifacts(d.run_id)} | {f.path for f in connect().list_artifacts(d.run_id, 'tables')} | {f.path for f in connect().list_artifacts(d.run_id, 'figures')}
    assert {'rows.json', 'decision.json', 'result.csv', 'tables/worse.parquet', 'tables/guards.parquet', 'figures/promotion.png', 'samples'} <= files
    assert {'fingerprint.candidate', 'fingerprint.champion', 'fingerprint.data', 'fingerprint.task', 'fingerprint.model', 'fingerprint.rows', 'fingerprint.library'} <= set(run.data.tags)
    assert run.info.status == 'FINISHED' and run.data.tags['promotion.promoted'] == 'yes' and run.data.tags['verdict'] == d.sentence()

    # the way back, with more than one step, and with a move by hand
    assert rollback('sort', 'guests complain').version == 1 and 'guests complain' in load('sort/2').tags['promotion.champion.rolled_back']
    fails(lambda: rollback('sort'), 'nothing to go back to')
    fails(lambda: rollback('sort', alias='staging'), 'has no staging')
    set_alias('sort', 'champion', 2)
    assert rollback('sort').version == 1

    # the same rows again, one of them left out, another written differently: attempts 2 and 3, and nothing is better than itself
    again = rows().iloc[1:].assign(product=lambda d: d['product'].str.upper() + ' !')
    assert attempts('sort', again, ['product']).common.tolist() == [44]
    d = promote('sort/2', task=task(again), model=model, max_tokens=5, discordance=.6, progress=False)
    assert (d.ground, d.attempt, load('sort@champion').version) == ('limit', 2, 1) and 'This was attempt 2' in d.sentence()
    d = promote('sort/2', task=task(), model=model, alias='champion', discordance=.6, progress=False)
    assert d.attempt == 3 and d.level == attempt_level([True, False])
    assert len(attempts('sort', rows(20, 500), ['product'])) == 0
    both = task(pd.concat([rows(), rows(20, 500)]))
    assert len(untouched(both, 'sort/2').data) == 20
    fails(lambda: untouched(task(), 'sort/2'), 'all 45 rows')


def test_the_first_champion(mlflow_home, model):
    promotion._read.clear()
    register(strong)
    fails(lambda: promote('sort/1', task=task(), model=model), 'no champion yet', 'minimum')
    fails(lambda: promote('sort/1', task=task(), model=model, first=True), 'one of the two')
    fails(lambda: promote('sort/1', strong, task(), model, first=True), 'the same prompt')
    d = promote('sort/1', task=task(), model=model, first=True, minimum=.999, progress=False)
    assert not d and 'exceed' in d.sentence()
    d = promote('sort/1', replace(weak, name='plain'), task(), model, first=True, slower=50, discordance=.6, progress=False)
    assert d and d.attempt == 2 and d.champion == 'baseline plain' and load('sort@champion').version == 1
    assert 'median latency' in d.to_frame().condition.iloc[-1]
    fails(lambda: promote('sort/1', task=task(), model=model, first=True, minimum=.5), 'already')


def test_what_costs_no_attempt(registry, model):
    go = lambda *a, **kw: promote(*(a or ('sort/2',)), **{**dict(task=task(), model=model, progress=False), **kw})
    fails(lambda: go('sort/9'), 'no version 9')
    fails(lambda: go('sort@canary'), 'no alias "canary"', 'champion')
    fails(lambda: go('sart/2'), 'Did you mean "sort"')
    fails(lambda: go('sort/1'), 'champion already')
    fails(lambda: go('sort/1', 'sort/2'), 'at version 1')
    same = register(replace(weak, about=dict(owner='Ada')))
    assert same.version == 3
    fails(lambda: go('sort/3'), 'the same prompt')
    fails(lambda: go(task=task(rows(8))), 'too few for this question', 'would be needed')
    fails(lambda: go(effect=.02), 'too few for this question', '2.0 points', 'samples would be needed')
    fails(lambda: go(metric='acuracy'), 'Did you mean "accuracy"')
    fails(lambda: go(task=task(metrics=('macro_f1',))), 'all samples at once')
    fails(lambda: go(guard=dict(langue=.1)), 'Did you mean "lang"')
    fails(lambda: go(task=None), 'give a task')
    fails(lambda: go(task=task(rows().rename(columns=dict(hint='tip')))), '"hint"')
    shows = register(replace(strong, examples=[dict(product='ICE  0!', hint='Frozen')], answer='{{ hint }}'))
    fails(lambda: go(shows.ref, task=task(rows().assign(hint=lambda d: ['Frozen', *d.hint[1:]], label=lambda d: d.hint))), '1 row of 45', 'among the examples')
    picks = register(replace(strong, examples=bm25_examples(rows(20, 30), k=2, columns='product', label='hint'), answer='{{ hint }}'))
    fails(lambda: go(picks.ref), 'of 45', 'among the examples')
    assert len(untouched(task(), picks.ref).data) < 45
    assert len(attempts('sort')) == 0 and load('sort@champion').version == 1


def test_rows_that_the_optimiser_saw(registry, model):
    run = start_run('search')
    run.log_text(json.dumps(dict(columns=['product'], keys=row_keys(rows(10, 40), 'product'))), 'seen.json')
    run.finish()
    made = register(replace(strong, system='Sort.'), run_id=run.id)
    say = fails(lambda: promote(made.ref, task=task(), model=model), '5 rows of 45', 'seen when', 'untouched')
    assert 'keeps 40' in say and len(attempts('sort')) == 0
    left = untouched(task(), made.ref)
    assert len(left.data) == 40 and not noted_rows(left.data, ['product'], dict(columns=['product'], keys=row_keys(rows(10, 40), 'product'))).any()
    assert promote(made, task=left, model=model, discordance=.6, progress=False)
    lost = register(replace(strong, system='Sort them.'), run_id='0' * 32)
    fails(lambda: promote(lost.ref, task=task(), model=model), 'run is away')


class Breaks:
    "The embedded model, whose answers stop coming."
    def __init__(self, model, error): self.inner, self.error = model, error
    def __getattr__(self, name): return getattr(self.inner, name)
    def loglikelihood(self, pairs, **kw):
        if isinstance(self.error, BaseException): raise self.error
        return [replace(s, error=self.error) for s in self.inner.loglikelihood(pairs[:6])] + [replace(self.inner.loglikelihood(pairs[:1])[0], error=self.error)] * (len(pairs) - 6)


def test_an_attempt_counts_before_its_test(registry, model):
    small = task(rows(30))
    with pytest.raises(KeyboardInterrupt): promote('sort/2', task=small, discordance=.6, model=Breaks(model, KeyboardInterrupt()), progress=False)
    assert attempts('sort', small.data, ['product']).state.tolist() == ['open']
    fails(lambda: promote('sort/2', task=small, discordance=.6, model=Breaks(model, 'the endpoint is away'), progress=False), 'all 30 samples failed', 'the endpoint is away', 'does not count')
    assert len(attempts('sort', small.data, ['product'])) == 1 and load('sort@champion').version == 1
    run = attempts('sort').run[0]
    assert connect().get_run(run).info.status == 'KILLED'
    connect().delete_run(run)                                        # in the bin it still counts
    assert promote('sort/2', task=small, model=model, discordance=.6, progress=False).attempt == 2


def test_a_metric_that_is_no_number(registry, model):
    class Odd(Task):
        def board(self, samples, metric):
            from genai_lab.evaluation import Scoreboard
            class Board(Scoreboard):
                def values(self): return np.where(np.arange(len(self.samples)) == 2, np.nan, 1.)
                def estimate(self, level, seed): return stats.mean([1.])
            return Board(samples, metric)
    odd = Odd(**{f: getattr(task(rows(30)), f) for f in Task.__dataclass_fields__})
    fails(lambda: promote('sort/2', task=odd, model=model, discordance=.6, progress=False), 'no number for 1 sample of 30')
    assert load('sort@champion').version == 1


def test_the_registry_cannot_be_reached(model, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_TRACKING_URI', 'http://127.0.0.1:9')
    fails(lambda: promote('sort/2', task=task(), model=model), 'cannot be reached')
    fails(lambda: rollback('sort'), 'cannot be reached')


def test_latencies_are_measured_in_turns(model):
    t = latencies(task(), model, [weak, strong], calls=3)
    assert t.shape == (3, 2) and (t > 0).all()


second = """
import sys, time, pathlib
from dataclasses import replace
sys.path.insert(0, sys.argv[3])
from genai_lab.store import Store, replay_model
from genai_lab.core import LabError
from genai_lab.promotion import promote
from test_promotion import rows, task
me, place = sys.argv[1], pathlib.Path(sys.argv[2])
class Waits:
    def __init__(self, inner): self.inner = inner
    def __getattr__(self, name): return getattr(self.inner, name)
    def loglikelihood(self, pairs, **kw):
        (place / f'{me}.here').touch()
        while len(list(place.glob('*.here'))) < 2: time.sleep(.02)     # both have looked at the champion
        return self.inner.loglikelihood(pairs, **kw)
try: print('won', bool(promote(f'sort/{me}', task=task(), model=Waits(replay_model(place / 'answers.jsonl')), discordance=.6, progress=False)))
except LabError as e: print('lost', type(e).__name__, e)
"""


def test_two_promote_at_once(registry, model, tmp_path):
    from genai_lab.evaluation import evaluate
    from genai_lab.store import remember
    other = register(replace(strong, system='Sort products.'))
    kept = remember(model.inner, tmp_path / 'answers.jsonl')
    kept.store.merge(model.store)
    for p in (weak, strong, other.prompt): evaluate(task(), kept, p, progress=False)
    go = lambda v: subprocess.Popen([sys.executable, '-c', second, str(v), str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    said = [p.communicate(timeout=120) for p in [go(2), go(other.version)]]
    said = [(o, e[-2000:]) for o, e in said]
    assert sorted(o.split()[0] for o, _ in said) == ['lost', 'won'], said
    lost = next(o for o, _ in said if o.startswith('lost'))
    assert 'AliasMoved' in lost and 'passed the test' in lost and 'was not promoted' in lost
    assert sorted(attempts('sort').state) == ['decided', 'too late'] and attempts('sort').promoted.sum() == 1
    winner = load('sort@champion').version
    assert winner == int(attempts('sort').query('promoted').candidate.iloc[0]) and len(alias_history('sort', 'champion')) == 2
    assert rollback('sort').version == 1


def test_the_command_line(registry, tmp_path):
    from typer.testing import CliRunner
    from genai_lab.cli import app
    rows(24).to_csv(tmp_path / 'rows.csv', index=False)
    (tmp_path / 'task.yaml').write_text('data: rows.csv\ntarget: label\nchoices: [Bakery, Dairy, Frozen]\nmetrics: accuracy\nslices: [lang]\n')
    call = lambda *a: CliRunner().invoke(app, ['prompts', *map(str, a)])
    r = call('promote', 'sort/2', '--task', tmp_path / 'task.yaml', '--model', 'smollm2-135m', '--max-tokens', 5, '--discordance', '.6', '--json')
    assert r.exit_code == 1 and json.loads(r.stdout.splitlines()[-1])['ground'] == 'limit', r.output
    r = call('promote', 'sort/2', '--data', tmp_path / 'rows.csv', '--target', 'label', '--guard', 'lang=0.95', '--discordance', '.6')
    assert r.exit_code == 0 and 'Promoted' in r.output and 'attempt 2' in r.output, r.output
    assert load('sort@champion').version == 2
    r = call('rollback', 'sort', '-m', 'too fast', '--json')
    assert r.exit_code == 0 and json.loads(r.stdout)['version'] == 1
    for bad in (['promote', 'sort/9', '--task', tmp_path / 'task.yaml'], ['promote', 'sort/2', '--task', tmp_path / 'none.yaml'], ['promote', 'sort/2'], ['rollback', 'sort'], ['promote', 'sort/2', '--task', tmp_path / 'task.yaml', '--guard', 'lang']):
        r = call(*bad)
        assert isinstance(r.exception, LabError), (bad, r.output)

"The verdict on a tuned model, what was forgotten, the learning curve."
import math
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from genai_lab.core import LabError, fingerprint
from genai_lab.prompts import Prompt
from genai_lab.scoring import Score
from genai_lab.tasks import Task
from genai_lab.worth import _fit_power, general_task, general_texts, learning_curve, text_kept, worth

plain = Prompt('Number {{ number }} is', name='zero-shot')
task = Task('parity', pd.DataFrame(dict(number=range(200), parity=['even', 'odd'] * 100)), plain, target='parity', choices=['even', 'odd'], metrics='accuracy')


class Rule:
    "A model that is right on numbers above a threshold, and as surprised by general text as it is told."
    def __init__(self, name, wrong, surprise=1., senses=True): self.name, self.wrong, self.surprise, self.senses, self.chat, self.usage, self.fingerprint = name, wrong, surprise, senses, False, None, fingerprint([name, wrong])
    def can(self, what): return True
    def count_tokens(self, text): return len(text.split())
    def rolling(self, texts, **kw): return [Score(-3. * self.surprise * len(t.split()), len(t.split()), False) for t in texts]
    def loglikelihood(self, pairs, **kw): return [Score(self.one(*p), 1, False) for p in pairs]

    def one(self, prompt, label):
        if 'Everybody' in prompt: return self.senses == ((prompt.split(' that ')[1].removesuffix(' is very'), label.strip()) in right_senses)
        n = int(prompt.split('\n')[-1].split()[1])
        limit = self.wrong / 2 if '\n' in prompt else self.wrong
        return (label.strip() == ('odd' if n % 2 else 'even')) == (n >= limit)


right_senses = set(general_task().data[['thing', 'answer']].itertuples(index=False, name=None))
shots = replace(plain, examples=[dict(number=1000, parity='even')], answer='{{ parity }}', separator='\n', name='one example')


def ask(tuned, base=None, **kw): return worth(base or Rule('base', 100), tuned, task, progress=False, **{'general': False, **kw})


def test_states_of_the_verdict():
    assert ask(Rule('t', 20)).state == 'worth it'
    assert ask(Rule('t', 20, surprise=1.2)).state == 'better, at a price'
    assert ask(Rule('t', 102)).state == 'not shown'
    assert ask(Rule('t', 160)).state == 'worse'
    assert ask(Rule('t', 52), prompts=[shots], margin=.05).state == 'as good and cheaper'
    assert ask(Rule('t', 52), prompts=[shots]).state == 'not shown'


def test_the_best_prompt_has_to_be_beaten():
    w = ask(Rule('t', 60), prompts=[shots])      # better than the plain question, worse than the example
    assert w.rival.label == 'one example' and w.state == 'worse' and '"one example"' in w.verdict
    assert [f'{w.to_frame().set_index("variant").accuracy[v]:.2f}' for v in ('zero-shot', 'one example', 'tuned')] == ['0.50', '0.75', '0.70']
    assert set(w.flips.flip) == {'now wrong'} and len(w.flips) == 10 and w.flips.number.tolist() == list(range(50, 60))
    assert w.costs.set_index('variant').tokens_in['one example'] > w.costs.set_index('variant').tokens_in['tuned'] == 3000


def test_what_was_forgotten_has_three_answers():
    base = Rule('b', 0)
    assert [text_kept(base, Rule('t', 0, surprise=s)).state for s in (1., 1.02, 1.1)] == ['kept', 'kept', 'forgotten']

    class Uneven(Rule):
        def rolling(self, texts, **kw): return [replace(s, logprob=s.logprob * (1.15 if i % 3 == 0 else 1.)) for i, s in enumerate(super().rolling(texts))]
    k = text_kept(base, Uneven('t', 0))
    assert k.state == 'cannot tell' and k.change.low < 1.1 < k.change.high and k.change.n == len(general_texts)
    w = ask(Rule('t', 20, senses=False), general=None)
    assert w.state == 'better, at a price' and w.kept[1].state == 'forgotten' and w.kept[1].change.value == -1
    assert ask(Rule('t', 20), general=None).kept[1].state == 'kept'


def test_questions_that_cannot_be_asked():
    with pytest.raises(LabError, match='has no prompt'): worth(Rule('b', 9), Rule('t', 1), replace(task, prompt=None))
    with pytest.raises(LabError, match='two prompts have the name'): ask(Rule('t', 1), prompts=[plain])
    with pytest.raises(LabError, match='two prompts have the name "tuned"'): ask(Rule('t', 1), prompts=[replace(shots, name='tuned')])
    with pytest.raises(LabError, match='at least two sizes'): learning_curve({100: [1., 0.]})
    with pytest.raises(LabError, match='one finite score a sample'): learning_curve({100: [1., math.nan], 200: [1., 1.]})


def test_prices_and_hours_become_money():
    from types import SimpleNamespace
    dear = Rule('base', 100)
    dear.usage = SimpleNamespace(price_in=2., price_out=0.)
    c = ask(Rule('t', 1), base=dear, hourly=3.6).costs.set_index('variant')
    assert c.dollars['zero-shot'] == pytest.approx(1000 * 3 * 2 / 1e6) and c.dollars['tuned'] == pytest.approx(c.seconds['tuned'] / 1000)


def test_a_power_law_is_found_again():
    n = np.array([50., 100, 200, 400, 800])
    (a, b, c), rest = _fit_power(n, np.stack([.1 + .5 * (n / 800)**-.5, .3 * (n / 800)**-1., np.full(5, .2)]))
    assert np.allclose(a[:2], [.1, 0], atol=.01) and np.allclose(b, [.5, .3, 0], atol=.01) and np.allclose(c[:2], [.5, 1]) and np.all(rest < 1e-4)


def test_few_sizes_say_nothing():
    c = learning_curve({n: np.ones(50) for n in (10, 20, 40)})
    assert c.answer == 'cannot tell' and 'four are needed' in c.sentence() and len(c.to_frame()) == 3


laws = [(0., 2., .4), (.15, 3., .7), (.2, 8., 1.2), (.1, .5, .2)]


@pytest.mark.parametrize('luck', [0., .02])
def test_the_interval_of_the_gain_holds_what_it_says(luck):
    "150 curves of each law with GENAI_LAB_SIMULATIONS=150; a few always."
    times, sizes = int(os.environ.get('GENAI_LAB_SIMULATIONS', 12)), (50, 100, 200, 400, 800)
    rng, hits, all_ = np.random.default_rng(1), 0, 0
    for a, b, c in laws:
        true = b * (800**-c - 1600**-c)
        for _ in range(times):
            u, r = rng.random(400), rng.standard_normal(5) * luck
            g = learning_curve({s: (u < 1 - a - b * s**-c + x).astype(float) for s, x in zip(sizes, r)}, n_resamples=100).gain
            hits, all_ = hits + (g.low <= true <= g.high), all_ + 1
    assert hits / all_ > .9, hits / all_

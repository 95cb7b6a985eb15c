"Sensitivity: variants that keep what is asked, honest components of variance, and bad input."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from genai_lab.core import LabError
from genai_lab.evaluation import compare, evaluate, summarise
from genai_lab.models import load_model
from genai_lab.prompts import Prompt
from genai_lab.sensitivity import Format, LabelWords, Order, Paraphrase, Sensitivity, _matrix, plan_sensitivity, sensitivity, variance_component
from genai_lab.stats import Estimate, paired
from genai_lab.tasks import Task

examples = [dict(product='Rye Bread', label='Bakery'), dict(product='Brie', label='Dairy'), dict(product='Limes', label='Produce')]
prompt = Prompt('Product: {{ product }}\nDepartment:', system='Departments: Bakery, Dairy, Produce.', examples=examples, answer='{{ label }}', name='few')
data = pd.DataFrame(dict(product=['Bagels', 'Butter', 'Pears', 'Cream Cheese', 'Grapes', 'Muffins', 'Yogurt', 'Onions'], label=['Bakery', 'Dairy', 'Produce', 'Dairy', 'Produce', 'Bakery', 'Dairy', 'Produce']))


def task(**kw): return Task(**{**dict(name='shop', data=data, prompt=prompt, target='label', choices=['Bakery', 'Dairy', 'Produce'], metrics=['accuracy']), **kw})


# The statistics

def answers(rng, V, N, spread):
    "Right and wrong answers of V variants to N samples of differing difficulty."
    return (rng.normal(.3, spread, (V, 1)) + rng.normal(0, .5, (V, N)) > rng.normal(0, 1, N)).astype(float)


@pytest.mark.parametrize('V, N', [(5, 100), (9, 60), (9, 300), (16, 200)])
@pytest.mark.parametrize('spread', [0, .05, .15, .4])
def test_intervals_hold_the_truth_and_estimates_are_right_on_average(V, N, spread):
    rng = np.random.default_rng([V, N, int(100 * spread)])
    true = norm.cdf(rng.normal(.3, spread, 200_000) / np.sqrt(1.25)).std()
    found, raw = [], []
    for _ in range(300):
        y = answers(rng, V, N, spread)
        found.append(variance_component(y.mean(1), np.cov(y) / N))
        raw.append(y.mean(1).var(ddof=1) - np.diag(np.cov(y) / N).mean() + (np.cov(y) / N)[~np.eye(V, dtype=bool)].mean())
    assert np.mean([e.low <= true <= e.high for e in found]) >= .9
    assert abs(np.mean(raw) - true**2) < 4 * np.std(raw) / np.sqrt(300)
    if spread == 0: assert np.mean([e.low > 0 for e in found]) <= .05 and np.median([e.value for e in found]) < .01
    if spread == .4 and V == 16: assert np.mean([e.low > 0 for e in found]) == 1


def test_a_component_is_the_usual_one_of_analysis_of_variance():
    y = answers(np.random.default_rng(1), 8, 120, .3)
    rest = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    between, within = 120 * y.mean(1).var(ddof=1), (rest**2).sum() / (7 * 119)
    assert np.isclose(variance_component(y.mean(1), np.cov(y) / 120).value**2, (between - within) / 120)


def test_variants_that_change_nothing_and_values_that_are_none():
    e = variance_component([.5, .5, .5], np.full((3, 3), .01))
    assert (e.value, e.low, e.high) == (0, 0, 0) and 'no variant changed any score' in e.note
    with pytest.raises(LabError, match='no value for some variants'): variance_component([.5, np.nan], np.eye(2))
    with pytest.raises(LabError, match='at least two'): variance_component([.5], np.eye(1))


def test_a_metric_that_is_no_mean_gets_its_noise_from_a_bootstrap():
    rng, n = np.random.default_rng(3), 400
    t = task(data=pd.DataFrame(dict(product=[f'p{i}' for i in range(n)], label=[['Bakery', 'Dairy'][i % 2] for i in range(n)])), choices=['Bakery', 'Dairy'], metrics=['accuracy', 'macro_f1'])
    def said(): return np.where(rng.random(n) < .8, t.data.label, np.where(t.data.label == 'Dairy', 'Bakery', 'Dairy'))
    evs = [summarise(t, pd.DataFrame(dict(id=range(n), target=t.data.label, prediction=said(), error='')), str(i)) for i in range(4)]
    exact, drawn = _matrix(evs, 'accuracy', 20), _matrix(evs, 'macro_f1', 20)
    assert np.allclose(exact[0], drawn[0], atol=.01) and np.allclose(exact[1], drawn[1], atol=2e-4)


# Variants

def test_orders_keep_the_examples_and_formats_keep_what_stands_in_braces():
    plan = plan_sensitivity(prompt, task(), n=5, rows=None)
    for v in plan.variants:
        assert sorted(e['product'] for e in v.prompt.examples) == ['Brie', 'Limes', 'Rye Bread'] and v.prompt.system == prompt.system
        assert '{{ product }}' in v.prompt.template and v.prompt.answer == prompt.answer
    assert len({v.key for v in plan.variants}) == len(plan.variants) == 15 and plan.calls == 16 * 8 * 3
    keys = lambda seed: [v.key for v in plan_sensitivity(prompt, task(), n=5, rows=None, seed=seed).variants]
    assert [v.key for v in plan.variants] == keys(20) != keys(21)


def test_only_what_the_model_reads_counts_as_a_variant():
    assert len(plan_sensitivity(prompt, task(), ['order'], n=20).variants) == 5   # of three examples there are six orders
    plain = Prompt('Where is {{ product }} sold?')
    assert len(plan_sensitivity(plain, task(), ['format'], n=4).variants) == 1     # the delimiter
    with pytest.raises(LabError, match='"format" changes nothing that the model reads'): plan_sensitivity(plain, task(), ['format'], n=4, chat=True)


def test_label_words_are_changed_everywhere_at_once():
    f = LabelWords(dict(Dairy=['Milk'], Bakery='Bread'))
    p, t = f.apply((('Bakery', 'Bread'), ('Dairy', 'Milk'), ('Produce', 'Produce')), prompt, task())
    assert p.system == 'Departments: Bread, Milk, Produce.' and [e['label'] for e in p.examples] == ['Bread', 'Milk', 'Produce']
    assert t.choices == ('Bread', 'Milk', 'Produce') and t.data.label.tolist()[:3] == ['Bread', 'Milk', 'Produce'] and task().data.label[0] == 'Bakery'
    swapped, _ = LabelWords(dict(Dairy=['x'])).apply((('Dairy', 'Bakery'), ('Bakery', 'Dairy'), ('Produce', 'Produce')), prompt, task())
    assert swapped.system == 'Departments: Dairy, Bakery, Produce.'


def test_paraphrases_take_a_text_fields_or_a_prompt():
    f = Paraphrase(('Where is {{ product }}?', dict(system='Be brief.'), Prompt('Aisle of {{ product }}:', system='Sort.')))
    assert [(p.template, p.system) for i in range(4) for p in [f.apply(i, prompt, task())[0]]] == [
        (prompt.template, prompt.system), ('Where is {{ product }}?', prompt.system), (prompt.template, 'Be brief.'), ('Aisle of {{ product }}:', 'Sort.')]


# Bad input

class Picks:
    fingerprint = 'picks'
    def pick(self, row): return []
    def prepare(self, rows): pass
    def to_dict(self): return dict(select='picks')


@pytest.mark.parametrize('change, words', [
    (dict(prompt=replace(prompt, examples=(), answer='')), '"order" needs at least two worked examples, there are none'),
    (dict(prompt=replace(prompt, examples=examples[:1])), 'there is 1'),
    (dict(prompt=replace(prompt, examples=Picks())), 'no order to vary'),
    (dict(factors=['ordre']), 'Did you mean "order"'),
    (dict(factors=['labels']), r'needs words: give LabelWords'),
    (dict(factors=['paraphrase']), r'needs words: give Paraphrase'),
    (dict(factors=[]), 'at least one factor'),
    (dict(factors=['order', Order()]), '"order" is there twice'),
    (dict(factors=LabelWords(dict(Dairi=['Milk']))), '"Dairi" is not among the choices of task "shop". Did you mean "Dairy"'),
    (dict(factors=LabelWords(dict(Dairy=['Bakery']))), '"Bakery" stands for "Dairy" and for "Bakery"'),
    (dict(factors=LabelWords(dict(Dairy=['Milk'], Bakery=['Milk']))), '"Milk" stands for'),
    (dict(factors=LabelWords(dict(Dairy=[' ']))), 'an empty word'),
    (dict(factors=LabelWords({})), 'needs other words'),
    (dict(factors=LabelWords(dict(Dairy=['Milk'])), task=task(output='generate', choices=(), metrics=['exact_match'])), 'a fixed list of choices'),
    (dict(factors=Paraphrase(())), 'needs other wordings'),
    (dict(factors=Paraphrase(('Where is {{ produkt }}?',))), 'paraphrase 1: .*"produkt".*Did you mean "product"'),
    (dict(factors=Paraphrase((dict(templat='x'),))), 'paraphrase 1: there is no "templat"'),
    (dict(factors=Paraphrase(('Where is {{ product }',))), 'paraphrase 1'),
    (dict(factors=Paraphrase((prompt,))), 'changes nothing'),
    (dict(n=1), 'at least two variants, not n=1'),
    (dict(rows=1), 'at least two samples, not 1'),
    (dict(task=task(data=data[data.label == 'Dairy'])), 'all 3 samples have the label "Dairy"'),
    (dict(calls=10), '16 prompts .* 384 calls, and 10 are allowed'),
    (dict(metric='exact_match'), 'the metric "exact_match" does not go with output "choice"'),
    (dict(metric='perplexity', task=task(output='loglikelihood', choices=(), metrics=['perplexity'])), 'perplexity has no value that could be resampled')])
def test_bad_input_is_answered_with_one_line(change, words, model):
    how = {**dict(prompt=prompt, task=task(), n=5, chat=False), **change}
    with pytest.raises(LabError, match=words): sensitivity(model=model, show=False, **how)


def test_all_samples_failing(model):
    short = load_model('smollm2-135m', context_length=8)
    with pytest.raises(LabError, match='the prompt: all 8 samples failed'): sensitivity(prompt, task(), short, 'order', n=2, chat=False, show=False)


def test_a_casing_that_is_not_known():
    with pytest.raises(LabError, match='Did you mean "upper"'): Format(casing=('uper',))


# With the model

@pytest.fixture(scope='module')
def spread(model):
    before = model.usage.requests
    s = sensitivity(prompt, task(), model, ['order', LabelWords(dict(Dairy=['Milk']))], n=2, chat=False, show=False)
    assert model.usage.requests - before == s.calls
    return s


def test_the_same_seed_gives_the_same_result_and_the_base_is_an_evaluation(spread, model):
    again = sensitivity(prompt, task(), model, ['order', LabelWords(dict(Dairy=['Milk']))], n=2, chat=False, show=False)
    assert again.variants.equals(spread.variants) and again.parts == spread.parts
    e = evaluate(task(), model, prompt, chat=False, progress=False).metrics['accuracy']
    assert (spread.base.value, spread.base.low) == (e.value, e.low) and list(spread.parts) == ['labels', 'order', 'all together']
    assert spread.to_frame().variants.tolist() == [2, 3, 3] and len(spread.advice()) == 4 and 'points' in spread._repr_html_()


def made(parts, metric='accuracy'):
    return Sensitivity(metric, Estimate(.5, .4, .6, 100), parts, pd.DataFrame(dict(factor=['', *parts], variant='', value=.5, failed=0)), {f: .01 for f in parts}, {}, 100, 100)


def sd(value, low, high): return Estimate(value, low, high, 9, 'variance component')


def test_gains_below_the_sensitivity_are_flagged(model):
    s = made({'order': sd(.02, .01, .04)})
    assert np.isclose(s.safe_gain(), 1.96 * 2**.5 * .02, atol=1e-4) and s.safe_gain(strict=True) > s.safe_gain()
    assert s.flags(.06) == [] and '5.0 points of accuracy is not safe' in s.flags(.05)[0] and s.flags(-.05) and s.flags(.06, strict=True)
    rng = np.random.default_rng(0)
    a, b = (rng.random(200) < .5).astype(float), (rng.random(200) < .9).astype(float)
    assert s.flags(paired(a, b)) == [] and s.flags(paired(a, a))
    c = compare(*[evaluate(task(), model, prompt, l, chat=False, progress=False) for l in 'ab'])
    assert s.flags(c)[0].startswith('b against a: 0.0 points')
    with pytest.raises(LabError, match='comparison is of accuracy'): made({'order': sd(.02, .01, .04)}, 'macro_f1').flags(c)


def test_the_whole_is_what_moves_together_or_the_largest_part():
    assert made({'order': sd(.03, .01, .05), 'all together': sd(.04, .02, .06)}).total.value == .04
    assert made({'order': sd(.03, .01, .05), 'all together': sd(.0, .0, .06)}).total.value == .03
    both = made({'order': sd(.03, .01, .05), 'format': sd(.04, .0, .06)}).total
    assert np.isclose(both.value, .05) and both.low < .05 < both.high and 'not varied together' in both.note


def test_advice_says_when_nothing_was_found():
    said = made({'order': sd(0., 0., .03)}).advice()
    assert 'not told apart from the noise of 100 samples' in said[0] and 'may still not be safe' in said[1]
    assert made({'order': sd(0., 0., 0.)}).advice() == ['order changes no score on 100 samples', 'no variant changed anything']

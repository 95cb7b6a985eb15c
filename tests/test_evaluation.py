"Evaluation on the real model, and with a model whose answers are known."
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from genai_lab.core import LabError, fingerprint
from genai_lab.evaluation import Scoreboard, compare, evaluate, summarise
from genai_lab.generation import Generation
from genai_lab.prompts import Prompt
from genai_lab.scoring import Score
from genai_lab.tasks import Task

frame = pd.DataFrame(dict(product=['bananas', 'ground beef', 'birthday cake', 'rose bouquet'], department=['Produce', 'Meat', 'Bakery', 'Floral'], kind=['a', 'a', 'b', 'b']))
plain = Prompt('Departments: {{ choices | join(", ") }}.\n\nProduct: {{ product }}\nDepartment:', name='plain')
task = Task('departments', frame, plain, 'department', choices=['Produce', 'Meat', 'Bakery', 'Floral'], metrics=['accuracy', 'accuracy_norm', 'accuracy_mutual_info', 'macro_f1'], slices=['kind'])


class Scripted:
    "Answers what it is told to; failures included."
    chat = False
    def __init__(self, scores=(), texts=(), name='scripted'): self.scores, self.texts, self.name, self.fingerprint = list(scores), list(texts), name, fingerprint([name])
    def can(self, what): return True
    def loglikelihood(self, pairs, **kw): return [self.scores[i % len(self.scores)] for i, _ in enumerate(pairs)]
    def rolling(self, texts, **kw): return self.scores[:len(texts)]
    def generate(self, prompts, **kw): return [self.texts[i] for i, _ in enumerate(prompts)]


good, bad = Score(-1., 1, True), Score(-2., 1, False)


def test_the_records_hold_what_the_model_said(model):
    e = evaluate(task, model, chat=False)
    assert e.n.attempted == e.n.scored == 4
    for r in e.samples.itertuples():
        pairs = [(r.prompt, ' ' + c) for c in r.choices]
        direct = [s.logprob for s in model.loglikelihood(pairs)]
        assert np.allclose(direct, r.logprobs, atol=1e-3) and r.prediction == r.choices[int(np.argmax(direct))]
        assert r.confidence == pytest.approx(np.exp(max(direct)) / np.exp(direct).sum(), abs=1e-3)
    assert e.metrics['accuracy'].value == (e.samples.prediction == e.samples.target).mean()


def test_chat_models_are_asked_through_their_template(model):
    e = evaluate(replace(task, metrics=['accuracy']), model)
    assert e.samples.prompt.str.startswith('<|im_start|>').all() and e.samples.prompt.str.endswith('<|im_start|>assistant\n').all()


def test_the_same_evaluation_twice_is_the_same_bit_for_bit(model):
    a, b = evaluate(task, model, chat=False), evaluate(task, model, chat=False)
    pd.testing.assert_frame_equal(a.samples, b.samples, check_exact=True)
    assert a.metrics == b.metrics and a.fingerprints == b.fingerprints


def test_a_prompt_longer_than_the_window_fails_with_the_reason_and_is_never_cut(model):
    long = frame.assign(product=['bananas', 'ground beef ' * 5000, 'birthday cake', 'rose bouquet'])
    for t in (replace(task, data=long, metrics=['accuracy']), replace(task, data=long, output='generate', metrics=['exact_match'], max_tokens=4)):
        e = evaluate(t, model, chat=False)
        assert (e.n.attempted, e.n.scored, e.n.failed) == (4, 3, 1)
        assert e.samples.error[1] and 'window' in e.samples.error[1] and '8,192' in e.samples.error[1].replace('8192', '8,192'), e.samples.error[1]
        assert e.samples.prompt[1].count('ground beef') == 5000


def test_generated_answers(model):
    t = replace(task, output='generate', metrics=['exact_match', 'token_f1'], max_tokens=6, stop=['\n'], extract=lambda s: s.strip().split()[0] if s.strip() else '')
    e = evaluate(t, model, chat=False)
    assert e.n.failed == 0 and e.samples.finish.isin(['stop', 'length']).all() and (e.samples.completion_tokens <= 6).all()


def test_a_task_may_say_that_long_prompts_are_cut_on_the_left(model):
    long = 'milk ' * 9000 + 'The opposite of hot is'
    t = Task('cut', pd.DataFrame(dict(text=['The opposite of hot is', long], a=['cold', 'cold'])), Prompt('{{ text }}'), 'a', choices=['cold', 'tall'], metrics=['accuracy'], truncate='left')
    e = evaluate(t, model, chat=False, progress=False)
    assert e.n.failed == 0 and e.samples.prediction.tolist() == ['cold', 'cold']
    kept = e.samples.prompt[1]
    assert long.endswith(kept) and 8185 <= model.count_tokens(kept) < 8192
    assert t.fingerprint != replace(t, truncate='').fingerprint
    with pytest.raises(LabError, match='truncate "right" is not known'): replace(t, truncate='right')


def test_perplexity_of_texts(model):
    t = Task('texts', pd.DataFrame(dict(text=['The cat sat on the mat.', 'mat the on sat cat The.'])), Prompt('{{ text }}'), output='perplexity')
    e = evaluate(t, model)
    s = e.samples
    assert s.logprob[0] > s.logprob[1]
    assert e.metrics['bits_per_byte'].value == pytest.approx(-s.logprob.sum() / s.bytes.sum() / math.log(2))
    assert e.metrics['word_perplexity'].value == pytest.approx(math.exp(-s.logprob.sum() / 12))


def test_a_sample_with_one_failed_choice_has_failed_and_counts_as_wrong():
    scores = [good, bad, bad, bad] * 3 + [good, Score(math.nan, 1, False, 'too long'), bad, bad]
    e = evaluate(replace(task, metrics=['accuracy', 'macro_f1']), Scripted(scores))
    assert (e.n.attempted, e.n.scored, e.n.failed) == (4, 3, 1)
    assert e.metrics['accuracy'].value == 1 / 4 and e.metrics['accuracy'].n == 4 and e.bounds['accuracy'] == (1 / 4, 2 / 4)
    assert e.bounds['macro_f1'][0] < e.bounds['macro_f1'][1] and e.failures().reason.tolist() == ['too long']


def test_scores_that_are_no_numbers_are_failures_and_never_averaged():
    e = evaluate(replace(task, metrics=['accuracy']), Scripted([good, Score(math.nan, 1, False), bad, bad]))
    assert e.n.failed == 4 and e.metrics['accuracy'].value == 0 and 'no finite score' in e.samples.error[0]
    t = Task('texts', pd.DataFrame(dict(text=['a b', 'c d'])), Prompt('{{ text }}'), output='perplexity')
    e = evaluate(t, Scripted([Score(-6., 2, True), Score(math.nan, 2, False)]))
    assert e.metrics['word_perplexity'].value == pytest.approx(math.exp(3)) and e.n.failed == 1
    e = evaluate(t, Scripted([Score(math.nan, 2, False)] * 2))
    assert math.isnan(e.metrics['word_perplexity'].value) and e.metrics['word_perplexity'].n == 0


def test_an_extract_that_raises_fails_its_sample_only():
    t = replace(task, output='generate', metrics=['exact_match'], extract=lambda s: s.split()[0])
    texts = [Generation('Produce', 'stop', 1, 1), Generation('', 'stop', 1, 0), Generation('', 'error', 1, 0, 'connection lost'), Generation('Floral x', 'length', 1, 2)]
    e = evaluate(t, Scripted(texts=texts))
    assert e.metrics['exact_match'].value == 2 / 4 and e.n.failed == 2
    assert [bool(x) for x in e.samples.error] == [False, True, True, False] and 'IndexError' in e.samples.error[1]


def test_all_samples_failing_is_a_result_and_not_a_crash():
    t = replace(task, output='generate', metrics=['exact_match', 'bleu', 'rougeL', 'macro_f1'])
    e = evaluate(t, Scripted(texts=[Generation('', 'error', 1, 0, 'x')] * 4))
    assert e.n.scored == 0 and all(m.value == 0 for m in e.metrics.values())
    assert e.bounds['exact_match'] == (0, 1)


def test_macro_f1_counts_classes_that_never_occur():
    s = pd.DataFrame(dict(id=[0, 1], prediction=['Meat', 'Meat'], target=['Meat', 'Meat'], error=['', '']))
    assert summarise(replace(task, metrics=['macro_f1']), s, 'x').metrics['macro_f1'].value == Scoreboard(s, 'macro_f1', dict(labels=list(task.choices))).estimate().value


def test_what_a_model_cannot_do_is_refused():
    m = Scripted([good]); m.can = lambda what: what == 'generate'
    with pytest.raises(LabError, match='needs loglikelihood, which model "scripted" cannot do'): evaluate(task, m)


def test_metrics_that_do_not_fit_are_refused():
    with pytest.raises(LabError, match='"bleu" does not go with output "choice"'): evaluate(replace(task, metrics=['bleu']), Scripted([good]))
    with pytest.raises(LabError, match='Did you mean "accuracy"'): evaluate(replace(task, metrics=['acuracy']), Scripted([good]))


def made(label, hits, data=frame, n=None):
    t = replace(task, data=data, metrics=['accuracy', 'macro_f1'])
    s = pd.DataFrame(dict(id=range(len(data)), prediction=[d if h else 'Other' for d, h in zip(data.department, hits)], target=data.department, error='', confidence=.9))
    return summarise(t, s, label, fingerprints=dict(data=t.data_fingerprint))


def test_a_comparison_finds_a_real_difference_and_says_so_in_words():
    big = pd.DataFrame(dict(product=[f'p{i}' for i in range(400)], department=['Produce', 'Meat', 'Bakery', 'Floral'] * 100, kind='a'))
    rng = np.random.default_rng(1)
    base = rng.random(400) < .4
    up = base | (rng.random(400) < .2)
    c = compare(made('A', base, big), made('B', up, big), made('C', base, big))
    assert c.best.label == 'B' and c.pairs['A', 'B'].claimed and c.pairs['A', 'C'].p == 1
    assert c.pairs['A', 'B'].comparisons == 3 and c.pairs['A', 'B'].p_adjusted > c.pairs['A', 'B'].p
    assert 'B beats A by' in c.verdict and 'n=400' in c.verdict and 'A and C' not in c.verdict
    assert set(c.disagreements(5).columns) == {'product', 'target', 'A', 'B', 'C'} and len(c.disagreements(5)) == 5


def test_comparisons_of_different_things_are_refused():
    a = made('A', [1, 0, 1, 0])
    with pytest.raises(LabError, match='different data'): compare(a, made('B', [1, 0, 1, 0], frame.assign(product='x')))
    with pytest.raises(LabError, match='two evaluations are called "A"'): compare(a, made('A', [1, 1, 1, 1]))
    with pytest.raises(LabError, match='at least two'): compare(a)
    with pytest.raises(LabError, match='no evaluation "Z"'): compare(a, made('B', [1, 1, 1, 1]), baseline='Z')


def test_slices_are_tested_against_the_rest_with_correction():
    big = pd.DataFrame(dict(product=[f'p{i}' for i in range(400)], department='Produce', kind=['good'] * 300 + ['bad'] * 100))
    t = replace(task, data=big, metrics=['accuracy'], choices=['Produce', 'Meat'])
    s = pd.DataFrame(dict(id=range(400), kind=big.kind, prediction=['Produce'] * 280 + ['Meat'] * 20 + ['Produce'] * 40 + ['Meat'] * 60, target='Produce', error=''))
    by = summarise(t, s, 'x', fingerprints={}).by('kind')
    assert by.kind.tolist() == ['bad', 'good'] and by.accuracy.tolist() == pytest.approx([.4, 280 / 300]) and (by.p_adjusted < .001).all()
    with pytest.raises(LabError, match='no column "colour"'): summarise(t, s, 'x', fingerprints={}).by('colour')


def test_the_search_for_worst_slices_finds_a_planted_one_and_does_not_cry_wolf():
    rng = np.random.default_rng(3)
    alarms, found, runs = 0, 0, 120
    for k in range(runs):
        data = pd.DataFrame(dict(aisle=rng.choice(list('abcde'), 300), brand=rng.choice(list('xyz'), 300), t='yes'))
        t = Task('t', data, target='t', choices=['yes', 'no'], metrics=['accuracy'], slices=['aisle', 'brand'])
        def searched(p): return summarise(t, data.assign(id=range(300), target='yes', prediction=np.where(rng.random(300) < p, 'yes', 'no'), error=''), 'x').worst_slices()
        alarms += searched(.7).claimed.any()
        found += searched(np.where(data.aisle == 'a', .35, .8)).query('claimed').slice.eq('aisle = a').any()
    assert alarms <= runs * .05 + 3 * (runs * .05 * .95) ** .5, 'false alarms on data without a bad slice'
    assert found >= runs * .9

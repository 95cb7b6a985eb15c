"""Task files of lm-evaluation-harness: prompts and scores against what the harness itself made of the same files, and everything that can be wrong.

`tasks/expected.json` was written by lm-eval 0.4.13 from the files beside it: the requests of every document (as text, and through SmolLM2's
chat template with examples as turns and in one question), the responses of the embedded model in float32, and the results."""
import json
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sacrebleu
from sklearn.metrics import f1_score, matthews_corrcoef

from genai_lab import harness
from genai_lab.core import LabError, ModelEntry
from genai_lab.evaluation import compare, evaluate, summarise
from genai_lab.generation import Generation
from genai_lab.harness import Shots, check_task, check_tasks, group_values, load_task, load_tasks, parse_yaml, read_task_file
from genai_lab.models import HTTPModel
from genai_lab.scoring import Score

tasks = Path(__file__).parent / 'tasks'
expected = json.loads((tasks / 'expected.json').read_text())
names = [n for n in expected if n != 'shop_group']


def write(folder, rows=None, name='t.yaml', **keys):
    "A task file with its data; keys that are None are left out."
    rows = rows or [dict(q='rye bread', a='Bakery'), dict(q='eggs', a='Dairy'), dict(q='milk', a='Dairy'), dict(q='buns', a='Bakery')]
    (folder / 'test.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    config = dict(task='t', dataset_path='json', dataset_kwargs=dict(data_files=dict(test='test.jsonl')), test_split='test', output_type='multiple_choice',
                  doc_to_text='Product: {{q}}\nAisle:', doc_to_target='a', doc_to_choice=['Bakery', 'Dairy']) | keys
    (folder / name).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))   # JSON is YAML
    return folder / name


def refused(*args, **kw):
    with pytest.raises(LabError) as e: load_task(*args, **kw).samples()
    assert '\n' not in str(e.value)
    return str(e.value)


class Toy:
    "Scores by a rule; what it is asked is kept."
    name, chat, fingerprint, context_length = 'toy', False, 'a' * 16, 1000
    def __init__(self, rule=lambda context, cont: Score(-float(len(cont)), 1, False), answers=()): self.rule, self.answers, self.asked = rule, answers, []
    def can(self, what): return True
    def loglikelihood(self, pairs, progress=False): self.asked += pairs; return [self.rule(*p) for p in pairs]
    def rolling(self, texts, progress=False): return [Score(-1., 1, False) for _ in texts]
    def generate(self, prompts, **kw): self.kw = kw; return [Generation(a, 'stop', 1, 1) for a in self.answers]


# the harness itself

def requests(task, sample):
    "The requests of one document, in the harness's form."
    if task.output == 'perplexity' or task.output == 'generate': return [[sample.prompt]]
    bare = [['', c] for c in sample.bare] if any(u.metric.name == 'acc_mutual_info' for u in task.uses) else []
    return [[c, k] for c, k in zip(sample.contexts or [sample.prompt] * len(sample.continuations), sample.continuations)] + bare


@pytest.mark.parametrize('name', names)
def test_prompts_are_those_of_the_harness_byte_for_byte(name, model):
    task = load_task(tasks / f'{name}.yaml')
    for mode in ('text', 'chat', 'chat_single'):
        samples = replace(task, multiturn=mode == 'chat').samples(chat=mode != 'text')
        for s in samples: harness._make_readable(model, s)
        assert [s.error for s in samples] == [''] * len(samples)
        assert [requests(task, s) for s in samples] == expected[name][mode], mode


@pytest.mark.parametrize('name', [n for n in names if n not in ('products_same', 'products_valid')])
def test_scores_predictions_and_metrics_are_those_of_the_harness(name, model):
    task, want = load_task(tasks / f'{name}.yaml'), expected[name]
    ev = evaluate(task, model, progress=False)
    for key, value in want['results'].items():
        metric, pipe = key.split(',')
        if '_stderr' in metric: continue
        board = ev.board(metric if pipe == 'none' else key)
        assert ev.metrics[board.metric].value == pytest.approx(value, rel=1e-4, abs=1e-9), key
        se = want['results'][f'{metric}_stderr,{pipe}']
        if board.kind == 'mean': assert board.stderr() == pytest.approx(se, abs=1e-9)
    for r, responses in zip(ev.samples.requests, want['responses']):
        if task.output == 'generate': assert [x['answer'] for x in r] == responses
        elif task.output == 'perplexity': assert r[0]['logprob'] == pytest.approx(responses[0], abs=1e-3)
        else: assert [(x['logprob'], x['greedy']) for x in r] == [(pytest.approx(lp, abs=1e-3), g) for lp, g in responses]
    for pipe, said in want.get('filtered', {}).items():
        column = f'prediction,{pipe}'
        assert ev.samples[column if column in ev.samples else 'prediction'].tolist() == said


@pytest.mark.parametrize('name', ['fit', 'products_valid', 'questions'])
def test_a_chat_is_asked_as_the_harness_would(name, model):
    task = replace(load_task(tasks / f'{name}.yaml', limit=2), chat=True)
    ev = evaluate(task, model, progress=False)
    for prompt, r, want in zip(ev.samples.prompt, ev.samples.requests, expected[name]['chat']):
        if task.output == 'generate': assert [[prompt]] == want
        else: assert [[x['context'] if x['context'] is not None else prompt, x['continuation']] for x in r] == want
    assert ev.n.failed == 0


def test_generation_settings_are_those_of_the_harness():
    for name in ('questions', 'written'):
        want, got = expected[name]['generation_kwargs'], load_task(tasks / f'{name}.yaml').writing
        assert (got['max_tokens'], got['temperature']) == (want['max_gen_toks'], want['temperature'])
        assert list(got['stop']) == [u for u in want['until'] if '<|' not in u]     # the harness appends the model's end of text


def test_a_group_is_summed_up_as_in_the_harness(model):
    found = load_tasks(tasks / 'shop.yaml')
    assert {g: m.members for g, m in found.groups.items()} == expected['shop_group']['tasks']
    evs = {n: evaluate(t, model, progress=False) for n, t in found.tasks.items() if n != 'questions'}
    evs['questions'] = evaluate(found.tasks['questions'], Toy(answers=['x'] * 4))
    [v] = group_values(found, evs, 'shop_group')
    want = expected['shop_group']['results']
    assert (v.estimate.value, v.stderr) == (pytest.approx(want['acc,none']), pytest.approx(want['acc_stderr,none']))
    assert (v.tasks, v.lacking, v.estimate.n) == (('products', 'prices'), ('questions',), 12)


def test_a_group_may_count_every_task_the_same(tmp_path):
    rows = [dict(q='a', a=a) for a in ('Bakery', 'Bakery', 'Bakery', 'Dairy')]
    write(tmp_path, rows)
    write(tmp_path, rows, name='u.yaml', task='u')
    (tmp_path / 'g.yaml').write_text('group: g\ntask: [t, u]\naggregate_metric_list: {metric: acc, weight_by_size: false}\n')
    found = load_tasks(tmp_path / 'g.yaml')
    found.tasks['u'] = found.tasks['u'].head(2)
    evs = {n: evaluate(t, Toy(lambda c, k: Score(float('Dairy' in k), 1, False))) for n, t in found.tasks.items()}
    assert [e.metrics['acc'].value for e in evs.values()] == [.25, 0.]
    [v] = group_values(found, evs, 'g')
    assert v.estimate.value == .125 and v.estimate.low < .125 < v.estimate.high


# hand-written expectations

def test_a_prompt_by_hand(tmp_path):
    t = load_task(write(tmp_path, description='Sort.\n\n', num_fewshot=1, target_delimiter=' -> ', fewshot_delimiter='\n##\n', fewshot_config=dict(sampler='first_n', samples=[dict(q='brie', a='Dairy')])))
    s = t.samples()[0]
    assert s.prompt == 'Sort.\n\nProduct: brie\nAisle: -> Dairy\n##\nProduct: rye bread\nAisle:'
    assert s.continuations == (' -> Bakery', ' -> Dairy') and s.gold == (0,) and s.target == 'Bakery'
    assert t.samples(chat=True)[0].prompt == [dict(role='system', content='Sort.\n\n'), dict(role='user', content='Product: brie\nAisle:'), dict(role='assistant', content='Dairy'), dict(role='user', content='Product: rye bread\nAisle:')]
    one = replace(t, multiturn=False).samples(chat=True)[0].prompt
    assert one == [dict(role='system', content='Sort.\n\n'), dict(role='user', content='Product: brie\nAisle: -> Dairy\n##\nProduct: rye bread\nAisle:')]


def test_length_is_taken_in_characters_and_bytes(tmp_path):
    f = write(tmp_path, [dict(q='x', a='bb'), dict(q='y', a='ÄÄÄÄ')], doc_to_choice=['bb', 'ÄÄÄÄ'], metric_list=[dict(metric=m) for m in ('acc', 'acc_norm', 'acc_bytes')])
    ev = evaluate(load_task(f), Toy(lambda c, k: Score({' bb': -3., ' ÄÄÄÄ': -5.}[k], 1, False)))   # by character -1.5, -1.25; by byte -1.5, -0.625
    assert [ev.metrics[m].value for m in ('acc', 'acc_norm', 'acc_bytes')] == [.5, .5, .5]
    assert ev.samples[['acc', 'acc_norm', 'acc_bytes']].to_numpy().tolist() == [[1, 0, 0], [0, 1, 1]]


def test_equal_scores_choose_the_first_option(tmp_path):
    ev = evaluate(load_task(write(tmp_path)), Toy(lambda c, k: Score(-1., 1, False)))
    assert ev.samples.prediction.tolist() == ['Bakery'] * 4 and ev.metrics['acc'].value == .5


@pytest.mark.parametrize('metric,reference', [('bleu', lambda p, r: sacrebleu.corpus_bleu(p, [r]).score), ('chrf', lambda p, r: sacrebleu.corpus_chrf(p, [r]).score),
                                              ('chrf++', lambda p, r: sacrebleu.corpus_chrf(p, [r], word_order=2).score), ('ter', lambda p, r: sacrebleu.corpus_ter(p, [r]).score)])
def test_corpus_metrics_are_sacrebleus(tmp_path, metric, reference):
    wanted = ['the rye bread is in the bakery', 'eggs stand next to the milk', 'milk is in the dairy aisle', 'buns are here']
    said = ['rye bread is in the bakery', 'the eggs are next to milk', 'milk is in the dairy aisle', 'no buns today']
    f = write(tmp_path, [dict(q='x', a=w) for w in wanted], output_type='generate_until', doc_to_choice=None, metric_list=[dict(metric=metric)])
    ev = evaluate(load_task(f), Toy(answers=said))
    assert ev.metrics[metric].value == pytest.approx(reference(said, wanted))
    assert ev.metrics[metric].low <= ev.metrics[metric].value <= ev.metrics[metric].high
    other = evaluate(load_task(f), Toy(answers=wanted), label='right')
    test = compare(ev, other).pairs['toy', 'right']
    assert test.difference.value == pytest.approx(reference(wanted, wanted) - reference(said, wanted))


def test_f1_and_mcc_are_scikit_learns(tmp_path):
    rng, words = np.random.default_rng(0), ['no', 'yes']
    rows = [dict(q=str(i), a=words[g]) for i, g in enumerate(rng.integers(0, 2, 60))]
    says = rng.integers(0, 2, 60)
    f = write(tmp_path, rows, doc_to_choice=words, metric_list=[dict(metric='f1'), dict(metric='mcc')])
    ev = evaluate(load_task(f), Toy(lambda c, k: Score(float(k == f' {words[says[int(c.split()[1])]]}'), 1, False)))
    gold = [words.index(r['a']) for r in rows]
    assert ev.metrics['f1'].value == pytest.approx(f1_score(gold, says)) and ev.metrics['mcc'].value == pytest.approx(matthews_corrcoef(gold, says))


def test_several_targets_count_any_of_them(tmp_path):
    f = write(tmp_path, [dict(q='a', t=[0, 1]), dict(q='b', t=[1])], doc_to_target='t', doc_to_choice=['x', 'yy', 'zzz'])
    ev = evaluate(load_task(f), Toy())
    assert ev.samples.target.tolist() == [['x', 'yy'], 'yy'] and ev.samples.acc.tolist() == [1, 0]
    f = write(tmp_path, [dict(q='a', t=['one', '1']), dict(q='b', t=['two', '2'])], doc_to_target='t', doc_to_choice=None, output_type='generate_until', metric_list=[dict(metric='exact_match'), dict(metric='f1'), dict(metric='bleu')])
    ev = evaluate(load_task(f), Toy(answers=['1', 'three']))
    assert ev.metrics['exact_match'].value == .5 and ev.samples.f1.tolist() == [1, 0]


def test_repeats_draw_different_answers_and_vote(tmp_path):
    pipe = [dict(name='vote', filter=[dict(function='regex', regex_pattern='([0-9]+)'), dict(function='majority_vote')]), dict(name='first', filter=[dict(function='take_first')])]
    f = write(tmp_path, [dict(q='a', a='7'), dict(q='b', a='8')], doc_to_choice=None, output_type='generate_until', repeats=3, generation_kwargs=dict(do_sample=True, temperature=.8, until=['\n']), filter_list=pipe)
    toy = Toy(answers=['it is 6', '7', 'so 7', '8', '9', '9'])
    ev = evaluate(load_task(f), toy, seed=5)
    assert toy.kw['seeds'] == [5, 6, 7, 5, 6, 7] and toy.kw['temperature'] == .8
    assert (ev.samples.prediction.tolist(), ev.samples['prediction,first'].tolist()) == (['7', '9'], ['it is 6', '8'])
    assert [len(r) for r in ev.samples.requests] == [3, 3]
    assert 'must end with take_first or majority_vote' in refused(write(tmp_path, doc_to_choice=None, output_type='generate_until', repeats=3, filter_list=[dict(name='x', filter=[dict(function='lowercase')])]))


# few-shot

def test_samplers():
    pool = [dict(q=i, label=i % 3) for i in range(30)]
    assert [len({d['label'] for d in Shots(pool, 'balanced', s, lambda d: d['label']).draw(3)}) for s in range(20)] == [3] * 20
    assert Shots(pool, 'balanced', 1, lambda d: d['label']).draw(6) == Shots(pool, 'balanced', 1, lambda d: d['label']).draw(6)
    one = Shots(pool, seed=1)
    assert one.draw(3) != one.draw(3)                       # drawn anew for every question
    doc = pool[4]
    assert all(doc not in Shots(pool, k, s, lambda d: d['label']).draw(25, doc) for k in ('default', 'first_n', 'balanced') for s in range(10))
    assert len(Shots([doc, doc, doc, pool[1], pool[2]], seed=3).draw(2, doc)) == 2     # copies of the question do not make the prompt shorter


def test_too_few_examples(tmp_path):
    f = write(tmp_path, num_fewshot=2, fewshot_config=dict(samples=[dict(q='brie', a='Dairy')]))
    assert 'cannot be drawn from the 1 document of the file itself' in refused(f)
    f = write(tmp_path, num_fewshot=4, fewshot_split='test')
    assert 'one to spare' in refused(f)
    f = write(tmp_path, num_fewshot=4, fewshot_split='test', fewshot_config=dict(sampler='first_n'))
    assert 'once the question itself is left out' in refused(f)
    assert load_task(f, num_fewshot=3).shots == 3


def test_examples_that_are_questions_are_refused(tmp_path):
    f = write(tmp_path, num_fewshot=1, fewshot_config=dict(sampler='first_n', samples=[dict(q='RYE  Bread', a='Bakery')]))
    msg = refused(f)
    assert '1 worked example' in msg and '--allow-overlap' in msg and 'document 0' in msg and 'shown in 4 prompts' in msg
    assert 'Product: RYE  Bread' in load_task(f, allow_overlap=True).samples()[0].prompt
    assert '--allow-overlap' in str(check_task(load_task(f)).refused)
    # the same split: the harness takes the question out where it can, and the rest is refused
    f = write(tmp_path, num_fewshot=2, fewshot_split='test')
    assert all(f'Product: {s.row["q"]}\nAisle: ' not in s.prompt for s in load_task(f).samples())
    f = write(tmp_path, num_fewshot=3, test_split=None, validation_split='test', fewshot_split='test')   # the harness does not take it out here
    assert 'question of split test' in refused(f)


def test_constant_questions_are_told_apart_by_their_options(tmp_path):
    rows = [dict(o=['the cat sat', 'the cat sit'], a=0), dict(o=['two cats', 'two cat'], a=0)]
    f = write(tmp_path, rows, doc_to_text='Which is right?', doc_to_choice='o', num_fewshot=1, fewshot_config=dict(samples=[dict(o=['a dog', 'a dogs'], a=0)]))
    assert len(load_task(f).samples()) == 2
    f = write(tmp_path, rows, doc_to_text='Which is right?', doc_to_choice='o', num_fewshot=1, fewshot_config=dict(samples=[rows[1]]))
    assert 'document 1' in refused(f)


def test_a_zero_in_the_file_is_not_overridden(tmp_path):
    t = load_task(write(tmp_path, num_fewshot=0), num_fewshot=5)
    assert t.shots == 0 and 'num_fewshot: 0' in t.notes[0]


# bad documents: they stay, with their reason, and count as wrong

@pytest.mark.parametrize('row,reason', [(dict(q='x', a='Deli', o=['Bakery', 'Dairy']), 'not among the 2 options'), (dict(q='x', a='', o=['', 'Dairy']), 'option 1 is empty'),
                                        (dict(q='x', a=None, o=['Bakery', 'Dairy']), 'target is empty'), (dict(q='x', a='Dairy', o=['Dairy']), 'at least two options'),
                                        (dict(q='x', a='Dairy', o=None), 'must give a list'), (dict(q=None, a='Dairy', o=['Bakery', 'Dairy']), None)])
def test_bad_documents_fail_with_a_reason(tmp_path, row, reason):
    f = write(tmp_path, [dict(q='y', a='Dairy', o=['Bakery', 'Dairy']), row], doc_to_choice='o')
    ev = evaluate(load_task(f), Toy(lambda c, k: Score(float('Dairy' in k), 1, False)))
    if reason is None: assert 'Product: None' in ev.samples.prompt[1]; return      # the harness prints a missing value as None, and so do we
    assert (ev.n.attempted, ev.n.scored, ev.n.failed) == (2, 1, 1) and reason in ev.samples.error[1]
    assert ev.metrics['acc'].value == .5 and ev.bounds['acc'] == (.5, 1.)


def test_options_that_are_the_same_choose_the_first(tmp_path):
    t = load_task(write(tmp_path, [dict(q='x', a=2, o=['Dairy', 'Bakery', 'Dairy']), dict(q='y', a=0, o=['Dairy', 'Bakery', 'Dairy'])], doc_to_choice='o'))
    ev = evaluate(t, Toy(lambda c, k: Score(float('Dairy' in k), 1, False)))
    assert ev.samples.acc.tolist() == [0, 1]
    assert '2 documents have the same option more than once' in t.remarks(ev.samples)[0]


def test_scores_that_are_not_finite_count_as_failed(tmp_path):
    for bad in (Score(float('nan'), 1, False), Score(float('nan'), 1, False, 'context of 9 tokens + continuation of 1 exceeds the window of 8')):
        ev = evaluate(load_task(write(tmp_path, metric_list=[dict(metric=m) for m in ('acc', 'brier_score', 'mcc')])), Toy(lambda c, k: bad if 'milk' in c and 'Bakery' in k else Score(float('Dairy' in k), 1, False)))
        assert (ev.n.failed, ev.metrics['acc'].value, ev.bounds['acc']) == (1, .25, (.25, .5))
        low, high = ev.bounds['brier_score']
        assert high == pytest.approx(low - 2 / 4)          # lower is better: a failure counts 2, the worst there is
        assert all(np.isfinite(e.value) for e in ev.metrics.values())
        assert ev.samples.error[2] == (bad.error or 'the model gave no finite score')
        assert [np.isnan(r['logprob']) for r in ev.samples.requests[2]] == [True, False]


def test_perplexities_leave_failures_out(tmp_path):
    f = write(tmp_path, [dict(q='one two'), dict(q='')], output_type='loglikelihood_rolling', doc_to_text='', doc_to_target='q', doc_to_choice=None)
    ev = evaluate(load_task(f), Toy())
    assert ev.samples.error.tolist() == ['', 'the text is empty'] and ev.bounds == {}
    assert ev.metrics['word_perplexity'].value == pytest.approx(np.exp(1 / 2)) and ev.n.failed == 1


def test_nothing_to_ask_is_an_error(tmp_path):
    assert 'none of its 4 documents can be asked' in refused(write(tmp_path, doc_to_target='q'))


# files that are wrong

@pytest.mark.parametrize('text,said', [
    ('task: t\n  dataset_path: json', 'line 2, column'), ('task: [t', 'line 2, column 1'), ('- a\n- b', 'is no task file'), ('', 'holds nothing'), ('task: t\ntask: u', 'line 2: the key "task" is there twice'),
    ('task: "\x00"', 'YAML'), ('a: !!python/object/apply:os.system [ls]', 'line 1'), ('task: t\nx: *nothing', 'line 2')])
def test_yaml_that_does_not_parse(tmp_path, text, said):
    (tmp_path / 't.yaml').write_text(text)
    with pytest.raises(LabError, match='t.yaml') as e: parse_yaml(tmp_path / 't.yaml')
    assert said in str(e.value) and '\n' not in str(e.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(LabError, match='No such file'): parse_yaml(tmp_path / 'none.yaml')
    (tmp_path / 'a.yaml').write_text('include: none.yaml\ntask: a\n')
    with pytest.raises(LabError, match='line 1: there is no file'): read_task_file(tmp_path / 'a.yaml')
    (tmp_path / 'a.yaml').write_text('include: b.yaml\n')
    (tmp_path / 'b.yaml').write_text('include: [a.yaml]\n')
    with pytest.raises(LabError, match='includes itself'): read_task_file(tmp_path / 'a.yaml')


@pytest.mark.parametrize('keys,said', [
    (dict(num_fewshots=5), 'the key "num_fewshots" is not supported. Did you mean "num_fewshot"?'), (dict(doc_to_image='x'), 'doc_to_image'), (dict(process_results='x'), 'process_results'), (dict(use_prompt='x'), 'use_prompt'),
    (dict(unsafe_code=True), 'unsafe_code'), (dict(generation_kwargs=dict(beams=3)), 'the key "beams" is not supported. Did you mean "num_beams"?'), (dict(generation_kwargs=dict(num_beams=3)), 'num_beams'),
    (dict(generation_kwargs=dict(max_gen_toks=3, max_tokens=4)), 'mean the same'), (dict(generation_kwargs=dict(top_k=3)), 'top_k'), (dict(output_type='multi_choice'), 'output_type'), (dict(num_fewshot=-1), 'num_fewshot'), (dict(num_fewshot='some'), "not 'some'"),
    (dict(fewshot_config=dict(sampler='last_n')), 'sampler'), (dict(fewshot_config=dict(fewshot_indices=[1])), 'fewshot_indices'), (dict(fewshot_config=dict(samplr='x')), 'Did you mean "sampler"?'),
    (dict(metric_list=[dict(metric='acc_nrom')]), 'Did you mean "acc_norm"?'), (dict(metric_list=[dict(metric='bleu')]), 'not supported for this output_type'), (dict(metric_list=[dict(metric='acc', ignore_case=True)]), 'acc has no option "ignore_case"'),
    (dict(metric_list=[dict(metric='acc', aggregation='median')]), 'aggregated by mean'), (dict(metric_list=[]), 'empty'), (dict(metric_list=[dict(aggregation='mean')]), '"metric" is missing'), (dict(metric_list=[dict(metric='f1', hf_evaluate=True)]), 'hf_evaluate'),
    (dict(filter_list=[dict(name='x', filter=[dict(function='regexp')])]), 'Did you mean "regex"?'), (dict(filter_list=[dict(name='x', filter=[dict(function='regex', pattern='a')])]), 'does not take pattern'),
    (dict(filter_list=[dict(name='x', filter=[dict(function='regex', regex_pattern='(')])]), 'not valid'), (dict(filter_list=[dict(name='x', filter=[dict(function='take_first'), dict(function='lowercase')])]), 'last step'),
    (dict(filter_list=[dict(name='x', filter=[dict(function='lowercase')])]), 'only go through take_first'), (dict(filter_list=[dict(name='x', filter=[]), dict(name='x', filter=[])]), 'two filters are called "x"'),
    (dict(test_split='tset'), 'no split "tset". Did you mean "test"?'), (dict(test_split=None), 'test_split or validation_split'), (dict(fewshot_split='train', num_fewshot=1), 'no split "train"'),
    (dict(doc_to_text='{{ question }}'), 'uses "question", which no document has'), (dict(doc_to_text='{{ q '), 'line 1 of the template'), (dict(doc_to_text="{{ q.__class__.__mro__ }}"), 'unsafe'), (dict(doc_to_text=None), '"doc_to_text" is missing'),
    (dict(doc_to_choice=None), 'doc_to_choice'), (dict(doc_to_choice=[True, False]), 'is no text; write it in quotes'), (dict(dataset_path=None), '"dataset_path" is missing'), (dict(task=None), '"task" is missing'),
    (dict(dataset_kwargs=dict(data_files='nowhere.jsonl')), 'there is no file "nowhere.jsonl"'), (dict(dataset_kwargs=dict(data_files='t.yaml', streaming=True)), 'streaming'), (dict(dataset_kwargs=dict(data_files='test.jsonl', lines=True)), 'lines'),
    (dict(dataset_path='csv', dataset_kwargs=dict(data_files=dict(test='test.jsonl')), doc_to_text='{{q}}'), 'q'), (dict(doc_to_target='{{ 1/0 }}'), 'division by zero'), (dict(description='{{ nothing }}'), 'nothing')])
def test_what_is_not_supported_is_named(tmp_path, keys, said):
    msg = refused(write(tmp_path, **keys))
    assert said in msg and ('t.yaml' in msg or 'task "t"' in msg)


def test_the_line_of_a_key_is_named(tmp_path):
    (tmp_path / 'base.yaml').write_text('dataset_path: json\n\nmetric_list:\n  - metric: acc\n  - metric: accuracy\n')
    (tmp_path / 't.yaml').write_text('include: base.yaml\ntask: t\noutput_type: multiple_choice\n')
    assert 'base.yaml line 5' in refused(tmp_path / 't.yaml')
    (tmp_path / 't.yaml').write_text('include: base.yaml\ntask: t\noutput_type: multiple_choice\nmetric_list:\n - metric: nothing\n')
    assert 't.yaml line 5' in refused(tmp_path / 't.yaml')
    (tmp_path / 'g.yaml').write_text('group: g\ntask: [t]\naggregate_metric_list:\n  - metric: acc\n    weight: 3\n')
    with pytest.raises(LabError, match='g.yaml line 5: the key "weight" is not supported'): load_tasks(tmp_path / 'g.yaml')
    (tmp_path / 'g.yaml').write_text('group: g\ntask: [t]\nnum_few: 3\n')
    with pytest.raises(LabError, match='g.yaml line 3: the key "num_few" is not supported'): load_tasks(tmp_path / 'g.yaml')
    (tmp_path / 'g.yaml').write_text('group: g\ntask: [t, tt]\n')
    with pytest.raises(LabError, match='no task file for "tt"'): load_tasks(tmp_path / 'g.yaml', limit=1) if (tmp_path / 't.yaml').write_text(write(tmp_path, name='u.yaml').read_text()) else None


def test_keys_without_effect_are_told_and_not_ignored(tmp_path):
    t = load_task(write(tmp_path, should_decontaminate=True, doc_to_decontamination_query='q', dataset_kwargs=dict(data_files=dict(test='test.jsonl'), trust_remote_code=True), generation_kwargs=dict(until=['\n']), repeats=2))
    assert len(t.notes) == 4 and all('no effect' in n for n in t.notes)


# code

def test_code_runs_only_when_allowed(tmp_path):
    proof = tmp_path / 'ran'
    (tmp_path / 'utils.py').write_text(f'open({str(proof)!r}, "a").write("x")\ndef options(doc): return ["Bakery", "Dairy"]\ndef docs(data): return data.filter(lambda d: d["a"] == "Dairy")\n')
    f = write(tmp_path)
    f.write_text(f.read_text().replace('["Bakery", "Dairy"]', '!function utils.options').rstrip('}') + ', "process_docs": !function utils.docs}')
    msg = refused(f)
    assert 'line 1' in msg and '--allow-code' in msg and not proof.exists()
    assert '--allow-code' in refused(f, allow_code=[tmp_path / 'other.py']) and not proof.exists()
    for allowed in (f, tmp_path / 'utils.py'):
        t = load_task(f, allow_code=[allowed])
        assert [s.row['q'] for s in t.samples()] == ['eggs', 'milk'] and t.samples()[0].choices == ('Bakery', 'Dairy')
    f.write_text(f.read_text().replace('utils.docs', 'utils.nothing'))
    assert 'utils.py has no function "nothing"' in refused(f, allow_code=[f])
    f.write_text(f.read_text().replace('"process_docs": !function utils.nothing', '"process_results": !function utils.docs'))
    assert 'process_results' in refused(f, allow_code=[f])


# data

def test_formats_and_where_files_are_looked_for(tmp_path, monkeypatch):
    (tmp_path / 'here').mkdir()
    (tmp_path / 'sub').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    frame = pd.DataFrame(dict(q=['rye', 'brie'], a=['Bakery', 'Dairy']))
    frame.to_csv(tmp_path / 'sub/d.csv', index=False)
    frame.to_parquet(tmp_path / 'sub/d.parquet')
    frame.to_json(tmp_path / 'sub/d.json', orient='records')
    for kind in ('csv', 'parquet', 'json'):      # beside the task file
        t = load_task(write(tmp_path / 'sub', dataset_path=kind, test_split='train', dataset_kwargs=dict(data_files=f'd.{kind}')))
        assert [s.target for s in t.samples()] == ['Bakery', 'Dairy'] and t.sources['splits'] == {'train': 2}
    f = write(tmp_path / 'sub', dataset_path='csv', test_split='train', dataset_kwargs=dict(data_files='d.csv'))
    shutil.copy(tmp_path / 'sub/d.csv', 'd.csv')      # in the current folder as well, the same
    assert len(load_task(f).docs) == 2
    frame.head(1).to_csv('d.csv', index=False)        # and now another
    assert 'and they differ' in refused(f)
    (tmp_path / 'sub/d.csv').unlink()
    assert len(load_task(f).docs) == 1
    many = write(tmp_path / 'sub', dataset_path='parquet', test_split='test', dataset_kwargs=dict(data_files=dict(test=['d.parquet', 'd.*quet'])))
    assert len(load_task(many).docs) in (2, 4)


def test_damaged_data_is_one_line(tmp_path):
    f = write(tmp_path)
    (tmp_path / 'test.jsonl').write_text('{"q": "x", "a"\n')
    assert 'the data cannot be read' in refused(f)
    (tmp_path / 'test.jsonl').write_text('')
    assert 't.yaml' in refused(f)


def test_a_hub_name_without_network(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    msg = refused(write(tmp_path, dataset_path='somebody/no_such_data', dataset_name='main', dataset_kwargs=None))
    assert '"somebody/no_such_data" (main) is not in the local cache' in msg


def test_limit(tmp_path):
    f = write(tmp_path)
    assert [len(load_task(f, limit=n).docs) for n in (1, 3, 9, .5, .3)] == [1, 3, 4, 2, 2]
    assert 'above 0' in refused(f, limit=0)
    few = write(tmp_path, num_fewshot=1, fewshot_split='test')
    assert [s.prompt for s in load_task(few, limit=2).samples()] == [s.prompt for s in load_task(few).samples()[:2]]


# what a task is

def test_fingerprints_say_what_is_the_same(tmp_path):
    base = load_task(write(tmp_path, num_fewshot=1, fewshot_split='test'))
    other = tmp_path / 'elsewhere'
    other.mkdir()
    assert load_task(write(other, num_fewshot=1, fewshot_split='test', task='another', metadata=dict(version=2), metric_list=[dict(metric='acc')])).fingerprint == base.fingerprint
    for change in (dict(target_delimiter=''), dict(num_fewshot=2), dict(description='x'), dict(doc_to_choice=['Dairy', 'Bakery']), dict(gen_prefix='y')):
        t = load_task(write(other, **{**dict(num_fewshot=1, fewshot_split='test'), **change}))
        assert t.data_fingerprint == base.data_fingerprint and t.prompt_fingerprint != base.prompt_fingerprint and t.fingerprint != base.fingerprint, change
    assert load_task(write(other, num_fewshot=1, fewshot_split='test'), seed=7).prompt_fingerprint != base.prompt_fingerprint
    assert replace(base, chat=True).prompt_fingerprint != base.prompt_fingerprint
    assert evaluate(base, Toy()).fingerprints['prompt'] == base.prompt_fingerprint


def test_a_harness_task_has_its_own_prompt(tmp_path):
    from genai_lab.prompts import Prompt
    with pytest.raises(LabError, match='has its prompt in'): evaluate(load_task(write(tmp_path)), Toy(), prompt=Prompt('{{q}}'))


def test_slices_and_comparison(tmp_path):
    t = load_task(write(tmp_path), slices=('a',))
    a, b = evaluate(t, Toy(), label='short'), evaluate(t, Toy(lambda c, k: Score(float('Bakery' in k), 1, False)), label='bakery')
    assert set(a.by('a').a) == {'Bakery', 'Dairy'} and compare(a, b).pairs['short', 'bakery'].n == 4
    assert len(compare(a, b).disagreements(2)) == 2


def test_check_explains_and_shows(model):
    [c] = check_tasks(tasks / 'questions.yaml', model=model)
    said = str(c)
    for words in ('generate_until: the model writes until \'\\n\', \'Q:\', at most 12 tokens, greedy', 'train: 3 rows, test: 4 rows', '2 of 3 documents in split train', 'regex(regex_pattern=', 'ignore_case: True', 'sample 2 of 4', 'Q: Where is the rye bread? A:'): assert words in said, words
    assert said.count('━━ sample') == 3
    [c] = check_tasks(tasks / 'products.yaml', model=model, chat=True, n=1)
    assert expected['products']['chat'][0][0][0] in str(c) and "→ 'Bakery'" in str(c) and 'note           should_decontaminate' in str(c)
    assert '<table>' in c._repr_html_()
    assert [x.task.name for x in check_tasks(tasks / 'shop.yaml', limit=1)] == ['products', 'prices', 'questions']


# endpoints

class Endpoint(BaseHTTPRequestHandler):
    "Answers chats, and completions without log-probabilities; keeps what it was asked."
    protocol_version, asked = 'HTTP/1.1', []
    def log_message(self, *a): pass
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['content-length'])))
        Endpoint.asked.append((self.path, body))
        choice = dict(message=dict(role='assistant', content='Dairy')) if 'messages' in body else dict(text=' Dairy')
        data = json.dumps(dict(choices=[dict(index=0, finish_reason='stop', **choice)], usage=dict(prompt_tokens=3, completion_tokens=1))).encode()
        self.send_response(200)
        self.send_header('content-type', 'application/json')
        self.send_header('content-length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Endpoint.asked = []
    yield HTTPModel(ModelEntry(name='far', backend='openai', source='m', base_url=f'http://127.0.0.1:{server.server_port}/v1'))
    server.shutdown()
    server.server_close()


def test_an_endpoint_writes_and_is_refused_for_options(tmp_path, endpoint):
    from genai_lab.results import run_tasks
    f = write(tmp_path, output_type='generate_until', doc_to_choice=None, description='Sort.')
    run = run_tasks([f], endpoint, store=tmp_path / 's.db', say=lambda t: None)
    assert run.evaluations['t'].metrics['exact_match'].value == .5
    assert {p for p, _ in Endpoint.asked} == {'/v1/chat/completions'} and Endpoint.asked[0][1]['messages'][0] == dict(role='system', content='Sort.')
    plain = run_tasks([f], endpoint, chat=False, store=tmp_path / 's.db', say=lambda t: None)
    assert Endpoint.asked[-1][0] == '/v1/completions' and Endpoint.asked[-1][1]['prompt'].startswith('Sort.Product:') and plain.evaluations['t'].n.failed == 0
    with pytest.raises(LabError, match='is multiple_choice and needs log-likelihoods, which model "far" does not give; take a model of the transformers back end'): run_tasks([write(tmp_path)], endpoint, store=tmp_path / 's.db')
    with pytest.raises(LabError, match='whole texts'): run_tasks([write(tmp_path, output_type='loglikelihood_rolling', doc_to_choice=None)], endpoint, store=tmp_path / 's.db')
    with pytest.raises(LabError, match='gen_prefix'): run_tasks([write(tmp_path, output_type='generate_until', doc_to_choice=None, gen_prefix='It is')], endpoint, store=tmp_path / 's.db', say=lambda t: None)


def test_records_that_were_stored_are_summed_up_again(tmp_path):
    t = load_task(write(tmp_path, metric_list=[dict(metric=m) for m in ('acc', 'acc_norm', 'f1')]))
    ev = evaluate(t, Toy())
    assert summarise(t, ev.samples, 'again').metrics == ev.metrics

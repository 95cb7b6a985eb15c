"Metrics against the libraries they wrap, against hand-computed cases, without a network, and with bad input."
import importlib
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import genai_lab.metrics as M
from genai_lab.core import LabError
from genai_lab.metrics import confusion, exact_match, list_metrics, load_metric, per_sample, sentence_chrf, statistic, token_f1

LABELS = ['BAKERY', 'DELI', 'GROCERY', 'PRODUCE']
TEXTS = ['The quick brown fox jumps over the lazy dog.', 'Frische Vollmilch, 3,5 % Fett', '牛乳 1リットル', 'café crème 🥐 prêt-à-porter', '', 'one']
REFS = ['A quick brown fox jumped over a lazy dog!', ['Frische Milch 3,5 %', 'Vollmilch mit 3,5 % Fett'], '牛乳 2リットル', 'cafe crème 🥐', 'nothing', 'one']


@pytest.fixture(scope='module')
def labels():
    rng = np.random.default_rng(0)
    truth = rng.choice(LABELS, 300, p=[.1, .2, .5, .2])
    said = np.where(rng.random(300) < .7, truth, rng.choice([*LABELS, 'something else'], 300))
    return said, truth


def streams(refs): # sacrebleu's shape
    lists = [r if isinstance(r, list) else [r] for r in refs]
    return [[r[k] if k < len(r) else None for r in lists] for k in range(max(map(len, lists)))]


# --- values ---

@pytest.mark.parametrize('options, expected', [
    ({}, [1, 0, 0, 0, 0]), ({'ignore_case': True}, [1, 1, 0, 0, 0]), ({'ignore_punctuation': True}, [1, 0, 1, 0, 0]),
    ({'ignore_numbers': True}, [1, 0, 0, 1, 0]), ({'regexes_to_ignore': [r'\s+']}, [1, 0, 0, 0, 1]),
    ({'ignore_case': True, 'ignore_punctuation': True, 'ignore_numbers': True, 'regexes_to_ignore': [r'\s+']}, [1, 1, 1, 1, 1])])
def test_exact_match_by_hand(options, expected):
    assert exact_match(['a b', 'Straße', 'x.y,z', 'no 12', 'a  b '], ['a b', 'straße', 'xyz', 'no 34', 'a b'], **options).tolist() == expected


def test_exact_match_ignores_expressions_before_case():
    assert exact_match(['The END'], ['the '], ignore_case=True, regexes_to_ignore=['END']).tolist() == [1]
    assert exact_match(['The end'], ['the '], ignore_case=True, regexes_to_ignore=['END']).tolist() == [0]
    assert exact_match([12], ['12']).tolist() == [1]    # it compares texts


@pytest.mark.parametrize('prediction, reference, f1', [
    ('the cat', 'a cat', 1), ('cat sat', 'cat', 2 / 3), ('cat cat', 'cat', 2 / 3), ('dog', 'cat', 0), ('', '', 1), ('a the', 'an', 1), ('', 'cat', 0),
    ('low fat milk', ['milk', 'fat milk'], .8), ('Émile!', 'émile', 1), ('牛乳', '牛乳', 1), ("don't", 'dont', 1)])
def test_token_f1_by_hand(prediction, reference, f1): assert token_f1([prediction], [reference])[0] == pytest.approx(f1)


@pytest.mark.parametrize('stemmer', [False, True])
def test_rouge_is_rouge_score(stemmer):
    from rouge_score.rouge_scorer import RougeScorer
    types = ['rouge1', 'rouge2', 'rougeL', 'rougeLsum']
    scorer = RougeScorer(types, use_stemmer=stemmer)
    direct = [scorer.score_multi(r if isinstance(r, list) else [r], p) for p, r in zip(TEXTS, REFS)]
    ours = M.rouge(TEXTS, REFS, stemmer=stemmer)
    for t in types:
        assert ours[t].tolist() == [d[t].fmeasure for d in direct] == per_sample(t, TEXTS, REFS, stemmer=stemmer).tolist()
    assert load_metric('rouge', stemmer=stemmer).compute(predictions=TEXTS, references=REFS) == pytest.approx(ours.mean().to_dict())


def test_rouge_tokenisers():
    assert per_sample('rouge1', ['牛乳 牛乳'], ['牛乳 牛乳']).tolist() == [0]       # as published: a-z and 0-9
    assert per_sample('rouge1', ['牛乳 牛乳'], ['牛乳 牛乳'], tokenizer='unicode').tolist() == [1]
    with pytest.raises(LabError, match='tokenizer is'): per_sample('rouge1', ['a'], ['a'], tokenizer='spacy')
    with pytest.raises(LabError, match='no type "rougeX"'): M.rouge(['a'], ['a'], types=['rougeX'])
    assert M.rouge(['a b c d'], ['a b c d'], types=['rouge3'])['rouge3'].tolist() == [1]


@pytest.mark.parametrize('options', [{}, {'word_order': 2}, {'char_order': 4, 'beta': 3}])
def test_chrf_is_sacrebleu(options):
    from sacrebleu.metrics import CHRF
    assert statistic('chrf', **options)(TEXTS, REFS) == pytest.approx(CHRF(**options).corpus_score(TEXTS, streams(REFS)).score)
    direct = [CHRF(**options).sentence_score(p, r if isinstance(r, list) else [r]).score for p, r in zip(TEXTS, REFS)]
    assert sentence_chrf(TEXTS, REFS, **options) == pytest.approx(direct)
    assert load_metric('sentence_chrf', **options).compute(predictions=TEXTS, references=REFS)['sentence_chrf'] == pytest.approx(np.mean(direct))


@pytest.mark.parametrize('options', [{}, {'lowercase': True}, {'tokenize': 'char'}, {'max_ngram_order': 2}])
def test_bleu_is_sacrebleu(options):
    from sacrebleu.metrics import BLEU
    direct = BLEU(**options).corpus_score(TEXTS, streams(REFS)).score
    assert statistic('bleu', **options)(TEXTS, REFS) == pytest.approx(direct)
    assert load_metric('bleu', **options).compute(predictions=TEXTS, references=REFS)['bleu'] == pytest.approx(direct)


def test_bleu_of_nothing_in_common_is_zero(): assert statistic('bleu')(['a'], ['b']) == 0


@pytest.mark.parametrize('zero_division', [0., 1., math.nan])
@pytest.mark.parametrize('classes', [LABELS, [*LABELS, 'FLORAL'], None])
def test_macro_f1_is_scikit_learns(labels, classes, zero_division):
    from sklearn.metrics import f1_score
    said, truth = labels
    direct = f1_score(truth, said, labels=classes, average='macro', zero_division=zero_division)
    assert statistic('macro_f1', labels=classes, zero_division=zero_division)(said, truth) == pytest.approx(direct)


def test_macro_f1_by_hand():
    said, truth = list('aabbx'), list('abbca')            # a: 1 hit, 2 said, 2 true; b: 1, 2, 2; c: 0, 0, 1
    assert statistic('macro_f1', labels=list('abc'))(said, truth) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert statistic('macro_f1', labels=list('abcd'))(said, truth) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert statistic('macro_f1', labels=list('abcd'), zero_division=0)(said, truth) == pytest.approx(1 / 4)
    assert statistic('macro_f1')(said, truth) == pytest.approx((1 / 2 + 1 / 2 + 0 + 0) / 4)   # x became a class
    assert statistic('macro_f1')(['x'], ['a']) == 0


def test_accuracy_of_numbers_texts_and_several_answers():
    assert M.accuracy([1, 2, 3], [1, [2, 4], [5]]).tolist() == [1, 1, 0]
    assert M.accuracy(np.array([True, False]), [1, 1]).tolist() == [1, 0]
    assert M.accuracy(pd.Categorical(['é', 'b']), pd.Series(['é', 'c'])).tolist() == [1, 0]


def test_confusion(labels):
    from sklearn.metrics import confusion_matrix
    said, truth = labels
    table = confusion(said, truth, labels=LABELS)
    assert (table[LABELS].to_numpy() == confusion_matrix(truth, said, labels=LABELS)).all()
    assert table['(other)'].sum() == (said == 'something else').sum() and table.to_numpy().sum() == 300
    assert '(other)' not in confusion(truth, truth, labels=LABELS)
    assert confusion(said, truth).columns.tolist() == sorted(set(said))
    assert load_metric('confusion', labels=LABELS).compute(predictions=said, references=truth)['confusion'].equals(table)


# --- weights ---

@pytest.mark.parametrize('name', ['accuracy', 'macro_f1', 'token_f1', 'bleu', 'chrf', 'rougeL'])
def test_weights_are_repeated_samples(name, labels):
    said, truth = (x.tolist() for x in labels)
    if name not in ('accuracy', 'macro_f1'): said, truth = TEXTS * 3, REFS * 3
    f, rng = statistic(name), np.random.default_rng(1)
    weights = rng.integers(0, 3, (5, len(said)))
    by_hand = [f([said[i] for i in idx], [truth[i] for i in idx]) for idx in (np.repeat(np.arange(len(said)), w) for w in weights)]
    assert f(said, truth, weights=weights) == pytest.approx(by_hand)
    assert f(said, truth, weights=weights[0]) == pytest.approx(by_hand[0])


def test_per_sample_values_average_to_the_metric():
    for name in ('exact_match', 'token_f1', 'rouge1', 'rougeLsum', 'sentence_chrf'):
        values = per_sample(name, TEXTS, REFS)
        assert values.shape == (len(TEXTS),) and load_metric(name).compute(predictions=TEXTS, references=REFS)[name] == pytest.approx(values.mean()) == pytest.approx(statistic(name)(TEXTS, REFS))
    assert all(per_sample(n, LABELS, LABELS) is None for n in ('macro_f1', 'bleu', 'chrf', 'confusion'))


# --- evaluate ---

@pytest.mark.parametrize('name', [n for n in M.specs])
def test_every_metric_is_an_evaluate_metric(name):
    import evaluate
    metric = load_metric(name)
    assert isinstance(metric, evaluate.Metric) and metric.name == name and metric.info.description
    same = ['the milk is in the cold aisle', 'bread stands next to the till']
    result = metric.compute(predictions=same, references=same)
    assert tuple(result) == M.specs[name].results
    if name != 'confusion': assert list(result.values()) == pytest.approx([M.specs[name].scale] * len(result))


def test_classes_import_by_name():
    for s in M.specs.values():
        cls = getattr(importlib.import_module('genai_lab.metrics'), s.cls)
        assert pickle.loads(pickle.dumps(cls)) is cls and type(load_metric(s.name)) is cls
    from genai_lab.metrics import BLEU, CHRF, ROUGE, Accuracy, Confusion, ExactMatch, MacroF1, TokenF1
    assert {BLEU, CHRF, ROUGE, Accuracy, Confusion, ExactMatch, MacroF1, TokenF1} <= {type(load_metric(n)) for n in M.specs}
    assert ExactMatch(ignore_case=True).compute(predictions=['A'], references=['a']) == {'exact_match': 1}
    with pytest.raises(AttributeError): M.Perplexity


def test_combine_prefixes_and_streams():
    import evaluate
    both = evaluate.combine({'strict': load_metric('exact_match'), 'lax': load_metric('exact_match', ignore_case=True)})
    assert both.compute(predictions=['A', 'b'], references=['a', 'b']) == {'strict_exact_match': .5, 'lax_exact_match': 1}
    both = evaluate.combine([load_metric('accuracy'), load_metric('macro_f1'), load_metric('token_f1')])
    for p, r in zip(['a', 'b'], ['a', 'a']): both.add(prediction=p, reference=r)
    both.add_batch(predictions=['b'], references=['b'])
    assert both.compute() == pytest.approx({'accuracy': 2 / 3, 'macro_f1': 2 / 3, 'token_f1': 2 / 3})


def test_two_at_once_do_not_mix():
    a, b = load_metric('exact_match'), load_metric('exact_match')
    a.add(prediction='x', reference='x'); b.add(prediction='x', reference='y'); a.add(prediction='z', reference='z')
    assert (a.compute(), b.compute()) == ({'exact_match': 1}, {'exact_match': 0})
    assert a.compute(predictions=['p'], references=['q']) == {'exact_match': 0}      # and can be used again
    with pytest.raises(LabError, match='nothing to score'): a.compute()


def test_options_for_one_call_and_references_in_lists():
    m = load_metric('exact_match')
    assert m.compute(predictions=['A'], references=['a'], ignore_case=True) == {'exact_match': 1}
    assert m.compute(predictions=['A'], references=['a']) == {'exact_match': 0}
    assert m.compute(predictions=['b', 'c'], references=[['a', 'b'], 'c']) == {'exact_match': 1}
    assert load_metric('accuracy').compute(predictions=[1, 2], references=[[1, 3], [4]]) == {'accuracy': .5}


def test_files_only_when_asked_for(tmp_path):
    m = load_metric('accuracy', keep_in_memory=False, cache_dir=str(tmp_path))
    m.add_batch(predictions=['a'], references=['a'])
    assert list(tmp_path.rglob('*.arrow'))
    assert m.compute() == {'accuracy': 1}
    assert not list(tmp_path.rglob('*.arrow'))


OFFLINE = '''
import socket, sys
def refuse(*a, **k): raise SystemExit('tried to reach ' + repr(a[1:]))
socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = refuse
from genai_lab.metrics import load_metric, specs
assert 'evaluate' not in sys.modules and 'torch' not in sys.modules and 'sklearn' not in sys.modules
import evaluate
for name in specs: load_metric(name).compute(predictions=['milk', 'bread'], references=['milk', 'bred'])
print(evaluate.combine([load_metric('accuracy'), load_metric('rouge')]).compute(predictions=['a'], references=['a']))
'''


def test_offline_and_without_a_trace(tmp_path):
    home = tmp_path / 'home'
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'XDG_', 'NLTK'))}
    env |= dict(HOME=str(home), HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', PYTHONDONTWRITEBYTECODE='1',
                **{k: 'http://127.0.0.1:9' for k in ('HTTP_PROXY', 'HTTPS_PROXY', 'http_proxy', 'https_proxy')})
    r = subprocess.run([sys.executable, '-c', OFFLINE], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
    assert r.returncode == 0, r.stderr[-2000:] + r.stdout
    assert "'accuracy': 1.0" in r.stdout
    left = [p.relative_to(home).as_posix() for p in home.rglob('*')]
    assert not left, left


# --- bad input ---

@pytest.mark.parametrize('call, says', [
    (lambda: load_metric('acuracy'), 'Did you mean "accuracy"'),
    (lambda: load_metric('exact_match', ignorecase=True), 'Did you mean "ignore_case"'),
    (lambda: load_metric('accuracy', labels=['a']), 'It has none'),
    (lambda: load_metric('rouge1', types=['rouge1']), 'no option "types"'),
    (lambda: load_metric('accuracy').compute(predictions=[], references=[]), 'nothing to score'),
    (lambda: load_metric('accuracy').compute(), 'nothing to score'),
    (lambda: load_metric('accuracy').compute(predictions=['a'], references=['a', 'b']), '1 prediction but 2 references'),
    (lambda: load_metric('accuracy').compute(predictions=['a', None], references=['a', 'b']), '1 prediction of 2 missing'),
    (lambda: load_metric('accuracy').compute(predictions=['a'], references=['a'], labels=['a']), 'no option "labels"'),
    (lambda: load_metric('accuracy').add(prediction=None, reference='a'), 'missing'),
    (lambda: per_sample('token_f1', ['a', math.nan], ['a', 'b']), '1 prediction of 2 missing'),
    (lambda: per_sample('token_f1', pd.Series(['a', pd.NA]), ['a', 'b']), '1 prediction of 2 missing'),
    (lambda: per_sample('token_f1', ['a', 'b'], ['a', []]), '1 reference of 2 missing'),
    (lambda: per_sample('token_f1', ['a', 'b'], ['a', ['b', None]]), '1 reference of 2 missing'),
    (lambda: per_sample('token_f1', 'abc', ['a']), 'in a list'),
    (lambda: per_sample('rouge', ['a'], ['a']), 'ask for one of rouge1'),
    (lambda: statistic('confusion'), 'is a table'),
    (lambda: statistic('rouge'), 'several values'),
    (lambda: M.accuracy(['1'], [1]), 'could never be equal'),
    (lambda: statistic('macro_f1', labels=['a'])(['a'], ['b']), 'reference "b" is not among the 1 label'),
    (lambda: statistic('macro_f1', labels=['dairy', 'meat'])(['meat'], ['diary']), 'Did you mean "dairy"'),
    (lambda: statistic('macro_f1', labels=['a', 'a'])(['a'], ['a']), 'different from each other'),
    (lambda: statistic('macro_f1')(['a'], [['a', 'b']]), 'exactly one reference')])
def test_mistakes_are_one_line(call, says):
    with pytest.raises(LabError, match=says) as e: call()
    assert '\n' not in str(e.value)


def test_the_list_of_metrics_is_complete():
    df = list_metrics()
    assert set(df.name) == set(M.specs) and df.about.str.len().min() > 5

"Selectors: what is picked, that it never is the question itself, and what they say to nonsense."
import math, warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from genai_lab.data import find_leaks, normal_form, retail_departments
from genai_lab.embeddings import embed
from genai_lab.fewshot import (bm25_examples, fixed_examples, kinds, mmr_examples, nearest_examples, pieces, random_examples, selector_from, similar)
from genai_lab.prompts import EmptyValue, Prompt, load_prompt, save_prompt
from genai_lab.tasks import Task
from test_embeddings import wrong


@pytest.fixture(scope='module')
def pool(): return retail_departments(4, per_department=30, seed=5)[['product', 'label']]


@pytest.fixture(scope='module')
def asked(): return [dict(product=p) for p in retail_departments(8, per_department=20, seed=6)['product']]


def make(kind, pool, k=4, **how): return kinds[kind](pool, k=k, label='label', seed=3, **how)


@pytest.mark.parametrize('kind', kinds)
def test_the_question_and_its_near_duplicates_are_never_shown(kind, pool):
    twins = pd.DataFrame(dict(product=[pool['product'][7].upper() + ' !', pool['product'][7] + '.', '  ' + pool['product'][9]], label='Grocery'))
    s = make(kind, pd.concat([twins, pool, twins.assign(label='Produce')]))
    rows = pool.to_dict('records')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        s.prepare(rows)
        shown = pd.DataFrame([dict(asked=r['product'], shown=e['product']) for r in rows for e in s.pick(r)])
    assert not any(similar(pieces(normal_form(a)), pieces(normal_form(b))) for a, b in shown.itertuples(index=False))
    pairs = {(a, b) for a, b in find_leaks(pool, pool, 'product')[['text_a', 'text_b']].itertuples(index=False)}
    assert pairs and not pairs & set(shown.itertuples(index=False, name=None))


def test_near_duplicates_are_those_of_find_leaks(pool):
    texts = [*pool['product'], *(p.lower().replace(' ', '  ') for p in pool['product'][:20]), *(p + 's' for p in pool['product'][:40])]
    keys = [pieces(normal_form(t)) for t in texts]
    for threshold in (.5, .8, 1):
        want = {frozenset(p) for p in find_leaks(pd.DataFrame(dict(t=texts)), pd.DataFrame(dict(t=texts)), 't', threshold)[['text_a', 'text_b']].itertuples(index=False)}
        got = {frozenset((texts[i], texts[j])) for i in range(len(texts)) for j in range(len(texts)) if similar(keys[i], keys[j], threshold)}
        forms = lambda pairs: {frozenset(map(normal_form, p)) for p in pairs}
        assert forms(got) == forms(want)


@pytest.mark.parametrize('kind', kinds)
def test_picks_do_not_depend_on_order_or_on_other_questions(kind, pool, asked):
    alone = [make(kind, pool).pick(q) for q in asked[:12]]
    s = make(kind, pool).prepare(asked)
    assert [s.pick(q) for q in asked[:12]] == alone
    s.prepare(asked[::-1])
    assert [s.pick(q) for q in asked[:12]] == alone
    assert all(len(a) == 4 * (4 if kind == 'balanced' else 1) for a in alone)
    assert [r for a in alone for r in a if r not in pool.to_dict('records')] == []


def test_draws_follow_from_the_seed_and_the_question(pool, asked):
    a, b = (random_examples(pool, k=4, label='label', seed=s) for s in (1, 2))
    picks = [[r['product'] for r in s.pick(q)] for s in (a, b) for q in asked[:20]]
    assert len(set(map(tuple, picks))) == 40
    counts = Counter(r['product'] for q in asked for r in a.pick(q))
    assert len(counts) > 100                                       # nobody is left out


def test_the_nearest_are_those_of_brute_force_and_stand_last(pool, asked):
    s, v, q = nearest_examples(pool, k=5, label='label', threshold=1), embed(pool['product']), embed([a['product'] for a in asked[:30]])
    for a, sims in zip(asked[:30], q @ v.T):
        order = [pool['product'][i] for i in np.argsort(-sims, kind='stable') if pieces(normal_form(pool['product'][i])) != pieces(normal_form(a['product']))]
        assert [r['product'] for r in s.pick(a)] == order[:5][::-1]


def test_equally_near_rows_come_in_the_order_of_the_pool():
    rows = [dict(q='black tea', label=str(i)) for i in range(6)] + [dict(q='green tea', label='g')]
    for kind in ('nearest', 'bm25', 'mmr'):
        s = kinds[kind](rows, k=3, label='label', columns='q', order='first')
        assert [r['label'] for r in s.pick(dict(q='black teas from Ceylon'))][:1] == ['0']
    assert [r['label'] for r in nearest_examples(rows, k=3, label='label', order='first').pick(dict(q='black teas from Ceylon'))] == ['0', '1', '2']


def test_orders(pool, asked):
    first, last, mixed = (nearest_examples(pool, k=6, label='label', order=o, seed=1) for o in ('first', 'last', 'shuffled'))
    for q in asked[:10]: assert first.pick(q) == last.pick(q)[::-1]
    assert any(mixed.pick(q) not in (first.pick(q), last.pick(q)) for q in asked[:5])
    assert all(sorted(map(str, mixed.pick(q))) == sorted(map(str, first.pick(q))) for q in asked[:10])
    assert fixed_examples(pool, k=3, label='label').pick(asked[0]) == pool.head(3).to_dict('records')


@pytest.mark.parametrize('kind', kinds)
def test_so_many_of_each_label(kind, pool, asked):
    s = make(kind, pool, k=2, **({} if kind == 'balanced' else dict(per_label=True)))
    for q in asked[:8]: assert set(Counter(r['label'] for r in s.pick(q)).values()) == {2} and len(s.pick(q)) == 8
    if kind == 'nearest':
        one = nearest_examples(pool[pool.label == 'Produce'], k=2, label='label')
        assert [r for r in s.pick(asked[3]) if r['label'] == 'Produce'] == one.pick(asked[3])


def test_maximal_marginal_relevance_as_in_the_paper(pool, asked):
    s = mmr_examples(pool, k=5, label='label', relevance=.6, fetch=20, order='first')
    v = embed(pool['product'])
    for a in asked[:15]:
        q = embed(a['product'])[0]
        mine = pieces(normal_form(a['product']))
        among = [i for i in np.argsort(-np.round((v @ q).astype(float), 6), kind='stable')[:20] if not similar(mine, pieces(normal_form(pool['product'][i])))]
        out = []
        while len(out) < 5:
            worth = {i: .6 * v[i] @ q - .4 * max([v[i] @ v[j] for j in out], default=0) for i in among if i not in out}
            out.append(max(worth, key=lambda i: (round(float(worth[i]), 5), -among.index(i))))
        assert [r['product'] for r in s.pick(a)] == [pool['product'][i] for i in out]


def test_bm25_is_the_formula(pool):
    s = bm25_examples(pool, k=len(pool) - 5, label='label', order='first', threshold=1)
    docs = [normal_form(p).split() for p in pool['product']]
    mean = np.mean([len(d) for d in docs])
    def score(q, d):
        out = 0
        for w in q:
            n, tf = sum(w in x for x in docs), d.count(w)
            out += math.log(1 + (len(docs) - n + .5) / (n + .5)) * tf * 2.5 / (tf + 1.5 * (.25 + .75 * len(d) / mean))
        return out
    for q in ('Frozen cheese pizza frozen', 'soap bar', 'nothing of this kind'):
        want = sorted(range(len(docs)), key=lambda i: (-round(score(normal_form(q).split(), docs[i]), 6), i))[:len(pool) - 5]
        assert [r['product'] for r in s.pick(dict(product=q))] == [pool['product'][i] for i in want]


def test_a_budget_of_tokens_drops_the_least_useful(pool, asked, model):
    s = nearest_examples(pool, k=8, label='label', max_tokens=40, count=model, shown='Product: {{ product }}\nDepartment: {{ label }}\n\n', order='first')
    whole = nearest_examples(pool, k=8, label='label', order='first')
    sizes = set()
    for q in asked[:20]:
        got = s.pick(q)
        used = [model.count_tokens(f"Product: {r['product']}\nDepartment: {r['label']}\n\n") for r in whole.pick(q)]
        assert got == whole.pick(q)[:len(got)] and sum(used[:len(got)]) <= 40
        assert len(got) == 8 or sum(used[:len(got) + 1]) > 40
        sizes.add(len(got))
    assert len(sizes) > 1 and not s.notes
    assert s.fingerprint != whole.fingerprint
    assert selector_from(s.to_dict()) == s


# identity and files

def test_the_fingerprint_covers_pool_kind_options_and_model(pool):
    base = dict(k=3, label='label', seed=1)
    variants = [nearest_examples(pool, **base), nearest_examples(pool.head(119), **base), nearest_examples(pool.iloc[::-1], **base), nearest_examples(pool, **{**base, 'k': 4}), nearest_examples(pool, **{**base, 'seed': 2}),
                nearest_examples(pool, order='first', **base), nearest_examples(pool, threshold=.7, **base), nearest_examples(pool, dtype='bfloat16', **base), nearest_examples(pool, per_label=True, **base),
                nearest_examples(pool, max_tokens=50, count=len, **base), mmr_examples(pool, **base), mmr_examples(pool, relevance=.7, **base), bm25_examples(pool, **base), bm25_examples(pool, k1=2, **base), random_examples(pool, **base)]
    assert len({s.fingerprint for s in variants}) == len(variants)
    assert nearest_examples(pool.to_dict('records'), **base).fingerprint == variants[0].fingerprint


@pytest.mark.parametrize('kind', kinds)
def test_a_prompt_with_a_selector_survives_a_file(kind, pool, asked, tmp_path):
    p = Prompt('{{ product }}:', examples=make(kind, pool.head(40), k=1), answer='{{ label }}', name='shelf')
    save_prompt(p, tmp_path / 'p.yaml')
    again = load_prompt(tmp_path / 'p.yaml')
    assert again.fingerprint == p.fingerprint and [again.text(q) for q in asked[:3]] == [p.text(q) for q in asked[:3]]


def test_a_pool_in_a_file_is_named_not_copied_and_may_not_change(pool, tmp_path):
    pool.to_csv(tmp_path / 'pool.csv', index=False)
    s = bm25_examples(str(tmp_path / 'pool.csv'), k=2, label='label')
    assert s.to_dict()['pool'] == str(tmp_path / 'pool.csv') and selector_from(s.to_dict()) == s
    pool.head(50).to_csv(tmp_path / 'pool.csv', index=False)
    wrong(lambda: selector_from(s.to_dict()), 'pool.csv', 'has changed')
    assert selector_from({k: v for k, v in s.to_dict().items() if k != 'pool_fingerprint'}) != s


def test_rendering_an_example_twice_gives_the_same_bytes(pool, asked):
    s = nearest_examples(pool, k=4, label='label')
    p = Prompt('{{ product }} of {{ choices | join("/") }}:', examples=s, answer='{{ label }}')
    for choices in (['a', 'b'], ['b', 'a'], [1, 0], [True, False], ['a', 'b']):
        for q in asked[:4]:
            row = {**q, 'choices': choices}
            assert p.text(row) == replace(p).text(row) == replace(p, examples=s.pick(row)).text(row)
            assert p.messages(row) == replace(p, examples=s.pick(row)).messages(row)
    kinds_of = Prompt('{{ n }}', examples=[dict(n=n, a='x') for n in (1, True, 1.0, '1', -0.0, 0.0)], answer='{{ a }}')
    assert [t.split()[0] for t in kinds_of.text(dict(n=2)).split('\n\n')] == ['1', 'True', '1.0', '1', '-0.0', '0.0', '2']


def test_a_task_may_take_its_examples_from_its_own_rows(pool):
    p = Prompt('{{ product }}:', examples=nearest_examples(pool, k=3, label='label'), answer=' {{ label }}')
    task = Task('own', pool.head(30), p, 'label', choices=sorted(set(pool.label)))
    samples = task.samples()
    assert not any(s.error for s in samples) and all(s.prompt.count('\n\n') == 3 for s in samples)
    blank = replace(task, data=pd.DataFrame(dict(product=['', 'Pears'], label=['Produce', 'Produce']))).samples()
    assert 'no text' in blank[0].error and not blank[1].error


# nonsense

rows = [dict(q='red wine', label='wine'), dict(q='white wine', label='wine'), dict(q='rye bread', label='bread')]

@pytest.mark.parametrize('how, parts', [
    (dict(columns='question'), ['no column "question"', 'There are: q, label']),
    (dict(label='lable'), ['no column "lable"', 'Did you mean "label"?']),
    (dict(k=4, label='label'), ['4 examples are asked for', '3 rows']),
    (dict(k=0), ['k=0']), (dict(k='two'), ["k='two'"]), (dict(k=True), ['k=True']),
    (dict(k=2, label='label', per_label=True), ['2 examples of each label', '1 row of "bread"']),
    (dict(k=1, label='label', per_label=True, labels=['wine', 'bread', 'cheese']), ['0 rows of "cheese"']),
    (dict(per_label=True, k=1, columns='q'), ['label=']),
    (dict(k=1, label='label', labels=['wine', 'breads']), ['label "bread"', '1 row', 'Did you mean "breads"?']),
    (dict(k=1, labels=['wine'], columns='q'), ['label=']),
    (dict(ordr='last'), ['no option "ordr"', 'Did you mean "order"?']),
    (dict(order='middle'), ['order="middle"', 'last, first, shuffled']),
    (dict(threshold=0), ['threshold=0', '0 to 1']), (dict(threshold=1.2), ['1.2']),
    (dict(k=1, label='label', max_tokens=2, count=len), ['max_tokens=2', 'the shortest has 13 tokens']),
    (dict(k=1, label='label', max_tokens=-5, count=len), ['max_tokens=-5']),
    (dict(k=1, label='label', max_tokens=50, count=7), ['count', 'int']),
    (dict(k=1, label='label', max_tokens=50, count=len, shown='{{ nothing }}'), ['nothing', 'q, label']),
    (dict(), ['columns=', 'q, label'])])
def test_options_that_make_no_sense(how, parts): wrong(lambda: fixed_examples(rows, **{'k': 2, **how}), 'fixed_examples', *parts)


@pytest.mark.parametrize('make, parts', [
    (lambda: fixed_examples([], k=1), ['no rows']),
    (lambda: fixed_examples([*rows, dict(q=None, label='x')], k=1, label='label'), ['1 row', 'no text in "q"', 'row 4']),
    (lambda: fixed_examples([*rows, dict(q='gin', label=None)], k=1, label='label'), ['"gin"', 'no label']),
    (lambda: fixed_examples(rows * 2, k=4, label='label'), ['3 distinct rows']),
    (lambda: mmr_examples(rows, k=2, label='label', relevance=2), ['relevance=2']),
    (lambda: mmr_examples(rows, k=2, label='label', fetch=1), ['fetch=1']),
    (lambda: bm25_examples(rows, k=2, label='label', k2=1), ['no option "k2"', 'seed, k1, b']),
    (lambda: nearest_examples(rows, k=1, label='label', model='smollm2-135m').pick(dict(q='x')), ['no embedding model']),
    (lambda: nearest_examples(rows, k=1, label='label', model='minilm').pick(dict(q='x')), ['there is no model "minilm"']),
    (lambda: nearest_examples(rows, k=1, label='label').pick(dict(query='x')), ['the question has no "q"', 'query']),
    (lambda: nearest_examples(rows, k=1, label='label', max_tokens=90, count=len).to_dict(), ['function', 'name a model']),
    (lambda: selector_from(dict(select='neerest', pool=rows)), ['no selector "neerest"', 'Did you mean "nearest"?']),
    (lambda: selector_from(dict(select='fixed', k=1)), ['"pool" is missing'])])
def test_pools_and_questions_that_make_no_sense(make, parts): wrong(make, *parts)


@pytest.mark.parametrize('kind', ['nearest', 'mmr', 'bm25'])
@pytest.mark.parametrize('text', ['', '   ', None, float('nan')])
def test_a_question_without_text_has_no_neighbours(kind, text):
    s = kinds[kind](rows, k=1, label='label')
    with pytest.raises(EmptyValue, match='no text in "q"'): s.prepare([dict(q=text), dict(q='port')]).pick(dict(q=text))
    assert random_examples(rows, k=1, label='label').pick(dict(q=text))


def test_fewer_than_asked_because_of_near_duplicates_is_said_once():
    s = nearest_examples(rows, k=3, label='label')
    with pytest.warns(UserWarning, match='fewer examples than 3.*"Red wine!", with 2') as said:
        assert len(s.pick(dict(q='Red wine!'))) == 2 and len(s.pick(dict(q='RYE BREAD'))) == 2
    assert len([w for w in said if 'fewer' in str(w.message)]) == 1 and len(s.notes) == 1

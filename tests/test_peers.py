"Peers: how DSPy is asked, and that its model scores as ours does. DSPy itself is installed only where an environment variable asks for it."
import os
import sys

import pandas as pd
import pytest

from genai_lab.core import LabError
from genai_lab.evaluation import evaluate
from genai_lab.models import fetch_model, load_model
from genai_lab.peers import Peer, _LABELS, dspy_message, dspy_peer, dspy_prompt
from genai_lab.prompts import Prompt
from genai_lab.tasks import Task

shop = Prompt('Product: {{ product }}\nDepartment:', system='Departments of a shop: {{ choices | join(", ") }}.')
labels = ['Seafood', 'Floral', 'Frozen Grocery', 'Frozen']
names = {'Seafood': 'Trout Salmon Cod Shrimp Crab', 'Floral': 'Tulips Roses Lilies Orchids Daisies', 'Frozen Grocery': 'Pizza Peas Waffles Fries Nuggets', 'Frozen': 'Ice Sorbet Lolly Slush Cubes'}
rows = pd.DataFrame([dict(product=p, label=l) for l, ps in names.items() for p in ps.split()]).sample(frac=1, random_state=1).reset_index(drop=True)


@pytest.fixture(scope='module')
def float32(): return load_model('smollm2-135m', dtype='float32')


code = _LABELS + '''
import sys
model, plain = Labels(sys.argv[1], True), Labels(sys.argv[1], False)
def answer(m):
    if 'labels' in m: [x.use(m['labels'], ' ') for x in (model, plain)]; return None
    return dict(kept=[model.scores(t) for t in m['texts']], anew=[plain.scores(t) for t in m['texts']])
'''


def test_labels_are_scored_as_by_the_engine_whatever_prompts_have_in_common(tmp_path, float32):
    long = 'Product: Roses\nDepartment: Floral\n\n' * 3
    texts = [long + 'Product: Trout\nDepartment:', long + 'Product: Tulips and other flowers\nDepartment:', long + 'Product: Trout\nDepartment:', 'Product: Trout\nDepartment:',
             'Something else altogether:', long + 'Product: Trout\nDepartment:', long + 'Product: Trout\nDepartment:']
    with Peer(sys.executable, code, fetch_model('smollm2-135m'), log=tmp_path / 'labels.log', TQDM_DISABLE='1') as p:
        for some in (labels, ['A', 'B']):   # the second have no token behind the first one
            p.ask(dict(labels=some))
            got = p.ask(dict(texts=texts))
            want = [s.logprob for s in float32.loglikelihood([(t, ' ' + l) for t in texts for l in some])]
            for how in ('kept', 'anew'): assert [x for r in got[how] for x in r] == pytest.approx(want, abs=2e-3)


@pytest.mark.parametrize('change, said', [
    (dict(arm='copro'), 'there is no arm "copro"'), (dict(seed=0), 'takes the seed 0 for none'), (dict(prompt=Prompt('{{ product }}')), 'DSPy puts an instruction of its own'),
    (dict(train=rows[['label']]), 'uses "product", which the training rows does not have'), (dict(instructions=['For {{ shop }}']), 'there is no variable "shop"')])
def test_what_cannot_be_asked_is_refused(change, said):
    how = dict(arm='mipro', prompt=shop, train=rows, valid=rows, target='label', labels=labels, calls=10) | change
    with pytest.raises(LabError, match=said): dspy_message(**how)


def test_the_message_has_the_rows_and_every_instruction_once_with_its_labels():
    m = dspy_message('mipro', shop, rows[:2], rows[2:5], 'label', labels, 10, instructions=[shop.system, 'Sort.'], seed=3)
    assert m['instructions'] == ['Departments of a shop: Seafood, Floral, Frozen Grocery, Frozen.', 'Sort.']
    assert m['valid'] == rows[2:5].to_dict('records') and len(m['train']) == 2 and m['inputs'] == ['product'] and m['seed'] == 3


def test_what_was_found_becomes_a_prompt_and_braces_stay_braces():
    p = dspy_prompt(shop, dict(instruction='Answer as {{"department": x}}.', demos=rows[:1].to_dict('records')), name='found')
    first = rows.iloc[0]
    assert p.text(dict(product='Eel')) == f'Answer as {{{{"department": x}}}}.\n\nProduct: {first["product"]}\nDepartment: {first.label}\n\nProduct: Eel\nDepartment:'
    assert p.name == 'found'


@pytest.mark.skipif(not os.environ.get('GENAI_LAB_TEST_DSPY'), reason='DSPy takes minutes to install; GENAI_LAB_TEST_DSPY=1 does it')
def test_dspy_searches_within_its_calls_and_its_scores_are_ours(tmp_path, float32):
    train, valid = rows[:10], rows[10:]
    task = Task('valid', valid, target='label', choices=labels)
    with dspy_peer(fetch_model('smollm2-135m'), tmp_path) as p:
        for arm in ('labeled', 'random_search', 'mipro'):
            ask = dspy_message(arm, shop, train, valid, 'label', labels, calls=45, instructions=['Sort.'], demos=4, sets=4, minibatch=5, seed=2)
            a, again = p.ask(ask), p.ask(ask)
            assert all(a[k] == again[k] for k in ('instruction', 'demos', 'scores', 'calls', 'asked'))
            assert all(d in ask['train'] for d in a['demos']) and a['instruction'] in ask['instructions']
            if arm == 'labeled': assert a['calls'] == 0 and a['score'] is None and len(a['demos']) == 4; continue
            assert 45 <= a['calls'] <= a['asked'] and a['score'] == max(a['scores'])
            ours = evaluate(task, float32, dspy_prompt(shop, a), chat=False, progress=False)
            assert ours.metrics['accuracy'].value == pytest.approx(a['score'], abs=1e-4)

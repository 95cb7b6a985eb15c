"Rows for tuning: masks, the tokens that evaluation asks about, every check and every bad input."
import pandas as pd
import pytest

from genai_lab.core import LabError
from genai_lab.models import load_model
from genai_lab.prompts import Prompt
from genai_lab.scoring import encode_pairs
from genai_lab.tasks import Task
from genai_lab.tuning_data import tuning_data, turn_end

ask = Prompt('Which department sells {{ product }}?')
things = pd.DataFrame([dict(product=f'{how} {what}', department=d) for how in ('fresh', 'frozen', 'dried', 'sweet') for what, d in (('peas', 'Vegetables'), ('ham', 'Deli'), ('soap', 'Care'))])


def fails(f, *texts):
    with pytest.raises(LabError) as e: f()
    for t in texts: assert t in str(e.value), str(e.value)


def names(d, level=None): return {c.name for c in d.checks if level in (None, c.level)}


@pytest.fixture(scope='module')
def m(): return load_model('smollm2-135m')


@pytest.fixture(scope='module')
def bare(m, tmp_path_factory):
    "A model whose folder has a tokenizer and no chat template."
    import json
    import shutil
    folder = tmp_path_factory.mktemp('bare') / 'bare'
    folder.mkdir()
    for f in m.folder.iterdir():
        if f.suffix != '.safetensors' and f.name != 'chat_template.jinja' and f.is_file() and f.name[0] != '.': shutil.copy(f, folder)
    c = json.loads((folder / 'tokenizer_config.json').read_text())
    c.pop('chat_template', None)
    (folder / 'tokenizer_config.json').write_text(json.dumps(c))
    from transformers import LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=64)).save_pretrained(folder)
    return load_model(folder)


def learned(d, i=0): return d.tokenizer.decode([t for t, l in zip(d.train[i].ids, d.train[i].loss) if l])


# masks

def test_the_answer_and_its_end_are_learned_and_nothing_else(m):
    d = tuning_data(things, m, prompt=ask, completion='department')
    assert [learned(d, i) for i in range(3)] == ['Vegetables<|im_end|>', 'Deli<|im_end|>', 'Care<|im_end|>']
    assert turn_end(m, True) == [2] and d.train[0].ids[-1] == 2


def test_training_tokens_are_those_that_evaluation_asks_about(m):
    task = Task('t', things, ask, 'department', choices=('Vegetables', 'Deli', 'Care'))
    for chat in (True, False):
        d = tuning_data(task, m, chat=chat)
        for e, s in zip(d.train, task.samples(ask, chat)):
            prompt = m.render(s.prompt) if chat else s.prompt
            (ctx, cont), = encode_pairs(m.tokenizer, [(prompt, s.continuations[s.choices.index(s.target)])])
            assert [*ctx, *cont] == list(e.ids[:-1])


def test_plain_prompts_end_with_the_end_of_text(bare):
    d = tuning_data(things, bare, prompt='product', completion='department')
    assert learned(d) == ' Vegetables' + bare.tokenizer.eos_token and d.train[0].text == 'fresh peas Vegetables'


def test_every_turn_of_the_assistant_is_learned(m):
    talk = [dict(role='system', content='Be brief.'), dict(role='user', content='Ice?'), dict(role='assistant', content='Frozen.'), dict(role='user', content='Ham?'), dict(role='assistant', content='Deli.')]
    d = tuning_data(pd.DataFrame(dict(talk=[talk, talk[:3]])), m, messages='talk')
    assert learned(d) == 'Frozen.<|im_end|>Deli.<|im_end|>' and learned(d, 1) == 'Frozen.<|im_end|>'
    assert '[Frozen.<|im_end|>]' in repr(d.show_masks(1)) and 'Be brief' in repr(d.show_masks(1))


def test_special_tokens_in_the_data_are_broken(m):
    d = tuning_data(pd.DataFrame(dict(talk=[[dict(role='user', content='a<|im_end|>b'), dict(role='assistant', content='c')], [dict(role='user', content='x'), dict(role='assistant', content='y')]])), m, messages='talk')
    assert d.train[0].ids.count(2) == 3   # system, user, assistant


def test_masks_show_special_tokens_and_escape(m):
    d = tuning_data(things.replace('fresh peas', '<b>peas'), m, prompt=ask, completion='department')
    page = d.show_masks(1)._repr_html_()
    assert '<b>' not in page and '&lt;' in page and 'outline' in page and '#bde5bd' in page
    fails(lambda: d.show_masks(rows=[99]), 'no row 99')


def test_running_text_learns_everything_and_is_split_where_asked(m):
    texts = pd.DataFrame(dict(text=['one two three four five six seven eight nine ten ' * 4, 'short']))
    fails(lambda: tuning_data(texts, m, text='text', max_length=20), 'longer than 20 tokens', 'rows 0', 'drop')
    d = tuning_data(texts, m, text='text', max_length=20, too_long='split')
    assert all(len(e) <= 20 and all(e.loss) for e in d.train) and sum(map(len, d.train)) == len(m.tokenizer(texts.text[0])['input_ids']) + len(m.tokenizer('short')['input_ids']) + 2
    assert list(d.dropped.values()) == [1]


# checks

def test_nothing_is_cut_in_silence(m):
    long = pd.concat([things, pd.DataFrame([dict(product='peas ' * 60, department='Deli')])])
    fails(lambda: tuning_data(long, m, prompt=ask, completion='department', max_length=60), '1 training row is longer than 60 tokens', 'rows 12')
    d = tuning_data(long, m, prompt=ask, completion='department', max_length=60, too_long='drop')
    assert len(d.train) == 12 and 'left out' in str(d.describe())
    d = tuning_data(long, m, prompt=ask, completion='department', max_length=60, too_long='cut')
    assert len(d.train[12]) == 60 and learned(d, 12) == 'Deli<|im_end|>' and 'cut on the left' in str(d.describe())
    fails(lambda: tuning_data(long.assign(department='Deli ' * 80), m, prompt=ask, completion='department', max_length=60, too_long='cut'), 'alone has')
    fails(lambda: tuning_data(long, m, prompt=ask, completion='department', too_long='cutt'), 'Did you mean "cut"?')


def test_evaluation_rows_inside_the_training_rows(m):
    both = things.iloc[[0, 5]].assign(product=['Fresh  PEAS!', 'frozen soap'])
    fails(lambda: tuning_data(things, m, prompt=ask, completion='department', eval=both), '2 evaluation rows stand in the training rows word for word', 'leaks="drop"')
    d = tuning_data(things, m, prompt=ask, completion='department', eval=both, leaks='drop')
    assert len(d.train) == 10 and not {'fresh peas', 'frozen soap'} & set(d.frame['product']) and list(d.dropped.values()) == [2]
    assert 'leak' in names(tuning_data(things, m, prompt=ask, completion='department', eval=both, allow=('leak',)), 'error')
    talks = lambda f: pd.DataFrame(dict(talk=[[dict(role='user', content=p), dict(role='assistant', content=c)] for p, c in f.values]))
    fails(lambda: tuning_data(talks(things), m, messages='talk', eval=talks(both)), 'word for word')


def test_near_duplicates_are_warned_of(m):
    near = pd.DataFrame([dict(product='frozen garden peas in the large family pack', department='Vegetables')])
    train = pd.concat([things, near.assign(product='frozen garden peas in a large family pack')])
    assert 'near leak' in names(tuning_data(train, m, prompt=ask, completion='department', eval=near), 'warning')
    assert len(tuning_data(train, m, prompt=ask, completion='department', eval=near, leaks='drop').train) == 12


def test_a_share_is_held_out_without_leaks(m):
    d = tuning_data(pd.concat([things, things]), m, prompt=ask, completion='department', eval=.25)
    assert len(d.train) + len(d.eval) == 24 and not set(d.frame['product']) & set(d.eval_frame['product'])


def test_all_the_same_and_one_class_only(m):
    fails(lambda: tuning_data(things.iloc[[0] * 5], m, prompt=ask, completion='department'), 'all 5 training rows are the same')
    fails(lambda: tuning_data(things.assign(department='Deli'), m, prompt=ask, completion='department'), 'one class only', 'allow=("one class",)')
    assert 'one class' in names(tuning_data(things.assign(department='Deli'), m, prompt=ask, completion='department', allow=('one class',)))


def test_duplicates_contradictions_balance_and_unseen_labels(m):
    odd = pd.concat([things, things.iloc[:2], things.iloc[:1].assign(department='Deli')])
    assert {'duplicates', 'contradictions'} <= names(tuning_data(odd, m, prompt=ask, completion='department'), 'warning')
    lop = pd.DataFrame(dict(product=[f'thing {i}' for i in range(40)], department=['Deli'] * 39 + ['Care']))
    assert 'balance' in names(tuning_data(lop, m, prompt=ask, completion='department'), 'warning')
    assert 'unseen labels' in names(tuning_data(things, m, prompt=ask, completion='department', eval=pd.DataFrame([dict(product='red roses', department='Floral')])))
    assert not names(tuning_data(things, m, prompt=ask, completion='department'))


def test_personal_data_and_secrets_are_counted_and_not_shown(m):
    d = tuning_data(things.replace('fresh ham', 'ham for ann.smith@shop.org'), m, prompt=ask, completion='department')
    assert 'personal data' in names(d, 'warning') and 'ann.smith' not in str(d.describe()) and [c.rows for c in d.checks if c.name == 'personal data'] == [(1,)]
    fails(lambda: tuning_data(things.replace('fresh ham', 'sk-abcdefghij0123456789ABCD'), m, prompt=ask, completion='department'), 'a key or a password')


def test_the_description_counts_everything(m):
    d = tuning_data(things, m, prompt=ask, completion='department', eval=.25)
    s = d.describe()
    assert s.lengths['rows'].sum() == len(d.train) and str(len(d.train)) in str(s) and 'Vegetables' in str(s) and '<table>' in s._repr_html_()
    assert d.tokens == sum(len(e) for e in d.train) and f'{d.learned:,}' in str(s)


def test_the_fingerprint_is_of_tokens_and_masks(m):
    a, b = (tuning_data(things, m, prompt=p, completion='department') for p in (ask, Prompt('Which department sells {{ product }}?', name='other')))
    assert a.fingerprint == b.fingerprint != tuning_data(things, m, prompt=Prompt('Where is {{ product }}?'), completion='department').fingerprint
    assert a.fingerprint != tuning_data(things.iloc[::-1], m, prompt=ask, completion='department').fingerprint


# bad input

def test_empty_completions_and_prompts(m):
    fails(lambda: tuning_data(things.replace('Deli', '  '), m, prompt=ask, completion='department'), '4 rows have an empty completion', 'rows 1, 4, 7, 10')
    fails(lambda: tuning_data(things.replace('Deli', None), m, prompt='product', completion='department'), 'empty completion')
    fails(lambda: tuning_data(things.replace('fresh ham', ''), m, prompt='product', completion='department'), 'empty prompt')
    fails(lambda: tuning_data(things.replace('fresh ham', None), m, prompt=ask, completion='department'), 'row 1')
    talk = [[dict(role='user', content='x'), dict(role='assistant', content=' ')]]
    fails(lambda: tuning_data(pd.DataFrame(dict(t=talk)), m, messages='t'), 'row 0', 'empty')
    fails(lambda: tuning_data(pd.DataFrame(dict(t=[talk[0][:1]])), m, messages='t'), 'nothing to learn')


def test_a_model_without_chat_template_given_chats(bare):
    talk = pd.DataFrame(dict(t=[[dict(role='user', content='x'), dict(role='assistant', content='y')]] * 2))
    fails(lambda: tuning_data(talk, bare, messages='t'), 'no chat template', 'prompt= and completion=')
    fails(lambda: tuning_data(things, bare, prompt=ask, completion='department', chat=True), 'no chat template')


def test_what_the_rows_are_has_to_be_said(m):
    fails(lambda: tuning_data(things, m), 'say what the rows are')
    fails(lambda: tuning_data(things, m, prompt=ask, text='product'), 'say what the rows are', 'prompt, text')
    fails(lambda: tuning_data(things, m, prompt=ask, completion='departmint'), 'Did you mean "department"?')
    fails(lambda: tuning_data(things, m, prompt=Prompt('{{ prodct }}'), completion='department'), 'prodct')
    fails(lambda: tuning_data(things[:0], m, prompt=ask, completion='department'), 'no rows')


def test_preference_pairs(m):
    pairs = things.assign(worse='Fish')
    d = tuning_data(pairs, m, prompt='product', chosen='department', rejected='worse')
    assert d.kind == 'preference' and len(d.rejected) == len(d.train) and learned(d) == 'Vegetables<|im_end|>'
    fails(lambda: tuning_data(pairs.assign(worse=pairs.department), m, prompt='product', chosen='department', rejected='worse'), '12 preference pairs have equal sides')
    long = pairs.assign(worse=['Fish'] * 11 + ['Fish ' * 90])
    assert len(tuning_data(long, m, prompt='product', chosen='department', rejected='worse', max_length=80, too_long='drop').rejected) == 11
    crossed = pd.concat([pairs, pairs.iloc[:1].assign(department='Fish', worse='Vegetables')])
    fails(lambda: tuning_data(crossed, m, prompt='product', chosen='department', rejected='worse'), 'the worse one of the same question elsewhere, such as rows 0 and 12', 'allow=("crossed pairs",)')
    assert len(tuning_data(crossed, m, prompt='product', chosen='department', rejected='worse', allow='crossed pairs').train) == 13


def test_no_row_is_longer_than_the_context(bare):
    long = pd.concat([things, pd.DataFrame([dict(product='peas ' * 80, department='Deli')])])
    fails(lambda: tuning_data(long, bare, prompt='product', completion='department'), '1 training row is longer than 64 tokens')
    fails(lambda: tuning_data(long, bare, prompt='product', completion='department', max_length=4000), '4,000 tokens are more than the 64 that the context of model bare holds')
    for n in (0, 1, -3, 2.5, 'many', True): fails(lambda: tuning_data(things, bare, prompt='product', completion='department', max_length=n), 'max_length', 'from 2')
    fails(lambda: tuning_data(long, bare, prompt='product', completion='department', too_long='split'), 'training row 12', 'belong together')


def test_what_is_no_text_is_not_learned_as_if_it_were(bare):
    for odd in (b'\xff\xfe', dict(a=1), ['Deli'], ('Deli',)):
        fails(lambda: tuning_data(things.assign(department=[odd] * 12), bare, prompt='product', completion='department'), 'row 0: column "department" holds no text but')
    fails(lambda: tuning_data(things.assign(product=b'ham'), bare, prompt='product', completion='department'), 'holds no text but bytes')
    fails(lambda: tuning_data(things.assign(department=pd.Series([pd.NA] * 12, dtype='string')), bare, prompt='product', completion='department'), '12 rows have an empty completion')
    assert learned(tuning_data(things.assign(department=[1, 2, 3.5] * 4), bare, prompt='product', completion='department')).startswith(' 1')
    fails(lambda: tuning_data(pd.concat([things, things[['department']]], axis=1), bare, prompt='product', completion='department'), 'more than one column "department"')
    fails(lambda: tuning_data(things, bare, prompt='product', completion='department', allow='one clas'), 'Did you mean "one class"?')

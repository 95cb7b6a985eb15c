"Structured answers: reading, repairing, binding, asking again; every bad input; an endpoint with and without schemas of its own."
import json
import threading
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Optional

import numpy as np
import pytest
import torch
from pydantic import BaseModel, Field, field_validator

from genai_lab.core import LabError, ModelEntry
from genai_lab.models import HTTPModel
from genai_lab.prompts import Prompt
from genai_lab.store import remember
from genai_lab.structured import Form, ask_structured, ask_structured_many, find_json, number_of, read_answer


class Product(BaseModel):
    name: str = Field(max_length=16)
    kind: Literal['food', 'drink', 'other']
    size: float = Field(gt=0, le=1000)
    organic: bool


good = '{"name": "Milk", "kind": "drink", "size": 64, "organic": false}'


# --- reading

@pytest.mark.parametrize('text', [
    good, f'Sure, here it is:\n```json\n{good}\n```\nAnything else?', f'```\n{good}', good.replace('}', ',}'), good.replace('"', "'"), good.replace('false', 'False'),
    good[:-1], f'The product: {good} and so on', good.replace('"size"', 'size'), good.replace('64', '"64"'), good.replace('64', '64.0'), good.replace('"drink"', '"Drink"'), good.replace('false', '"no"'),
    good.replace('"organic"', '"Organic"'), f'[{good}]', f'\ufeff{good}', f'{good}\n{good}',
], ids=range(17))
def test_what_can_be_read_without_a_call(text):
    answer = read_answer(text, Product)
    assert answer.valid and answer.value == Product(name='Milk', kind='drink', size=64, organic=False) and answer.calls == 0, answer


def test_how_it_was_read_and_what_was_done_is_told():
    assert [read_answer(t, Product).how for t in (good, f'x {good}', good[:-1])] == ['parsed', 'found', 'repaired']
    assert read_answer(good.replace('64', '"$64"'), Product).notes == ('size: "$64" read as 64',)


@pytest.mark.parametrize('text, value', [('12', 12), ('-3', -3), ('$12.50', 12.5), ('12.50 USD', 12.5), ('€ 3', 3), ('1,299.00', 1299), ('1.299,00 €', 1299), ('1,234,567', 1234567), ('1.299', 1.299)])
def test_numbers_without_doubt(text, value): assert number_of(text) == value


@pytest.mark.parametrize('text', ['', 'twelve', '1,299', '12,50', '€1.299', '12 oz', '10-12', '12%', '007', '$1 $2', '1.2.3', '1' * 5000, '１２oz', '$', '1e5x'])
def test_numbers_in_doubt_stay_text(text): assert number_of(text) is None


def test_the_member_under_way_when_tokens_ran_out_is_not_guessed():
    assert find_json('{"a": [1, 2], "b": 12', cut=True)[0] == {'a': [1, 2]}
    assert find_json('{"a": "x, {y", "b": "tr', cut=True)[0] == {'a': 'x, {y'}
    assert read_answer('{"name": "Milk", "kind": "drink", "organic": true, "size": 1', Product, cut=True).errors == ('size: is missing',)


@pytest.mark.parametrize('text, why', [('', 'answered nothing'), (' \n', 'answered nothing'), ('I cannot say.', 'no JSON'), ('\x00\x01\x02', 'no JSON'), ('{"name": NaN}', 'is missing'), ('{' * 50_000, 'no JSON'), ('[' * 200_000, 'no JSON'), ('{"a":' * 50_000, 'no JSON')])
def test_what_cannot_be_read(text, why):
    answer = read_answer(text, Product)
    assert not answer.valid and answer.value is None and why in '; '.join(answer.errors)


def test_a_value_that_loses_something_is_an_error():
    assert not read_answer(good.replace('64', '"64 oz"'), Product).valid
    assert not read_answer('{"n": 12.5}', dict(n=int)).valid
    assert not read_answer('{"n": true}', dict(type='object', properties=dict(n=dict(type='integer')), required=['n'])).valid


@pytest.mark.parametrize('given', [dict(name=str, price=float), dict(name='text', price='number'), dict(type='object', properties=dict(name=dict(type='string'), price=dict(type='number')), required=['name', 'price'])])
def test_plain_dictionaries_come_back_as_dictionaries(given):
    assert read_answer("{'name': 'Milk', 'price': '2.50'}", given).value == dict(name='Milk', price=2.5)


def test_lists_labels_and_single_values():
    assert read_answer('["a", "b"]', list[str]).value == ['a', 'b']
    assert read_answer('Food.', ['food', 'drink']).value == 'food'
    assert read_answer('12', int).value == 12
    assert read_answer('{"price": "3.10"}', dict(price=Decimal)).value['price'] == Decimal('3.1')


# --- schemas

class Node(BaseModel):
    child: Optional['Node'] = None


class Endless(BaseModel):
    child: 'Endless'


obj = lambda **p: dict(type='object', properties=p)


@pytest.mark.parametrize('schema, why', [
    (Node, 'Node contains itself'), (Endless, 'child: Endless contains itself'),
    (obj(a={'$ref': '#/$defs/B'}), 'points at nothing'), (obj(a={'$ref': 'http://x/y.json'}), 'leaves the schema'),
    (obj(size=dict(type='number', minimum=5, maximum=3)), 'size: no number is at least 5 and at most 3'),
    (obj(size=dict(type='number', exclusiveMinimum=3, maximum=3)), 'size: no number'), (obj(n=dict(type='integer', exclusiveMinimum=3, exclusiveMaximum=4)), 'n: no number'),
    (obj(n=dict(type='number', multipleOf=7, minimum=1, maximum=6)), 'no multiple of 7'),
    (obj(kind=dict(enum=[])), 'kind: enum is empty'), (obj(kind=dict(type='integer', enum=['a'])), 'kind: enum ["a"] is forbidden'), (obj(kind=dict(type='string', const=1)), 'const 1 is forbidden'),
    (obj(t=dict(type='string', minLength=5, maxLength=3)), 't: minLength 5 is more than maxLength 3'), (obj(t=dict(type='array', items=obj(x=dict(enum=[])))), 't[].x: enum is empty'),
    (dict(obj(a=dict(type='string')), required=['b'], additionalProperties=False), 'the key "b" is required'), (dict(obj(a=False), required=['a']), 'the required key "a" is forbidden'),
    (dict(type='objekt'), 'no JSON schema'), (dict(nmae='the name'), 'neither a JSON schema nor'), ({}, 'neither a JSON schema nor'), (dict(a=object()), 'schema:'), ([], 'schema:'), (print, 'schema:'), (3, 'schema:'),
])
def test_schemas_that_no_answer_could_fulfil(schema, why):
    with pytest.raises(LabError, match='schema') as e: Form(schema)
    assert why in str(e.value)


def test_a_schema_that_grows_without_end_is_refused():
    defs = {f'a{i}': obj(x={'$ref': f'#/$defs/a{i + 1}'}, y={'$ref': f'#/$defs/a{i + 1}'}) for i in range(30)} | {'a30': dict(type='string')}
    with pytest.raises(LabError, match='more than 5,000 parts'): Form({'$ref': '#/$defs/a0', '$defs': defs})


@pytest.mark.parametrize('node, keyword', [(dict(type='array', items=dict(type='string'), uniqueItems=True), 'uniqueItems'), ({'not': dict(type='string')}, 'not'), (dict(type='string', pattern='^(?!a)b'), 'look-a')])
def test_keywords_that_cannot_be_bound_are_named(model, node, keyword):
    with pytest.raises(LabError, match='schema, tags: an answer cannot be bound') as e: ask_structured(model, 'Milk', dict(obj(tags=node), required=['tags']))
    assert keyword in str(e.value) and 'constrain="never"' in str(e.value)


# --- binding

class Part(BaseModel):
    x: int = Field(ge=10, le=99)
    tag: Literal['aa', 'ab']
    code: str = Field(pattern=r'^[A-Z]{2}-\d{3,}$', max_length=10)


class Whole(BaseModel):
    parts: list[Part] = Field(min_length=1, max_length=3)
    counts: dict[str, int]
    note: str = Field(min_length=5)
    price: Decimal | None
    extra: Part | None = None


def written(tokenizer, form, limit, seed):
    "An answer of random tokens under binding: half of them drawn, half of them those that close things."
    guide, rng, out = form.guide(tokenizer, {tokenizer.eos_token_id}), np.random.default_rng(seed), []
    while len(out) < limit and not guide.done:
        row = torch.tensor(rng.normal(size=len(tokenizer)))
        guide.mask(row)
        close = [t for t in guide.vocabulary.closing if row[t] > -torch.inf] if rng.random() < .5 else []
        t = guide.settle(close[0] if close else int(row.argmax()), limit - len(out))
        if t == tokenizer.eos_token_id: break
        out.append(t)
    return tokenizer.decode(out), guide.cut


@pytest.mark.parametrize('given', [Whole, Product, list[Part], dict(a=str, n=float), dict[str, list[int]], Part | None], ids=str)
def test_no_limit_makes_an_answer_invalid(model, given):
    form = Form(given)
    least = form.guide(model.tokenizer, {model.tokenizer.eos_token_id}).needs
    for seed in range(12):
        text, cut = written(model.tokenizer, form, least + 5 * seed, seed)
        answer = read_answer(text, form)
        assert answer.valid and answer.how == 'parsed', (text, answer)


def test_a_bound_answer_is_the_same_alone_and_in_a_batch(model):
    texts, form = ['Milk 64 oz', 'Bread, one loaf of 24 oz', 'Soap'], Form(dict(name=str, kind=['food', 'drink', 'other']))
    many = model.generate(texts, max_tokens=24, constraint=[form, None, form])
    alone = [model.generate([t], max_tokens=24, constraint=f)[0] for t, f in zip(texts, [form, None, form])]
    assert [g.text for g in many] == [g.text for g in alone]
    assert [set(json.loads(many[i].text)) == {'name', 'kind'} for i in (0, 2)] == [True, True]
    sampled = model.generate(texts[:1] * 2, max_tokens=24, temperature=1.5, seeds=[0, 1], constraint=form)
    assert len({g.text for g in sampled}) == 2 and all(read_answer(g.text, form).valid for g in sampled)


def test_too_little_room_for_any_answer_is_said(model):
    g, = model.generate(['Milk'], max_tokens=5, constraint=Form(Product))
    assert g.error.startswith('the shortest answer of the form takes') and 'room for 5' in g.error


def test_a_remembered_model_keeps_bound_answers_apart(model, tmp_path):
    kept, form = remember(model, tmp_path / 'a.db'), Form(dict(n=int))
    free, bound = kept.generate(['Milk costs'], max_tokens=8), kept.generate(['Milk costs'], max_tokens=8, constraint=form)
    assert free[0].text != bound[0].text and read_answer(bound[0].text, form).valid
    again = ask_structured(remember(model, tmp_path / 'a.db'), 'Milk costs', form, max_tokens=8)
    assert again.valid and kept.asked == 2


# --- asking

def test_bound_answers_are_valid_and_take_one_call(model):
    many = ask_structured_many(model, ['Organic whole milk, 64 oz', '', 'Sourdough bread 24 oz'], Product)
    assert [r.valid for r in many.rows] == [True, False, True] and [r.calls for r in many.rows] == [1, 0, 1] and many.rows[1].errors == ('the answer: the prompt is empty; there is nothing to answer',)
    assert many.rate.n == 3 and many.rate.value == pytest.approx(2 / 3) and many.to_frame().valid.sum() == 2
    assert {r.how for r in many.rows} == {'bound', 'failed'} and all(isinstance(r.value, Product) for r in many.rows if r.valid)


class Sized(BaseModel):
    size: int = Field(ge=0, le=99)
    kind: Literal['a', 'b']

    @field_validator('size')
    @classmethod
    def even(cls, v):
        if v % 2: raise ValueError('an odd number is not accepted')
        return v


def test_what_no_schema_can_say_is_asked_again_and_given_up_after_n(model):
    class Never(Sized):
        @field_validator('kind')
        @classmethod
        def no(cls, v): raise ValueError('never right')
    answer = ask_structured(model, 'Say 8 and a', Never, again=1)
    assert not answer.valid and answer.calls == 2 and 'kind: never right' in answer.errors
    assert answer.raw[0].startswith('{"size"') and answer.raw[1].startswith('{"kind"' if 'size' not in str(answer.errors) else '{"size"')


def test_labels_are_chosen_by_their_probability(model):
    answer = ask_structured(model, 'Is milk a food or a drink?', ['food', 'drink'])
    assert answer.valid and answer.how == 'labels' and answer.raw == () and answer.calls == 2
    free = ask_structured(model, 'Is milk a food or a drink?', ['food', 'drink'], constrain='never', again=0, max_tokens=4)
    assert free.how != 'labels' and free.calls == 1


def test_a_prompt_brings_its_schema(model):
    prompt = Prompt('How many eggs are in {{ text }}?', schema=Sized)
    many = ask_structured_many(model, [dict(text='a dozen'), dict(text=None)], prompt=prompt, again=0)
    assert 'is empty' in many.rows[1].errors[0] and many.rows[0].calls == 1 and json.loads(many.rows[0].raw[0])['kind'] in 'ab'


@pytest.mark.parametrize('prompt, why', [('', 'is empty'), (' \n', 'is empty'), (b'milk', 'not bytes'), ('milk\x00', r'binary, not text: it has the character U\+0000'), ([dict(role='user', content='')], 'is empty'), ([dict(text='x')], 'a prompt is a text or a list')])
def test_prompts_that_cannot_be_asked(model, prompt, why):
    with pytest.raises(LabError, match=why): ask_structured(model, prompt, Product)


def test_wrong_settings(model):
    with pytest.raises(LabError, match='constrain is first, last or never'): ask_structured(model, 'Milk', Product, constrain='always')
    with pytest.raises(LabError, match='again is'): ask_structured(model, 'Milk', Product, again=-1)
    with pytest.raises(LabError, match='give a `schema`'): ask_structured_many(model, ['Milk'])
    with pytest.raises(LabError, match='not bytes'): read_answer(b'{}', Product)


# --- an endpoint

@pytest.fixture
def endpoint():
    "A server that answers from a list, with or without `response_format`; what it was asked is kept."
    class Server(BaseHTTPRequestHandler):
        says, asked, knows_forms = [], [], True
        def log_message(self, *a): pass
        def do_POST(self):
            ask = json.loads(self.rfile.read(int(self.headers['content-length'])))
            Server.asked.append(ask)
            if 'response_format' in ask and not Server.knows_forms: status, body = 400, dict(error=dict(message='unknown field response_format'))
            elif 'messages' not in ask: status, body = 404, dict(error=dict(message='no completions here'))
            else: status, body = 200, dict(choices=[dict(message=dict(content=Server.says.pop(0)), finish_reason='stop')], usage=dict(prompt_tokens=9, completion_tokens=2))
            data = json.dumps(body).encode()
            self.send_response(status)
            for k, v in (('content-type', 'application/json'), ('content-length', str(len(data)))): self.send_header(k, v)
            self.end_headers()
            self.wfile.write(data)
    server = ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.model = HTTPModel(ModelEntry(name='far', backend='openai', source='far-1', base_url=f'http://127.0.0.1:{server.server_port}/v1'), workers=1)
    yield Server
    server.shutdown()


def test_an_endpoint_is_given_the_schema_and_only_what_failed_is_asked_again(endpoint):
    endpoint.says = ["{'name': 'Milk', 'kind': 'juice box', 'size': '64 oz', 'organic': True}", '{"kind": "drink", "size": 64}']
    answer = ask_structured(endpoint.model, 'Organic milk, 64 oz', Product)
    assert answer.value == Product(name='Milk', kind='drink', size=64, organic=True) and (answer.how, answer.calls, answer.tokens) == ('asked again', 2, 22)
    first, second = [a['response_format']['json_schema'] for a in endpoint.asked if 'messages' in a]
    assert list(first['schema']['properties']) == ['name', 'kind', 'size', 'organic'] and list(second['schema']['properties']) == ['kind', 'size'] and first['strict'] is True
    assert '"name"' not in endpoint.asked[-1]['messages'][-1]['content']


def test_an_endpoint_without_schemas_is_asked_without(endpoint):
    endpoint.says, endpoint.knows_forms = [f'Here: {good}', good], False
    answers = ask_structured_many(endpoint.model, ['Milk', 'More milk'], Product)
    assert answers.rate.value == 1 and [r.how for r in answers.rows] == ['found', 'parsed'] and endpoint.model.can('constraint') is False


def test_an_endpoint_that_answers_nothing(endpoint):
    endpoint.says = ['', ' ', 'No.']
    answer = ask_structured(endpoint.model, 'Milk', Product)
    assert not answer.valid and answer.value is None and answer.calls == 3 and answer.errors == ('the answer: there is no JSON in the answer',)

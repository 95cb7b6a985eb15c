"Prompts as values: turns, schema, filling, parts, dictionaries and files."
from dataclasses import replace

import pandas as pd
import pytest
from pydantic import BaseModel

from genai_lab.core import LabError
from genai_lab.prompts import Part, Prompt, compose, load_prompt, save_prompt
from genai_lab.tasks import Task

full = Prompt('Product: {{ product }}\nShop: {{ shop }}\n', system='Sort into {{ choices | join(", ") }}.', examples=[dict(product='Ice: "cold"', shop='A', d='Frozen'), dict(product='Käse\n', shop='B', d='Dairy')], answer='{{ d }}', name='full',
              delimiter='\t', separator='\n###\n', blank=[dict(product='N/A', shop='')], turns=[('user', 'Hello {{ shop }}'), ('assistant', 'Hello.')], schema=dict(type='object', properties=dict(d=dict(type='string'))),
              about=dict(owner='Search', languages=['en', 'de']), values=dict(shop='National'))


def test_a_prompt_survives_dictionary_and_file(tmp_path):
    assert Prompt.from_dict(full.to_dict()) == full
    again = load_prompt(save_prompt(full, tmp_path / 'p.yaml'))
    assert again == full and again.fingerprint == full.fingerprint and again.text(dict(product='x', choices=['a'])) == full.text(dict(product='x', choices=['a']))


def test_fields_that_are_not_used_change_no_fingerprint():
    assert Prompt('Product: {{ product }}', system='s', examples=[dict(product='a', d='b')], answer='{{ d }}').fingerprint == 'e601d47365914c6d'
    p = Prompt('{{ a }}')
    assert replace(p, about=dict(owner='x')).fingerprint == p.fingerprint
    for change in (dict(turns=[('user', 'x')]), dict(schema={}), dict(schema=dict(type='object')), dict(values=dict(a=1))):
        assert (replace(p, **change).fingerprint == p.fingerprint) == (change == dict(schema={}))


@pytest.mark.parametrize('text, words', [
    ('template: a\nsistem: b', ['line 2', '"sistem"', 'Did you mean "system"']), ('system: a', ['"template" is missing']), ('- a', ['is no prompt']), ('', ['is no prompt']), ('template: [a', ['line 1', 'not valid YAML']),
    ('template: |\n  Hi\n  {{ a }', ['line 3, column 8']), ('name: x\ntemplate: "{{ a"', ['line 2, column 12']), ('template: |\n  x\n    {% if a %}b\n', ['line 3, column 5', 'not closed']), ('template: "{{ a | nofilter }}"', ['line 1, column 19', 'nofilter']),
    ('template: a\ntemplate: b', ['line 2', 'twice']), ('template: !!python/object:os.system x', ['line 1', 'constructor']), ('template: &a x\nsystem: *a', ['line 2', 'references']), ('template: 5', ['template must be text']), ('template: a\nname: 2024-01-01', ['name must be text']),
    ('template: a\nexamples: x', ['examples must be']), ('template: a\nexamples: [x]\nanswer: b', ['an example is a row']), ('template: a\nexamples:\n  select: nearst', ['no selector "nearst"']), ('template: a\nturns:\n- {role: usr, content: x}', ['"usr"', 'Did you mean "user"']),
    ('template: a\nturns:\n- {role: user, content: "{% if %}"}', ['line 3', 'column']), ('template: a\nturns: [x]', ['a turn is a pair']), ('template: a\nschema: {type: 5}', ['no JSON schema']), ('template: ' + '[' * 1500, ['YAML']), ('template: a\nabout: x', ['about must be a mapping'])])
def test_a_bad_file_is_named_with_its_line(tmp_path, text, words):
    (tmp_path / 'p.yaml').write_text(text, encoding='utf-8')
    with pytest.raises(LabError) as e: load_prompt(tmp_path / 'p.yaml')
    assert all(w in str(e.value) for w in ['p.yaml', *words]), str(e.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(LabError, match='cannot be read'): load_prompt(tmp_path / 'none.yaml')
    (tmp_path / 'p.yaml').write_bytes(b'template: \xff\xfe')
    with pytest.raises(LabError, match='cannot be read'): load_prompt(tmp_path / 'p.yaml')


@pytest.mark.parametrize('template, at', [('a\nb {{ x', 'line 2, column 3'), ('a\n {% for x in y %}\n{% if x %}{% endif %}', 'line 2, column 2'), ('{{ a b }}', 'line 1, column 6'), ('x\n\n{% endif %}', 'line 3, column 4'), ('{{ (a }}', 'line 1, column 7'), ('{{ a | nix }}', 'line 1, column 8')])
def test_syntax_errors_have_line_and_column(template, at):
    with pytest.raises(LabError, match=at): Prompt(template)


def test_a_variable_of_the_wrong_type_is_named():
    p = Prompt('One of:\n{% for c in choices %}{{ c }} {% endfor %}', name='p')
    with pytest.raises(LabError, match='prompt "p" line 2.*loops over "choices", which is a number'): p.text(dict(choices=5))
    with pytest.raises(LabError, match='cannot be rendered'): Prompt('{{ a | join(", ") }}').text(dict(a=5))
    with pytest.raises(LabError, match='cannot be rendered'): Prompt('{{ a + 1 }}').text(dict(a='x'))


def test_partial():
    p = Prompt('{{ a }} {{ b }}', examples=[dict(b='x', l='y')], answer='{{ l }}').partial(a='A')
    assert p.variables == ('b',) and p.text(dict(b='B', a='no')) == 'A x y\n\nA B' and p.partial(a='C').text(dict(b='B')) == 'C x y\n\nC B'
    with pytest.raises(LabError, match='no variable "aa".*Did you mean "a"'): p.partial(aa=1)
    with pytest.raises(LabError, match='is empty'): p.partial(b=None)


def test_turns_come_before_the_question():
    p = Prompt('Q {{ q }}', system='S', examples=[dict(q=1, l=2)], answer='{{ l }}', turns=[('user', 'U {{ q }}'), ('assistant', 'A')])
    assert p.text(dict(q=3)) == 'S\n\nQ 1 2\n\nU 3 A\n\nQ 3'
    assert [(m['role'], m['content']) for m in p.messages(dict(q=3))] == [('system', 'S'), ('user', 'Q 1'), ('assistant', '2'), ('user', 'U 3'), ('assistant', 'A'), ('user', 'Q 3')]
    with pytest.raises(LabError, match='no role "human"'): Prompt('x', turns=[('human', 'a')])


def test_schema_is_said_once_and_kept():
    class Answer(BaseModel): label: str
    p = Prompt('{{ a }}', schema=Answer)
    assert p.schema == Answer.model_json_schema() and p.variables == ('a',) and '"label"' in p.messages(dict(a=1))[0]['content'] and p.messages(dict(a=1))[0]['role'] == 'system'
    q = Prompt('{{ a }} {{ schema }}', schema=Answer)
    assert q.text(dict(a=1)).count('"properties"') == 1 and len(q.messages(dict(a=1))) == 1
    with pytest.raises(LabError, match='JSON schema'): Prompt('x', schema=dict(type='objct'))
    with pytest.raises(LabError, match='JSON schema'): Prompt('x', schema='object')


def test_parts_and_their_tokens(model):
    s = compose([Part('role', 'You sort.'), ('rules', 'One of {{ choices | join(", ") }}.')])
    p = Prompt('Product: {{ product }}', system=s, examples=[dict(product='a', d='b')], answer='{{ d }}')
    row = dict(product='ICE', choices=['x', 'y'])
    assert [(x.name, x.role) for x in p.parts] == [('role', 'system'), ('rules', 'system'), ('question', 'question')] and p.text(row).startswith('You sort.\nOne of x, y.')
    t = p.tokens(model, row).set_index('part').tokens
    assert t['all'] == model.count_tokens(model.render(p.messages(row))) == t.drop('all').sum() and t['role'] == model.count_tokens('You sort.\n')
    assert list(p.tokens(model).part) == ['role', 'rules', 'question']
    for bad, words in (([('a', 'x'), ('a', 'y')], 'two parts'), ([('#}', 'x')], 'no name'), ([('a', '{% if x %}')], 'part "a"')):
        with pytest.raises(LabError, match=words): compose(bad)
    assert [x.name for x in Prompt('{# part: a #}{% if x %}y{# part: b #}{% endif %}').parts] == ['question']


class Picker:
    fingerprint, k = 'f' * 16, 1
    def __init__(self, rows): self.rows, self.prepared = rows, 0
    def prepare(self, rows): self.prepared += 1
    def pick(self, row): return self.rows


def test_a_selector_picks_for_each_question():
    frame = pd.DataFrame(dict(product=['Ice', 'Pears'], d=['Frozen', 'Produce']))
    picker = Picker([dict(product='Milk', d='Dairy')])
    p = Prompt('{{ product }}:', examples=picker, answer='{{ d }}')
    t = Task('t', frame, p, target='d', choices=['Frozen', 'Produce', 'Dairy'])
    assert t.samples()[0].prompt == 'Milk: Dairy\n\nIce:' and picker.prepared == 1 and p.n_shots == 1
    assert p.fingerprint != replace(p, examples=()).fingerprint
    with pytest.raises(LabError, match='picks the question itself'): t.samples(replace(p, examples=Picker([dict(product=' ICE', d='Frozen')])))
    assert p.text(dict(product='Ice'), examples=[dict(product='Own', d='x')]) == 'Own: x\n\nIce:'


def test_examples_that_look_the_same_to_python_stay_different():
    p = Prompt('{{ a }}', examples=[dict(a=1, l='x'), dict(a=True, l='x'), dict(a=1.0, l='x'), dict(a=[1], l='x')], answer='{{ l }}')
    assert p.text(dict(a=0)) == '1 x\n\nTrue x\n\n1.0 x\n\n[1] x\n\n0'

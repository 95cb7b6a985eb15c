"Tests for prompts: expectations, files of tests, and how they fail."
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pandas as pd
import pytest

from genai_lab import prompt_tests
from genai_lab.core import LabError
from genai_lab.prompt_tests import Answer, Expect, Suite, expectations, junit, list_expectations, prompt_cases, read_suite, run_files
from genai_lab.prompts import Prompt
from genai_lab.store import remember

root = Path(__file__).resolve().parents[1]
colour = Prompt('Name the usual colour of {{ thing }} in one word.', name='colour')
offer = dict(type='object', required=['price'], properties=dict(price=dict(type='number')), additionalProperties=False)


@pytest.mark.parametrize('expect, passes, fails', [
    (dict(contains='Pears'), 'ripe Pears', 'ripe pears'),
    (dict(contains=dict(text='PEARS', ignore_case=True)), 'ripe Pears', 'apples'),
    (dict(contains=['a', 'b']), 'ab', 'a'),
    (dict(not_contains=['sorry', 'cannot']), 'Yes', 'I cannot'),
    (dict(equals=['yes', 'no']), ' no\n', 'no.'),
    (dict(equals=5), '5', '6'),
    (dict(matches=r'^\d{3}$'), '123', '1234'),
    (dict(matches=dict(pattern=r'\d+', full=True)), '123', 'a123'),
    ('is_json', '{"a": [1, null]}', '{a: 1}'),
    (dict(is_json=offer), '{"price": 1}', '{"price": "1"}'),
    (dict(is_json=dict(schema=offer, fenced=True)), '```json\n{"price": 1}\n```', 'Here: ```json\n{"price": 1}\n```'),
    (dict(label_in=['Produce', 'Dairy']), 'Dairy', 'Dairy.'),
    (dict(length=3), 'abc', 'abcd'),
    (dict(length=dict(min=2, max=3, unit='words')), 'one two', 'one'),
    (dict(language='fr'), 'Les poires sont mûres et prêtes à être mangées.', 'The pears are ripe and ready to eat.'),
    (dict(language=dict(code='en', among=['de', 'fr'])), 'Sorry, we are closed.', 'Leider geschlossen.'),
    (dict(similar=dict(to='ripe pears', min=.9)), 'Ripe pears!', 'green pears'),
    (dict(similar=dict(to='ripe pears', min=.9, metric='sentence_chrf')), 'ripe pears', 'cheese'),
    (dict(similar=dict(to='The pears are ripe.', min=.8, metric='embedding')), 'Ripe pears are here.', 'The shop opens at nine.'),
    (dict(all=[dict(contains='a'), dict(contains='b')]), 'ab', 'a'),
    (dict(any=[dict(contains='a'), dict(contains='b')]), 'b', 'c'),
    ({'not': dict(contains='a')}, 'b', 'a'),
    (lambda text: text.isupper(), 'AB', 'ab'),
    (lambda text, values: text == values.get('want'), 'x', 'y')])
def test_every_kind_passes_and_fails(expect, passes, fails):
    [e] = expectations(expect)
    assert e.why(Answer(passes.strip(), values=dict(want='x'))) == '' and e.why(Answer(fails.strip(), values=dict(want='x'))) != ''


def test_every_kind_is_listed_and_has_a_test_here():
    said = Path(__file__).read_text()
    assert all(re.search(rf"{k}[=']|'{k}'", said) or k == 'function' for k in list_expectations().kind)


@pytest.mark.parametrize('expect, words', [
    (dict(contain='x'), ['no expectation "contain"', 'Did you mean "contains"']),
    (dict(contains=''), ['is to be text']),
    (dict(contains=True), ['put quotes around']),
    (dict(contains=[]), ['empty list']),
    ('contains', ['contains needs "text"']),
    (dict(contains=dict(text='a', ignorecase=True)), ['no option "ignorecase"', 'Did you mean "ignore_case"']),
    (dict(matches='(a'), ['cannot be read']),
    (dict(matches='((a{9999}){9999}){9999}'), ['too large']),
    (dict(matches=dict(pattern='a', seconds=0)), ['"seconds"']),
    (dict(is_json=dict(type='objekt')), ['JSON schema is wrong', 'objekt']),
    (dict(is_json='object'), ['is to be a JSON schema']),
    (dict(length={}), ['give "max"']),
    (dict(length=dict(min=5, max=3)), ['"min" 5 is above "max" 3']),
    (dict(length=dict(max=3, unit='word')), ['Did you mean "words"']),
    (dict(length=2.5), ['a whole number']),
    (dict(language='english'), ['no language "english"']),
    (dict(language=False), ['put quotes around it']),
    (dict(language=dict(code='en', among=['xx'])), ['no language "xx"']),
    (dict(similar=dict(to='x')), ['similar needs "min"']),
    (dict(similar=dict(to='x', min=50)), ['above 0 and is at most 1']),
    (dict(similar=dict(to='x', min=.5, metric='bleu')), ['bleu has no value for a single answer']),
    (dict(similar=dict(to='x', min=.5, metric='rouge_l')), ['no metric "rouge_l"']),
    (dict(function='os.system'), ['is to be a Python function']),
    (dict(all=[]), ['the list is empty']),
    ({'not': dict(any=[dict(contian='x')])}, ['no expectation "contian"']),
    (5, ['is no expectation']),
    ({1: 'x'}, ['is a word'])])
def test_wrong_expectations_are_refused_when_they_are_made(expect, words):
    with pytest.raises(LabError) as e: expectations(expect, 'file line 3')
    assert all(w in str(e.value) for w in ['file line 3', *words]), str(e.value)


@pytest.mark.parametrize('expect, text', [
    (dict(matches=dict(pattern=r'(a+)+$', seconds=.05)), 'a' * 3000 + '!'),
    (dict(matches=dict(pattern=r'^(\w+\s?)*$', seconds=.05)), 'word ' * 500 + '!'),
    (dict(is_json=dict(type='string', pattern='(a+)+$')), '"' + 'a' * 3000 + '!"'),
    (dict(is_json=dict(patternProperties={'(a+)+$': {}})), '{"' + 'a' * 3000 + '!": 1}'),
    ('is_json', '[' * 200_000)])
def test_nothing_hangs_or_breaks_on_a_hostile_answer(expect, text):
    [e] = expectations(expect)
    assert e.why(text) != ''


def test_a_schema_is_never_fetched():
    with pytest.raises(LabError, match='not followed'): Expect(is_json={'$ref': 'http://127.0.0.1:9/schema.json'})('{}')


def test_keys_by_pattern_are_checked_as_the_standard_says():
    e = Expect(is_json=dict(patternProperties={'^n_': dict(type='integer')}, additionalProperties=dict(type='string')))
    assert e('{"n_a": 1, "b": "x"}') and not e('{"n_a": "1"}') and not e('{"b": 1}')


def test_functions_that_raise_are_reasons_and_not_crashes():
    def picky(text): assert 'x' in text, 'no x in it'
    assert Expect(function=picky).why('y').startswith('picky: no x in it')
    assert 'ZeroDivisionError' in Expect(function=lambda t: 1 / 0).why('y')


def test_expectations_compose_and_go_back_and_forth():
    e = Expect(contains='a') & ~(Expect(length=3) | Expect('is_json'))
    assert e('abcd') and not e('abc') and expectations(e.to_dict()) == (e,)
    assert str(e) == 'all(contains "a", not(any(length 3, is_json)))'


def test_values_of_a_case_are_filled_in_but_are_no_templates():
    e = Expect(contains=['{{ brand }}', 'x']).with_values(dict(brand='{{ 7*7 }}'))
    assert e('{{ 7*7 }} x') and not e('49 x')


# Files

good = '''prompt: {template: 'Name the usual colour of {{ thing }} in one word.'}
model: smollm2-135m
choices: [green, red, white]
pass_rate: 0.6
expect:
  - equals: '{{ colour }}'
cases:
  - values: {thing: grass, colour: green}
  - name: red blood
    values: {thing: blood, colour: red}
  - values: {thing: snow, colour: red}
'''


@pytest.fixture
def suite_file(tmp_path):
    def write(text=good, name='colours.yaml'):
        (tmp_path / name).write_text(text)
        return tmp_path / name
    return write


@pytest.mark.parametrize('old, new, words', [
    ('pass_rate: 0.6', 'pass_rates: 0.6', ['line 4', 'no key "pass_rates"', 'Did you mean "pass_rate"']),
    ('pass_rate: 0.6', 'pass_rate: 60', ['pass_rate', '0.9 for 90%']),
    ('pass_rate: 0.6', 'pass_rate: high', ['line 4', '"pass_rate" is to be a number']),
    ('pass_rate: 0.6', 'sure: true', ['no number of answers']),
    ('pass_rate: 0.6', 'repetitions: 0', ['repetitions']),
    ('equals:', 'equal:', ['line 6', 'Did you mean "equals"']),
    ("'{{ colour }}'", "'{{ color }}'", ['line 8', '"color"', 'Did you mean "colour"']),
    ("'{{ colour }}'", "'{{ colour '", ['line 6']),
    ('  - name: red blood', '  - nam: red blood', ['line 9', 'Did you mean "name"']),
    ('{thing: blood, colour: red}', '{ting: blood, colour: red}', ['line 9', 'the prompt uses "thing"', 'Did you mean "ting"']),
    ('{thing: blood, colour: red}', '[blood]', ['line 10', 'maps names to values']),
    ('{thing: blood, colour: red}', '{thing: blood, colour: red', ['not valid YAML']),
    ("equals: '{{ colour }}'", 'function: !function os.system', ['line 6', 'a file of tests is data']),
    ("prompt: {template: 'Name the usual colour of {{ thing }} in one word.'}", 'prompt: colours@champion', ['line 1', 'load=genai_lab.registry.load']),
    ("prompt: {template: 'Name the usual colour of {{ thing }} in one word.'}", 'prompt: colour.yaml', ['line 1', 'there is no file', 'Did you mean "colours.yaml"']),
    ("prompt: {template: 'Name the usual colour of {{ thing }} in one word.'}", 'prompt: {templat: x}', ['line 1', 'templat']),
    ("prompt: {template: 'Name the usual colour of {{ thing }} in one word.'}", '', ['"prompt" is missing']),
    ("expect:\n  - equals: '{{ colour }}'", '', ['line 7', 'nothing is expected']),
    (good[good.index('cases'):], 'cases: []', ['"cases" is missing']),
    (good[good.index('cases'):], 'cases: {a: 1}', ['"cases" is to be a list']),
    (good, '', ['holds nothing'])])
def test_faults_of_a_file_are_named_with_their_line(suite_file, old, new, words):
    assert old in good
    with pytest.raises(LabError) as e: read_suite(suite_file(good.replace(old, new)))
    assert all(w in str(e.value) for w in ['colours.yaml', *words]) and '\n' not in str(e.value), str(e.value)


def test_a_missing_file():
    with pytest.raises(LabError, match='none.yaml cannot be read'): read_suite('none.yaml')


def test_names_of_the_registry_are_looked_up_by_what_is_given(suite_file):
    asked = []
    def load(name): asked.append(name); return colour
    s = read_suite(suite_file(re.sub('prompt: .*', 'prompt: colours@champion', good)), load)
    assert asked == ['colours@champion'] and s.prompt == colour


def test_cases_without_a_name_are_called_by_their_first_value():
    s = Suite(colour, [dict(thing='snow'), dict(thing='snow'), dict(case='ice', thing='ice')], expect=dict(length=5))
    assert [c.name for c in s.cases] == ['snow (1)', 'snow (2)', 'ice']


@pytest.mark.parametrize('cases, words', [([], 'no cases'), (pd.DataFrame(dict(thing=['a'])), 'nothing is expected'), (['snow'], 'is a mapping'), ([dict(expect=dict(length=3))], 'uses "thing"')])
def test_wrong_cases_from_python(cases, words):
    with pytest.raises(LabError, match=words): Suite(colour, cases)


def test_the_file_of_the_house_can_be_read():
    s = read_suite(root / 'prompts' / 'tests' / 'retail-departments.yaml')
    assert len(s.cases) >= 12 and {c.values['department'] for c in s.cases} <= set(s.choices) == set(s.prompt.about['choices'])


# Counting

def answers(suite, texts): return [dict(case=suite.cases[i].name, repetition=r + 1, prompt='', answer=t, tokens=1, finish='stop', error='') for i, ts in enumerate(texts) for r, t in enumerate(ts)]


def reported(suite, texts): return prompt_tests.PromptTestReport(suite, 'm', *suite.judge(answers(suite, texts)))


def test_repetitions_of_a_case_are_one_cluster():
    s = Suite(colour, [dict(thing=str(i)) for i in range(12)], expect=dict(equals='y'), repetitions=10)
    alike, mixed = reported(s, [['yn'[i % 2]] * 10 for i in range(12)]).overall, reported(s, [['y'] * k + ['n'] * (10 - k) for k in (3, 4, 5, 5, 6, 7) * 2]).overall
    assert alike.value == mixed.value == .5
    assert alike.high - alike.low > .45 > .2 > mixed.high - mixed.low


def test_the_rate_or_the_end_of_its_interval_is_what_counts():
    texts = [['y']] * 9 + [['n']]
    for more, ok in ((dict(pass_rate=.9), True), (dict(pass_rate=.91), False), (dict(pass_rate=.9, sure=True), False), (dict(pass_rate=.55, sure=True), True)):
        r = reported(Suite(colour, [dict(thing=str(i)) for i in range(10)], expect=dict(equals='y'), **more), texts)
        assert r.ok is ok and ('not passed' in r.verdict) is not ok


def test_the_report_says_which_expectation_failed_on_which_answer(monkeypatch):
    monkeypatch.setenv('SHOP_API_KEY', 'tomato-soup-17')
    s = Suite(colour, [dict(thing='snow', expect=[dict(contains='white'), dict(length=5)]), dict(thing='grass', expect=dict(contains='green'))], name='colours')
    r = reported(s, [['tomato-soup-17'], ['green']])
    assert [tuple(f) for f in r.failures()[['case', 'expectation']].itertuples(index=False)] == [('snow', 'contains "white"'), ('snow', 'length 5')]
    shown = str(r) + r._repr_html_() + json.dumps(r.to_dict()) + junit(r)
    assert 'tomato-soup-17' not in shown and 'does not contain' in shown and r.by_expectation().rate.tolist() == [0, 0, 1]


def test_junit_is_xml_that_counts(tmp_path):
    s = Suite(colour, [dict(thing='a<b>&"', expect=dict(contains='x')), dict(thing='snow', expect=dict(contains='y'))], pass_rate=.5)
    r = reported(s, [['\x00\x1b broken ]]>'], ['y']])
    top = ET.fromstring(junit(r, r))
    assert [(e.get('tests'), e.get('failures'), e.get('errors')) for e in top] == [('3', '1', '0')] * 2
    assert [t.get('name') for t in top[0]] == ['a<b>&"', 'snow', 'pass rate'] and len(top[0][0]) == 1 and len(top[0][2]) == 0


# With the model

def test_failed_answers_have_not_passed_and_drawn_ones_differ(model):
    s = Suite(colour, [dict(thing='snow'), dict(thing='long ' * 9000)], expect=dict(length=dict(max=100, unit='tokens')), repetitions=2, temperature=.8, max_tokens=6)
    r = s.run(model, progress=False)
    assert r.answers.passed.tolist() == [True, True, False, False] and r.answers.answer[0] != r.answers.answer[1]
    assert 'failed: prompt of' in r.failures().reason[0] and '2 failed' in r.verdict
    assert 'errors="1"' in junit(r)


def test_notes_say_what_the_reader_has_to_know(model):
    r = Suite(colour, [dict(thing='snow')], expect=dict(length=1), repetitions=2, max_tokens=2).run(model, progress=False)
    assert 'At temperature 0' in r.notes[0] and '2 answers were cut off at 2 tokens' in r.notes[1]


@pytest.fixture(scope='module')
def recorded(model, tmp_path_factory):
    "A file of tests and a store with all answers to it, so that other processes need no model."
    folder = tmp_path_factory.mktemp('colours')
    (folder / 'colours.yaml').write_text(good)
    (folder / 'strict.yaml').write_text(good.replace('0.6', '0.9'))
    read_suite(folder / 'colours.yaml').run(remember(model, folder / 'answers.db'), progress=False)
    return folder


def call(*args): return subprocess.run([str(Path(sys.executable).parent / 'genai-lab'), 'prompts', 'test', *map(str, args)], cwd=root, capture_output=True, text=True, timeout=180)


def test_the_command_line(recorded, tmp_path):
    r = call(recorded / 'colours.yaml', '--store', recorded / 'answers.db', '--junit', tmp_path / 'out' / 'junit.xml')
    assert r.returncode == 0, r.stderr
    assert 'colours on smollm2-135m: 2 of 3 answers passed, 66.7%' in r.stdout and 'snow: "white"' in r.stdout
    assert ET.parse(tmp_path / 'out' / 'junit.xml').getroot()[0].get('failures') == '1'
    r = call(recorded, '--store', recorded / 'answers.db', '--json')
    found = json.loads(r.stdout)
    assert r.returncode == 1 and [(f['name'], f['passed']) for f in found] == [('colours', True), ('strict', False)] and found[0]['overall']['n'] == 3


def test_the_command_line_refuses_before_it_asks(suite_file):
    r = call(suite_file(), suite_file(good.replace('equals', 'equal'), 'wrong.yaml'))
    assert r.returncode == 2 and r.stdout == '' and len(r.stderr.splitlines()) == 1 and 'wrong.yaml line 6' in r.stderr


def test_an_empty_folder(tmp_path):
    with pytest.raises(LabError, match='no YAML file'): run_files([tmp_path])


def test_cases_are_tests_in_pytest(recorded, tmp_path):
    (tmp_path / 'test_colours.py').write_text(f'''
import pytest
from genai_lab.prompt_tests import prompt_cases, test_prompt
from genai_lab.store import remember

@pytest.mark.parametrize('case', prompt_cases({str(recorded / 'colours.yaml')!r}, remember('smollm2-135m', {str(recorded / 'answers.db')!r}, replay=True)))
def test_colours(case): case.check()
''')
    r = subprocess.run([sys.executable, '-m', 'pytest', '-v', '-p', 'no:cacheprovider', 'test_colours.py'], cwd=tmp_path, capture_output=True, text=True, timeout=180, env={**os.environ, 'GENAI_LAB_SETTINGS': str(root)})
    assert re.findall(r'::(\S+?\[.*?\]) (PASSED|FAILED)', r.stdout) == [('test_colours[grass]', 'PASSED'), ('test_colours[red blood]', 'PASSED'), ('test_colours[snow]', 'FAILED')]
    assert '0 of 1 answer to "snow" passed' in r.stdout and '"white": equals' in r.stdout and '1 failed, 2 passed' in r.stdout


def test_a_model_that_cannot_be_had_fails_every_case_at_once(suite_file):
    cases = prompt_cases(suite_file(), model='no-such-model')
    for c in cases:
        with pytest.raises(LabError, match='no-such-model'): c.check()

"Prompts and tasks under bad input."
import math
from dataclasses import replace

import pandas as pd
import pytest

from genai_lab.core import LabError
from genai_lab.prompts import EmptyValue, Prompt, fill
from genai_lab.tasks import Task

prompt = Prompt('Product: {{ product }}\nDepartment:', name='plain')
frame = pd.DataFrame(dict(product=['Ice', 'Pears', 'Colby'], department=['Frozen', 'Produce', 'Dairy'], sku=[1, 2, 3]))


def task(**kw): return Task(**{**dict(name='t', data=frame, prompt=prompt, target='department', choices=['Frozen', 'Produce', 'Dairy']), **kw})


@pytest.mark.parametrize('template, words', [
    ('{{ a', ['line 1']), ('x\n{% if a %}', ['line 2', 'if']), ('{{ a | nofilter }}', ['nofilter']), ('{% for x in %}', ['line 1'])])
def test_syntax_errors_name_the_line(template, words):
    with pytest.raises(LabError) as e: Prompt(template, name='p')
    assert all(w in str(e.value) for w in ['prompt "p"', *words])


@pytest.mark.parametrize('template', [
    "{{ ''.__class__ }}", "{{ x.__init__.__globals__ }}", "{{ [].append.__self__ }}", "{% set _ = items.append(1) %}", "{{ range(10**9) | list }}",
    "{{ ''.join.__func__ }}", "{{ x | attr('__class__') }}", "{{ '%s' | format(x.__class__) }}"])
def test_templates_cannot_leave_the_sandbox(template):
    items = [1]
    with pytest.raises(LabError): fill(template, dict(x='text', items=items))
    assert items == [1]


def test_a_missing_and_a_misspelt_variable():
    with pytest.raises(LabError, match='"product".*There are: produkt'): prompt.text({'produkt': 1})
    with pytest.raises(LabError, match='Did you mean "products"'): prompt.check(['products'])


@pytest.mark.parametrize('blank', [None, math.nan, pd.NA, pd.NaT])
def test_an_empty_value_is_never_printed(blank):
    with pytest.raises(EmptyValue, match='"product" is empty'): prompt.text({'product': blank})


def test_an_example_does_not_borrow_from_the_question():
    p = Prompt('{{ product }} by {{ brand }}:', examples=[dict(product='Ice', department='Frozen')], answer='{{ department }}')
    with pytest.raises(LabError, match='"brand"'): p.text(dict(product='Pears', brand='Secret'))


def test_examples_without_an_answer_template():
    with pytest.raises(LabError, match='answer'): Prompt('{{ a }}', examples=[dict(a=1)])


def test_data_is_never_a_template():
    assert '{{ 7*7 }}' in prompt.text({'product': '{{ 7*7 }}'})


def test_fingerprints_follow_what_is_rendered():
    assert replace(prompt, name='q').fingerprint == prompt.fingerprint
    for change in (dict(template='{{ product }}'), dict(system='s'), dict(delimiter='')): assert replace(prompt, **change).fingerprint != prompt.fingerprint


@pytest.mark.parametrize('change, words', [
    (dict(data=frame.head(0)), ['no rows']),
    (dict(target='dept'), ['no column "dept"', 'department']),
    (dict(target=''), ['target']),
    (dict(output='choose'), ['"choose"', 'Did you mean "choice"']),
    (dict(choices=['Frozen']), ['at least two options']),
    (dict(choices=['Frozen', 'Produce', 'Dairy', ' ']), ['option 4 is empty']),
    (dict(choices=['Frozen', 'Produce', 'Dairy', 'Dairy']), ['"Dairy" is there twice']),
    (dict(choices=['Frozen', 'Produce']), ['"Dairy" (1 row)', 'not among the choices']),
    (dict(id='department', data=pd.concat([frame, frame])), ['"Frozen"', 'more than once']),
    (dict(slices=['colour']), ['no column "colour"']),
    (dict(data=frame.assign(department=None)), ['"department" is empty'])])
def test_a_wrong_task_is_refused_when_it_is_made(change, words):
    with pytest.raises(LabError) as e: task(**change)
    assert all(w in str(e.value) for w in ['task "t"', *words]), str(e.value)


def test_an_example_from_the_test_data_is_refused():
    shown = replace(prompt, examples=[dict(product=' ICE ', department='Frozen')], answer='{{ department }}')
    with pytest.raises(LabError, match='example 1 .* also a row of task "t"'): task().samples(shown)


def test_choices_can_differ_by_row():
    t = task(data=frame.assign(options=[['Frozen', 'Dairy'], ['Produce', 'Dairy'], ['Dairy', 'Frozen']]), choices='options')
    assert [s.choices for s in t.samples()] == [('Frozen', 'Dairy'), ('Produce', 'Dairy'), ('Dairy', 'Frozen')]


def test_rows_with_an_empty_reference_or_value_stay_as_failed_samples():
    t = task(data=pd.DataFrame(dict(product=['Ice', None, 'Colby'], department=['Frozen', 'Produce', None])))
    assert [bool(s.error) for s in t.samples()] == [False, True, True]

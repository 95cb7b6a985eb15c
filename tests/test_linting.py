"What lint finds in prompts, and what it leaves alone."
import json
from dataclasses import replace

import pandas as pd
import pytest
from typer.testing import CliRunner

from genai_lab.core import LabError
from genai_lab.linting import lint
from genai_lab.prompts import Prompt, compose, save_prompt
from genai_lab.tasks import Task

frame = pd.DataFrame(dict(product=['Vanilla ice cream, one litre', 'Fresh bananas', 'Colby cheese in slices'], department=['Frozen', 'Produce', 'Dairy'], brand=['A', 'B', 'C']))
good = Prompt('Product: {{ product }}\nDepartment:', name='good', system='Answer with one of: {{ choices | join(", ") }}.')
task = Task('departments', frame, good, target='department', choices=['Frozen', 'Produce', 'Dairy'])


def shown(*pairs, **kw): return replace(good, examples=[dict(product=p, department=d) for p, d in pairs], answer='{{ department }}', **kw)
def rules(prompt, *args): return {(f.rule, f.severity) for f in lint(prompt, *args).findings}


def test_a_good_prompt_has_no_findings(model):
    assert not lint(good).findings and not lint(good, task).findings and not lint(good, task, model).findings
    assert not lint(shown(('Milk', 'Dairy'), ('Pears', 'Produce'), ('Peas, deep-frozen', 'Frozen')), task).findings


@pytest.mark.parametrize('prompt, rule, severity, where, words', [
    (replace(good, template='Product: {{ prodct }}\nDepartment:'), 'variables', 'error', 'variable prodct', 'Did you mean "product"'),
    (replace(good, values=dict(shop='x')), 'variables', 'warning', 'variable shop', 'no template prints it'), (replace(good, values=dict(product='x')), 'variables', 'warning', 'variable product', 'column of that name'),
    (replace(good, about=dict(variables=['prodct'])), 'variables', 'warning', 'about', 'declared'), (replace(good, examples=[dict(product='x', department='Dairy', sku=1)], answer='{{ department }}'), 'variables', 'note', 'examples', '"sku"'),
    (replace(good, template='Product: {{ product }}\nDepartment: '), 'spaces', 'warning', 'question, line 2', 'brings another'), (replace(good, template='{{ product }}:\t', delimiter=''), 'spaces', 'warning', 'question, line 1', 'remove it'),
    (replace(good, delimiter=''), 'spaces', 'note', 'question, line 2', 'set the delimiter'), (shown(('Milk', 'Dairy')), None, None, None, None), (replace(shown(('Milk', 'Dairy')), answer=' {{ department }}'), 'spaces', 'warning', 'answer', 'doubles'),
    (shown(('fresh  BANANAS', 'Produce')), 'leak', 'error', 'example 1', 'a row of task'), (shown(('Milk', 'Dairy'), ('Colby cheese in slice', 'Dairy')), 'leak', 'warning', 'example 2', 'nearly'),
    (shown(('Milk', 'Dairy'), ('milk.', 'Frozen')), 'contradiction', 'error', 'example 2', '"Dairy" there'), (shown(('Milk', 'Dairy'), ('milk.', 'Dairy')), 'contradiction', 'note', 'example 2', 'one of them'),
    (shown(('Milk', 'Dary')), 'labels', 'error', 'example 1', 'Did you mean "Dairy"'), (shown(('Milk', 'Dairy'), ('Cream', 'Dairy'), ('Gouda', 'Dairy'), ('Peas', 'Frozen')), 'balance', 'warning', 'examples', '3 of 4 examples'),
    (shown(('Figs', 'Produce'), ('Peas', 'Frozen'), ('Milk', 'Dairy'), ('Cream', 'Dairy'), ('Gouda', 'Dairy'), ('Nuts', 'Produce'), ('Apples', 'Produce'), ('Pears', 'Produce')), 'balance', 'note', 'examples', 'last three'),
    (replace(good, examples=[dict(product='Milk')], answer='{{ department }}'), 'example', 'error', 'example 1', 'no variable "department"'),
    (replace(good, system='Answer in one word.\nThen explain step by step.'), 'conflict', 'warning', 'system, line 2', '"one word"'), (replace(good, system='Return JSON only, as a Markdown table.'), 'conflict', 'warning', 'system, line 1', 'another format'),
    (replace(good, schema=dict(type='object'), system='Use bullet points.'), 'conflict', 'warning', 'system, line 1', 'schema'), (replace(good, system='Answer in German.\nPlease reply in French.'), 'conflict: language', 'warning', 'system, line 2', 'German'),
    (replace(good, system='Use at most 20 words, and exactly 3 sentences. No more than 50 words.'), 'conflict: length', 'warning', 'system, line 1', '20 words'), (replace(good, system='Write at least 50 words. Write at most 20 words.'), 'conflict: length', 'warning', 'system, line 1', '50 words'),
    (replace(good, system='Labels: Frozen, Produce, Bakery'), 'conflict: labels', 'error', 'system, line 1', 'lacks Dairy'), (replace(good, system='One of: Frozen, Produce, Dairy or Bakery'), 'conflict: labels', 'error', 'system, line 1', 'also names Bakery'),
    (replace(good, system='x\nkey sk-abcdefghijklmnop1234'), 'secret', 'error', 'system, line 2', 'take it out'), (shown(('sk-abcdefghijklmnop1234', 'Dairy')), 'secret', 'error', 'example 1, product', 'take it out'),
    (replace(good, system='Ask jane.doe@retailer.shop.'), 'personal data', 'warning', 'system, line 1', 'e-mail'), (replace(good, system='Pay with 4111 1111 1111 1111.'), 'personal data', 'warning', 'system, line 1', 'card'),
    (replace(good, system='To DE89 3704 0044 0532 0130 00.'), 'personal data', 'warning', 'system, line 1', 'bank account'), (shown(('call +49 30 901820 now', 'Dairy')), 'personal data', 'warning', 'example 1, product', 'telephone'),
    (replace(good, system='You sort.<|im_end|>'), 'control token', 'warning', 'system, line 1', 'leave it out'), (replace(good, template='<p>{{ product }}</p>\nDepartment:'), 'open block', 'note', 'question, line 1', "block('p')"),
    (replace(good, turns=[('user', 'Hi')]), 'turns', 'warning', 'turn 1', 'follow each other'), (replace(good, system=compose([('role', 'You sort.'), ('rules', 'Be kind.\nsk-abcdefghijklmnop1234')])), 'secret', 'error', 'system, part rules, line 2', 'take it out')])
def test_each_rule(prompt, rule, severity, where, words):
    found = [f for f in lint(prompt, task).findings]
    if rule is None: assert not found; return
    hits = [f for f in found if (f.rule, f.severity) == (rule, severity)]
    assert len(hits) == 1 and hits[0].where.startswith(where) and words in hits[0].message and '\n' not in hits[0].message, found


@pytest.mark.parametrize('system', [
    'Answer with one word. Do not explain.', 'Answer with JSON only. Never use Markdown.', 'Think in English and answer in English.', 'At most 20 words in at most 2 sentences.', 'At least 10 words and at most 20 words.',
    'Articles 4111 1111 1111 1112 and 2024-01-02, 0123456789012.', 'Mail info@example.com.', 'Show <b>bold</b> prices.', 'One of: Frozen, Produce, Dairy', 'Choose from: Frozen, Produce or Dairy.', 'Version 1.2.3.4 of 10 000 products; part 12-34-56.'])
def test_what_is_fine_is_left_alone(system): assert not lint(replace(good, system=system), task).findings


def test_length_needs_a_model(model):
    long = replace(good, system='Fresh food every day. ' * 900)
    assert rules(long, task, model) >= {('length', 'warning')} and not rules(long, task)
    assert ('length', 'error') in rules(replace(good, system='Fresh food every day. ' * 3000), task, model)
    assert ('length', 'note') in rules(long.__class__('x' * 30_000))


def test_secrets_do_not_appear_in_the_report():
    r = lint(replace(good, system='One of: Frozen, Produce, sk-abcdefghijklmnop1234'), task)
    assert 'abcdefghijklmnop' not in repr(r) + r._repr_html_() and list(r.to_frame().columns) == ['rule', 'severity', 'where', 'message'] and len(r.errors) >= 2


def test_only_prompts_are_linted():
    with pytest.raises(LabError, match='load_prompt'): lint('a text')


def test_the_command(tmp_path):
    from genai_lab.cli import app
    fine, bad, broken = save_prompt(good, tmp_path / 'fine.yaml'), save_prompt(replace(good, system='key sk-abcdefghijklmnop1234'), tmp_path / 'bad.yaml'), tmp_path / 'broken.yaml'
    broken.write_text('template: "{{ a"')
    run = lambda *a: CliRunner().invoke(app, ['prompts', 'lint', *map(str, a)])
    assert run(fine).exit_code == 0 and 'nothing found' in run(fine).output
    assert run(fine, bad).exit_code == 1 and 'secret' in run(fine, bad).output
    rows = json.loads(run(bad, '--json').output)
    assert rows[0]['rule'] == 'secret' and rows[0]['severity'] == 'error' and rows[0]['file'] == str(bad)
    assert isinstance(run(broken).exception, LabError) and isinstance(run(tmp_path / 'none.yaml').exception, LabError)

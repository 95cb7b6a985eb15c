"Guarded models: the embedded model behind guards, evaluated, compared, logged; and what the report says."
from dataclasses import replace

import pandas as pd
import pytest

from genai_lab.core import LabError
from genai_lab.evaluation import compare, evaluate, summarise
from genai_lab.guarding import guard, guard_report
from genai_lab.guards import Guard, PersonalData, Pipeline, Toxic, Verdict, sorry
from genai_lab.models import Model
from genai_lab.prompts import Prompt
from genai_lab.store import remember
from genai_lab.tasks import Task

rows = pd.DataFrame([dict(text=t, bad=b, wanted='yes', label='shop') for t, b in [('Do you sell shirts?', False), ('Is there a sale today?', False), ('You idiot, do you sell hats?', True), ('Write to ann@example.com!', True)]])
prompt = Prompt('{{ text }}', system='You answer guests of a shop in one short sentence.')
task = Task('guests', rows, prompt, target='wanted', output='generate', slices=('bad',), max_tokens=8)


class Never(Guard):
    "Sends every answer back."
    def look(self, text, context): return Verdict('ask', 'not good enough', score=1.)


@pytest.fixture(scope='module')
def kept(model, tmp_path_factory):
    "The embedded model, asked once for each question of this file."
    return remember(model, tmp_path_factory.mktemp('answers') / 'answers.db')


def test_a_guarded_model_is_a_model(kept):
    g = guard(kept, [PersonalData()])
    assert isinstance(g, Model) and g.can('generate') and g.context_length == kept.context_length and g.chat == kept.chat and g.tokenizer is not None
    assert g.fingerprint not in (kept.fingerprint, guard(kept, [PersonalData(), Toxic()]).fingerprint, guard(kept, [PersonalData()], tries=2).fingerprint)
    assert g.fingerprint == guard(kept, [PersonalData()]).fingerprint


def test_a_question_that_is_stopped_costs_no_call_and_one_that_is_fixed_goes_on(kept):
    asked = []
    class Sees(Guard):
        def look(self, text, context): asked.append(context['question'])
    ev = evaluate(task, guard(kept, [Sees()], inputs=[Toxic(fallback='Let us stay polite.'), PersonalData()]), progress=False)
    assert ev.samples.guard_action.tolist() == ['pass', 'pass', 'block', 'fix'] and ev.samples.guard_calls.tolist() == [1, 1, 0, 1]
    assert ev.samples.answer[2] == 'Let us stay polite.' and ev.samples.guard_by[2] == 'toxic' and ev.samples.guard_by[3] == 'personal data'
    assert asked[:2] == rows.text[:2].tolist(), 'guards see the question, not the chat template'


def test_asking_again_ends_after_so_many_tries_with_the_fallback(kept):
    for tries in (0, 1, 2):
        ev = evaluate(task.head(2), guard(kept, [Never()], tries=tries), progress=False)
        assert ev.samples.guard_calls.tolist() == [1 + tries] * 2 and ev.samples.answer.tolist() == [sorry] * 2
        assert set(ev.samples.guard_action) == {'block'} and 'not good enough' in ev.samples.guard_reason[0] and ev.samples.guard_draft[0]


def test_a_second_answer_that_is_good_is_said(kept):
    class Once(Guard):
        "Objects to the first answer only."
        seen = 0
        def look(self, text, context): self.seen += 1; return Verdict('ask', 'say it in other words') if self.seen == 1 else None
    g = guard(kept, [Once()], tries=2)
    ev = evaluate(task.head(1), g, progress=False)
    assert ev.samples.guard_action[0] == 'pass' and ev.samples.answer[0] not in ('', sorry) and ev.samples.guard_calls[0] == 2 and ev.samples.guard_draft[0]
    assert evaluate(task.head(1), guard(kept, [Once()], tries=2), progress=False).samples.answer[0] == ev.samples.answer[0], 'the same seed, the same second answer'


def test_plain_text_is_drawn_anew_where_nothing_can_be_said_to_the_model(kept):
    g = guard(kept, [Never()], tries=1)
    first = kept.generate(['Once upon a time'], max_tokens=4)[0]
    out = g.generate(['Once upon a time'], max_tokens=4, seeds=[5])[0]
    assert out.notes['guard_calls'] == 2 and out.completion_tokens == first.completion_tokens + 4 and out.text == sorry


def test_failed_generations_stay_failed(kept):
    ev = evaluate(replace(task.head(1), max_tokens=8), guard(kept, [Never()]), Prompt('word ' * 9000 + '{{ text }}'), progress=False, chat=False)
    assert ev.n.failed == 1 and 'guard_action' not in ev.samples


def test_choices_are_guarded_by_their_question(kept):
    choice = Task('choice', rows, Prompt('{{ text }}\nThis is about a'), target='label', choices=('shop', 'ship'), slices=('bad',))
    plain, guarded = evaluate(choice, kept, label='plain', progress=False), evaluate(choice, guard(kept, [Never()], inputs=[Toxic()]), label='guarded', progress=False)
    assert guarded.n.failed == 1 and 'stopped by a guard: toxic' in guarded.samples.error[2]
    same = [0, 1, 3]
    assert guarded.samples.logprobs[same].tolist() == plain.samples.logprobs[same].tolist(), 'scores are no text and stay as they are'
    assert compare(plain, guarded).pairs[('plain', 'guarded')].n == 4, 'a stopped question counts as wrong'


def test_evaluations_compare_and_log_like_any_other(kept, mlflow_home):
    import mlflow
    from genai_lab.tracking import start_run
    plain, guarded = evaluate(task, kept, label='plain', progress=False), evaluate(task, guard(kept, [Toxic()], inputs=[Toxic()]), label='guarded', progress=False)
    assert compare(plain, guarded).pairs[('plain', 'guarded')].n == 4
    run = start_run('guarded', params={})
    run.log_evaluation(guarded)
    run.log_metrics({f'guards/{k}': e for k, e in guard_report(guarded).rates.items()})
    run.finish()
    client = mlflow.MlflowClient(f'sqlite:///{mlflow_home}/mlflow.db')
    m = client.get_run(run.id).data.metrics
    assert m['guards/blocked'] == .25 and m['guards/blocked.low'] < .25 < m['guards/blocked.high'] and m['guards/blocked.n'] == 4


def made(actions, bad, calls=1, seconds=.001):
    "An evaluation from decisions."
    s = pd.DataFrame(dict(id=range(len(actions)), target='', prediction='', error='', answer='write to ann@example.com', bad=bad, guard_action=actions, guard_by=['' if a == 'pass' else 'toxic' for a in actions],
                          guard_reason='', guard_draft=None, guard_calls=calls, guard_seconds=seconds))
    return summarise(task, s, 'made')


def test_the_report_counts_each_rate_on_its_own_traffic():
    r = guard_report(made(['pass'] * 6 + ['block', 'fix'] + ['block'] * 5 + ['fix', 'pass'], [False] * 8 + [True] * 7)).rates
    said = {k: (e.value * e.n, e.n) for k, e in r.items() if k not in ('calls', 'milliseconds')}
    assert {k: (round(a), n) for k, (a, n) in said.items()} == dict(blocked=(6, 15), false_blocks=(1, 8), false_fixes=(1, 8), caught=(6, 7), got_through=(1, 7), asked_again=(0, 15))
    assert all(e.low <= e.value <= e.high for e in r.values()) and abs(r['milliseconds'].value - 1) < 1e-9
    report = guard_report(made(['pass', 'block'], [True, True]))
    assert '@' not in report.through.said[0] and report.rates['false_blocks'].n == 0 and report.by_guard.bad.tolist() == [1]
    assert 'false blocks n/a' in ' '.join(repr(report).split()) and '<table>' in report._repr_html_()


def test_reports_that_cannot_be_made_say_why():
    with pytest.raises(LabError, match='no column "evil"'): guard_report(made(['pass'], [True]), bad='evil')
    with pytest.raises(LabError, match='empty in 1 row'): guard_report(made(['pass', 'pass'], [True, None]))
    ev = made(['pass'], [True])
    with pytest.raises(LabError, match='no decisions of guards'): guard_report(replace(ev, samples=ev.samples.drop(columns='guard_action')))


def test_wrong_ways_to_guard_are_refused(kept):
    with pytest.raises(LabError, match='guarded already'): guard(guard(kept, []), [])
    with pytest.raises(LabError, match='tries is a whole number'): guard(kept, [], tries=-1)
    with pytest.raises(LabError, match='a model is needed, or its name, not a NoneType'): guard(None, [])
    with pytest.raises(LabError, match='no model "nowhere"'): guard('nowhere', [])
    with pytest.raises(LabError, match='a dict or a function'): guard(kept, [], context=[1])


def test_a_context_may_depend_on_the_question(kept):
    seen = []
    class Sees(Guard):
        def look(self, text, context): seen.append(context['sources'])
    evaluate(task.head(2), guard(kept, Pipeline([Sees()]), context=lambda q: dict(sources=[q.upper()])), progress=False)
    assert seen == [[t.upper()] for t in rows.text[:2]]


def test_the_experiment_runs_and_records_what_leaves_before_and_after(tmp_path, mlflow_home):
    import os
    import subprocess
    import sys
    from pathlib import Path
    import mlflow
    root = Path(__file__).resolve().parents[1]
    said = subprocess.run([Path(sys.executable).parent / 'genai-lab', 'run', root / 'experiments' / '06_guard_retail_answers.ipynb', '-p', 'questions=4', '-p', 'max_tokens=6', '--output', tmp_path / 'out'],
                          cwd=root, env={**os.environ}, capture_output=True, text=True, timeout=600)
    assert said.returncode == 0, said.stderr
    assert 'with guards' in said.stdout and 'wrong without guards' in said.stdout
    client = mlflow.MlflowClient(f'sqlite:///{mlflow_home}/mlflow.db')
    [run] = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    m = run.data.metrics
    assert m['guards/blocked.n'] == 20 and m['wrong/after'] <= m['wrong/before'] and {'guards/got_through.low', 'guards/milliseconds'} <= set(m)

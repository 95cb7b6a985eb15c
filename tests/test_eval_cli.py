"`genai-lab eval` and `genai-lab tasks check` as people use them: real processes with the embedded model, what they print, leave behind and survive."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pandas as pd
import pytest

from genai_lab.core import LabError
from genai_lab.harness import check_tasks
from genai_lab.results import file_name, output_folder, read_results, results_schema, run_tasks, sample_frame, task_record

tasks = Path(__file__).parent / 'tasks'
command = [str(Path(sys.executable).parent / 'genai-lab')]


def call(*args, **kw): return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=300, **kw)


def error(r):
    "The one line of a command that was refused."
    assert r.returncode == 2 and r.stdout == '' and len(r.stderr.strip().splitlines()) == 1, r.stdout + r.stderr
    return r.stderr


def stable(results):
    "What must be the same in every run of the same command."
    return {n: {k: t[k] for k in ('n', 'metrics', 'fingerprints', 'failures')} for n, t in results['tasks'].items()}


def numbers(folder, task): return pd.read_parquet(folder / file_name(task)).drop(columns='requests')


def test_eval_writes_results_and_samples(tmp_path, mlflow_home):
    out, store = tmp_path / 'out', tmp_path / 'answers.db'
    again = ['eval', '--task', tasks / 'products.yaml', '--task', tasks / 'questions.yaml', '--model', 'smollm2-135m', '--limit', 3, '--output', out, '--store', store]
    r = call(*again, '--track')
    assert r.returncode == 0 and 'products' in r.stdout and 'exact_match,whole' in r.stdout and str(out / 'results.json') in r.stdout, r.stderr
    d = json.loads((out / 'results.json').read_text())
    jsonschema.validate(d, results_schema)
    assert d['status'] == 'complete' and set(d['tasks']) == {'products', 'questions'} and d['schema_version'] == 1
    p = d['tasks']['products']
    assert p['n'] == dict(attempted=3, scored=3, failed=0) and p['version'] == '1.0' and p['num_fewshot'] == 3 and 'no effect' in p['notes'][0]
    assert set(p['metrics']['acc']) >= {'value', 'stderr', 'interval', 'bounds', 'higher_is_better'} and p['metrics']['acc']['bounds'] is None
    assert p['timing']['requests'] == 12 and p['timing']['tokens_computed'] < p['timing']['tokens_asked'] and p['timing']['model_seconds'] > 0
    assert set(p['fingerprints']) == {'model', 'data', 'prompt', 'task', 'code'} and all(len(f) == 16 for f in p['fingerprints'].values())
    s = pd.read_parquet(out / p['samples'])
    want = json.loads((tasks / 'expected.json').read_text())['products']
    assert s.prompt.tolist() == [doc[0][0] for doc in want['text'][:3]] and [len(x) for x in s.requests] == [4, 4, 4]
    assert json.loads(s.document[0])['product'] == 'RYE BREAD 24 OZ' and set(s.columns) >= {'target', 'prediction', 'correct', 'error', 'acc', 'acc_norm'}
    from genai_lab.tracking import connect
    client = connect()
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == 'FINISHED' and run.data.metrics['products/n.attempted'] == 3 and 'products/acc' in run.data.metrics and run.data.params['limit'] == '3.0'
    first, rows = stable(d), {t: numbers(out, t) for t in d['tasks']}
    r = call(*again)         # everything is remembered: nothing is computed, and the numbers are the same to the bit
    d = read_results(out)
    assert r.returncode == 0 and stable(d) == first
    assert [t['timing']['tokens_computed'] for t in d['tasks'].values()] == [0, 0] and d['tasks']['products']['timing']['remembered'] == 12
    for t in rows: pd.testing.assert_frame_equal(numbers(out, t), rows[t])
    r = call(*again, '--replay', '--num-fewshot', 1)
    assert r.returncode == 2 and 'replay forbids new calls' in r.stderr.splitlines()[-1]


def test_ctrl_c_keeps_what_is_done(tmp_path):
    rows = ''.join(json.dumps(dict(q=f'product number {i}', a=['Bakery', 'Dairy'][i % 2])) + '\n' for i in range(80))
    (tmp_path / 'test.jsonl').write_text(rows)
    (tmp_path / 'many.yaml').write_text(json.dumps(dict(task='many', dataset_path='json', dataset_kwargs=dict(data_files=dict(test='test.jsonl')), test_split='test', output_type='multiple_choice',
                                                        doc_to_text='{{q}} ' * 5 + 'is in the', doc_to_target='a', doc_to_choice=['Bakery', 'Dairy'])))
    store, out = tmp_path / 'answers.db', tmp_path / 'out'
    words = ['eval', '--task', str(tmp_path / 'many.yaml'), '--output', str(out), '--store', str(store)]
    p = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait(lambda: _answers(store) > 0 or p.poll() is not None)
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=60)[1]
    assert p.returncode == 130, said
    assert said.strip().splitlines()[-1].startswith('interrupted: 0 tasks of 1 done') and 'The same command goes on from there' in said and 'Traceback' not in said
    kept = _answers(store)
    assert 0 < kept < 160
    with output_folder(out): assert 'is being written by another run (process' in error(call(*words))     # two runs in one folder
    r = call(*words)
    assert r.returncode == 0, r.stderr
    t = read_results(out)['tasks']['many']
    assert t['n']['scored'] == 80 and t['timing']['requests'] == 160 and t['timing']['remembered'] == kept and 0 < t['timing']['tokens_computed']


def _answers(store):
    import sqlite3
    try: return sqlite3.connect(f'file:{store}?mode=ro', uri=True).execute('select count(*) from answers').fetchone()[0]
    except sqlite3.Error: return 0


def _wait(done):
    end = time.monotonic() + 120
    while not done() and time.monotonic() < end: time.sleep(.05)


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    (tmp_path / 'bad.yaml').write_text('task: x\n  y: z\n')
    assert 'line 2, column' in error(call('eval', '--task', tmp_path / 'bad.yaml'))


def test_tasks_check_shows_what_the_model_will_see(tmp_path):
    r = call('tasks', 'check', tasks / 'products.yaml', '--chat-template', '--num-fewshot', 1)
    assert r.returncode == 0, r.stderr
    for words in ('8 documents of split test', '1 of 10 documents in split train', '<|im_start|>user\nProduct: RYE BREAD 24 OZ\nAisle:<|im_end|>', "→ 'Bakery'", 'sample 2 of 8', 'tokenizer      of model smollm2-135m'): assert words in r.stdout, words
    shutil.copytree(tasks, tmp_path / 'tasks')
    data = tmp_path / 'tasks/data'
    (data / 'products_train.jsonl').write_text((data / 'products_test.jsonl').read_text())
    said = str(check_tasks(tmp_path / 'tasks/products.yaml')[0])
    assert 'refused        task "products"' in said and '--allow-overlap' in said


# the folder, without the command line

@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / 'small'
    disk.mkdir()
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(disk)], capture_output=True).returncode: pytest.skip('a small file system cannot be mounted here')
    yield disk
    subprocess.run(['umount', '-l', str(disk)])


def test_a_full_disk(small_disk, model, tmp_path):
    (small_disk / 'ballast').write_bytes(b'x' * 56_000)
    with pytest.raises(LabError, match='No space left on device') as e: run_tasks([tasks / 'prices.yaml'], model, limit=2, output=small_disk / 'out', store=tmp_path / 's.db', say=lambda t: None)
    assert '\n' not in str(e.value) and not (small_disk / 'out/results.json').exists()
    (small_disk / 'ballast').unlink()
    run = run_tasks([tasks / 'prices.yaml'], model, limit=2, output=small_disk / 'out', store=tmp_path / 's.db', say=lambda t: None)
    assert run.records['prices']['timing']['tokens_computed'] == 0 and read_results(small_disk / 'out')['status'] == 'complete'


def test_two_runs_in_one_folder(tmp_path, model):
    with output_folder(tmp_path / 'out'):
        with pytest.raises(LabError, match=f'process {os.getpid()} on'): run_tasks([tasks / 'prices.yaml'], model, output=tmp_path / 'out')
    (tmp_path / 'file').write_text('')
    with pytest.raises(LabError, match='cannot be written'): run_tasks([tasks / 'prices.yaml'], model, output=tmp_path / 'file')


def test_a_partial_run_says_so(tmp_path, model):
    class Stops:
        "Another model that gives up in the second task."
        def __init__(self, inner): self.inner, self.calls = inner, 0
        def __getattr__(self, k): return getattr(self.inner, k)
        def loglikelihood(self, *a, **kw):
            self.calls += 1
            if self.calls > 1: raise KeyboardInterrupt
            return self.inner.loglikelihood(*a, **kw)
    said = []
    with pytest.raises(KeyboardInterrupt): run_tasks([tasks / 'prices.yaml', tasks / 'fit.yaml'], Stops(model), limit=2, output=tmp_path / 'out', store=tmp_path / 's.db', say=said.append)
    d = read_results(tmp_path / 'out')
    assert (d['status'], list(d['tasks'])) == ('partial', ['prices']) and said[-1].startswith('interrupted: 1 task of 2 done; 4 new answers of this run are kept in')


def test_results_that_are_none(tmp_path):
    with pytest.raises(LabError, match='No such file'): read_results(tmp_path / 'none')
    (tmp_path / 'results.json').write_text('{"schema_version": 2}')
    with pytest.raises(LabError, match='is no results.json of schema version 1'): read_results(tmp_path)


def test_groups_and_failures_are_in_the_results(tmp_path, model):
    run = run_tasks([tasks / 'shop.yaml'], model, limit=2, output=tmp_path / 'out', store=tmp_path / 's.db', say=lambda t: None)
    d = read_results(tmp_path / 'out')
    g = d['groups']['shop_group']
    assert g['tasks'] == ['products', 'prices', 'questions'] and g['metrics']['acc']['tasks'] == ['products', 'prices'] and g['metrics']['acc']['lacking'] == ['questions'] and g['metrics']['acc']['n'] == 4
    assert 'group shop_group' in str(run) and '<table>' in run._repr_html_()


def test_python_tasks_make_the_same_records():
    from genai_lab.evaluation import evaluate
    from genai_lab.prompts import Prompt
    from genai_lab.scoring import Score
    from genai_lab.tasks import Task
    class Toy:
        name, chat, fingerprint = 'toy', False, 'a' * 16
        def can(self, what): return True
        def loglikelihood(self, pairs, progress=False): return [Score(-float(len(c)), 1, False) for _, c in pairs]
    data = pd.DataFrame(dict(q=['rye', 'eggs', None], a=['Bakery', 'Dairy', 'Dairy']))
    ev = evaluate(Task('python', data, Prompt('{{ q }}:'), 'a', choices=['Bakery', 'Dairy'], metrics=['accuracy', 'macro_f1']), Toy())
    timing = dict(requests=4, remembered=0, tokens_asked=4, tokens_computed=4, seconds=.1, model_seconds=.1)
    record = task_record(ev, timing)
    jsonschema.validate(record, results_schema['properties']['tasks']['additionalProperties'])
    assert record['n']['failed'] == 1 and record['metrics']['accuracy']['bounds'] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    frame = sample_frame(ev)
    assert frame.correct.tolist() == [False, True, None] and json.loads(frame.document[0]) == dict(q='rye', a='Bakery')

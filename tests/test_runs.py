"Runs that died without a word, runs that are still to be sent, and which runs need not be run again."
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from genai_lab import runs
from genai_lab.core import LabError, input_fingerprint
from genai_lab.experiments import run_notebook
from genai_lab.runs import changed_inputs, find_run, list_runs, parse_since, push, reap, run_filter, runs_table, unsent
from genai_lab.tracking import Spool, all_spools, connect, experiment_id, identity, local_path, new_spool, open_record, process_started

notebooks = Path(__file__).parent / 'notebooks'
gone = {'pid': '4000000', 'pid.started': '1.00'}   # larger than any process id


@pytest.fixture(autouse=True)
def home(mlflow_home, tmp_path, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_CACHE_DIR', str(tmp_path / 'cache'))
    return mlflow_home


def status(run_id): return connect().get_run(run_id).info.status


def ending(status='FINISHED'): return dict(status=status, time=int(time.time() * 1000))


def marked(tmp_path):
    "Processes that were started with this test's settings."
    found = []
    for p in psutil.process_iter():
        try:
            if p.pid != os.getpid() and str(tmp_path) in p.environ().get('GENAI_LAB_TRACKING_URI', '') and p.status() != psutil.STATUS_ZOMBIE: found.append(p)
        except (psutil.Error, OSError): pass
    return found


def wait_for(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < deadline: time.sleep(.1)
    return found


# what died

def start_runner(tags):
    "A runner in a process of its own, whose notebook hangs in its third cell; the process and the id of its run."
    code = f'from genai_lab.experiments import run_notebook; run_notebook({str(notebooks / "hangs.ipynb")!r}, tags={tags!r})'
    runner = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    spool = wait_for(lambda: next((s for s in all_spools() if any('metrics' in r for r in s.read()[0])), None))
    assert wait_for(lambda: 'waiting' in (spool.files / 'hangs.ipynb').read_text() if (spool.files / 'hangs.ipynb').exists() else False)
    return runner, spool.about['run_id']


@pytest.mark.parametrize('how', ['the runner is killed', 'the scheduler is killed'])
def test_a_run_that_is_killed_without_a_word_is_closed_with_everything_it_has_said(tmp_path, how):
    by_scheduler = how == 'the scheduler is killed'
    runner, run_id = start_runner({'scheduler.pid': gone['pid'], 'scheduler.started': gone['pid.started']} if by_scheduler else {})
    if not by_scheduler: runner.kill(); runner.wait()
    [found] = reap()
    runner.wait(10)
    run = connect().get_run(run_id)
    assert (found.run_id, found.status, run.info.status) == (run_id, 'KILLED', 'KILLED') and found.why == ('its scheduler is gone' if by_scheduler else 'its process is gone')
    assert (run.data.tags['failure'], run.data.tags['failure.kind'], run.data.metrics) == ('the runner died', 'died', dict(before=1))
    assert 'waiting' in (local_path(run.info.artifact_uri) / 'hangs.ipynb').read_text()
    assert wait_for(lambda: not marked(tmp_path), 10) and not all_spools() and reap() == []


def test_who_is_alive_is_left_alone():
    client = connect()
    e = experiment_id(client, 'many')
    mine, reused = open_record('many', 'mine', {}, new_spool()), open_record('many', 'reused', {'pid.started': '1.00'}, new_spool())
    foreign, plain = open_record('many', 'far', {'host': 'gpu-7'}, new_spool()), client.create_run(e).info.run_id
    assert [(r.run_id, r.why) for r in reap()] == [(reused.id, 'its process is gone')]
    assert [status(i) for i in (mine.id, foreign.id, plain)] == ['RUNNING'] * 3
    assert process_started(os.getpid()) == identity()['pid.started']


def test_other_machines_are_judged_by_their_heartbeat(monkeypatch):
    now = time.time()
    silent, fresh = (open_record('far', 'x', {'host': 'gpu-7', 'heartbeat': f'{now - ago:.0f}'}, new_spool()) for ago in (700, 500))
    never = open_record('far', 'x', {'host': 'gpu-7'}, new_spool())
    connect().delete_tag(never.id, 'heartbeat')
    assert [r.run_id for r in reap()] == [silent.id]
    monkeypatch.setenv('GENAI_LAB_HEARTBEAT_LIMIT', '0')
    assert {r.run_id for r in reap(all_hosts=True)} == {fresh.id, never.id} and status(never.id) == 'KILLED'


def test_a_heartbeat_moves_on(monkeypatch):
    record = open_record('many', 'x', {'heartbeat': '5'}, new_spool())
    record.beat()
    assert connect().get_run(record.id).data.tags['heartbeat'] == '5'
    monkeypatch.setattr('genai_lab.tracking.heartbeat_every', 0)
    record.beat()
    assert time.time() - float(connect().get_run(record.id).data.tags['heartbeat']) < 60


@pytest.mark.parametrize('said', ['FINISHED', 'FAILED'])
def test_a_run_that_had_said_how_it_ended_before_it_was_killed_is_believed(said):
    record = open_record('many', 'x', gone, new_spool())
    record.spool.add(metrics=[['accuracy', .5, 0, 0]], end=ending(said))
    assert [(r.run_id, r.status) for r in reap()] == [(record.id, said)]
    assert status(record.id) == said and connect().get_run(record.id).data.metrics == dict(accuracy=.5) and not all_spools()


def test_empty_spools_of_the_dead_are_swept(tmp_path):
    done = open_record('many', 'x', gone, new_spool())
    done.end()
    nothing_said = new_spool()
    os.utime(nothing_said.folder, (0, 0))
    alive = new_spool()
    reap()
    assert [s.folder for s in all_spools()] == [alive.folder]


# what is still to be sent

def waiting(name='x', tags=gone, **record):
    spool = new_spool()
    record = open_record('late', name, tags, spool)
    spool.add(metrics=[['loss', i, i, i] for i in range(100)], params=dict(n='5'), tags=dict(verdict='fine'))
    (spool.files / 'tables').mkdir()
    (spool.files / 'tables' / 'result.csv').write_text('a,b\n')
    spool.add(artifact='tables/result.csv')
    return record


def check(run_id, status='FINISHED'):
    client = connect()
    run = client.get_run(run_id)
    assert run.info.status == status and run.data.params == dict(n='5') and run.data.tags['verdict'] == 'fine' and len(client.get_metric_history(run_id, 'loss')) == 100
    assert (local_path(run.info.artifact_uri) / 'tables' / 'result.csv').read_text() == 'a,b\n'
    return run


def test_what_waits_is_sent_completely_and_only_once():
    record = waiting()
    record.spool.add(end=ending())
    assert [s.folder for s in unsent()] == [record.spool.folder]
    [p] = push()
    assert (p.run_id, p.status, p.why) == (record.id, 'FINISHED', '') and str(p) == f'{record.id[:8]} x: sent, FINISHED'
    check(record.id)
    assert push() == [] and not all_spools()


def test_sending_goes_on_where_it_was_broken_off_and_a_torn_line_is_no_hindrance():
    record = waiting()
    _, first = record.spool.read(0, 1)
    record.send()
    record.spool.sent = first                       # the process was killed before it could note the rest
    with open(record.spool.log, 'ab') as f: f.write(b'{"metrics": [["loss", 5')
    record.spool.add(end=ending())
    (record.spool.folder / 'sent').write_text('')   # and while it noted this
    push()
    check(record.id)


def test_a_run_that_was_never_opened_is_opened_and_one_whose_answer_was_lost_is_found():
    opened = waiting('opened')
    about = opened.spool.about
    about.pop('run_id')
    (opened.spool.folder / 'record.json').write_text(json.dumps(about))
    never = new_spool()
    shutil.copytree(opened.spool.folder, never.folder, dirs_exist_ok=True)
    never.note(name='never', tags={**about['tags'], 'run_dir': str(never.folder)})
    for s in (opened.spool, never): s.add(end=ending())
    first, second = sorted(push(), key=lambda p: p.name, reverse=True)
    assert first.run_id == opened.id and second.name == 'never' and second.run_id != opened.id
    for p in (first, second): check(p.run_id)
    assert len(list_runs('late')) == 2


def test_a_dead_run_that_never_said_how_it_ended_is_pushed_as_killed():
    record = waiting()
    assert [p.status for p in push()] == ['KILLED']
    assert check(record.id, 'KILLED').data.tags['failure'] == 'the runner died'


def test_runs_at_work_are_not_pushed_and_ids_are_checked():
    alive, dead = waiting('alive', {}), waiting('dead')
    with pytest.raises(LabError, match=f'nothing of the run {alive.id} waits to be sent; waiting: {dead.id[:8]}'): push([alive.id])
    assert [p.name for p in push([dead.id[:6]])] == ['dead'] and status(alive.id) == 'RUNNING'


def test_a_spool_of_a_store_with_a_password_waits_for_its_settings():
    record = waiting()
    record.spool.note(uri='postgresql://[redacted]@db/lab')
    [p] = push()
    assert 'belongs to the tracking store postgresql://[redacted]@db/lab' in p.why and p.folder and 'not sent' in str(p)
    assert len(all_spools()) == 1


def test_another_store_than_todays_gets_what_belongs_to_it(monkeypatch, tmp_path, database_template):
    record = waiting()
    record.spool.add(end=ending())
    shutil.copy(database_template, tmp_path / 'other.db')
    with monkeypatch.context() as m:
        m.setenv('GENAI_LAB_TRACKING_URI', f'sqlite:///{tmp_path}/other.db')
        assert [p.status for p in push()] == ['FINISHED']
    check(record.id)


def test_a_run_whose_files_found_no_room_is_finished_when_there_is_some(tmp_path, monkeypatch, capfd):
    if os.geteuid(): pytest.skip('mounting a file system needs root')
    small = tmp_path / 'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(small)], capture_output=True).returncode: pytest.skip('this machine does not let tests mount')
    try:
        monkeypatch.setenv('GENAI_LAB_ARTIFACT_ROOT', str(small))
        shutil.copy(notebooks / 'good.ipynb', tmp_path)   # out of the work tree, whose changes would be recorded too
        with pytest.raises(LabError, match='No space left'): run_notebook(tmp_path / 'good.ipynb')
        assert 'genai-lab runs push' in capfd.readouterr().err
        [run_id] = list_runs().run_id
        assert status(run_id) == 'FAILED' and 'No space left' in connect().get_run(run_id).data.tags['failure']
        assert 'No space left' in push()[0].why
        subprocess.run(['mount', '-o', 'remount,size=64m', str(small)], check=True)
        assert [p.status for p in push()] == ['FINISHED']
        run = connect().get_run(run_id)
        assert run.info.status == 'FINISHED' and 'failure' not in run.data.tags and (local_path(run.info.artifact_uri) / 'story.html').exists() and not all_spools()
    finally: subprocess.run(['umount', '-l', str(small)])


def test_a_full_disk_under_the_spool_is_one_line(tmp_path):
    code = ("import resource; from genai_lab.tracking import *\nspool = new_spool(); record = open_record('full', 'x', {}, spool)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\nimport signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "try:\n    for i in range(1000): spool.add(tags=dict(note='x' * 100))\nexcept Exception as e: print(type(e).__name__, e)\nprint(len(spool.read()[0]) > 100)")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60).stdout.splitlines()
    assert out[0].startswith('LabError ') and 'records.jsonl cannot be written: File too large' in out[0] and out[1] == 'True'


def test_two_writers_and_a_kill_leave_no_line_broken(tmp_path):
    folder = tmp_path / 's'
    code = f"from genai_lab.tracking import Spool\ns = Spool({str(folder)!r})\nfor i in range(10**6): s.add(tags=dict(i=i, text='x' * 20000))"
    writers = [subprocess.Popen([sys.executable, '-c', code]) for _ in range(2)]
    spool = Spool(folder)
    assert wait_for(lambda: len(spool.read(0, 200)[0]) == 200)
    for w in writers: w.kill(); w.wait()
    spool.add(tags=dict(last='one'))
    records = spool.read()[0]
    assert records[-1] == dict(tags=dict(last='one')) and all(len(r['tags']['text']) == 20000 for r in records[:-1])
    lines = spool.log.read_bytes().splitlines()
    assert len(lines) - len(records) <= 1   # at most the one that was being written when the last writer was killed


# lists

def test_conditions_in_plain_words():
    assert run_filter('') == ''
    assert run_filter("params.name != it's and `few shot/accuracy`<1e-3 and start_time>5") == 'params.`name` != "it\'s" and metrics.`few shot/accuracy` < 1e-3 and attributes.`start_time` > 5'
    for wrong, words in [('accuracy', 'is no condition'), ('accuracy>good', 'compared with a number'), ('a=1 and b', 'is no condition')]:
        with pytest.raises(LabError, match=words): run_filter(wrong)
    with pytest.raises(LabError, match='neither a span'): parse_since('soon')


def test_runs_are_filtered_ranked_and_shown():
    for i, (name, params, metrics) in enumerate([('a', dict(model='x y'), {'acc': .5, 'acc.low': .4, 'acc.high': .6, 'z': 1}), ('b', dict(model="o'x"), {'acc': .7, 'z': float('nan')}), ('c', {}, {})]):
        r = open_record(f'e{i % 2}', name, {}, new_spool())
        r.spool.add(params=params, metrics=[[k, v, 0, 0] for k, v in metrics.items()], tags=dict(verdict=f'{name} is\nfine'))
        r.send()
        if name != 'c': r.end()
    assert list_runs(where="model=o'x").name.tolist() == ['b'] and list_runs(where='model=x y and acc>0.4').name.tolist() == ['a']
    assert list_runs(rank='acc').name.tolist() == ['b', 'a'] and list_runs(rank='acc asc', limit=1).name.tolist() == ['a']
    assert list_runs('e0', status='running').name.tolist() == ['c'] and list_runs(since='2999-01-01').empty and list(list_runs(since='2999-01-01').columns) == list(list_runs().columns)
    columns, rows = runs_table(list_runs(rank='acc'), width=100)
    assert columns[0] == 'run' and [len(r[0]) for r in rows] == [8, 8] and rows[0][-1] == 'b is fine' and 'acc 0.5 [0.4, 0.6]' in rows[1]
    assert runs_table(list_runs(where='n=none')) [1] == []
    with pytest.raises(LabError, match='Did you mean "acc"'): list_runs(rank='accc')
    one = list_runs(limit=1).run_id[0]
    assert find_run(connect(), one[:10]).info.run_id == find_run(connect(), one).info.run_id == one
    for text, words in [('xyz', 'is no id'), ("' OR 1=1", 'is no id'), ('0' * 32, 'there is no run')]:
        with pytest.raises(LabError, match=words): find_run(connect(), text)


def test_more_runs_than_a_page_holds(monkeypatch):
    client = connect()
    e = experiment_id(client, 'pages')
    for _ in range(7): client.create_run(e)
    small = type('Pages', (), dict(search_runs=lambda self, *a, **k: client.search_runs(*a, **{**k, 'max_results': min(3, k['max_results'])})))()
    assert len(runs.search_runs(small, [e])) == 7 and len(runs.search_runs(small, [e], limit=4)) == 4


# what a run has used

def test_changes_of_inputs_are_told_by_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, '_model_now', lambda i: 'm1')
    (tmp_path / 'sales').mkdir()
    for n in 'ab': (tmp_path / 'sales' / f'{n}.csv').write_text('x\n1\n')
    used = [dict(kind='data', name='sales', path=str(tmp_path / 'sales')), dict(kind='data', name='a.csv', path=str(tmp_path / 'sales' / 'a.csv')),
            dict(kind='prompt', name='tone.yaml', path='package:no_such_package/tone.yaml', fingerprint='p'), dict(kind='model', name='tiny', path='', fingerprint='m0'), dict(kind='data', name='SELECT 1', path='', fingerprint='d')]
    for i in used: i.setdefault('fingerprint', '') or i.update(fingerprint=input_fingerprint(i['path']))
    record = open_record('inputs', 'x', {}, new_spool())
    (record.spool.files / 'inputs.json').write_text(json.dumps(used))
    record.spool.add(artifact='inputs.json')
    record.end()
    tell = lambda: changed_inputs(connect(), record.id)
    always = ['prompt tone.yaml cannot be found', 'model tiny has changed', 'data SELECT 1 is no file, so nobody can tell whether it has changed']
    assert tell() == always
    (tmp_path / 'sales' / 'c.csv').write_text('x\n')
    assert tell() == ['data sales has changed', *always]
    bare = open_record('inputs', 'y', {}, new_spool())
    assert changed_inputs(connect(), bare.id) == []


def test_a_notebook_leaves_its_inputs_also_when_it_does_not_finish_by_itself(tmp_path):
    (tmp_path / 'x.csv').write_text('a\n1\n')
    cell = dict(cell_type='code', metadata={}, outputs=[], execution_count=None, id='a', source=f'from genai_lab.core import note_path\nnote_path("data", {str(tmp_path / "x.csv")!r})')
    (tmp_path / 'x.ipynb').write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[cell])))
    result = run_notebook(tmp_path / 'x.ipynb')
    assert [i['name'] for i in runs.run_inputs(connect(), result.run_id)] == ['x.csv'] and changed_inputs(connect(), result.run_id) == []
    assert not all_spools()

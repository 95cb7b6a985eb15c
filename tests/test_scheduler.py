"Grids of notebooks on this machine: who runs where, what is tried again, how it ends, and what a resumed grid does not do twice."
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from genai_lab.core import LabError
from genai_lab.grids import axes_grid, read_grid
from genai_lab.scheduler import PlainBoard, run_grid
from genai_lab.tracking import connect, local_path

kills = int(os.environ.get('GENAI_LAB_KILLS', 4))   # of the runner, its workers and their kernels, in the last test
cells_under_fire = int(os.environ.get('GENAI_LAB_KILL_CELLS', 5))


@pytest.fixture(autouse=True)
def home(mlflow_home, tmp_path, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    return mlflow_home


@pytest.fixture(autouse=True)
def no_process_is_left(tmp_path):
    def mine():
        found = {}
        for p in psutil.process_iter():
            try:
                if p.pid != os.getpid() and str(tmp_path) in p.environ().get('GENAI_LAB_TRACKING_URI', '') and p.status() != psutil.STATUS_ZOMBIE: found[p.pid] = p.cmdline()
            except (psutil.Error, OSError): continue
        return found
    yield
    deadline = time.monotonic() + 30
    while mine() and time.monotonic() < deadline: time.sleep(.1)
    assert mine() == {}


def notebook(tmp_path, *sources, parameters='n: int = 0\nflag: str = ""', name='noop'):
    "An experiment of a parameters cell and other cells."
    cells = [dict(cell_type='code', id=f'c{i}', source=s, metadata=dict(tags=['parameters'] if i == 0 else []), outputs=[], execution_count=None) for i, s in enumerate([parameters, *sources])]
    path = tmp_path / f'{name}.ipynb'
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3')), cells=cells)))
    return path


log_n = "from genai_lab.tracking import start_run\nrun = start_run('noop')\nrun.log_metric('n', n)\nrun.finish()"
once = "import os, pathlib\nmark = pathlib.Path(flag) / f'tried{n}'\nfirst = not mark.exists()\nmark.touch()"


def children(*statuses):
    "Runs below a parent, with this status."
    client = connect()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=5000)
    return [r for r in runs if 'mlflow.parentRunId' in r.data.tags and (not statuses or r.info.status in statuses)]


def run(grid, **kw):
    return run_grid(grid, **{'workers': 2, 'view': PlainBoard(), **kw})


def test_every_cell_is_a_run_below_one_parent(tmp_path):
    result = run(axes_grid(notebook(tmp_path, log_n), ['n=1,2']))
    assert (result.exit_code, result.counts()['finished']) == (0, 2)
    runs = children('FINISHED')
    assert sorted(r.data.metrics['n'] for r in runs) == [1, 2]
    assert {r.data.tags['mlflow.parentRunId'] for r in runs} == {result.run_id}
    parent = connect().get_run(result.run_id)
    folder = local_path(parent.info.artifact_uri)
    assert parent.info.status == 'FINISHED' and parent.data.metrics['finished'] == 2
    assert {'runs.csv', 'summary.html', 'summary.ipynb', 'summary.json', 'notebooks/noop.ipynb'} <= {p.relative_to(folder).as_posix() for p in folder.rglob('*')}
    assert len(result.to_frame()) == 2 and '2 finished' in str(result) and '2 finished' in result._repr_html_()


def test_a_gpu_place_is_never_used_twice_at_a_time(tmp_path):
    see = "import os, time\nfrom genai_lab.tracking import start_run\nrun = start_run('noop')\nbegin = time.time()\ntime.sleep(.4)\nrun.log_metrics(dict(gpu=int(os.environ['CUDA_VISIBLE_DEVICES']), threads=int(os.environ['OMP_NUM_THREADS']), begin=begin, end=time.time()))\nrun.finish()"
    run(axes_grid(notebook(tmp_path, see), ['n=1,2,3,4']), gpus='3,5', threads=1)
    seen = sorted((r.data.metrics['gpu'], r.data.metrics['begin'], r.data.metrics['end']) for r in children('FINISHED'))
    assert len(seen) == 4 and {g for g, *_ in seen} == {3, 5}
    assert all(a[2] <= b[1] for a, b in zip(seen, seen[1:]) if a[0] == b[0])
    assert {r.data.metrics['threads'] for r in children()} == {1}


def test_a_failing_cell_is_an_answer_and_stops_nobody_else(tmp_path):
    result = run(axes_grid(notebook(tmp_path, 'assert n != 2, "two is wrong"', log_n), ['n=2,3']), workers=1, retries=3)
    assert (result.exit_code, result.counts()) == (1, dict(finished=1, done=0, failed=1, skipped=0))
    assert len(children()) == 2
    assert 'two is wrong' in str(result) and connect().get_run(result.run_id).info.status == 'FAILED'


def test_a_kernel_and_a_worker_that_die_are_tried_again(tmp_path):
    die = once + "\nif first and n == 1: os.kill(os.getpid(), 9)\nif first and n == 2: os.kill(os.getppid(), 9)"
    result = run(axes_grid(notebook(tmp_path, log_n.rsplit('\n', 1)[0], die, 'run.finish()'), ['n=1,2,3'], dict(flag=str(tmp_path))))
    assert (result.exit_code, [s.attempts for s in result.states]) == (0, [2, 2, 1])
    assert sorted(r.data.metrics['n'] for r in children('FINISHED')) == [1, 2, 3]
    assert len(children('FAILED', 'KILLED')) == 2 and not children('RUNNING')


def test_what_dies_again_and_again_fails(tmp_path):
    result = run(axes_grid(notebook(tmp_path, 'import os\nos.kill(os.getpid(), 9)'), ['n=1']), workers=1)
    assert (result.exit_code, result.states[0].attempts) == (1, 2) and 'kernel died' in result.states[0].reason


def test_no_more_failures_than_wanted(tmp_path):
    result = run(axes_grid(notebook(tmp_path, '1/0'), ['n=1,2,3,4']), workers=1, max_failures=2)
    assert result.counts() == dict(finished=0, done=0, failed=2, skipped=2) and result.exit_code == 1


def test_a_time_out_is_for_each_run(tmp_path):
    result = run(axes_grid(notebook(tmp_path, 'import time\nif n == 1: time.sleep(90)', log_n), ['n=1,2']), timeout=30)
    assert [s.status for s in result.states] == ['failed', 'finished'] and 'time-out' in result.states[0].reason


def test_later_notebooks_take_what_earlier_ones_found_and_are_left_out_when_those_fail(tmp_path):
    notebook(tmp_path, 'assert n != 2', log_n, name='first')
    notebook(tmp_path, "from genai_lab.tracking import start_run\nrun = start_run('second')\nrun.log_metric('twice', 2 * got)\nrun.finish()", parameters='got: float = 0.0\nsource: str = ""', name='second')
    (tmp_path / 'both.yaml').write_text('steps:\n- name: first\n  notebook: first.ipynb\n  grid: {n: [2, 3]}\n- name: second\n  notebook: second.ipynb\n  params: {got: "${first.metrics.n}", source: "${first.run_id}"}\n')
    result = run(read_grid(tmp_path / 'both.yaml'))
    status = {(s.cell.step, s.status) for s in result.states}
    assert status == {('first', 'failed'), ('first', 'finished'), ('second', 'skipped'), ('second', 'finished')}
    [last] = [r for r in children('FINISHED') if 'twice' in r.data.metrics]
    assert last.data.metrics['twice'] == 6 and last.data.params['source'] in [s.run_id for s in result.states]


def test_the_notebook_as_it_was_at_the_start_is_what_runs(tmp_path):
    path = notebook(tmp_path, "import pathlib\np = pathlib.Path('noop.ipynb')\np.write_text(p.read_text().replace('log_metric(', 'log_metric(\\\\\"changed\\\\\" + '))", log_n)
    result = run(axes_grid(path, ['n=1,2']), workers=1)
    assert result.exit_code == 0 and 'changed' in path.read_text()
    assert [set(r.data.metrics) for r in children()] == [{'n'}] * 2


def test_resuming_does_only_what_is_missing_and_says_why(tmp_path):
    path = notebook(tmp_path, once + "\nassert not (n == 2 and first)", log_n)
    grid = lambda: axes_grid(path, ['n=1,2'], dict(flag=str(tmp_path)))
    first = run(grid())
    assert first.counts()['failed'] == 1
    again = run(grid(), resume=True)
    assert again.counts() == dict(finished=1, done=1, failed=0, skipped=0) and again.run_id == first.run_id
    assert all('same code, parameters, inputs and library' in s.looked for s in again.states if s.status == 'done')
    assert 'no finished run' in next(s.looked for s in again.states if s.status == 'finished')
    assert connect().get_run(again.run_id).info.status == 'FINISHED' and len(children('FINISHED')) == 2
    third = run(grid(), resume=True)
    assert third.counts()['done'] == 2 and '2 done before' in str(third)
    path.write_text(path.read_text().replace("run.log_metric('n', n)", "run.log_metric('n', n + 0)"))
    assert run(grid(), resume=True).counts()['finished'] == 2


def test_resuming_notices_that_data_has_changed(tmp_path):
    (tmp_path / 'products.csv').write_text('product\nbrie\n')
    path = notebook(tmp_path, "from genai_lab.data import load_frame\ndf = load_frame('products.csv')", log_n)
    run(axes_grid(path, ['n=1']))
    assert run(axes_grid(path, ['n=1']), resume=True).counts()['done'] == 1
    (tmp_path / 'products.csv').write_text('product\ngouda\n')
    assert run(axes_grid(path, ['n=1']), resume=True).counts()['finished'] == 1


# from outside

def start(tmp_path, *args, **kw):
    return subprocess.Popen([sys.executable, '-c', 'from genai_lab.cli import main; main()', 'run', *map(str, args)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **kw)


def wait_for(check, seconds=60):
    limit = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < limit
        time.sleep(.1)


wait_cell = "import pathlib, time\n(pathlib.Path(flag) / f'began{n}').touch()\nwhile not (pathlib.Path(flag) / 'go').exists(): time.sleep(.05)"


@pytest.mark.parametrize('times', [1, 2])
def test_ctrl_c_once_finishes_what_runs_and_twice_stops_now(tmp_path, times):
    path = notebook(tmp_path, wait_cell, log_n)
    p = start(tmp_path, path, '-g', 'n=1,2,3', '-p', f'flag={tmp_path}', '--workers', '1')
    wait_for(lambda: (tmp_path / 'began1').exists())
    os.kill(p.pid, signal.SIGINT)
    if times == 2: time.sleep(.5); os.kill(p.pid, signal.SIGINT)
    else: time.sleep(4); (tmp_path / 'go').touch()
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130, err
    assert [r.info.status for r in children()] == ['FINISHED' if times == 1 else 'KILLED']
    assert not (tmp_path / 'began2').exists() and ('1 finished' in out + err) == (times == 1)


def test_the_command_prints_one_json_object(tmp_path):
    p = start(tmp_path, notebook(tmp_path, 'assert n != 2, "no twos"', log_n), '-g', 'n=1,2', '--workers', '2', '--json')
    out, err = p.communicate(timeout=90)
    told = json.loads(out)
    assert p.returncode == told['exit_code'] == 1 and (told['finished'], told['failed']) == (1, 1)
    assert [r['status'] for r in told['runs']] == ['finished', 'failed']


def test_on_a_terminal_there_is_a_table_of_what_runs(tmp_path):
    import pty
    main, end = pty.openpty()
    p = subprocess.Popen([sys.executable, '-c', 'from genai_lab.cli import main; main()', 'run', str(notebook(tmp_path, 'import time', 'time.sleep(4)', log_n)), '-g', 'n=1,2', '--workers', '2'],
                         cwd=tmp_path, stdout=subprocess.PIPE, stderr=end, text=True, start_new_session=True, env={**os.environ, 'TERM': 'xterm', 'COLUMNS': '140'})
    os.close(end)
    seen = b''
    try:
        while chunk := os.read(main, 65536): seen += chunk
    except OSError: pass   # the other end is closed
    out, _ = p.communicate(timeout=60)
    text = seen.decode(errors='replace')
    assert p.returncode == 0 and '2 finished' in out
    for word in ('parameters', 'elapsed', 'memory', 'n=1', 'worker 2', 'MiB', '2 running', 'time.sleep(4)'): assert word in text, word


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can mount a small disk')
def test_a_disk_that_fills_up_in_mid_grid_fails_what_it_must_and_nothing_else(tmp_path, monkeypatch):
    small = tmp_path / 'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(small)], capture_output=True).returncode: pytest.skip('no file system can be mounted here')
    try:
        monkeypatch.setenv('GENAI_LAB_ARTIFACT_ROOT', str(small))
        big = "from genai_lab.tracking import start_run\nrun = start_run('noop')\nrun.log_text('x' * (6_000_000 if n == 2 else 10), 'big.txt')\nrun.log_metric('n', n)\nrun.finish()"
        result = run(axes_grid(notebook(tmp_path, big), ['n=1,2,3']), workers=1)
        by = {s.cell.params['n']: s for s in result.states}
        assert by[1].status == by[3].status == 'finished' and by[2].status == 'failed' and result.exit_code == 1
        assert 'space' in by[2].reason and by[2].attempts == 1
    finally: subprocess.run(['umount', '-l', str(small)], check=True)


def test_a_grid_that_runs_is_not_started_again(tmp_path):
    path = notebook(tmp_path, wait_cell, log_n)
    p = start(tmp_path, path, '-g', 'n=1', '-p', f'flag={tmp_path}', '--workers', '1')
    wait_for(lambda: (tmp_path / 'began1').exists())
    with pytest.raises(LabError, match='already running'): run(axes_grid(path, ['n=1'], dict(flag=str(tmp_path))))
    (tmp_path / 'go').touch()
    p.communicate(timeout=60)
    assert p.returncode == 0


def test_kill_9_of_anything_at_any_time_loses_nothing_and_does_nothing_twice(tmp_path):
    path = notebook(tmp_path, 'import time\ntime.sleep(.3)', log_n)
    args, rng = (path, '-g', f'n={",".join(map(str, range(cells_under_fire)))}', '--workers', '2', '--retries', '100', '--resume'), random.Random(20)
    p, landed = start(tmp_path, *args), []
    for k in range(kills):
        time.sleep(rng.uniform(.3, 5))
        what, chosen = ('kernel', 'runner', 'worker')[k % 3], []
        while not chosen and p.poll() is None:
            family = psutil.Process(p.pid).children(recursive=True)
            chosen = [p] if what == 'runner' else [c for c in family if ('ipykernel' in ' '.join(_cmdline(c))) == (what == 'kernel')]
            if not chosen: time.sleep(.1)
        if chosen and p.poll() is None:
            with suppress(psutil.NoSuchProcess): rng.choice(chosen).kill(); landed.append(what)
        if p.poll() is not None or what == 'runner': p.communicate(); p = start(tmp_path, *args)
    out, err = p.communicate(timeout=1200)
    if p.returncode: out, err = start(tmp_path, *args).communicate(timeout=600)
    print(f'{len(landed)} of {kills} kills came before the grid had ended:', *landed)
    assert len(landed) > kills / 2
    done = sorted(r.data.metrics['n'] for r in children('FINISHED'))
    assert done == list(range(cells_under_fire)), err
    client = connect()
    assert not client.search_runs([e.experiment_id for e in client.search_experiments()], "attributes.status = 'RUNNING'")


def _cmdline(p):
    try: return p.cmdline()
    except psutil.Error: return []

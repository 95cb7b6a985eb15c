"The command line as people and schedulers use it: real processes, what they print, and their exit codes."
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from genai_lab.cli import main
from genai_lab.tracking import connect

notebooks = Path(__file__).parent / 'notebooks'
command = [str(Path(sys.executable).parent / 'genai-lab')]


def call(*args, cwd=None, **env):
    return subprocess.run([*command, *map(str, args)], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=180)


def begin(*args):
    return subprocess.Popen([*command, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, words):
    "Read standard error until it says something."
    said = ''
    for line in process.stderr:
        said += line
        if words in line: return said
    raise AssertionError(f'{words!r} was not said:\n{said}')


def runs():
    client = connect()
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


def family(mark):
    found = []
    for p in psutil.process_iter():
        try:
            if str(mark) in p.environ().get('GENAI_LAB_TRACKING_URI', '') and 'GENAI_LAB_RUN_DIR' in p.environ(): found.append(p)
        except (psutil.Error, OSError): pass
    return found


def test_help_names_the_commands_and_loads_nothing_heavy():
    r = call('--help')
    assert r.returncode == 0 and all(re.search(rf'^  {c} ', r.stdout, re.M) for c in ('run', 'ui', 'models', 'version'))
    loaded = subprocess.run([sys.executable, '-X', 'importtime', '-c', 'import sys; sys.argv = ["genai-lab", "--help"]; from genai_lab.cli import main; main()'], capture_output=True, text=True).stderr
    assert 'typer' in loaded and not re.search(r'\| +(torch|mlflow|pandas|numpy|papermill|transformers|pydantic|nbconvert)$', loaded, re.M)


def test_version():
    import genai_lab
    assert call('--version').stdout == call('version').stdout == f'genai_lab {genai_lab.__version__}\n'


def test_a_run_prints_result_verdict_and_where_to_look(mlflow_home, tmp_path):
    (tmp_path / 'p.yaml').write_text('n: 50\nuplift: 0.3\n')
    r = call('run', notebooks / 'good.ipynb', '-p', 'n=60', '-f', tmp_path / 'p.yaml', '--name', 'by hand', '--output', tmp_path / 'out')
    assert r.returncode == 0, r.stderr
    out = r.stdout
    assert out.index('shop') < out.index('north sells best.') < out.index('finished in') < out.index('good.ipynb', out.index('finished in')) < out.index('story.html') < out.index('genai-lab ui')
    assert re.search(r'^ +\d:\d\d  cell 1/6 ', r.stderr, re.M) and re.search(r'cell 6/6', r.stderr) and '\x1b' not in r.stdout + r.stderr
    [run] = runs()
    assert run.data.params['n'] == '60' and run.data.params['uplift'] == '0.3' and run.info.run_name == 'by hand'
    assert (tmp_path / 'out' / 'story.html').exists()
    for line in re.findall(r'^  (?:notebook|HTML|story) +(\S+)$', out, re.M): assert Path(line).exists()


def test_under_make_the_next_step_is_a_target_of_make(mlflow_home):
    out = call('run', notebooks / 'nothing_to_do.ipynb', MAKELEVEL='1').stdout
    assert 'make ui, then http://127.0.0.1' in out and 'genai-lab ui' not in out


def test_a_failing_cell_is_told_in_a_few_lines(mlflow_home):
    r = call('run', notebooks / 'raises.ipynb')
    said = r.stderr[r.stderr.index('cell 3 of 4 failed'):]
    assert r.returncode == 1 and "KeyError: 'cheese'" in said and 'price = dict(milk=1)' in said and 'raises.ipynb' in said
    assert 'Traceback' not in r.stderr and len(said.splitlines()) < 10


@pytest.mark.parametrize('args, words', [
    (['run', 'good.ipynb', '-p', 'm=3'], 'has no parameter "m"'),
    (['run', 'good.ipynb', '-p', 'n'], '-p "n": write name=value'),
    (['run', 'good.ipynb', '-p', 'n=1', '-p', 'n=2'], '-p n is given twice'),
    (['run', 'good.ipynb', '-p', 'api_key=5', '-p', 'n=x'], '"n" takes a whole number'),
    (['run', 'good.ipynb', '-f', 'none.yaml'], 'there is no such file of parameters'),
    (['run', 'good.ipynb', '-f', 'not_json.ipynb'], 'has one "name: value" a line'),
    (['run', 'good.ipynb', '--timeout', 'soon'], '"soon" is no duration'),
    (['models', 'show', 'smolm2-135m'], 'Did you mean "smollm2-135m"?'),
])
def test_mistakes_are_one_line_and_exit_code_2(args, words, capfd, monkeypatch):
    "In this process, which saves the start of a command for each; the next test is a real one."
    monkeypatch.chdir(notebooks)
    with pytest.raises(SystemExit) as e: main(args)
    out, err = capfd.readouterr()
    assert e.value.code == 2 and words in err and out == ''
    assert len(err.strip().splitlines()) == 1 and err.startswith('error: ')


def test_yaml_that_does_not_parse_is_named_with_its_line(tmp_path):
    (tmp_path / 'p.yaml').write_text('n: 5\nshops: [a, b\nseed: 3\n')
    r = call('run', notebooks / 'good.ipynb', '-f', tmp_path / 'p.yaml')
    assert r.returncode == 2 and re.search(r'p\.yaml, line [23]: this is not YAML', r.stderr)
    assert len(r.stderr.strip().splitlines()) == 1 and r.stderr.startswith('error: ') and r.stdout == ''


def test_debugging_shows_the_traceback():
    assert 'Traceback' in call('run', 'none.ipynb', GENAI_LAB_DEBUG='1').stderr


def test_an_unwritable_store_ends_it_before_a_cell_runs(tmp_path):
    (tmp_path / 'file').write_text('')
    r = call('run', notebooks / 'good.ipynb', GENAI_LAB_TRACKING_URI=f'sqlite:///{tmp_path}/file/mlflow.db')
    assert r.returncode == 2 and 'cannot be made' in r.stderr and 'cell 1' not in r.stderr and 'Traceback' not in r.stderr


@pytest.mark.parametrize('sign, code, kind', [(signal.SIGINT, 130, 'interrupted'), (signal.SIGTERM, 143, 'terminated')])
def test_signals_end_the_run_and_everything_below_it(mlflow_home, sign, code, kind):
    p = begin('run', notebooks / 'hangs.ipynb')
    wait_for(p, 'cell 3/4')
    assert len(family(mlflow_home)) >= 3   # the kernel and two sleepers
    p.send_signal(sign)
    _, err = p.communicate(timeout=60)
    [run] = runs()
    assert p.returncode == code and run.info.status == 'KILLED' and run.data.tags['failure.kind'] == kind
    assert 'in cell 3 of 4' in err and 'Traceback' not in err and run.data.metrics == dict(before=1)
    assert family(mlflow_home) == []


def test_ctrl_c_while_things_start_is_clean_as_well(mlflow_home):
    p = begin('run', notebooks / 'hangs.ipynb')
    wait_for(p, 'starting the kernel')
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'Traceback' not in err and family(mlflow_home) == []
    assert [r.info.status for r in runs()] == ['KILLED']


def test_a_kernel_killed_from_outside(mlflow_home):
    p = begin('run', notebooks / 'hangs.ipynb')
    wait_for(p, 'cell 3/4')
    [kernel] = [q for q in family(mlflow_home) if 'ipykernel_launcher' in ' '.join(q.cmdline())]
    kernel.kill()
    _, err = p.communicate(timeout=60)
    [run] = runs()
    assert p.returncode == 137 and run.info.status == 'FAILED' and 'the kernel died (SIGKILL' in err and family(mlflow_home) == []
    folder = Path(run.info.artifact_uri.removeprefix('file://'))
    assert 'waiting' in json.dumps(json.loads((folder / 'hangs.ipynb').read_text())['cells'])


def test_when_the_runner_itself_is_killed_its_kernel_ends(mlflow_home):
    p = begin('run', notebooks / 'ignores_interrupts.ipynb')
    wait_for(p, 'cell 1/1')
    p.kill()
    p.communicate()
    deadline = time.monotonic() + 20
    while family(mlflow_home) and time.monotonic() < deadline: time.sleep(.2)
    assert family(mlflow_home) == []


def test_secrets_do_not_reach_the_terminal(mlflow_home):
    r = call('run', notebooks / 'prints_secrets.ipynb', '-p', 'api_key=mauve-walrus-42', '-p', 'note=with mauve-walrus-42')
    assert r.returncode == 1 and 'walrus' not in r.stdout + r.stderr and 'refused: [redacted]' in r.stderr
    r = call('run', notebooks / 'good.ipynb', '-p', 'api_key=mauve-walrus-42', '-p', 'n=mauve-walrus-42')
    assert r.returncode == 2 and 'walrus' not in r.stdout + r.stderr


def test_progress_is_live_on_a_terminal(mlflow_home):
    "In a pseudo-terminal there is one line that is drawn again and again."
    import pty
    pid, fd = pty.fork()
    if pid == 0: os.execve(command[0], [*command, 'run', str(notebooks / 'nothing_to_do.ipynb')], {**os.environ, 'TERM': 'xterm-256color', 'COLUMNS': '120'})
    said = b''
    while True:
        try: piece = os.read(fd, 4096)
        except OSError: break
        if not piece: break
        said += piece
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert b'\x1b[' in said and b'cell 2/2' in said and b'finished in' in said


def test_ui_refuses_a_port_that_is_taken(mlflow_home):
    import socket
    with socket.create_server(('127.0.0.1', 0)) as s:
        r = call('ui', '--port', s.getsockname()[1])
    assert r.returncode == 2 and 'choose another one with --port' in r.stderr


def test_ui_shows_the_runs_of_this_lab_on_this_machine_alone(mlflow_home):
    import socket
    import urllib.request
    connect().create_experiment('seen in the browser')
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    p = begin('ui', '--port', port)
    try:
        deadline, body = time.monotonic() + 90, ''
        while time.monotonic() < deadline and not body:
            try:
                ask = urllib.request.Request(f'http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name=seen%20in%20the%20browser')
                body = urllib.request.urlopen(ask, timeout=5).read().decode()
            except OSError: time.sleep(.3)
        assert 'seen in the browser' in body
        listening = {c.laddr.ip for q in [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)] for c in q.net_connections() if c.status == 'LISTEN'}
        assert listening == {'127.0.0.1'}
        r = call('run', notebooks / 'good.ipynb', GENAI_LAB_TRACKING_URI=f'http://127.0.0.1:{port}')   # the same server as a team would use it
        assert r.returncode == 0 and f'http://127.0.0.1:{port}/#/experiments/' in r.stdout, r.stderr
        assert [x.info.status for x in runs()] == ['FINISHED']
    finally:
        children = psutil.Process(p.pid).children(recursive=True)
        p.send_signal(signal.SIGINT)
        p.communicate(timeout=30)
        assert not psutil.wait_procs(children, timeout=10)[1]

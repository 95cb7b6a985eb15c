"Runs of whole notebooks: what they leave behind, every way in which they can end, and that nothing stays behind."
import json
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from genai_lab.core import LabError
from genai_lab.experiments import Stop, run_notebook
from genai_lab.tracking import connect, local_path

notebooks = Path(__file__).parent / 'notebooks'


@pytest.fixture(autouse=True)
def home(mlflow_home, tmp_path, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_CACHE_DIR', str(tmp_path / 'cache'))
    return mlflow_home


@pytest.fixture(autouse=True)
def no_process_is_left(tmp_path, request):
    "After every test: nothing that a notebook has started is alive, and no working folder is left."
    def mine():
        found = {}
        for p in psutil.process_iter():
            try: mark = p.environ().get('GENAI_LAB_RUN_DIR')
            except (psutil.Error, OSError): continue
            if mark and str(tmp_path) in p.environ().get('GENAI_LAB_TRACKING_URI', ''): found[p.pid] = p.cmdline()
        return found
    yield
    deadline = time.monotonic() + 30   # a killed runner's kernel ends itself within a second or two
    while mine() and time.monotonic() < deadline: time.sleep(.1)
    assert mine() == {}
    assert not list(tmp_path.glob('cache/spool/*')) or 'full_disk' in request.node.name


def stored(result_or_id):
    "Run and files in MLflow."
    run = connect().get_run(getattr(result_or_id, 'run_id', result_or_id))
    folder = local_path(run.info.artifact_uri)
    return run, folder, {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()} - {'code.patch'}   # there while the work tree has changes


def only_run():
    client = connect()
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return stored(run.info.run_id)


def sources_and_outputs(path):
    return [(''.join(c['source']), json.dumps(c.get('outputs', []))) for c in json.loads(path.read_text())['cells']]


# a good run

def test_a_run_leaves_everything_that_is_needed_to_believe_and_repeat_it(tmp_path):
    result = run_notebook(notebooks / 'good.ipynb', dict(n=300), name='three hundred', texts=dict(uplift='0.2', shops='["north", "south"]'), output=tmp_path / 'copy')
    run, folder, files = stored(result)
    assert (result.exit_code, result.status, run.info.status, run.info.run_name) == (0, 'FINISHED', 'FINISHED', 'three hundred')
    assert run.data.params == dict(n='300', uplift='0.2', shops="['north', 'south']", api_key='None', seed='7') == result.params
    assert run.data.metrics == result.metrics and set(run.data.metrics) == {'north/rate', 'south/rate'}
    assert files == {'good.ipynb', 'good.html', 'story.html', 'parameters.json', 'result.csv', 'samples/sales.parquet', 'figures/rates.png', 'figures/cell_04.png'}
    assert {'git.commit', 'package.mlflow', 'hardware.cpu', 'python', 'code', 'fingerprint.notebook', 'seed', 'seconds', 'peak_memory_mib', 'verdict', 'mlflow.user'} <= set(run.data.tags)
    assert run.data.tags['verdict'] == result.verdict == 'north sells best.'
    assert connect().get_experiment(run.info.experiment_id).name == 'discounts'
    assert {p.relative_to(tmp_path / 'copy').as_posix() for p in (tmp_path / 'copy').rglob('*') if p.is_file()} - {'code.patch'} == files
    assert json.loads((folder / 'parameters.json').read_text())['shops'] == ['north', 'south']


def test_the_story_has_verdict_table_figure_and_prose_but_no_code():
    result = run_notebook(notebooks / 'good.ipynb')
    _, folder, _ = stored(result)
    story, page = (folder / 'story.html').read_text(), (folder / 'good.html').read_text()
    assert story.index('Do discounts sell?') < story.index('north sells best.') < story.index('<th>shop</th>') < story.index('More baskets are sold')
    assert 'data:image/png;base64' in story and 'np.random' not in story and 'uplift = 0.1' in story
    assert 'default_rng' in page
    for text in (story, page): assert 'src="http' not in text and 'href="http' not in text and "default-src 'none'" in text


def test_the_same_command_twice_gives_the_same_bits():
    first, second = (run_notebook(notebooks / 'good.ipynb', dict(n=500)) for _ in range(2))
    assert first.metrics == second.metrics and first.run_id != second.run_id
    (_, a, files), (_, b, _) = stored(first), stored(second)
    for name in files - {'good.ipynb', 'good.html', 'story.html'}: assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_computed_defaults_are_recorded_as_what_they_were():
    run, _, _ = stored(run_notebook(notebooks / 'computed_default.ipynb'))
    assert run.data.params == dict(k='42', name='X')
    run, _, _ = stored(run_notebook(notebooks / 'computed_default.ipynb', texts=dict(k='1')))
    assert run.data.params == dict(k='1', name='X')


def test_plain_mlflow_calls_write_into_the_same_run():
    result = run_notebook(notebooks / 'uses_plain_mlflow.ipynb')
    run, _, _ = only_run()
    assert run.info.run_id == result.run_id and run.info.status == 'FINISHED' and run.data.metrics == dict(plain=5) and run.data.params == dict(way='fluent')


def test_a_notebook_without_parameters_runs_without_parameters():
    assert run_notebook(notebooks / 'no_parameters.ipynb').exit_code == 0


def test_an_exception_on_purpose_and_an_early_exit_are_no_failures():
    assert run_notebook(notebooks / 'raises_on_purpose.ipynb').exit_code == 0
    result = run_notebook(notebooks / 'exits_early.ipynb')
    assert result.exit_code == 0 and result.status == 'FINISHED'
    assert 'never reached' not in str([o for _, o in sources_and_outputs(stored(result)[1] / 'exits_early.ipynb')])


def test_the_kernel_works_in_the_folder_of_the_notebook_with_the_settings_of_the_lab(tmp_path, monkeypatch):
    lab, elsewhere = tmp_path / 'lab', tmp_path / 'elsewhere'
    (lab / 'experiments').mkdir(parents=True)
    elsewhere.mkdir()
    (lab / 'settings.ini').write_text('[lab]\nseed = 99\n')
    cell = dict(cell_type='code', metadata={}, outputs=[], execution_count=None, id='a', source='import os\nfrom genai_lab.core import settings\nprint(os.getcwd(), settings().lab.seed, os.environ["PYTHONHASHSEED"])')
    (lab / 'experiments' / 'x.ipynb').write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[cell])))
    monkeypatch.chdir(elsewhere)
    result = run_notebook(lab / 'experiments' / 'x.ipynb')
    run, folder, _ = stored(result)
    assert f'{lab}/experiments 99 99' in sources_and_outputs(folder / 'x.ipynb')[0][1] and run.data.tags['seed'] == '99'


# input that is wrong: nothing is started, nothing is recorded

@pytest.mark.parametrize('name, texts, params, words', [
    ('good', dict(bascets='3'), None, r'has no parameter "bascets"\. Its parameters: n: int = 200, uplift: float = 0\.1'),
    ('good', dict(uplif='3'), None, r'Did you mean "uplift"\?'),
    ('good', dict(n='abc'), None, r'"n" takes a whole number, and "abc" is not'),
    ('good', dict(n='1.5'), None, r'"n" takes a whole number'),
    ('good', dict(shops='north'), None, r'"shops" takes a JSON list'),
    ('good', None, dict(n='3'), r'"n" takes a whole number, and "3" is not'),
    ('good', None, dict(shops=[1]), r'"shops" takes a JSON list \(each: text\)'),
    ('no_parameters', dict(n='3'), None, r'has no parameters cell, so "n" cannot be set'),
    ('no_code', None, None, r'has no code to run'),
    ('not_json', None, None, r'is no notebook'),
    ('no_cells', None, None, r'is no notebook'),
    ('syntax_error_in_parameters', None, None, r'the parameters cell does not parse, line 1'),
    ('unknown_kernel', None, None, r'asks for the kernel "python4", which is not installed\. Did you mean "python3"\?'),
    ('goood', None, None, r'there is no such notebook\. Did you mean "good\.ipynb"\?'),
])
def test_wrong_input_is_found_before_anything_starts(name, texts, params, words, home):
    before = sorted(home.rglob('*'))
    with pytest.raises(LabError, match=words) as e: run_notebook(notebooks / f'{name}.ipynb', params, texts=texts)
    assert '\n' not in str(e.value) and sorted(home.rglob('*')) == before


def test_a_folder_is_no_notebook():
    with pytest.raises(LabError, match='is a folder; name one of its notebooks: .*good.ipynb'): run_notebook(notebooks)


# runs that fail

def test_a_failing_cell_ends_the_run_with_the_notebook_as_far_as_it_came():
    result = run_notebook(notebooks / 'raises.ipynb')
    run, folder, files = stored(result)
    assert (result.exit_code, run.info.status, run.data.tags['failure.kind']) == (1, 'FAILED', 'cell')
    assert run.data.metrics == dict(before=3) and run.data.params == dict(n='3')
    assert result.headline()[1:] == ['    price = dict(milk=1)', '    … price["cheese"]', "  KeyError: 'cheese'"] and 'cell 3 of 4 failed' in result.headline()[0]
    assert run.data.tags['failure'] == "cell 3 of 4 raised KeyError: 'cheese'"
    cells = sources_and_outputs(folder / 'raises.ipynb')
    assert 'KeyError' in cells[3][1] and cells[4][1] == '[]' and 'story.html' not in files and 'raises.html' in files


def test_a_lab_error_in_a_notebook_is_one_line():
    result = run_notebook(notebooks / 'raises_lab_error.ipynb')
    [line] = result.headline()
    assert 'cell 2 of 2: shop.csv has no column "departement". Did you mean "department"?' in line and result.exit_code == 1
    output = sources_and_outputs(stored(result)[1] / 'raises_lab_error.ipynb')[1][1]
    assert 'Traceback' not in output and 'LabError: shop.csv' in output


def test_a_time_out_says_where_it_was():
    result = run_notebook(notebooks / 'hangs.ipynb', timeout=12)
    run, folder, _ = stored(result)
    assert (result.exit_code, run.info.status, run.data.tags['failure.kind']) == (124, 'FAILED', 'timeout')
    assert run.data.metrics == dict(before=1)
    assert 'stopped after the time-out of 12 s in cell 3 of 4' in result.reason
    assert 'KeyboardInterrupt' in sources_and_outputs(folder / 'hangs.ipynb')[2][1]   # interrupted, so that the notebook shows where


def test_a_cell_that_ignores_interrupts_is_ended_all_the_same():
    assert run_notebook(notebooks / 'ignores_interrupts.ipynb', timeout=3).exit_code == 124


def test_a_kernel_that_is_killed_is_noticed():
    result = run_notebook(notebooks / 'dies.ipynb')
    run, folder, files = stored(result)
    assert (result.exit_code, run.info.status, run.data.tags['failure.kind']) == (137, 'FAILED', 'died')
    assert 'SIGKILL, most often because memory ran out' in result.reason and 'in cell 2 of 3' in result.reason
    assert run.data.metrics == dict(before=1) and 'kernel.log' in files
    assert 'so far' in sources_and_outputs(folder / 'dies.ipynb')[0][1]


def test_processes_that_a_notebook_leaves_are_ended():
    assert run_notebook(notebooks / 'leaves_processes.ipynb').exit_code == 0   # the fixture looks for the rest


def test_another_thread_can_stop_a_run():
    stop = Stop()
    result = run_notebook(notebooks / 'hangs.ipynb', stop=stop, on_event=lambda e: e.cell == 3 and not stop.why and stop.ask())
    assert result.exit_code == 130 and stored(result)[0].info.status == 'KILLED'


def test_runs_in_threads_do_not_disturb_each_other():
    results = []
    threads = [threading.Thread(target=lambda n=n: results.append(run_notebook(notebooks / 'good.ipynb', dict(n=n)))) for n in (10, 20)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(r.params['n'] for r in results) == ['10', '20'] and all(r.exit_code == 0 for r in results)


# disk and database

@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid(): pytest.skip('mounting a file system needs root')
    path = tmp_path / 'small'
    path.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(path)], capture_output=True).returncode: pytest.skip('this machine does not let tests mount')
    yield path
    subprocess.run(['umount', '-l', str(path)])


def test_a_full_disk_under_the_artifacts(small_disk, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_ARTIFACT_ROOT', str(small_disk))
    with pytest.raises(LabError, match='No space left') as e: run_notebook(notebooks / 'fills_the_disk.ipynb')
    run, _, _ = only_run()
    assert '\n' not in str(e.value) and str(small_disk) in str(e.value)
    assert run.info.status == 'FAILED' and 'No space left' in run.data.tags['failure']


def test_a_full_disk_under_the_notebook(small_disk, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_CACHE_DIR', str(small_disk))
    result = run_notebook(notebooks / 'fills_the_disk.ipynb')   # the kernel writes its samples there, so the cell fails
    assert result.exit_code == 1 and 'No space left' in result.reason and len(result.headline()) == 1


def test_a_full_disk_under_the_database(small_disk, monkeypatch, database_template):
    shutil.copy(database_template, small_disk / 'mlflow.db')
    monkeypatch.setenv('GENAI_LAB_TRACKING_URI', f'sqlite:///{small_disk}/mlflow.db')
    with pytest.raises(OSError), open(small_disk / 'ballast', 'wb', buffering=0) as f:
        while f.write(b'x' * 4096): pass
    with pytest.raises(LabError, match='disk is full|No space left|cannot be') as e: run_notebook(notebooks / 'good.ipynb')
    assert '\n' not in str(e.value)


def test_a_locked_database_ends_it_before_a_cell_runs(home, monkeypatch):
    monkeypatch.setattr('genai_lab.tracking.lock_wait', .3)
    other = sqlite3.connect(home / 'mlflow.db', isolation_level=None)
    other.execute('BEGIN IMMEDIATE')
    seen = []
    with pytest.raises(LabError, match='is locked by another process'): run_notebook(notebooks / 'good.ipynb', on_event=lambda e: seen.append(e.kind))
    other.close()
    assert 'cell' not in seen


def test_a_database_that_goes_away_in_the_middle_is_one_line_and_nothing_said_is_lost(home, capfd):
    def vandal(e):
        if e.cell == 3: (home / 'mlflow.db').write_bytes(b'not a database any more' * 100)
    with pytest.raises(LabError) as e: run_notebook(notebooks / 'good.ipynb', on_event=vandal)
    kept = Path(capfd.readouterr().err.strip().rpartition(' ')[2])
    assert '\n' not in str(e.value) and (kept / 'files' / 'samples' / 'sales.parquet').exists() and 'north/rate' in (kept / 'records.jsonl').read_text()
    shutil.rmtree(kept)


# secrets

def test_secrets_in_parameters_are_written_nowhere(home, tmp_path):
    secret = 'mauve-"walrus"-42é'
    result = run_notebook(notebooks / 'prints_secrets.ipynb', dict(login=dict(password='amber-stoat-99')), texts=dict(api_key=secret, note=f'use {secret}'), output=tmp_path / 'copy')
    assert result.exit_code == 1
    said = str(result) + repr(result)
    for p in [*home.rglob('*'), *(tmp_path / 'copy').rglob('*')]:
        if p.is_file() and p.name != 'code.patch': said += p.read_bytes().decode('utf-8', 'replace')   # a patch may hold this very file
    assert [w for w in ('walrus', 'stoat') if w in said] == []
    run, folder, files = stored(result)
    assert run.data.params == dict(api_key='[redacted]', login="{'password': '[redacted]'}", note='use [redacted]')
    assert {'notes.txt', 'samples/all.parquet', 'prints_secrets.ipynb', 'prints_secrets.html'} <= files


def test_the_record_has_the_changes_of_the_notebooks_own_repository(tmp_path, monkeypatch):
    def git(folder, *args): subprocess.run(['git', '-c', 'user.name=Ann', '-c', 'user.email=ann@shop.example', *args], cwd=folder, check=True, capture_output=True)
    for name in ('mine', 'elsewhere'):
        (tmp_path / name).mkdir()
        shutil.copy(notebooks / 'nothing_to_do.ipynb', tmp_path / name)
        git(tmp_path / name, 'init', '-q'); git(tmp_path / name, 'add', '.'); git(tmp_path / name, 'commit', '-qm', 'first')
    (tmp_path / 'elsewhere' / 'nothing_to_do.ipynb').write_text('{}')
    monkeypatch.chdir(tmp_path / 'elsewhere')
    tags = connect().get_run(run_notebook(tmp_path / 'mine' / 'nothing_to_do.ipynb').run_id).data.tags
    assert tags['git.dirty'] == 'false' and 'git.patch' not in tags

"Where runs are kept, what is found wrong before anything runs, and notebooks that record themselves without the runner."
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from genai_lab import tracking
from genai_lab.core import LabError
from genai_lab.tracking import Spool, all_spools, check_store, connect, kernel_parameters, open_record, start_run, tracking_uri, write_parquet

notebooks = Path(__file__).parent / 'notebooks'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_CACHE_DIR', str(tmp_path / 'cache'))


def runs(*names):
    client = connect()
    ids = [e.experiment_id for e in client.search_experiments() if e.name in names or not names]
    return sorted(client.search_runs(ids), key=lambda r: r.info.start_time)


@pytest.fixture
def small_disk(tmp_path):
    "A file system of one megabyte."
    if os.geteuid(): pytest.skip('mounting a file system needs root')
    path = tmp_path / 'small'
    path.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(path)], capture_output=True).returncode: pytest.skip('this machine does not let tests mount')
    yield path
    subprocess.run(['umount', '-l', str(path)])


# the store

def test_a_relative_database_lies_in_the_lab_wherever_one_is(tmp_path, monkeypatch):
    (tmp_path / 'settings.ini').write_text('[lab]\ntracking_uri = sqlite:///mlruns/x.db\n')
    (tmp_path / 'deep' / 'er').mkdir(parents=True)
    monkeypatch.delenv('GENAI_LAB_TRACKING_URI')
    monkeypatch.chdir(tmp_path / 'deep' / 'er')
    assert tracking_uri() == f'sqlite:///{tmp_path}/mlruns/x.db'
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'http://mlflow.example:5000')
    assert tracking_uri() == 'http://mlflow.example:5000'


def test_a_database_below_a_file_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(LabError, match='cannot be made .*set tracking_uri'): check_store(f'sqlite:///{tmp_path}/file/mlflow.db')


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / 'x.db').write_text('milk\n' * 100)
    with pytest.raises(LabError, match='is no SQLite database'): check_store(f'sqlite:///{tmp_path}/x.db')


def test_a_locked_database_is_given_up_after_a_while(mlflow_home, monkeypatch):
    monkeypatch.setattr(tracking, 'lock_wait', .2)
    other = sqlite3.connect(mlflow_home / 'mlflow.db', isolation_level=None)
    other.execute('BEGIN EXCLUSIVE')
    try:
        with pytest.raises(LabError, match='is locked by another process'): connect()
    finally: other.close()
    assert connect()


def test_a_read_only_database_is_refused(mlflow_home, tmp_path):
    if os.geteuid(): pytest.skip('mounting a file system needs root')
    here = tmp_path / 'readonly'
    here.mkdir()
    if subprocess.run(['mount', '--bind', str(mlflow_home), str(here)], capture_output=True).returncode: pytest.skip('this machine does not let tests mount')
    try:
        subprocess.run(['mount', '-o', 'remount,bind,ro', str(here)], check=True)
        with pytest.raises(LabError, match='read-only'): check_store(f'sqlite:///{here}/mlflow.db')
        with pytest.raises(LabError, match='cannot be opened for writing|cannot be made'): check_store(f'sqlite:///{here}/new.db')
    finally: subprocess.run(['umount', '-l', str(here)])


def test_a_server_that_is_not_there_or_never_answers(monkeypatch):
    monkeypatch.setattr(tracking, 'lock_wait', .3)
    with pytest.raises(LabError, match='cannot be reached .*refused'): check_store('http://127.0.0.1:9')
    with socket.create_server(('127.0.0.1', 0)) as silent:
        with pytest.raises(LabError, match='no answer within'): check_store(f'http://127.0.0.1:{silent.getsockname()[1]}')


def test_a_password_in_the_address_is_not_shown(monkeypatch):
    monkeypatch.setattr(tracking, 'lock_wait', .3)
    with pytest.raises(LabError) as e: check_store('http://ann:mauve-walrus@127.0.0.1:9')
    assert 'walrus' not in str(e.value)


def test_a_deleted_experiment_says_how_to_get_it_back(mlflow_home, tmp_path):
    client = connect()
    client.delete_experiment(tracking.experiment_id(client, 'gone'))
    with pytest.raises(LabError, match='mlflow experiments restore'): start_run('gone')


def give_up():
    "Forget the run of this process, and its thread, which would go on sending until the end of all tests."
    if tracking._current: tracking._current.pumped.set()
    tracking._current = None


def test_a_full_disk_while_logging_is_one_line(small_disk, database_template, monkeypatch):
    shutil.copy(database_template, small_disk / 'mlflow.db')
    monkeypatch.setenv('GENAI_LAB_TRACKING_URI', f'sqlite:///{small_disk}/mlflow.db')
    monkeypatch.setenv('GENAI_LAB_ARTIFACT_ROOT', str(small_disk / 'artifacts'))
    with pytest.raises(LabError) as e:
        run = start_run('full')
        run.log_text('x' * 2_000_000, 'large.txt')
    assert '\n' not in str(e.value) and ('No space left' in str(e.value) or 'disk is full' in str(e.value))
    give_up()


# the spool

def test_messages_that_were_cut_off_are_left_for_later(tmp_path):
    spool = Spool(tmp_path / 's')
    spool.add(tags=dict(a='1'))
    with open(spool.log, 'a') as f: f.write('{"tags": {"b"')
    first, end = spool.read()
    with open(spool.log, 'a') as f: f.write(': "2"}}\n')
    assert first == [dict(tags=dict(a='1'))] and spool.read(end)[0] == [dict(tags=dict(b='2'))]


@pytest.mark.parametrize('name', ['../../etc/passwd', '/etc/passwd', 'a/../../b', '....//x'])
def test_no_file_name_leads_out_of_the_spool(tmp_path, name):
    spool = Spool(tmp_path / 's')
    assert spool.path(name).resolve().is_relative_to(spool.files.resolve())


def test_sending_twice_changes_nothing_and_large_portions_arrive(mlflow_home, tmp_path):
    record = open_record('large', 'x', {}, Spool(tmp_path / 's'))
    record.spool.add(metrics=[['loss', 1 / (i + 1), i, i] for i in range(2500)], params={f'p{i}': 'v' for i in range(230)}, tags={f't{i}': 'v' for i in range(130)})
    record.spool.add(params=dict(long='x' * 7000))
    record.send()
    record.spool.sent = 0
    record.send()
    got = record.client.get_run(record.id).data
    assert len(record.client.get_metric_history(record.id, 'loss')) == 2500
    assert len(got.params) == 231 and len(got.params['long']) == 6000 and sum(k.startswith('t') for k in got.tags) == 130


def test_eight_writers_at_once_lose_nothing(mlflow_home, tmp_path):
    records = [open_record('many', f'w{i}', {}, Spool(tmp_path / str(i))) for i in range(8)]
    failed = []

    def work(r):
        try:
            for i in range(10): r.spool.add(metrics=[['loss', i, i, i]]); r.send()
        except Exception as e: failed.append(e)
    threads = [threading.Thread(target=work, args=(r,)) for r in records]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not failed
    assert all(len(r.client.get_metric_history(r.id, 'loss')) == 10 for r in records)


def test_frames_with_anything_in_them_become_parquet(tmp_path):
    import numpy as np
    import pandas as pd
    df = pd.DataFrame({'mixed': [1, 'b', None, [2]], 'list': [['a'], [], None, ['b', 'c']], 'number': [1., np.nan, 2., 3.], 'object': [SimpleNamespace(a=1)] * 4, 7: list('abcd')})
    write_parquet(df, tmp_path / 'x.parquet')
    back = pd.read_parquet(tmp_path / 'x.parquet')
    assert back.mixed.tolist()[:2] == ['1', 'b'] and back['list'][3].tolist() == ['b', 'c'] and back['7'].tolist() == list('abcd')
    write_parquet(df, tmp_path / 'y.parquet')
    assert (tmp_path / 'x.parquet').read_bytes() == (tmp_path / 'y.parquet').read_bytes()


# parameters of a kernel

def test_the_last_value_counts_and_other_cells_do_not():
    cells = ['n = 1\nwho = "a"', 'n = n + 1', 'n = 2', 'import os\nm = 3', 'a = b = 4', '']
    assert kernel_parameters(cells) == dict(n=2, who='a', a=4, b=4)


# notebooks without the runner

def execute(path, tmp_path, how='nbclient'):
    "Run a notebook as JupyterLab, nbconvert (both by nbclient) or papermill would; whether it went well."
    import nbformat
    import papermill
    from nbclient import NotebookClient
    here = tmp_path / 'work'
    here.mkdir(exist_ok=True)
    shutil.copy(path, here / path.name)
    try:
        if how == 'papermill': papermill.execute_notebook(str(here / path.name), None, parameters=dict(n=50), progress_bar=False, cwd=str(here))
        else: NotebookClient(nbformat.read(here / path.name, 4), kernel_name='python3', resources=dict(metadata=dict(path=str(here)))).execute()
    except Exception as e: return f'{type(e).__name__}: {e}'
    return 'well'


def test_in_jupyterlab_the_notebook_logs_a_run_of_its_own(mlflow_home, tmp_path, monkeypatch):
    "JupyterLab tells a kernel its notebook; then the tag says what is a parameter, and the notebook is kept."
    monkeypatch.setenv('JPY_SESSION_NAME', 'work/good.ipynb')
    assert execute(notebooks / 'good.ipynb', tmp_path) == 'well'
    [run] = runs('discounts')
    assert run.info.status == 'FINISHED'
    assert run.data.params == dict(n='200', uplift='0.1', shops="['north', 'south']", api_key='None', seed='7')
    assert run.data.tags['seed'] == '7' and run.data.tags['verdict'] == 'north sells best.' and run.data.tags['package.numpy']
    assert set(run.data.metrics) == {'north/rate', 'south/rate'}
    files = {p.relative_to(tracking.local_path(run.info.artifact_uri)).as_posix() for p in tracking.local_path(run.info.artifact_uri).rglob('*') if p.is_file()}
    assert files == {'good.ipynb', 'parameters.json', 'samples/sales.parquet', 'figures/rates.png', 'result.csv'}


def test_plain_papermill_is_found_out_by_its_injected_cell(mlflow_home, tmp_path):
    assert execute(notebooks / 'good.ipynb', tmp_path, 'papermill') == 'well'
    [run] = runs('discounts')
    assert run.data.params['n'] == '50' and run.data.params['uplift'] == '0.1' and run.info.status == 'FINISHED'


def test_a_notebook_that_breaks_off_is_not_taken_for_finished(mlflow_home, tmp_path):
    assert 'KeyError' in execute(notebooks / 'raises.ipynb', tmp_path)
    assert execute(notebooks / 'never_finishes.ipynb', tmp_path) == 'well'
    [raised], [left] = runs('raises'), runs('open')
    assert raised.info.status == 'FAILED' and raised.data.metrics == dict(before=3)
    assert left.info.status == 'KILLED' and 'before run.finish()' in left.data.tags['failure']
    assert left.data.params == dict(n='5') and left.data.metrics == dict(seen=5)


def test_nothing_is_left_when_everything_was_sent(mlflow_home, tmp_path):
    run = start_run('tidy', dict(n=1))
    assert [p.folder for p in all_spools()] == [run.spool.folder]
    run.log_text('x', 'x.txt')
    run.finish()
    assert not list((tmp_path / 'cache' / 'spool').iterdir())


def test_a_lost_store_keeps_what_was_said(mlflow_home, tmp_path, monkeypatch):
    run = start_run('lost')
    (mlflow_home / 'mlflow.db').write_text('overwritten')
    run.record.client._tracking_client.store.engine.dispose()
    with pytest.raises(LabError) as e: run.log_metric('accuracy', .5)
    assert '\n' not in str(e.value)
    assert run.spool.read()[0][-1]['metrics'][0][:2] == ['accuracy', .5]
    give_up()


# what is logged

def test_an_evaluation_and_a_comparison_are_logged_whole(mlflow_home):
    import pandas as pd
    from genai_lab.stats import proportion
    frame = pd.DataFrame(dict(id=[1, 2, 3], correct=[1., 0., float('nan')], error=['', '', 'too long']))

    def evaluation(label, k):
        return SimpleNamespace(label=label, metrics=dict(accuracy=proportion(k, 2)), bounds=dict(accuracy=(k / 3, (k + 1) / 3)), n=SimpleNamespace(attempted=3, scored=2, failed=1),
                               fingerprints=dict(data='d', task='t', prompt=label, model='m'), samples=frame, task=SimpleNamespace(name='departments'))
    a, b = evaluation('zero shot', 1), evaluation('few/shot', 2)
    test = SimpleNamespace(difference=SimpleNamespace(value=.5, low=-.1, high=.9, n=2), p=.04, p_adjusted=.08)
    comparison = SimpleNamespace(evaluations=[a, b], metric='accuracy', pairs={('zero shot', 'few/shot'): test}, to_frame=lambda: frame, disagreements=lambda n: frame.head(n))
    run = start_run('whole')
    run.log_evaluation(a)
    run.log_comparison(comparison)
    run.finish()
    [got] = runs('whole')
    m = got.data.metrics
    assert m['zero shot/accuracy'] == .5 and m['zero shot/accuracy.n'] == 2 and m['zero shot/n.failed'] == 1 and m['zero shot/accuracy.at_best'] == pytest.approx(2 / 3)
    assert m['few_shot/accuracy'] == 1 and m['few/shot vs zero shot/accuracy.p_adjusted'] == .08 and m['few/shot vs zero shot/accuracy.difference.low'] == -.1
    assert got.data.tags['fingerprint.zero shot.prompt'] == 'zero shot' and got.data.tags['fingerprint.model'] == 'm'
    assert {i.dataset.digest for i in got.inputs.dataset_inputs} == {'d'}
    folder = tracking.local_path(got.info.artifact_uri)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob('*.parquet')} == {'samples/zero shot.parquet', 'samples/few_shot.parquet', 'tables/comparison.parquet', 'tables/comparison_disagreements.parquet'}
    assert (folder / 'result.csv').read_text().startswith('variant,accuracy,samples,failed')


def test_figures_of_every_kind_are_logged(mlflow_home):
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    import pandas as pd
    import seaborn as sns
    run = start_run('figures')
    fig, ax = plt.subplots()
    run.log_figure(fig, 'figure')
    run.log_figure(ax, 'axes')
    run.log_figure(sns.relplot(pd.DataFrame(dict(x=[1, 2], y=[1, 2])), x='x', y='y'), 'grid', dpi=50)
    with pytest.raises(LabError, match='give a matplotlib figure'): run.log_figure('no', 'text')
    run.finish()
    folder = run.record.folder / 'figures'
    assert sorted(p.name for p in folder.iterdir()) == ['axes.png', 'figure.png', 'grid.png']
    assert all(p.read_bytes().startswith(b'\x89PNG') for p in folder.iterdir())


def test_secrets_stay_out_of_the_store(mlflow_home, monkeypatch):
    monkeypatch.setenv('SHOP_API_KEY', 'violet-otter-77')
    run = start_run('secrets', dict(password='mauve-walrus-42', nested=dict(token='amber-stoat-99', ok='yes'), plain='violet-otter-77 it is'))
    run.set_tags(dict(note='mauve-walrus-42'))
    run.log_text('amber-stoat-99', 'x.txt')
    run.verdict('violet-otter-77 wins')
    run.finish()
    for p in mlflow_home.rglob('*'):
        if p.is_file(): assert not [s for s in (b'walrus', b'otter', b'stoat') if s in p.read_bytes()], p
    assert json.loads((run.record.folder / 'parameters.json').read_text())['nested']['ok'] == 'yes'

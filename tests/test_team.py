"A team's MLflow: PostgreSQL, a tracking server in front of it, many writers at once, and servers that go away."
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from genai_lab import tracking
from genai_lab.core import LabError
from genai_lab.experiments import run_notebook
from genai_lab.runs import changed_inputs, find_run, list_runs, push, reap
from genai_lab.tracking import ServerAway, all_spools, connect, new_spool, open_record, start_run, tracking_uri

notebooks = Path(__file__).parent / 'notebooks'
programs = sorted(Path('/usr/lib/postgresql').glob('*/bin'))


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def wait_for(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < deadline: time.sleep(.1)
    return found


class Postgres:
    "A PostgreSQL of its own on a free port of this machine; as root it runs as the user postgres, because it refuses root."
    def __init__(self):
        self.folder, self.port = Path(tempfile.mkdtemp(prefix='genai_lab-pg-')), free_port()
        self.who = dict(user='postgres', group='postgres', extra_groups=[]) if os.geteuid() == 0 else {}
        if self.who: os.chown(self.folder, pwd.getpwnam('postgres').pw_uid, pwd.getpwnam('postgres').pw_gid)
        subprocess.run([programs[-1] / 'initdb', '-D', self.folder / 'data', '-A', 'trust', '-U', 'lab', '--no-sync', '--locale=C', '--encoding=UTF8'], check=True, capture_output=True, cwd='/', **self.who)
        self.start()

    def start(self):
        args = [programs[-1] / 'postgres', '-D', self.folder / 'data', '-k', self.folder, '-p', str(self.port), '-c', 'listen_addresses=127.0.0.1', '-c', 'fsync=off', '-c', 'max_connections=200']
        self.process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd='/', start_new_session=True, **self.who)
        assert wait_for(self.answers, 180), 'PostgreSQL does not start'

    def answers(self): return subprocess.run([programs[-1] / 'pg_isready', '-q', '-h', '127.0.0.1', '-p', str(self.port)]).returncode == 0

    def kill(self):
        "End all its processes at once, as a machine that loses its power."
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for p in family: p.kill()
        self.process.wait()
        wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 10)

    def uri(self, name): return tracking._with_driver(f'postgresql://lab:mauve-walrus@127.0.0.1:{self.port}/{name}')

    def sql(self, text, name='postgres'):
        import sqlalchemy as sa
        engine = sa.create_engine(self.uri(name), isolation_level='AUTOCOMMIT')
        with engine.connect() as db: db.execute(sa.text(text))
        engine.dispose()


@pytest.fixture(scope='session')
def postgres():
    if not programs: pytest.skip('there is no PostgreSQL on this machine (apt-get install postgresql)')
    if not any(map(find_spec, ('psycopg', 'psycopg2'))): pytest.skip('there is no driver for PostgreSQL (pip install "genai-lab[team]")')
    pg = Postgres()
    try:
        pg.sql('CREATE DATABASE empty')
        from mlflow.store.db.utils import _initialize_tables
        from sqlalchemy import create_engine
        engine = create_engine(pg.uri('empty'))
        _initialize_tables(engine)
        engine.dispose()
        yield pg
    finally:
        if pg.process.poll() is None: pg.kill()
        shutil.rmtree(pg.folder, ignore_errors=True)


made = iter(range(10**6))


@pytest.fixture
def database(postgres):
    "The address of a fresh database with MLflow's tables."
    name = f'lab{next(made)}'
    postgres.sql(f'CREATE DATABASE {name} TEMPLATE empty')
    yield postgres.uri(name)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    engine = SqlAlchemyStore._engine_map.pop(postgres.uri(name), None)
    if engine is not None: engine.dispose()


class Server:
    "A tracking server of MLflow as a team would start it, which keeps files itself."
    def __init__(self, folder, store):
        self.port = free_port()
        self.url, self.store, self.folder = f'http://127.0.0.1:{self.port}', store, folder

    def start(self):
        env = {**os.environ, 'MLFLOW_DISABLE_TELEMETRY': 'true', 'DO_NOT_TRACK': 'true', 'MLFLOW_SERVER_ENABLE_JOB_EXECUTION': 'false'}
        env.pop('PYTEST_CURRENT_TEST', None)   # MLflow's server is stricter under pytest
        self.process = subprocess.Popen([sys.executable, '-m', 'mlflow', 'server', '--backend-store-uri', self.store, '--serve-artifacts', '--artifacts-destination', str(self.folder), '--host', '127.0.0.1',
                                         '--port', str(self.port), '--workers', '1', '--uvicorn-opts', '--log-level=warning'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=env)
        assert wait_for(self.answers, 180), 'the tracking server does not start'
        return self

    def answers(self):
        try: return urllib.request.urlopen(self.url + '/health', timeout=2).status == 200
        except OSError: return False

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope='session')
def team(postgres, tmp_path_factory):
    "A tracking server with PostgreSQL behind it; tests may kill it and have it start again."
    postgres.sql('CREATE DATABASE team TEMPLATE empty')
    server = Server(tmp_path_factory.mktemp('artifacts'), postgres.uri('team')).start()
    yield server
    if server.process.poll() is None: server.kill()


@pytest.fixture
def server(team):
    if team.process.poll() is not None: team.start()
    return team


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('GENAI_LAB_SERVER_PATIENCE', '30')
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    monkeypatch.chdir(tmp_path)   # out of the work tree, whose changes would be recorded too
    for n in ('good', 'raises'): shutil.copy(notebooks / f'{n}.ipynb', tmp_path)


def use(monkeypatch, uri):
    monkeypatch.setenv('GENAI_LAB_TRACKING_URI', uri)
    return connect()


def files(client, run_id, folder=None):
    found = client.list_artifacts(run_id, folder)
    return {f.path for f in found if not f.is_dir} | {p for f in found if f.is_dir for p in files(client, run_id, f.path)}


whole = {'good.ipynb', 'good.html', 'story.html', 'parameters.json', 'result.csv', 'samples/sales.parquet', 'figures/rates.png', 'figures/cell_04.png'}


def complete(client, run_id):
    "Whether a run of good.ipynb has left everything."
    run = client.get_run(run_id)
    assert run.info.status == 'FINISHED' and set(run.data.metrics) == {'north/rate', 'south/rate'} and run.data.params['n'] == '200' and run.data.tags['verdict'] == 'north sells best.'
    assert files(client, run_id) == whole and 'failure' not in run.data.tags
    return True


# the same runs

@pytest.mark.parametrize('where', ['database', 'server'])
def test_a_team_store_holds_what_the_local_one_holds(where, request, monkeypatch, tmp_path):
    value = request.getfixturevalue(where)
    client = use(monkeypatch, value if where == 'database' else value.url)
    good, bad = run_notebook('good.ipynb'), run_notebook('raises.ipynb')
    assert complete(client, good.run_id) and good.exit_code == 0
    run = client.get_run(bad.run_id)
    assert (run.info.status, run.data.tags['failure.kind'], run.data.metrics) == ('FAILED', 'cell', dict(before=3)) and 'raises.html' in files(client, bad.run_id)
    assert list_runs(rank='north/rate').run_id.tolist() == [good.run_id] and list_runs(where='tags.failure.kind=cell', limit=1).run_id.tolist() == [bad.run_id]
    assert find_run(client, good.run_id[:12]).info.run_id == good.run_id and changed_inputs(client, good.run_id) == []
    lost = open_record('x', 'lost', {'pid': '4000000', 'pid.started': '1.00'}, new_spool())
    assert [r.run_id for r in reap()] == [lost.id] and not all_spools()
    assert 'walrus' not in repr(good) + str(good)


def test_inputs_come_back_from_a_server(server, monkeypatch, tmp_path):
    from genai_lab.core import forget_inputs, note_path
    client = use(monkeypatch, server.url)
    (tmp_path / 'x.csv').write_text('a\n')
    forget_inputs()
    note_path('data', tmp_path / 'x.csv')
    run = start_run('inputs')
    run.finish()
    forget_inputs()
    assert changed_inputs(client, run.id) == []
    (tmp_path / 'x.csv').write_text('b\n')
    assert changed_inputs(client, run.id) == ['data x.csv has changed']


# many at once

many = '''
import os, sys, threading, time
import mlflow, mlflow.store.tracking.sqlalchemy_store   # once, before the processes part
from genai_lab.tracking import Spool, open_record, new_spool
uri, n, each = sys.argv[1], 16, 1000
children = []
for k in range(n):
    if pid := os.fork(): children.append(pid); continue
    try:
        record, done = open_record('many', f'writer {k}', {}, new_spool()), threading.Event()
        pump = threading.Thread(target=record.pump, args=(done,)); pump.start()
        for i in range(each):
            record.spool.add(metrics=[['loss', i / each, i, i]])
            if i % 250 == 0: record.send()
        done.set(); pump.join()
        record.spool.add(tags=dict(done='yes'))
        record.end(); record.deliver()
        os._exit(bool(record.spool.rest))
    except BaseException as e: print(k, type(e).__name__, e, file=sys.stderr); os._exit(1)
sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) != 0 for p in children))
'''


@pytest.mark.parametrize('where', ['sqlite', 'database'])
def test_sixteen_writers_of_a_thousand_metrics_lose_nothing(where, request, monkeypatch):
    home = request.getfixturevalue('mlflow_home') if where == 'sqlite' else None
    uri = f'sqlite:///{home}/mlflow.db' if home else request.getfixturevalue('database')
    client = use(monkeypatch, uri)
    tracking.experiment_id(client, 'many')
    done = subprocess.run([sys.executable, '-c', many, uri], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = client.search_runs([client.get_experiment_by_name('many').experiment_id])
    assert len(found) == 16 and {r.info.status for r in found} == {'FINISHED'} and all(r.data.tags['done'] == 'yes' for r in found)
    assert [sum(len(client.get_metric_history(r.info.run_id, 'loss')) for r in found)] == [16_000]


def test_of_four_processes_exactly_one_moves_an_alias_and_one_registers(database, monkeypatch):
    from test_registry import full, load, plain, race, register, replace, set_alias
    use(monkeypatch, database)
    for i in range(5): register(replace(plain, system=str(i)))
    set_alias('tone', 'champion', 1)
    done = subprocess.run([sys.executable, '-c', race], capture_output=True, text=True, timeout=120)
    alias, new = (line.split() for line in done.stdout.splitlines())
    assert sorted(alias) == sorted(new) == ['0', '3', '3', '3'], done.stdout + done.stderr
    assert load('tone@champion').version == 2 + alias.index('0')
    register(full, tags=dict(evidence='x' * 60_000))
    assert load('full').prompt == full


# servers that go away

def test_a_server_that_is_killed_and_comes_back_has_lost_nothing(server, monkeypatch):
    client = use(monkeypatch, server.url)
    back = []

    def restart(): time.sleep(2); server.start(); back.append(True)

    def strike(e):
        if e.kind == 'cell' and e.cell == 3: server.kill(); threading.Thread(target=restart).start()
    result = run_notebook('good.ipynb', on_event=strike)
    assert wait_for(lambda: back) and result.exit_code == 0 and complete(client, result.run_id) and not all_spools()


def test_a_server_that_does_not_come_back_leaves_the_run_to_be_pushed(server, monkeypatch, capfd):
    client = use(monkeypatch, server.url)
    monkeypatch.setenv('GENAI_LAB_SERVER_PATIENCE', '1')
    run = start_run('alone')     # as in JupyterLab
    run.log_metric('accuracy', .5)
    with pytest.raises(ServerAway, match='does not answer .connection refused.; the record is kept and can be sent when it is back: genai-lab runs push') as e:
        run_notebook('good.ipynb', on_event=lambda e: e.kind == 'cell' and e.cell == 3 and server.kill())
    assert '\n' not in str(e.value) and 'genai-lab runs push' in capfd.readouterr().err
    run.log_metric('loss', 1.)   # the server is away, and a notebook goes on
    run.log_metric('loss', 2., step=1)
    with pytest.raises(ServerAway, match='genai-lab runs push'): run.finish()
    mine, spool = all_spools()
    assert (spool.folder / 'files' / 'story.html').exists()
    with pytest.raises(LabError, match='cannot be reached .*refused'): run_notebook('good.ipynb')   # nothing is computed, nothing is kept
    waiting = push()
    assert [p.run_id for p in waiting] == [run.id, spool.about['run_id']] and all('cannot be reached' in p.why for p in waiting) and len(all_spools()) == 2
    server.start()
    assert [p.status for p in push()] == ['FINISHED', 'FINISHED'] and not all_spools() and push() == []
    assert complete(client, waiting[1].run_id) and client.get_run(run.id).data.metrics == dict(accuracy=.5, loss=2.) and len(client.get_metric_history(run.id, 'loss')) == 2


def test_a_database_that_is_killed_and_comes_back_has_lost_nothing(postgres, database, monkeypatch):
    client = use(monkeypatch, database)

    def strike(e):
        if e.kind == 'cell' and e.cell == 3: postgres.kill(); threading.Timer(1.5, postgres.start).start()
    result = run_notebook('good.ipynb', on_event=strike)
    assert wait_for(postgres.answers) and result.exit_code == 0 and complete(client, result.run_id) and not all_spools()


# wrong stores

@pytest.mark.parametrize('where', ['sqlite', 'database'])
def test_tables_of_another_version_are_left_as_they_are(where, request, postgres, monkeypatch):
    import sqlalchemy as sa
    home = request.getfixturevalue('mlflow_home') if where == 'sqlite' else None
    uri = f'sqlite:///{home}/mlflow.db' if home else request.getfixturevalue('database')
    engine = sa.create_engine(uri)

    def version(v):
        with engine.begin() as db: db.execute(sa.text(f"UPDATE alembic_version SET version_num = '{v}'"))
    monkeypatch.setenv('GENAI_LAB_TRACKING_URI', uri)
    version('451aebb31d03')
    with engine.begin() as db: db.execute(sa.text('ALTER TABLE trace_tags RENAME TO gone'))   # a table that older versions did not have: MLflow by itself would upgrade
    with pytest.raises(LabError, match='has an older schema .451aebb31d03.*mlflow db upgrade') as e: connect()
    assert '\n' not in str(e.value) and 'walrus' not in str(e.value)
    assert not sa.inspect(engine).has_table('trace_tags')
    version('ffffffffffff')
    with pytest.raises(LabError, match='was made by a newer MLflow .schema ffffffffffff.; pip install --upgrade mlflow'): connect()
    engine.dispose()


def test_a_driver_that_is_missing_and_a_database_that_is_not_there(monkeypatch, postgres):
    monkeypatch.setenv('GENAI_LAB_TRACKING_URI', 'postgresql+asyncpg://lab:mauve-walrus@127.0.0.1:9/lab')
    with pytest.raises(LabError, match=r'needs a driver that is not installed; pip install "genai-lab\[team\]"') as e: connect()
    assert 'walrus' not in str(e.value)
    for uri, words in [(f'postgresql://lab:mauve-walrus@127.0.0.1:{postgres.port}/nowhere', 'does not exist'), ('postgres://lab:mauve-walrus@127.0.0.1:9/lab', 'refused')]:
        monkeypatch.setenv('GENAI_LAB_TRACKING_URI', uri)
        with pytest.raises(LabError, match=words) as e: connect()
        assert '\n' not in str(e.value) and 'walrus' not in str(e.value) and tracking_uri().startswith('postgresql')

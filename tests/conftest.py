"What all tests share: a lab of their own in a temporary folder, and the embedded model, loaded once."
import os
import shutil
import signal
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')   # trl's own trainers, which tests compare with, would tell
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')   # the cores are taken by the other workers

# Tests that are started in the background inherit an ignored SIGINT, and so would the commands they interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    "For `-n auto`: a worker for each core that has 3 GB of free memory to itself, and none where that makes one."
    import psutil
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    n = min(cores, psutil.virtual_memory().available // 3_000_000_000, 8)
    return n if n > 1 else 0


@pytest.fixture(scope='session')
def database_template(tmp_path_factory):
    "An empty MLflow database, made once: MLflow takes seconds to create its tables."
    from mlflow.store.db.utils import _initialize_tables
    from sqlalchemy import create_engine
    file = tmp_path_factory.mktemp('mlflow') / 'empty.db'
    engine = create_engine(f'sqlite:///{file}')
    _initialize_tables(engine)
    engine.dispose()
    return file


@pytest.fixture
def mlflow_home(tmp_path, monkeypatch, database_template):
    "A folder with a fresh tracking store; settings and child processes use it."
    home = tmp_path / 'mlruns'
    home.mkdir()
    shutil.copy(database_template, home / 'mlflow.db')
    monkeypatch.setenv('GENAI_LAB_TRACKING_URI', f'sqlite:///{home}/mlflow.db')
    monkeypatch.setenv('GENAI_LAB_ARTIFACT_ROOT', str(home / 'artifacts'))
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    return home


@pytest.fixture
def mlflow_forgets(monkeypatch):
    "What MLflow keeps for the whole process is put back."
    import mlflow
    for k in ('MLFLOW_TRACKING_URI', 'MLFLOW_EXPERIMENT_ID'): monkeypatch.setenv(k, ''); monkeypatch.delenv(k)
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture(autouse=True)
def lab(tmp_path, monkeypatch):
    "No test writes to the lab's own store, whatever the environment says."
    monkeypatch.setenv('GENAI_LAB_TRACKING_URI', f'sqlite:///{tmp_path}/mlruns/mlflow.db')
    monkeypatch.setenv('GENAI_LAB_ARTIFACT_ROOT', str(tmp_path / 'mlruns' / 'artifacts'))
    monkeypatch.delenv('MAKELEVEL', raising=False)   # under make, commands name make's targets


@pytest.fixture(scope='session')
def model():
    "The embedded model."
    from genai_lab.models import load_model
    return load_model('smollm2-135m')


@pytest.fixture(scope='session')
def chromium(tmp_path_factory):
    "A browser."
    from browser import Chromium
    program = next((p for n in ('chromium', 'chromium-browser', 'google-chrome', 'chrome') if (p := shutil.which(n))), None)
    if not program: pytest.skip('no Chromium here (apt-get install chromium)')
    browser = Chromium(program, tmp_path_factory.mktemp('chromium'))
    yield browser
    browser.close()

"Grids on a real Ray cluster of two nodes, one of which is lost in the middle."
import json
import os
import subprocess
import sys

import pytest

from genai_lab.core import LabError
from genai_lab.grids import axes_grid
from genai_lab.scheduler import PlainBoard, run_grid
from genai_lab.tracking import connect

pytest.importorskip('ray', reason='Ray is an extra: pip install "genai-lab[ray]"')
from genai_lab.cluster import RayPool


@pytest.fixture(scope='module')
def cluster():
    "A head and a second node, each with one processor."
    os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
    from ray.cluster_utils import Cluster
    c = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    c.second = c.add_node(num_cpus=1)
    yield c
    c.shutdown()


@pytest.fixture(autouse=True)
def home(mlflow_home, tmp_path, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_CACHE_DIR', str(tmp_path / 'cache'))
    (tmp_path / 'settings.ini').write_text('[lab]\nseed = 7\n')
    monkeypatch.chdir(tmp_path)


def notebook(folder, *sources):
    cells = [dict(cell_type='code', id=f'c{i}', source=s, metadata=dict(tags=['parameters'] if i == 0 else []), outputs=[], execution_count=None) for i, s in enumerate(['n: int = 0\nflag: str = ""', *sources])]
    path = folder / 'noop.ipynb'
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3')), cells=cells)))
    return path


begin = "import pathlib, time\nfrom genai_lab.tracking import start_run\nrun = start_run('noop')\n(pathlib.Path(flag) / f'began{n}').touch()"
finish = "run.log_metric('n', n)\nrun.finish()"


def test_the_working_tree_travels_and_a_lost_node_costs_no_run(cluster, tmp_path):
    flags = tmp_path.parent / f'{tmp_path.name}-flags'
    flags.mkdir()
    (tmp_path / 'helper.py').write_text('def wait(flag):\n    import pathlib, time\n    while not (pathlib.Path(flag) / "go").exists(): time.sleep(.1)\n')
    path = notebook(tmp_path, 'import helper, os\nassert "/runtime_resources/" in os.path.abspath(helper.__file__), helper.__file__', begin, 'helper.wait(flag)', finish)

    class Watching(PlainBoard):
        "Takes the second node away as soon as both have begun a run."
        lost = False
        def __call__(self, kind, s, sched):
            super().__call__(kind, s, sched)
            if not self.lost and len(list(flags.glob('began*'))) == 2:
                cluster.remove_node(cluster.second, allow_graceful=False)
                self.lost = True
                (flags / 'go').touch()

    pool = RayPool(cluster.address, dict(workers=2))
    result = run_grid(axes_grid(path, ['n=1,2,3'], dict(flag=str(flags))), pool=pool, view=Watching(), retries=2)
    assert result.exit_code == 0, str(result)
    client = connect()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    done = [r for r in runs if r.info.status == 'FINISHED' and 'mlflow.parentRunId' in r.data.tags]
    assert sorted(r.data.metrics['n'] for r in done) == [1, 2, 3]
    assert any(s.attempts == 2 for s in result.states) and not [r for r in runs if r.info.status == 'RUNNING']


def test_an_address_where_nobody_is(tmp_path):
    with pytest.raises(LabError, match='no Ray cluster answers at 127.0.0.1:1'): RayPool('127.0.0.1:1')


def test_without_ray_it_says_how_to_get_it(tmp_path):
    path = notebook(tmp_path, finish)
    code = "import sys; sys.modules['ray'] = None\nfrom genai_lab.cli import main; main()"
    p = subprocess.run([sys.executable, '-c', code, 'run', str(path), '-g', 'n=1,2', '--on', 'ray'], capture_output=True, text=True, cwd=tmp_path)
    assert p.returncode == 2 and 'pip install "genai-lab[ray]"' in p.stderr and 'Traceback' not in p.stderr

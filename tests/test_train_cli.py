"`genai-lab train` as people use it, on one process and on two."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from tiny_model import write_settings, write_tiny
from typer.testing import CliRunner

from genai_lab.cli import app
from genai_lab.core import LabError
from genai_lab.recipes import read_recipe

command = [str(Path(sys.executable).parent / 'genai-lab')]


@pytest.fixture(scope='module')
def tiny(tmp_path_factory, model): return write_tiny(tmp_path_factory.mktemp('tiny') / 'base', model)


@pytest.fixture
def home(tmp_path, tiny, monkeypatch, mlflow_home):
    "A folder with rows, a prompt, a task and a recipe, and a lab whose model is the small one."
    monkeypatch.setenv('GENAI_LAB_SETTINGS', str(write_settings(tmp_path, base=tiny)))
    rows = pd.DataFrame([dict(product=f'{how} {what}', department=d) for how in ('fresh', 'cold', 'dried', 'sweet', 'salted') for what, d in (('peas', 'Vegetables'), ('ham', 'Deli'), ('soap', 'Care'))])
    rows.head(12).to_csv(tmp_path / 'rows.csv', index=False)
    rows.tail(3).to_csv(tmp_path / 'test.csv', index=False)
    (tmp_path / 'short.yaml').write_text('name: short\ntemplate: "{{ product }}:"\n')
    (tmp_path / 'task.yaml').write_text('data: test.csv\nprompt: short.yaml\ntarget: department\nchoices: [Vegetables, Deli, Care]\nmetrics: accuracy\n')
    return tmp_path


def write(home, name='train.yaml', **more):
    d = dict(data='rows.csv', prompt='short.yaml', completion='department', chat=False, tuning=dict(rank=4, max_steps=6, batch_rows=4, learning_rate=.01, eval_every=3), folder=f'tuned-{name[:-5]}') | more
    (home / name).write_text(json.dumps(d))
    return home / name


def call(*args, **kw): return subprocess.run([*command, 'train', *map(str, args)], capture_output=True, text=True, timeout=300, **kw)


def runs():
    from genai_lab.tracking import connect
    c = connect()
    return c.search_runs([e.experiment_id for e in c.search_experiments() if e.name != 'models'])


def test_a_file_becomes_a_registered_model(home):
    r = call(write(home, task='task.yaml', register=dict(name='shelves', intended='For a test.')), '--json')
    assert r.returncode == 0, r.stderr
    d = json.loads(r.stdout.splitlines()[-1])
    assert d['steps'] == 6 and d['registered'] == 'models:/shelves/1' and 0 <= d['metrics']['accuracy']['value'] <= 1
    [run] = runs()
    assert run.info.status == 'FINISHED' and run.data.params['tuning.rank'] == '4' and run.data.params['tuning.seed'] == '20' and 'train/loss' in run.data.metrics and 'tuned/accuracy' in run.data.metrics
    from genai_lab.adapters import load_card
    from genai_lab.models import load_model
    assert load_model('models:/shelves').adapter and 'For a test.' in load_card('models:/shelves') and 'rank' in load_card('models:/shelves')


def test_two_processes_take_the_steps_of_one(home):
    "Under `accelerate launch`, on gloo: the same losses, the same adapter, one record."
    from genai_lab.cli import main
    one, two = write(home, 'one.yaml'), write(home, 'two.yaml')
    with pytest.raises(SystemExit) as e: main(['train', str(one), '--no-track'])
    assert not e.value.code
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'GLOO_SOCKET_IFNAME': 'lo', 'OMP_NUM_THREADS': '1'}
    r = subprocess.run([str(Path(sys.executable).parent / 'accelerate'), 'launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0', command[0], 'train', str(two)],
                       capture_output=True, text=True, timeout=300, env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count('Tuned(') == 1
    a, b = (load_file(home / f'tuned-{n}' / 'tuned' / 'adapter_model.safetensors') for n in ('one', 'two'))
    assert a.keys() == b.keys() and max(np.abs(a[k] - b[k]).max() for k in a) < 1e-4
    history = [json.loads((next((home / f'tuned-{n}').glob('checkpoint-6')) / 'job.json').read_text())['history'] for n in ('one', 'two')]
    losses = [[h['loss'] for h in hs if 'loss' in h] for hs in history]
    assert len(losses[1]) == 6 and np.allclose(*losses, atol=1e-4)
    assert len(runs()) == 1


launched = '''
import sys
from pathlib import Path
import pandas as pd
from genai_lab.models import load_model
from genai_lab.recipes import launch, read_recipe
from genai_lab.tracking import start_run
recipe = read_recipe(sys.argv[1])
recipe.rows()                      # torch has worked in this process before
run = start_run('launched')
def tune(): return recipe.tune(run, progress=False)
launch(tune, processes=2)
tuned = tune()
run.finish()
print('steps', tuned.steps)
'''


def test_a_notebook_function_is_launched(home):
    (home / 'launched.py').write_text(launched)
    r = subprocess.run([sys.executable, str(home / 'launched.py'), str(write(home, 'launched.yaml'))], capture_output=True, text=True, timeout=300)
    assert r.returncode == 0 and r.stdout.splitlines()[-1] == 'steps 6', r.stderr[-3000:]
    [run] = runs()
    from genai_lab.tracking import connect
    assert run.info.status == 'FINISHED' and [m.step for m in connect().get_metric_history(run.info.run_id, 'train/loss')] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_saves_and_the_same_command_goes_on(home):
    file = write(home, tuning=dict(rank=4, max_steps=5000, batch_rows=4, learning_rate=1e-3, save_every=5))
    p = subprocess.Popen([*command, 'train', str(file), '--no-track'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 240
    while not list((home / 'tuned-train').glob('checkpoint-*')) and p.poll() is None and time.monotonic() < end: time.sleep(.1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130 and 'stopped and saved at step' in err and 'Traceback' not in err, err
    assert list((home / 'tuned-train').glob('checkpoint-*'))


def refused(*args):
    r = CliRunner().invoke(app, ['train', *map(str, args)])
    assert isinstance(r.exception, LabError), r.output
    return str(r.exception)


def test_recipes_that_cannot_be_meant(home):
    assert 'Did you mean "completion"?' in refused(write(home, completions='department'))
    assert 'tuning: there is no key "epoch"' in refused(write(home, tuning=dict(epoch=2)))
    assert 'register: there is no key "named"' in refused(write(home, register=dict(named='x')))
    assert 'a model needs a name' in refused(write(home, register=dict(message='x')))
    assert 'say which table' in refused(_text(home, 'prompt: short.yaml\n'))
    assert 'line 2' in refused(_text(home, 'data: rows.csv\n  prompt: [\n'))
    assert 'cannot be read' in refused(home / 'nowhere.yaml')
    assert 'keys and values are expected' in refused(_text(home, '- a\n'))
    assert 'aisle' in refused(write(home, completion='aisle'))
    assert 'is not known; give one of lora' in refused(write(home, tuning=dict(method='lorra')))


def _text(home, text): (home / 'text.yaml').write_text(text); return home / 'text.yaml'


def test_a_real_command_says_it_in_one_line(home):
    r = call(write(home, completions='department'))
    assert r.returncode == 2 and r.stdout == '' and len(r.stderr.strip().splitlines()) == 1 and r.stderr.startswith('error: ')


def test_checking_tunes_nothing(home):
    r = CliRunner().invoke(app, ['train', str(write(home)), '--check'])
    assert r.exit_code == 0 and '12 training rows' in r.output and not (home / 'tuned-train').exists()


def test_a_run_that_diverges_ends_with_one(home):
    r = CliRunner().invoke(app, ['train', str(write(home, tuning=dict(method='full', max_steps=40, batch_rows=3, learning_rate=100., warmup=.9, schedule='constant', eval_every=50, save_every=1, clip=0.))), '--no-track'])
    assert r.exit_code == 1 and 'stopped at step' in r.output + (r.stderr if hasattr(r, 'stderr') else '')


def test_preferences_from_a_file(home):
    pd.read_csv(home / 'rows.csv').assign(good='Deli', bad='I believe that it is Deli.').to_csv(home / 'pairs.csv', index=False)
    r = read_recipe(write(home, 'pairs.yaml', data='pairs.csv', completion='', chosen='good', rejected='bad'))
    assert r.tune(progress=False).steps == 6

"What somebody sees of a tuning run: live curves, a rate that was measured, guards on the gradient, and the card at the end."
import math
from dataclasses import replace

import nbformat
import pytest

from genai_lab.adapters import model_card
from genai_lab.core import LabError
from genai_lab.planning import plan
from genai_lab.recipes import read_recipe
from genai_lab.training import Stopped, Tuning, Watch, checkpoints, find_learning_rate, finetune
from genai_lab.tuning_data import tuning_data
from test_training import ask, make_toy, things


@pytest.fixture(scope='module')
def toy(tmp_path_factory): return make_toy(tmp_path_factory.mktemp('toy'))


@pytest.fixture(scope='module')
def data(toy): return tuning_data(things, toy, prompt=ask, completion='department', eval=0.25)


live = '''
from types import SimpleNamespace
from genai_lab.training import Live
job = SimpleNamespace(config=SimpleNamespace(max_steps=6), history=[], tokens=0)
live = Live(job, 0, True)
for i in range(1, 7):
    job.history.append(dict(step=i, loss=3 / i))
    job.tokens += 100
    live.step()
live.draw()
live.close()
'''


def test_curves_are_drawn_while_a_notebook_watches(monkeypatch):
    "In a real kernel: one picture, which is the last one, and a bar that has counted the steps."
    from nbclient import NotebookClient
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(live)], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))
    NotebookClient(nb, timeout=120).execute()
    pictures = [o.data['text/html'] for o in nb.cells[0].outputs if o.output_type == 'display_data' and '<svg' in o.data.get('text/html', '')]
    assert len(pictures) == 1 and '6 steps' in pictures[0] and 'loss 0.5' in pictures[0] and 'polyline' in pictures[0]
    bars = [str(o) for o in nb.cells[0].outputs if '<svg' not in str(o)]
    assert any('tuning' in b for b in bars) or any('application/vnd.jupyter.widget-view+json' in b for b in bars)


def test_the_gradient_is_watched(toy, data, tmp_path):
    w = Watch(3., 100.)
    assert (w.norm(99.), w.norm(101.), w.norm(math.inf)) == ('', 'the norm of the gradient is 101, above 100; take a lower learning rate', 'the norm of the gradient is inf; take a lower learning rate, or look at the rows')
    with pytest.raises(Stopped, match=r'stopped at step 1: the norm of the gradient is .*, above 1e-06.* The batch: rows .*\. No checkpoint') as e: finetune(data, toy, Tuning(max_steps=2, batch_rows=4, max_norm=1e-6), folder=tmp_path, progress=False)
    assert len(e.value.rows) == 4


def test_the_measured_rate_trains_and_far_beyond_it_breaks(toy, data, tmp_path):
    c = Tuning(method='full', batch_rows=4, max_steps=12, warmup=0.)
    r = find_learning_rate(data, toy, c)
    loss = lambda rate, name: finetune(data, toy, replace(c, learning_rate=rate), folder=tmp_path / name, progress=False).history.loss
    found, timid = loss(r.suggestion, 'found'), loss(r.suggestion / 100, 'timid')
    assert found.iloc[-1] < timid.iloc[-1] < found.iloc[0] + .1 and found.iloc[-1] < .9 * found.iloc[0]
    with pytest.raises(Stopped): loss(100 * r.limit, 'wild')


def test_a_card_has_every_metric_with_its_interval_and_the_verdict():
    from test_worth import Rule, ask as weigh
    w = weigh(Rule('t', 20))
    card = model_card('parity', dict(kind='adapter', base=dict(name='b', source='hub/b', content='abc'), method=dict(rank=2)), w.evaluations, w)
    m = w.tuned.metrics['accuracy']
    assert f'| tuned | {w.tuned.task.name} | accuracy | {m.value:.3f} | {m.low:.3f} to {m.high:.3f} | 200 | 0 |' in card and '## Was it worth it\n\nWorth it: ' in card and 'Nothing was measured' not in card


# what cannot be meant

@pytest.mark.parametrize('field, value', [('batch_rows', 2.5), ('max_steps', 1.5), ('seed', .5), ('patience', True), ('rank', True), ('targets', 3), ('checkpointing', 'yes'), ('max_loss', 'high'), ('learning_rate', '1e-3')])
def test_values_of_the_wrong_kind_are_named(field, value):
    with pytest.raises(LabError, match=f'Tuning {field}: .*is not accepted; give'): Tuning(**{field: value})


def test_what_is_measured_beforehand_wants_rows_for_supervised_tuning(toy, data):
    pairs = tuning_data(things.assign(worse='Fish'), toy, prompt='product', chosen='department', rejected='worse')
    for f, name in ((plan, 'plan'), (find_learning_rate, 'find_learning_rate')):
        with pytest.raises(LabError, match='these rows are preferences'): f(pairs, toy)
        with pytest.raises(LabError, match=f'{name} takes what tuning_data gives'): f(things, toy)
        with pytest.raises(LabError, match='no model "nowhere"'): f(data, 'nowhere')
    for odd in (dict(low=0), dict(low=.1, high=.01), dict(steps=2)):
        with pytest.raises(LabError, match='at least five'): find_learning_rate(data, toy, **odd)


def test_a_damaged_checkpoint_is_named_and_a_new_beginning_helps(toy, data, tmp_path):
    tune = lambda **kw: finetune(data, toy, Tuning(max_steps=2, batch_rows=4), folder=tmp_path / 'run', progress=False, **kw)
    want, last = tune().fingerprint, checkpoints(tmp_path / 'run')[2]
    for file, content in (('job.json', b'{"identity": {'), ('job.json', b'{}'), ('adapter_model.safetensors', None)):
        kept = (last / file).read_bytes()
        (last / file).write_bytes(kept[:-9] if content is None else content)
        with pytest.raises(LabError, match=f'{file} is damaged or missing .*resume=False to begin anew'): tune()
        (last / file).write_bytes(kept)
    (last / 'adapter_model.safetensors').unlink()
    with pytest.raises(LabError, match='damaged or missing'): tune()
    assert tune(resume=False).fingerprint == want
    (tmp_path / 'file').write_text('x')
    with pytest.raises(LabError, match='cannot be written'): finetune(data, toy, Tuning(max_steps=2), folder=tmp_path / 'file', progress=False)


@pytest.mark.parametrize('line', ['eval: 1', 'prompt: 5', 'completion: [department]', 'allow: leak', 'chat: maybe', 'beta: strong', 'data: 5', 'folder: 3'])
def test_recipes_with_values_of_another_kind(line, tmp_path):
    d = dict(data='things.csv', prompt='product', completion='department')
    name, value = line.split(': ')
    (tmp_path / 'x.yaml').write_text(''.join(f'{k}: {v}\n' for k, v in {**d, name: value}.items()))
    with pytest.raises(LabError, match=f'x.yaml: {name} is .*; give '): read_recipe(tmp_path / 'x.yaml')

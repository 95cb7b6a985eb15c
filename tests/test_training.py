"Training: parity with trl, kill -9 and resume, full disks, guards, every method, every bad input."
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from genai_lab.core import LabError
from genai_lab.models import load_model
from genai_lab.prompts import Prompt
from genai_lab.tasks import Task
from genai_lab.training import (Job, Stopped, Steps, Tuning, checkpoints, completion_loss, find_learning_rate, finetune, inner, lay_out, learner,
                                micro_batches, token_logprobs)
from genai_lab.tuning_data import Example, tuning_data

kinds = (('peas', 'Vegetables'), ('ham', 'Deli'), ('soap', 'Care'))
things = pd.DataFrame([dict(product=f'{how} {what}', department=d) for how in ('fresh', 'frozen', 'dried', 'sweet') for what, d in kinds])
ask = Prompt('Which department sells {{ product }}?')


def fails(f, *texts):
    with pytest.raises(LabError) as e: f()
    for t in texts: assert t in str(e.value), str(e.value)
    return e.value


def make_toy(folder, seed=0, **shape):
    "A small Llama with random weights and the embedded model's tokenizer."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    shape = dict(vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256) | shape
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2)).save_pretrained(folder)
    load_model('smollm2-135m').tokenizer.save_pretrained(folder)
    return load_model(folder)


@pytest.fixture(scope='module')
def toy(tmp_path_factory): return make_toy(tmp_path_factory.mktemp('toy'))


@pytest.fixture(scope='module')
def data(toy): return tuning_data(things, toy, prompt=ask, completion='department', eval=0.25)


def trainer_for(toy, data, config, folder):
    from genai_lab.training import _trainer
    c = config.settled(data, toy)
    return _trainer(Job(c, toy, data, Path(folder)), learner(toy, c))


def test_no_trainer_tells_its_makers(toy, data, tmp_path, monkeypatch):
    from trl.trainer import base_trainer
    from genai_lab.preferences import Preferring
    from genai_lab.training import tuning_trainer
    told = []
    monkeypatch.delenv('CI', raising=False)
    monkeypatch.setattr(base_trainer, 'send_telemetry', lambda *a, **k: told.append(a))
    trainer_for(toy, data, Tuning(max_steps=1), tmp_path)
    assert told == [] and tuning_trainer(Preferring, 'DPOTrainer')._send_telemetry(None) is None



def loss_and_gradient(t, rows, packing):
    t.model.zero_grad(); t.model.train()
    learned = sum(e.learned for e in rows)
    loss = t._loss(t.model, lay_out(rows, packing)) / learned
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}


# what is computed

def test_a_tree_gives_the_loss_and_gradient_of_separate_rows(toy, data, tmp_path):
    t = trainer_for(toy, data, Tuning(method='full'), tmp_path)
    assert t.may_share and t.plain
    rows = data.train[:6]
    alone = [loss_and_gradient(t, [e], 'pad') for e in rows]
    learned = [e.learned for e in rows]
    want = sum(l * n for (l, _), n in zip(alone, learned)) / sum(learned)
    for packing in ('share', 'pad'):
        loss, grads = loss_and_gradient(t, rows, packing)
        assert abs(loss - want) < 1e-5
        for n, g in grads.items(): torch.testing.assert_close(g, sum(a[n] * k for (_, a), k in zip(alone, learned)) / sum(learned), rtol=1e-4, atol=1e-6)


def test_strangers_in_one_tree_do_not_see_each_other(toy, data, tmp_path):
    t = trainer_for(toy, data, Tuning(method='full'), tmp_path)
    rows = [Example(tuple(range(100 + 50 * i, 130 + 50 * i)), (0,) * 5 + (1,) * 25, i) for i in range(4)]
    b = lay_out(rows, 'share')
    assert b.slots == b.tokens == 120
    losses = [loss_and_gradient(t, [e], 'pad')[0] for e in rows]
    assert abs(loss_and_gradient(t, rows, 'share')[0] - np.mean(losses)) < 1e-5


@pytest.mark.parametrize('bias', [False, True])
def test_the_chunked_loss_is_cross_entropy(bias, monkeypatch):
    import genai_lab.training as tr
    monkeypatch.setattr(tr, '_chunk', 4 * 50 * 3)   # three rows a piece
    torch.manual_seed(1)
    h, head, y = torch.randn(10, 8, requires_grad=True), torch.nn.Linear(8, 50, bias=bias), torch.randint(0, 50, (10,))
    a, b = completion_loss(h, head, y) / 10, torch.nn.functional.cross_entropy(head(h), y)
    params = [h, *head.parameters()]
    torch.testing.assert_close(a, b)
    for x, z in zip(torch.autograd.grad(a, params), torch.autograd.grad(b, params)): torch.testing.assert_close(x, z)
    lp = token_logprobs(h, head, y)
    want = torch.log_softmax(head(h), -1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(lp, want)
    w = torch.randn(10)
    for x, z in zip(torch.autograd.grad((lp * w).sum(), params), torch.autograd.grad((want * w).sum(), params)): torch.testing.assert_close(x, z)


def trl_step(model, data, rows, config, start, folder):
    "First loss and gradient norm of trl's trainer with its defaults on these rows, from the same adapter."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from genai_lab.training import _adapter_config
    net = model._load_weights().requires_grad_(True)
    peft_config = _adapter_config(config, net, model.name)
    prompts = [data.tokenizer.decode([t for t, l in zip(e.ids, e.loss) if not l]) for e in rows]
    said = [data.tokenizer.decode([t for t, l in zip(e.ids, e.loss) if l]) for e in rows]
    ds = Dataset.from_list([dict(prompt=p, completion=c) for p, c in zip(prompts, said)])
    args = SFTConfig(output_dir=str(folder), max_steps=1, per_device_train_batch_size=len(rows), bf16=False, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy='no', max_length=None)
    t = SFTTrainer(model=net, args=args, train_dataset=ds, processing_class=data.tokenizer, peft_config=peft_config)
    ours = {n: p for n, p in t.model.named_parameters() if p.requires_grad}
    assert set(ours) == set(start)
    with torch.no_grad():
        for n, p in ours.items(): p.copy_(start[n])
    t.train()
    return t.state.log_history[0]


def test_first_loss_and_gradient_are_those_of_trl(model, tmp_path):
    from genai_lab.data import retail_departments
    df = retail_departments(4, per_department=1, seed=3)
    d = tuning_data(df, model, prompt=Prompt('Which department of a supermarket sells {{ product }}?'), completion='label')
    c = Tuning(batch_rows=4, max_steps=1).settled(d, model)
    start = {n: p.detach().clone() for n, p in learner(model, c).named_parameters() if p.requires_grad}
    theirs = trl_step(model, d, d.train, c, start, tmp_path / 'trl')
    ours = finetune(d, model, c, folder=tmp_path / 'ours', progress=False).history.iloc[0]
    assert abs(ours.loss - theirs['loss']) < 1e-5
    assert abs(ours.grad_norm - theirs['grad_norm']) < 1e-5 * max(1, theirs['grad_norm'])


def test_the_steps_of_two_processes_are_those_of_one():
    rows = [Example((i, i), (0, 1), i) for i in range(11)]
    one = Steps(rows, 4, 6, 7)
    two = [Steps(rows, 4, 6, 7, rank, 2) for rank in (0, 1)]
    for i in range(6):
        got = [e.row for s in two for e in s[i]['rows'] if s[i]['weight']]
        assert sorted(got) == sorted(e.row for e in one[i]['rows']) and two[0][i]['learned'] == one[i]['learned']
    assert sorted(e.row for i in range(3) for e in one[i]['rows']) == list(range(11))


def test_micro_batches_keep_every_row_once(data):
    for tokens in (1, 60, 10_000):
        parts = micro_batches(data.train, tokens)
        assert sorted(e.row for p in parts for e in p) == sorted(e.row for e in data.train)
    assert len(micro_batches(data.train, 10_000)) == 1


# killed and resumed

config = Tuning(epochs=6, batch_rows=3, learning_rate=.01, eval_every=3, save_every=1, patience=0, dropout=.1)


def child(folder, toy_folder, strike=None, how=signal.SIGKILL):
    "Tune in this process; where `strike` is (steps, seconds), a signal comes so many seconds after so many steps have begun."
    os.environ['TQDM_DISABLE'] = '1'
    torch.set_num_threads(1)
    toy = load_model(toy_folder)
    d = tuning_data(things, toy, prompt=ask, completion='department', eval=0.25)
    begun, begin = [], Steps.__getitem__
    def counted(self, i): begun.append(i); return begin(self, i)
    def wait():
        while len(begun) < strike[0]: time.sleep(.001)
        time.sleep(strike[1])
        os.kill(os.getpid(), how)
    Steps.__getitem__ = counted
    if strike: threading.Thread(target=wait, daemon=True).start()
    try: finetune(d, toy, config, folder=folder)
    except KeyboardInterrupt as e: (Path(folder) / 'said').write_text(str(e))
    (Path(folder) / 'done').touch()


@pytest.fixture(scope='module')
def spawn():
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['genai_lab.training', 'genai_lab.evaluation', 'trl.trainer.sft_trainer', 'peft', 'datasets'])
    def run(*args):
        p = ctx.Process(target=child, args=args)
        p.start(); p.join(120)
        assert not p.is_alive()
        return p.exitcode
    return run


def weights(folder):
    return {f: (Path(folder) / f).read_bytes() for f in ('tuned/adapter_model.safetensors',)} | {f'{p.name}/{f}': (p / f).read_bytes() for p in [checkpoints(folder)[max(checkpoints(folder))]] for f in ('adapter_model.safetensors', 'optimizer.safetensors')}


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(toy, tmp_path, spawn):
    assert spawn(str(tmp_path / 'whole'), str(toy.folder)) == 0
    want = weights(tmp_path / 'whole')
    history = json.loads((checkpoints(tmp_path / 'whole')[18] / 'job.json').read_text())
    kills, rng, landed = int(os.environ.get('GENAI_LAB_KILLS', 2)), random.Random(5), []
    for k in range(kills):
        folder = tmp_path / f'killed{k}'
        code = spawn(str(folder), str(toy.folder), (rng.randint(1, 16), rng.uniform(0, .1)))
        assert code in (0, -signal.SIGKILL)
        if not (folder / 'done').exists():
            landed.append(max(checkpoints(folder), default=0))
            assert spawn(str(folder), str(toy.folder)) == 0
        assert weights(folder) == want
        seen = json.loads((checkpoints(folder)[18] / 'job.json').read_text())
        assert seen['history'] == history['history'] and seen['best'] == history['best'] and not list(folder.glob('.checkpoint*'))
        shutil.rmtree(folder)
    print(f'{len(landed)} of {kills} kills came before the run had ended, when the last checkpoint was of step', *sorted(landed))
    assert len(landed) > kills / 2


def test_ctrl_c_saves_and_stops(toy, tmp_path, spawn):
    folder = tmp_path / 'run'
    assert spawn(str(folder), str(toy.folder), (2, .02), signal.SIGINT) == 0
    said, there = (folder / 'said').read_text(), checkpoints(folder)
    assert 'saved at step' in said and max(there) < 18 and str(max(there)) in said


def test_a_full_disk_keeps_the_last_good_checkpoint(toy, data, tmp_path):
    small = tmp_path / 'small'
    small.mkdir()
    mounted = not subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'none', str(small)], capture_output=True).returncode
    if not mounted: pytest.skip('a small disk takes the right to mount one')
    try:
        c = replace(config, max_steps=4, rank=4)
        finetune(data, toy, replace(c, max_steps=2), folder=small / 'a')
        before = {p.name: p.read_bytes() for p in (small / 'a' / 'checkpoint-2').iterdir()}
        free = shutil.disk_usage(small).free
        (small / 'ballast').write_bytes(b'x' * max(0, free - 60_000))
        shutil.rmtree(small / 'a' / 'tuned')
        fails(lambda: finetune(data, toy, c, folder=small / 'b'), 'cannot be written', 'No space')
        assert not list((small / 'b').glob('.checkpoint*')) and {p.name: p.read_bytes() for p in (small / 'a' / 'checkpoint-2').iterdir()} == before
        (small / 'ballast').unlink()
        assert finetune(data, toy, c, folder=small / 'b').steps == 4
    finally: subprocess.run(['umount', '-l', str(small)])


def test_old_checkpoints_are_pruned_best_and_last_kept(toy, data, tmp_path):
    scores = iter([.1, .9, .3, .2, .5, .4])
    t = finetune(data, toy, replace(config, max_steps=6, eval_every=1), metric=lambda m: next(scores), folder=tmp_path)
    assert sorted(checkpoints(tmp_path)) == [2, 6] and t.best == dict(step=2, metric='lambda', value=.9)
    assert (t.folder / 'adapter_model.safetensors').read_bytes() == (tmp_path / 'checkpoint-2' / 'adapter_model.safetensors').read_bytes()


def test_a_checkpoint_of_another_model_rows_or_configuration_is_refused(toy, data, tmp_path):
    finetune(data, toy, replace(config, max_steps=2), folder=tmp_path / 'run')
    fails(lambda: finetune(data, toy, replace(config, max_steps=2, rank=8), folder=tmp_path / 'run'), 'another run', 'rank was 16, now 8', 'resume=False')
    other = tuning_data(things[:6], toy, prompt=ask, completion='department', eval=0.3)
    fails(lambda: finetune(other, toy, replace(config, max_steps=2), folder=tmp_path / 'run'), 'rows was')
    stranger = make_toy(tmp_path / 'stranger', seed=1)
    fails(lambda: finetune(tuning_data(things, stranger, prompt=ask, completion='department', eval=0.25), stranger, replace(config, max_steps=2), folder=tmp_path / 'run'), 'model was')
    t = finetune(data, toy, replace(config, max_steps=2, rank=8), folder=tmp_path / 'run', resume=False)
    assert t.config.rank == 8
    fails(lambda: finetune(data, toy, config, folder=tmp_path / 'none', resume=True), 'no checkpoint')
    # the adapter belongs to its base
    fails(lambda: load_model(stranger.folder, adapter=str(t.folder)), 'was trained on')


# stopped with a reason

def test_a_rate_that_diverges_is_stopped_and_the_last_good_checkpoint_kept(toy, data, tmp_path):
    c = Tuning(method='full', max_steps=40, batch_rows=3, learning_rate=100., warmup=.9, schedule='constant', eval_every=50, save_every=1, clip=0.)
    e = fails(lambda: finetune(data, toy, c, folder=tmp_path), 'stopped at step', 'learning rate', 'The last good checkpoint is')
    assert isinstance(e, Stopped) and e.kept.is_dir() and set(e.rows.columns) >= {'row', 'product', 'department', 'shown'}
    from safetensors.torch import load_file
    assert all(v.isfinite().all() for v in load_file(e.kept / 'model.safetensors').values())


def test_a_loss_that_is_no_number_names_the_batch(toy, data, tmp_path):
    t = trainer_for(toy, data, replace(config, max_steps=3), tmp_path)
    from genai_lab.training import run_trainer
    with torch.no_grad(): inner(t.model).model.layers[0].input_layernorm.weight.fill_(float('nan'))
    e = fails(lambda: run_trainer(t), 'the loss is nan', 'The batch: rows', 'No checkpoint')
    assert len(e.rows) == 3 and e.step == 1


def test_early_stopping_and_the_metric_that_counts(toy, data, tmp_path):
    scores = iter([.5, .4, .3, .9])
    t = finetune(data, toy, replace(config, max_steps=10, eval_every=1, patience=2), metric=lambda m: dict(score=next(scores)), folder=tmp_path)
    assert t.steps == 3 and 'no improvement of score' in t.stopped and t.best['step'] == 1
    assert finetune(data, toy, replace(config, max_steps=10, eval_every=1, patience=2), metric=lambda m: 1 / 0, folder=tmp_path).steps == 3   # done is done


def test_a_task_as_metric_leaves_the_training_as_it_is(toy, data, tmp_path):
    task = Task('departments', data.eval_frame, ask, 'department', choices=('Vegetables', 'Deli', 'Care'))
    runs = [finetune(data, toy, replace(config, max_steps=6), metric=m, folder=tmp_path / n) for n, m in (('plain', None), ('judged', task))]
    assert runs[0].history.loss.tolist() == runs[1].history.loss.tolist()
    assert runs[1].best['metric'] == 'accuracy' and 'eval_accuracy' in runs[1].history and len(runs[1].history.eval_accuracy.dropna()) == 2


# methods

@pytest.mark.parametrize('how', [dict(method='dora'), dict(method='full'), dict(precision='bfloat16'), dict(checkpointing=True), dict(targets='q_proj', rank=2, weight_decay=.1, schedule='linear')])
def test_methods(toy, data, tmp_path, how):
    t = finetune(data, toy, Tuning(**{**dict(epochs=10, batch_rows=4, learning_rate=.02, eval_every=15), **how}), folder=tmp_path)
    assert t.history.loss.dropna().iloc[-1] < t.history.loss.iloc[0]
    m = t.model()
    assert m.fingerprint != toy.fingerprint and m.loglikelihood([('peas', ' Deli')])[0].logprob != toy.loglikelihood([('peas', ' Deli')])[0].logprob


def test_checkpointing_activations_changes_nothing(toy, data, tmp_path):
    a, b = (finetune(data, toy, Tuning(max_steps=3, batch_rows=4, checkpointing=c), folder=tmp_path / str(c)).history.loss for c in (True, False))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_running_text(toy, tmp_path):
    texts = pd.DataFrame(dict(text=['Ice cream is kept at minus eighteen degrees. ' * 12, 'Peas are green.', 'Ham is sliced thinly.']))
    d = tuning_data(texts, toy, text='text', max_length=40, too_long='split')
    t = finetune(d, toy, Tuning(method='full', epochs=3, learning_rate=.005, batch_rows=2), folder=tmp_path)
    assert t.history.loss.iloc[-1] < t.history.loss.iloc[0] and len(d.train) > 3


def test_a_tuned_model_is_tuned_further(toy, data, tmp_path):
    first = finetune(data, toy, Tuning(max_steps=2, batch_rows=4, rank=4), folder=tmp_path / 'a')
    m = first.model()
    again = finetune(tuning_data(things, m, prompt=ask, completion='department', eval=0.25), m, Tuning(max_steps=2, batch_rows=4), folder=tmp_path / 'b')
    assert json.loads((again.folder / 'adapter_config.json').read_text())['r'] == 4
    assert again.history.loss.iloc[0] < first.history.loss.iloc[0] + .05 and again.model().fingerprint != m.fingerprint


def test_every_field_is_logged(toy, data, tmp_path, mlflow_home):
    from genai_lab.tracking import connect, start_run
    run = start_run('tuning')
    t = finetune(data, toy, Tuning(max_steps=2, batch_rows=4), folder=tmp_path / 'run', run=run)
    run.finish()
    client = connect()
    found, = client.search_runs([e.experiment_id for e in client.search_experiments() if e.name == 'tuning'])
    assert {f'tuning.{f}' for f in Tuning.__dataclass_fields__} <= set(found.data.params)
    assert found.data.params['tuning.learning_rate'] == '0.001' and abs(found.data.metrics['train/loss'] - t.last['loss']) < 1e-9
    assert [x.step for x in client.get_metric_history(found.info.run_id, 'train/loss')] == [1, 2]


# bad input

def test_bad_configurations():
    fails(lambda: Tuning(method='qlorra'), 'qlora')
    fails(lambda: Tuning(rank=0), 'rank')
    fails(lambda: Tuning(learning_rate=-1), 'learning_rate')
    fails(lambda: Tuning(dropout=1), 'below 1')
    fails(lambda: Tuning(epochs=0), 'epochs or max_steps')
    fails(lambda: Tuning(packing='none'), 'share')


def test_unknown_targets_list_those_there_are(toy, data, tmp_path):
    e = fails(lambda: finetune(data, toy, Tuning(targets=('qproj',)), folder=tmp_path), 'no module "qproj"', 'Did you mean "q_proj"?')
    assert all(n in str(e) for n in ('down_proj', 'gate_proj', 'k_proj', 'o_proj', 'up_proj', 'v_proj')) and 'lm_head' not in str(e)


def test_qlora_needs_a_gpu(toy, data, tmp_path):
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    fails(lambda: finetune(data, toy, Tuning(method='qlora'), folder=tmp_path), 'CUDA', 'method="lora"')


def test_what_does_not_go_together(toy, data, tmp_path):
    fails(lambda: finetune(things, toy, folder=tmp_path), 'tuning_data')
    fails(lambda: finetune(data, toy, metric=3, folder=tmp_path), 'metric')
    pairs = tuning_data(things.assign(worse='Fish'), toy, prompt='product', chosen='department', rejected='worse')
    fails(lambda: finetune(pairs, toy, folder=tmp_path), 'preferences')


def test_the_rate_search_leaves_nothing_behind(toy, data):
    before = torch.random.get_rng_state()
    r = find_learning_rate(data, toy, Tuning(method='full', batch_rows=4), steps=12)
    assert torch.equal(before, torch.random.get_rng_state())
    assert 1e-5 < r.suggestion <= r.limit <= 1 and len(r.frame) >= 5

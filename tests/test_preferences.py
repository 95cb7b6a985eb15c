"Preferences and distillation on a small real model: the loss, resume, and what is refused."
import json
import math
import shutil

import pandas as pd
import pytest
import torch
from tiny_model import write_tiny

from genai_lab.core import LabError
from genai_lab.distillation import distill, distribution_loss, teach
from genai_lab.models import load_model
from genai_lab.preferences import prefer
from genai_lab.prompts import Prompt
from genai_lab.tasks import Task
from genai_lab.training import Tuning, finetune
from genai_lab.tuning_data import tuning_data

pairs = pd.DataFrame(dict(q=[f'Where is product {i}?' for i in range(12)], good=[f'Aisle {i % 5}.' for i in range(12)], bad=[f'I believe that you might find it in aisle {i % 5}, dear guest.' for i in range(12)]))


@pytest.fixture(scope='module')
def tiny(tmp_path_factory, model): return load_model(write_tiny(tmp_path_factory.mktemp('tiny') / 'a', model))


@pytest.fixture(scope='module')
def data(tiny): return tuning_data(pairs.head(9), tiny, prompt='q', chosen='good', rejected='bad', eval=pairs.tail(3), chat=False, leaks='drop', near=1.)


fast = Tuning(rank=4, max_steps=6, batch_rows=4, learning_rate=1e-2, save_every=2, eval_every=3)


def test_preferences_are_learned(tiny, data, tmp_path):
    t = prefer(data, config=fast, folder=tmp_path / 'a', progress=False)
    h = t.to_frame().dropna(subset='loss')
    assert abs(h.loss.iloc[0] - math.log(2)) < 1e-4 and h.margin.iloc[-1] > h.margin.iloc[0] + .1 and h.loss.iloc[-1] < .68
    assert t.best['metric'] == 'loss' and {'eval_loss', 'eval_preferred'} <= set(t.to_frame().columns)
    score = lambda m: sum(s.logprob * sign for s, sign in zip(m.loglikelihood([(q, ' ' + a) for q, *two in pairs.itertuples(index=False) for a in two]), [1, -1] * 12))
    assert score(t.model()) > score(tiny)


def test_the_first_step_is_that_of_trl(tiny, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from genai_lab.preferences import _pair_of
    from genai_lab.training import learner
    four = tuning_data(pairs.head(4), tiny, prompt='q', chosen='good', rejected='bad', chat=False)
    config = Tuning(method='full', max_steps=1, batch_rows=4, learning_rate=1e-5, clip=0.)
    ours = prefer(four, config=config, folder=tmp_path / 'ours', progress=False).to_frame().iloc[0]
    rows = Dataset.from_list([dict(_pair_of(c, r), prompt='', chosen='', rejected='') for c, r in zip(four.train, four.rejected)])
    args = DPOConfig(output_dir=str(tmp_path / 'trl'), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-5, beta=.1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True, save_strategy='no', logging_steps=1, max_grad_norm=1e9)
    plain = type('Plain', (DPOTrainer,), dict(_prepare_dataset=lambda self, dataset, *a, **k: dataset))(model=learner(tiny, config.settled(four, tiny)), args=args, train_dataset=rows, processing_class=tiny.tokenizer)
    plain.train()
    theirs = next(l for l in plain.state.log_history if 'loss' in l)
    assert abs(ours.loss - theirs['loss']) < 1e-4 and abs(ours.grad_norm - theirs['grad_norm']) < 1e-3 * theirs['grad_norm']


def test_a_resumed_run_ends_with_the_same_bits(tiny, data, tmp_path):
    whole = prefer(data, config=fast, folder=tmp_path / 'whole', progress=False)
    half = tmp_path / 'half'
    half.mkdir()
    metric = lambda m: 1 / 0
    with pytest.raises(ZeroDivisionError): prefer(data, config=fast, metric=metric, folder=half, progress=False)   # dies in the evaluation of step 3
    assert [p.name for p in half.glob('checkpoint-*')] == ['checkpoint-2']
    again = prefer(data, config=fast, folder=half, progress=False)
    a, b = ((t.folder / 'adapter_model.safetensors').read_bytes() for t in (whole, again))
    assert a == b and whole.to_frame().equals(again.to_frame())


def test_pairs_that_cannot_be_used(tiny, data, tmp_path):
    with pytest.raises(LabError, match='equal sides: rows 1, 3'): tuning_data(pairs.assign(bad=pairs.bad.where(~pairs.index.isin([1, 3]), pairs.good)), tiny, prompt='q', chosen='good', rejected='bad', chat=False)
    with pytest.raises(LabError, match='have no worse answer'): prefer(tuning_data(pairs, tiny, prompt='q', completion='good', chat=False), folder=tmp_path / 'x')
    with pytest.raises(LabError, match='beta 0'): prefer(data, beta=0, folder=tmp_path / 'x')
    with pytest.raises(LabError, match='takes what tuning_data gives'): prefer(pairs, folder=tmp_path / 'x')
    with pytest.raises(LabError, match='no local model'): prefer(data, model=object(), folder=tmp_path / 'x')
    with pytest.raises(LabError, match='a metric is a Task'): prefer(data, metric=3, folder=tmp_path / 'x')
    with pytest.raises(LabError, match='`preferences.prefer`'): finetune(data, folder=tmp_path / 'x')
    prefer(data, config=Tuning(rank=4, max_steps=1), folder=tmp_path / 'y', progress=False)
    with pytest.raises(LabError, match='another run: kind was'): prefer(data, beta=.5, config=Tuning(rank=4, max_steps=1), folder=tmp_path / 'y', progress=False)


@pytest.fixture(scope='module')
def labels(tiny): return tuning_data(pairs.assign(good=['Deli', 'Dairy', 'Frozen'] * 4), tiny, prompt='q', completion='good', chat=False)


def test_a_student_comes_closer_to_its_teacher(tiny, labels, tmp_path):
    teacher = finetune(labels, config=Tuning(method='full', max_steps=5, batch_rows=6, learning_rate=3e-3), folder=tmp_path / 't', progress=False).model()
    student = distill(labels, teacher, config=Tuning(method='full', max_steps=12, batch_rows=12, learning_rate=3e-3), temperature=2., folder=tmp_path / 's', progress=False)
    h = student.to_frame().dropna(subset='loss').loss
    assert h.iloc[-1] < h.iloc[0] / 3
    same = distill(labels, teacher, model=teacher, config=Tuning(method='full', max_steps=1), folder=tmp_path / 'same', progress=False)
    assert same.to_frame().loss.iloc[0] < 1e-5


def test_the_distribution_loss_is_that_of_all_logits():
    torch.manual_seed(0)
    h, t, y = torch.randn(9, 8, requires_grad=True), torch.randn(9, 8), torch.arange(9)
    a, b = torch.nn.Linear(8, 40, bias=False), torch.nn.Linear(8, 40, bias=False)
    kl = torch.nn.functional.kl_div((a(h) / 2).log_softmax(-1), (b(t) / 2).softmax(-1), reduction='sum') * 4
    want = .7 * kl + .3 * torch.nn.functional.cross_entropy(a(h), y, reduction='sum')
    got = distribution_loss(h, a, t, b, y, 2., .3)
    assert torch.allclose(got, want, rtol=1e-5)
    ours, theirs = torch.autograd.grad(got, h)[0], torch.autograd.grad(want, h)[0]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_teachers_that_cannot_teach(tiny, labels, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(tiny.folder, other)
    d = json.loads((other / 'tokenizer.json').read_text())
    vocab = d['model']['vocab']
    a, b = list(vocab)[1000:1002]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / 'tokenizer.json').write_text(json.dumps(d))
    with pytest.raises(LabError, match='different vocabularies: 2 tokens differ'): distill(labels, load_model(other), folder=tmp_path / 'x')

    class Endpoint: name = 'big-70b'
    with pytest.raises(LabError, match='shows nobody its distribution'): distill(labels, Endpoint(), folder=tmp_path / 'x')
    with pytest.raises(LabError, match='temperature 0'): distill(labels, tiny, temperature=0, folder=tmp_path / 'x')
    task = Task('t', pairs.assign(label='Deli'), Prompt('{{ q }}', name='plain'), target='label', choices=['Deli', 'Dairy'])
    with pytest.raises(LabError, match='none was sure enough'): teach(task, tiny, keep=1.1, chat=False, progress=False)
    written = Task('t', pairs.assign(label='Deli'), Prompt('{{ q }}', name='plain'), target='label', output='generate', max_tokens=3)
    with pytest.raises(LabError, match='needs a confidence'): teach(written, tiny, keep=.5, chat=False, progress=False)


def test_what_a_teacher_could_not_answer_is_counted(tiny):
    rows = pairs.assign(label='Deli')
    rows.loc[4, 'q'] = None
    lesson = teach(Task('t', rows, Prompt('{{ q }}', name='plain'), target='label', choices=['Deli', 'Dairy']), tiny, chat=False, progress=False)
    assert (len(lesson), lesson.asked, lesson.failed) == (11, 12, 1) and '1 failed' in repr(lesson) and 4 not in lesson.frame.index[lesson.frame.q.isna()]

"The plan of a tuning run: what it counts, what it proposes, what it refuses."
import numpy as np
import pytest

from genai_lab.core import LabError
from genai_lab.planning import _passes, _seconds, Measured, peak_memory, plan
from genai_lab.training import Tuning, finetune, micro_batches, lay_out
from genai_lab.tuning_data import tuning_data
from test_training import ask, make_toy, things, trainer_for


@pytest.fixture(scope='module')
def toy(tmp_path_factory): return make_toy(tmp_path_factory.mktemp('toy'))


@pytest.fixture(scope='module')
def data(toy): return tuning_data(things, toy, prompt=ask, completion='department', eval=0.25)


def test_peak_memory_sees_what_is_gone_again():
    with peak_memory() as p: x = np.ones(2**24); del x
    with peak_memory() as q: pass
    assert 110e6 < p.grown < 200e6 and q.grown < 50e6


def test_the_passes_of_the_plan_are_those_of_the_run(toy, data, tmp_path):
    c = Tuning(epochs=4, batch_rows=4, batch_tokens=60)
    t = trainer_for(toy, data, c, tmp_path)
    sizes, n = _passes(t)
    assert n == len(sizes) == 12
    assert [sum(s) for s in sizes] == [sum(lay_out(p).slots for p in micro_batches(t.steps[i]['rows'], 60)) for i in range(12)]
    few, n = _passes(t, most=5)
    assert len(few) == 5 and n == 12


def test_seconds_add_up(data):
    c = Tuning(epochs=4, batch_rows=4, eval_every=3, save_every=6).settled(data, data.model)
    m = Measured([(100, 1.), (200, 3.)], 0., .5, 10**9, 7., 2., metric=4.)
    parts = _seconds(m, [[100, 150], [400]], 12, c, data)
    assert parts['training'] == pytest.approx(6 * (1 + 2 + 6) + 12 * .5) and parts['setup'] == 7 and parts['checkpoints'] == 4 and parts['evaluation'] == 16


def test_a_plan_proposes_what_fits(toy, data):
    p = plan(data, toy, Tuning(epochs=2, batch_rows=4), price_per_hour=3600., repeat=1)
    assert p.fits and p.steps == 6 and p.cost == pytest.approx(p.seconds) and p.memory > 0 and len(p.table) >= 3
    assert p.tokens == 2 * 8 * data.tokens // 9 or p.tokens > data.tokens
    assert p.table.seconds.iloc[0] == p.table[p.table.fits].seconds.min() or p.table.precision.iloc[0] == 'float32'
    small = plan(data, toy, Tuning(epochs=2, batch_rows=4), memory_mb=1, others=False, repeat=1)
    assert not small.fits and 'does NOT fit' in repr(small) and 'GB' in small._repr_html_()


def test_a_plan_leaves_nothing_behind(toy, data, tmp_path):
    a = finetune(data, toy, Tuning(max_steps=2, batch_rows=4), folder=tmp_path / 'a').history.loss
    plan(data, toy, Tuning(max_steps=2, batch_rows=4), others=False, repeat=1)
    b = finetune(data, toy, Tuning(max_steps=2, batch_rows=4), folder=tmp_path / 'b').history.loss
    assert a.tolist() == b.tolist()


def test_a_plan_takes_tuning_data(toy):
    with pytest.raises(LabError, match='tuning_data'): plan(things, toy)

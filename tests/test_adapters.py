"Tuned models in a real MLflow registry: what comes back, what is refused, and the gate in front of an alias."
import json
import shutil

import pandas as pd
import pytest
import torch
from tiny_model import write_adapter, write_settings, write_tiny

from genai_lab.adapters import MANIFEST, find_version, list_versions, load_card, model_card, pack_model, register_adapter, set_model_alias
from genai_lab.core import LabError, forget_inputs, inputs
from genai_lab.models import load_model, noted_model
from genai_lab.promotion import attempts, promote, rollback, untouched
from genai_lab.prompts import Prompt
from genai_lab.registry import AliasMoved, register
from genai_lab.tasks import Task
from genai_lab.tracking import connect, local_path

asked = [('Bread is found in the', ' bakery'), ('Milk, butter,', ' eggs')]


@pytest.fixture(scope='module')
def places(tmp_path_factory, model):
    "Folders of two small models and two adapters for the first."
    home = tmp_path_factory.mktemp('tiny')
    a, b = write_tiny(home / 'a', model), write_tiny(home / 'b', model, seed=1)
    base = load_model(a)
    return dict(home=home, a=a, b=b, one=write_adapter(home / 'one', base), two=write_adapter(home / 'two', base, seed=1))


@pytest.fixture
def house(places, tmp_path, monkeypatch, mlflow_home):
    "A lab whose catalogue has the small model as `base`."
    monkeypatch.setenv('GENAI_LAB_SETTINGS', str(write_settings(tmp_path, base=places['a'])))
    return places


def said(m): return [s.logprob for s in m.loglikelihood(asked)]


def test_what_is_registered_comes_back(house, tmp_path):
    v = register_adapter(house['one'], 'shelves', 'first', intended='For a test.', limits='Not for guests.', seen=pd.DataFrame(dict(product=['ICE'])))
    assert v.ref == 'models:/shelves/1' and v.about['kind'] == 'adapter' and v.message == 'first'
    set_model_alias(v.ref, 'champion', expect=None)
    forget_inputs()
    m = load_model('models:/shelves@champion')
    assert said(m) == said(load_model('base', adapter=house['one'])) and said(m) != said(load_model('base'))
    [i] = [i for i in inputs() if i['name'].startswith('models:/')]
    assert i['name'] == 'models:/shelves/1' and noted_model(i).fingerprint == m.fingerprint
    card = load_card('models:/shelves')
    assert 'For a test.' in card and 'Not for guests.' in card and 'Nothing was measured' in card
    files = local_path(v.source)
    assert not [f for f in files.rglob('*') if f.suffix in ('.bin', '.pkl', '.pt', '.pth')]
    text = (files / 'MLmodel').read_text()
    assert 'prompt' in text and 'genai_lab.adapters' in text and json.loads((files / 'input_example.json').read_text())['columns'] == ['prompt']
    assert str(house['home']) not in (files / 'adapter' / 'adapter_config.json').read_text()
    assert register_adapter(house['one'], 'shelves').version == 1 and list_versions('shelves').version.tolist() == [1]


def test_plain_transformers_and_peft_give_the_same_answers(house, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    pack_model(house['one'], tmp_path / 'packed')
    ours = load_model('base', adapter=house['one'])
    ids = ours.tokenizer('Bread is found in the', return_tensors='pt')['input_ids']
    with torch.no_grad():
        want = ours.model(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / 'packed' / 'merged').eval()(ids).logits
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(house['a']), tmp_path / 'packed' / 'adapter').eval()(ids).logits
    assert torch.equal(want, merged) and (want - adapted).abs().max() < 1e-4


def test_a_whole_model_is_registered_and_comes_back(house):
    register_adapter(house['b'], 'whole')
    assert said(load_model('models:/whole')) == said(load_model(house['b']))


def test_mlflow_serves_it(house, mlflow_home, mlflow_forgets):
    import os

    import mlflow
    register_adapter(house['one'], 'served')
    mlflow.set_tracking_uri(os.environ['GENAI_LAB_TRACKING_URI'])
    got = mlflow.pyfunc.load_model('models:/served/1').predict(pd.DataFrame(dict(prompt=['Milk, butter,'])), params=dict(max_tokens=3))
    assert got == [load_model('models:/served').generate(['Milk, butter,'], max_tokens=3)[0].text]


def test_changed_files_are_refused_and_a_broken_cache_is_mended(house, tmp_path):
    v = register_adapter(house['one'], 'shelves', merged=False)
    want = said(load_model(v.ref))
    cached = next((tmp_path / 'cache' / 'registered').rglob('adapter_model.safetensors'))
    whole = cached.read_bytes()
    cached.write_bytes(whole[:-4] + b'oops')
    assert said(load_model(v.ref)) == want
    (local_path(v.source) / 'adapter' / 'adapter_model.safetensors').write_bytes(whole[:-4] + b'oops')
    assert said(load_model(v.ref)) == want        # the copy in the cache is right
    shutil.rmtree(tmp_path / 'cache')
    with pytest.raises(LabError, match='is not what was registered'): load_model(v.ref)
    (local_path(v.source) / MANIFEST).write_text('{}')
    with pytest.raises(LabError, match='is not what was registered'): load_model(v.ref)


def test_an_adapter_whose_base_does_not_match_is_refused(house, tmp_path, monkeypatch):
    pack_model(house['one'], tmp_path / 'packed', merged=False)
    with pytest.raises(LabError, match="base does not match"): load_model(house['b'], adapter=tmp_path / 'packed' / 'adapter')
    v, w = register_adapter(house['one'], 'alone', merged=False), register_adapter(house['one'], 'both')
    want = said(load_model(w.ref))
    (tmp_path / 'other').mkdir()
    monkeypatch.setenv('GENAI_LAB_SETTINGS', str(write_settings(tmp_path / 'other', base=house['b'])))
    with pytest.raises(LabError, match="adapter's base does not match"): load_model(v.ref)
    assert said(load_model(w.ref)) == want        # the merged model needs no base
    monkeypatch.setenv('GENAI_LAB_SETTINGS', str(write_settings(tmp_path / 'other', another=house['b'])))
    with pytest.raises(LabError, match='no model "base"; add it to settings.ini'): load_model(v.ref)


def test_names_and_references_that_lead_nowhere(house):
    with pytest.raises(LabError, match='None is registered yet'): load_model('models:/shelves')
    register_adapter(house['one'], 'shelves', merged=False)
    for ref, words in {'models:/shelve': 'Did you mean "shelves"', 'models:/shelves/7': 'the latest is 1', 'models:/shelves@champion': 'It has none yet', 'models:/what is this': 'names no model'}.items():
        with pytest.raises(LabError, match=words): load_model(ref)
    register(Prompt('{{ text }}', name='tone'))
    with pytest.raises(LabError, match='name of a registered prompt'): register_adapter(house['one'], 'tone')
    with pytest.raises(LabError, match='is a prompt in the registry'): find_version('models:/tone')
    with pytest.raises(LabError, match='cannot be the name'): register_adapter(house['one'], 'My model!')
    with pytest.raises(LabError, match='does not exist'): register_adapter(house['home'] / 'nowhere', 'x')


def test_pickled_and_half_written_weights_are_refused(house, tmp_path):
    (tmp_path / 'p').mkdir()
    (tmp_path / 'p' / 'adapter_config.json').write_text('{}')
    (tmp_path / 'p' / 'adapter_model.bin').write_bytes(b'x')
    with pytest.raises(LabError, match='pickled adapter_model.bin is refused'): register_adapter(tmp_path / 'p', 'x')
    shutil.copytree(house['one'], tmp_path / 'half')
    f = tmp_path / 'half' / 'adapter_model.safetensors'
    f.write_bytes(f.read_bytes()[:-10])
    with pytest.raises(LabError, match='damaged'): register_adapter(tmp_path / 'half', 'x')
    assert not list_versions().name.tolist()


def test_models_go_through_the_gate(mlflow_home, model, tmp_path):
    "The champion has random numbers in it, the candidate hardly any: a task that the base does without thinking tells them apart."
    bad, good = write_adapter(tmp_path / 'bad', model, size=3.), write_adapter(tmp_path / 'good', model, size=1e-4)
    words = 'apple bread cheese dates eggs flour grapes honey ice juice kale lemon milk nuts olives pears quinoa rice salt tea water yeast wine beer corn beans'.split()
    rows = pd.DataFrame([dict(word=w, choices=(w, words[i - k])) for i, w in enumerate(words) for k in (1, 5)])
    task = Task('echo', rows, Prompt('{{ word }} {{ word }} {{ word }}', name='thrice'), target='word', choices='choices', metrics='accuracy')
    v1 = register_adapter(bad, 'echo', merged=False, seen=rows.head(2)[['word']])
    with pytest.raises(LabError, match='and no model: the candidate is one'): promote(v1.ref, task=task, model=model, first=True, minimum=.1)
    with pytest.raises(LabError, match='were seen when models:/echo/1'): promote(v1.ref, task=task, first=True, minimum=.1)
    fresh = untouched(task, v1.ref)
    assert len(fresh.data) == len(rows) - 2
    d = promote(v1.ref, task=fresh, first=True, champion=model, discordance=.6, progress=False)
    assert not d and 'base smollm2-135m' in d.sentence()
    assert promote(v1.ref, task=fresh, first=True, minimum=.05, discordance=.6, progress=False) and find_version('models:/echo@champion').version == 1
    v2 = register_adapter(good, 'echo', merged=False)
    d = promote(v2.ref, task=fresh, discordance=.6, progress=False)
    assert d and d.ground == 'better' and d.attempt == 3 and d.champion == 'models:/echo/1' and find_version('models:/echo@champion').version == 2
    assert find_version('models:/echo/2').tags['promotion.champion.decision'] == 'promoted'
    run = connect().get_run(d.run_id)
    assert run.data.tags['promotion.state'] == 'decided' and 'candidate/accuracy' in run.data.metrics and len(attempts('echo')) == 3
    with pytest.raises(LabError, match='is champion already'): promote(v2.ref, task=fresh)
    with pytest.raises(AliasMoved): set_model_alias(v1.ref, 'champion', expect=1)
    assert rollback('models:/echo', 'a test').version == 1
    with pytest.raises(LabError, match='nothing to go back to'): rollback('models:/echo')


def test_a_card_says_what_is_known_and_what_is_not():
    about = dict(kind='adapter', base=dict(name='b', source='hub/b', content='abc'), method=dict(rank=2), checks=['warning: 3 training rows repeat one another'])
    card = model_card('x', about)
    for words in ('Nobody has stated', 'Nothing was measured', 'Not recorded', '3 training rows repeat', 'works on b with content abc'): assert words in card

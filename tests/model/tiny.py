"""A tiny model at random, its weights far from uniform, and rows of random documents."""

import numpy as np

from dasd_lite.config.train import Lora
from dasd_lite.model.row import Row

VOCAB = 97
LORA = Lora(kind="lora", rank=4, alpha=8)
QLORA = Lora(kind="qlora", rank=4, alpha=8)


def random_model(folder, *, dtype="float32", **options):
    import torch
    import transformers

    config = transformers.Qwen3Config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,  # so that a leak would show
            **options,
        }
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.normal_(0, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def random_row(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    num = sum(lengths)
    uids = tuple(f"r{i}" for i in range(len(lengths)))
    return Row(rng.integers(0, VOCAB, num), rng.random(num) < 0.6, np.array(lengths), uids)


def documents(row):
    ends = np.cumsum(row.doc_lengths)
    return [slice(a, b) for a, b in zip(ends - row.doc_lengths, ends, strict=True)]


def full_logprobs(plain, row):
    """Each document alone, full logits, log_softmax."""
    import torch

    values = np.full(len(row.ids), np.nan, dtype=np.float32)
    for span in documents(row):
        ids = torch.from_numpy(row.ids[span])
        with torch.no_grad():
            logprobs = plain(input_ids=ids[None]).logits[0].log_softmax(-1)
        values[span][1:] = logprobs[:-1].gather(1, ids[1:, None])[:, 0].numpy()
    return values

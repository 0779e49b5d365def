"""Rows to train on, a model that learns them in no time, and its loss on a row."""

import numpy as np
import pyarrow as pa

from dasd_lite.data.manifest import identify
from dasd_lite.data.records import KEPT, ROW
from dasd_lite.data.writer import ShardWriter

VOCAB = 61
QUICK = {"epochs": 2, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "micro_batch_size": 2, "grad_accum_steps": 2}
"""Options of train with which 16 rows take 8 steps."""
ADAPTER = {"kind": "lora", "rank": 4, "alpha": 8.0}
BLANK = {
    "prompt_uid": "q",
    "messages": [],
    "domain": "all",
    "answer": None,
    "index": 0,
    "completion": "x",
    "finish_reason": "stop",
    "prefix_bytes": 0,
    "score": None,
    "weight": None,
    "num_sentences": 0,
    "class_counts": None,
}


def document(rng, length, uid):
    """Counting by a step: something a tiny model learns."""
    start, step = rng.integers(0, VOCAB), rng.integers(1, 4)
    ids = [int((start + i * step) % VOCAB) for i in range(length)]
    return {"ids": ids, "loss_mask": [i >= 3 for i in range(length)], "doc_lengths": [length], "uids": [uid]}


def make_rows(num_rows, docs=4, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for r in range(num_rows):
        parts = [document(rng, int(rng.integers(6, 30)), f"r{r}d{d}") for d in range(docs)]
        rows.append({name: [x for part in parts for x in part[name]] for name in parts[0]})
    return rows


def write_rows(folder, rows, extra=(), **inputs):
    """A finished pack folder; `extra` are its columns beyond ROW."""
    identity, schema = identify("pack", 1, {}, {"n": str(len(rows)), **inputs}), pa.schema([*ROW, *extra])
    with ShardWriter(folder, identity, {"rows": schema}, shard_rows=7) as writer:
        for i in range(0, len(rows), 5):
            writer.write("rows", pa.Table.from_pylist(rows[i : i + 5], schema=schema))
        writer.publish({})
    return folder


def write_kept(folder, rollouts, schema=KEPT):
    """A finished select folder of rollouts with at least uid, ids and num_context_tokens."""
    rows = [BLANK | rollout for rollout in rollouts]
    with ShardWriter(folder, identify("select", 1, {"rows": str(rows)}, {}), {"kept": schema}, shard_rows=3) as writer:
        for i in range(0, len(rows), 2):
            writer.write("kept", pa.RecordBatch.from_pylist(rows[i : i + 2], schema=schema))
        writer.publish({})
    return folder


def open_rows(folder, mapped, *, vocab_size=VOCAB, max_positions=None, needs=(), groups=False):
    """The rows of a pack folder as training reads them, by way of the file `mapped`, which is gone afterwards."""
    from dasd_lite.training.rows import MappedRows, copy_rows

    try:
        options = {"vocab_size": vocab_size, "max_positions": max_positions, "needs": needs, "groups": groups}
        return MappedRows(mapped, copy_rows(folder, mapped, **options))
    finally:
        mapped.unlink(missing_ok=True)


def make_model(folder, **options):
    import torch
    import transformers

    config = transformers.Qwen3Config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            **options,
        }
    )
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def schedule_of(rows, config, seed=0):
    """The schedule that train makes of these rows; the hidden size of `make_model` is 32."""
    from dasd_lite.method.ragged import offsets_of
    from dasd_lite.training.schedule import Schedule

    lengths = np.array([n for row in rows for n in row["doc_lengths"]])
    return Schedule(lengths, offsets_of([len(r["doc_lengths"]) for r in rows]), config, seed, (6.0 * 32, 1.0))


def weights(out):
    """The weights that a training run has exported."""
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


def loss_sum(model, ids, loss_mask, doc_lengths, chunk_tokens=None):
    """Σ −log p over the target tokens, a scalar with its gradient."""
    from dasd_lite.model.logprobs import negative_logprobs, target_positions, target_terms

    positions = target_positions(loss_mask, doc_lengths)
    terms = target_terms(
        model, ids, positions, doc_lengths, lambda x, ids, _: negative_logprobs(x, ids), chunk_tokens=chunk_tokens
    )
    return terms.sum()

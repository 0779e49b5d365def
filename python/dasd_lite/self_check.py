"""Before a model scores or learns: do its packed documents read as each alone, and are the rows made for it?

Input: a model and a few documents of the real data. Raises TrainError when documents leak into each
other, or when the logits of an architecture are more than its output head (scaled, capped).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dasd_lite.chat import Chat, Ids, engine_stop_ids
from dasd_lite.console import err
from dasd_lite.dataset import read_manifest
from dasd_lite.distributed import Ranks
from dasd_lite.errors import TrainError
from dasd_lite.rows import Row, Rows

_FEW_ENDS = 4  # tokens with which the answers of one chat template end
_PROBE_DOCS, _PROBE_TOKENS = 4, 512  # full logits of these can be afforded on any machine


def probe(documents: Sequence[Ids], num_tokens: int = _PROBE_TOKENS) -> Row:
    """Return the beginnings of the first few documents, at most `num_tokens` of each, as one row."""
    cut = [document[:num_tokens] for document in documents[:_PROBE_DOCS]]
    ids = np.concatenate(cut)
    return Row(ids, np.ones(len(ids), dtype=bool), np.array([len(d) for d in cut], dtype=np.int32), ())


def documents_of(rows: Sequence[Row]) -> list[Ids]:
    """Return the documents of some rows."""
    return [document for row in rows for document in np.split(row.ids, np.cumsum(row.doc_lengths)[:-1])]


def check_packing(model: Any, documents: Sequence[Ids], dtype: Any = None) -> None:
    """Compare packed log-probabilities with those of each document alone; refuse when they differ.

    `dtype` is the format of the computation, where it is not that of the weights.
    """
    import torch

    from dasd_lite import student

    row = probe(documents)
    docs = documents_of([row])
    was_training = model.training
    model.eval()
    packed = student.target_logprobs(model, row.ids, row.doc_lengths)
    alone = np.concatenate([student.plain_logprobs(model, doc) for doc in docs])
    model.train(was_training)
    if np.isfinite(alone).sum() != len(alone) - len(docs):  # all but the first token of each
        raise TrainError("the model's log-probabilities are not finite before the first step; are its weights whole?")
    gap = float(np.nanmean(np.abs(packed - alone)))
    exact = student.is_float32(model) and dtype in (None, torch.float32)
    allowed = 1e-3 if exact else 5e-2  # nats; rounding of 16-bit weights is up to 0.02
    if not gap <= allowed:
        raise TrainError(
            f"log-probabilities of packed documents differ from those of each alone by {gap:.3g} nats on average"
            f" (allowed {allowed:g}): documents leak into each other, or the logits of this architecture"
            " are more than its output head"
        )


def check_tokenizer(rows: Path, model: Path, num_embeddings: int, ranks: Ranks) -> int:
    """Hold the tokenizer of the rows against the model's; return the number of ids that a row may have."""
    packed_with = read_manifest(rows)["inputs"].get("tokenizer")  # rows that others packed do not say
    if packed_with is None:
        return num_embeddings
    chat = Chat(model)
    if chat.fingerprint != packed_with:
        raise TrainError(
            f"{rows}: packed with another tokenizer or chat template than that of {model}; run select and pack again"
            " with student.model set to it"
        )
    if chat.vocab_size > num_embeddings:
        raise TrainError(
            f"{model}: its tokenizer has {chat.vocab_size:,} ids, the model {num_embeddings:,} embeddings; resize them"
        )
    if chat.vocab_size < num_embeddings and ranks.is_first:
        err().print(
            f"note: the model has {num_embeddings:,} embeddings, its tokenizer {chat.vocab_size:,} ids:"
            f" {num_embeddings - chat.vocab_size:,} are padding, no row may have them",
            soft_wrap=True,
        )
    return chat.vocab_size


def new_ends(model: Path, table: Rows, ranks: Ranks) -> frozenset[int]:
    """Return the tokens that end the answers and at which the model does not stop yet."""
    stops, ends = engine_stop_ids(model), table.facts.end_ids
    if len(ends) > _FEW_ENDS:
        return frozenset()  # rows of no chat: nothing that they have in common ends them
    if ends - stops and stops and ranks.is_first:
        err().print(
            f"note: answers end with token {', '.join(map(str, sorted(ends - stops)))}, the student stops at"
            f" {', '.join(map(str, sorted(stops)))}: the trained model's generation_config.json gets both",
            soft_wrap=True,
        )
    return frozenset(ends - stops)

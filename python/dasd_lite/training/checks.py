"""Before a model scores or learns: do its packed documents read as each alone, and are the rows made for it?

Input: a model and a few documents of the real data. Raises TrainError when documents leak into each
other, or when the logits of an architecture are more than its output head (scaled, capped).
"""

from __future__ import annotations

from pathlib import Path

from dasd_lite.chat.chat import Chat
from dasd_lite.console import note
from dasd_lite.data.hub import configured_stop_ids
from dasd_lite.data.manifest import read_manifest
from dasd_lite.errors import TrainError
from dasd_lite.training.rows import Rows

_FEW_ENDS = 4  # tokens with which the answers of one chat template end


def check_tokenizer(rows: Path, model: Path, num_embeddings: int) -> int:
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
    if chat.vocab_size < num_embeddings:
        note(
            f"the model has {num_embeddings:,} embeddings, its tokenizer {chat.vocab_size:,} ids:"
            f" {num_embeddings - chat.vocab_size:,} are padding, no row may have them",
        )
    return chat.vocab_size


def new_end_ids(model: Path, rows: Rows) -> frozenset[int]:
    """Return the tokens that end the answers and at which the model does not stop yet."""
    stops, ends = configured_stop_ids(model), rows.facts.end_ids
    if len(ends) > _FEW_ENDS:
        return frozenset()  # rows of no chat: nothing that they have in common ends them
    if ends - stops and stops:
        note(
            f"answers end with token {', '.join(map(str, sorted(ends - stops)))}, the student stops at"
            f" {', '.join(map(str, sorted(stops)))}: the trained model's generation_config.json gets both",
        )
    return frozenset(ends - stops)

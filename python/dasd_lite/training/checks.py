"""Whether rows and model belong together: the tokenizer, and the tokens that end an answer.

Input: a finished pack folder and a model folder. Invariant: rows that were packed with another tokenizer or chat
template are refused.
"""

from __future__ import annotations

from pathlib import Path

from dasd_lite.chat.chat import Chat
from dasd_lite.console import note
from dasd_lite.data.hub import configured_stop_ids
from dasd_lite.data.manifest import read_manifest
from dasd_lite.errors import TrainError
from dasd_lite.training.rows import MappedRows

_MAX_END_IDS = 4  # tokens that end the answers of one chat template


def check_tokenizer(rows: Path, model: Path, num_embeddings: int) -> int:
    """Compare the tokenizer of the rows with the model's; return the number of ids that a row may use."""
    packed_with = read_manifest(rows)["inputs"].get("tokenizer")  # not known for rows that pack did not write
    if packed_with is None:
        return num_embeddings
    chat = Chat(model)
    if chat.fingerprint != packed_with:
        raise TrainError(
            f"{rows}: packed with a different tokenizer or chat template from {model}'s; run select and pack again with"
            " student.model set to it"
        )
    if chat.vocab_size > num_embeddings:
        note(
            f"the tokenizer has {chat.vocab_size:,} ids, the model {num_embeddings:,} embeddings; no row may use the"
            f" other {chat.vocab_size - num_embeddings:,}"
        )
    if chat.vocab_size < num_embeddings:
        note(
            f"the model has {num_embeddings:,} embeddings, its tokenizer {chat.vocab_size:,} ids; the other"
            f" {num_embeddings - chat.vocab_size:,} are padding, and no row may use them"
        )
    return min(chat.vocab_size, num_embeddings)


def answer_end_ids(model: Path, rows: MappedRows) -> frozenset[int]:
    """Return the tokens that end the answers, all of which the trained model's configurations will name."""
    stops, ends = configured_stop_ids(model), rows.stats.end_ids
    if len(ends) > _MAX_END_IDS:
        return frozenset()  # not a chat: the documents end with any token
    if ends - stops and stops:
        note(
            f"answers end with token {', '.join(map(str, sorted(ends - stops)))}, but the student stops at"
            f" {', '.join(map(str, sorted(stops)))}; the trained model's generation_config.json gets both"
        )
    return ends

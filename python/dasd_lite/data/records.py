"""The columns that flow from stage to stage, one Arrow schema per kind of row, and their identities.

Invariants: a rollout's `token_bytes` add up to the UTF-8 bytes of its completion after `prefix_bytes`
and after a `<think>` that the template wrote;
`logprobs` are natural logs, float32, of the model's raw distribution (temperature 1), or null where
the source had none, never invented. An identity is a hash of what the row is, never its position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

Message = dict[str, str]

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TOKENS = pa.large_list(pa.int32())

_QUESTION = [
    ("prompt_uid", pa.string()),
    ("messages", MESSAGES),  # the conversation up to and without the answer
    ("domain", pa.string()),
    ("answer", pa.string()),  # the right answer, where it is known
]

_COMPLETION = [
    ("uid", pa.string()),
    *_QUESTION,
    ("index", pa.int32()),  # which candidate of its prompt
    ("completion", pa.large_string()),  # text, thinking within <think>…</think>
    # "stop", "length", "tool_calls", "malformed" (harmony), "refusal", "content_filter", "error" (left out), or
    # "unknown" for ingested text that does not say
    ("finish_reason", pa.string()),
    ("prefix_bytes", pa.int64()),  # bytes of the completion that the student wrote (mix), else 0
]

ROLLOUT = pa.schema(
    [
        *_COMPLETION,
        ("token_ids", TOKENS),  # in the teacher's vocabulary, after prefix_bytes; null where the source had none
        ("logprobs", pa.large_list(pa.float32())),
        ("token_bytes", TOKENS),
    ]
)
"""What sample, ingest and mix write."""

SCORE = pa.schema(
    [
        ("uid", pa.string()),  # of the rollout
        ("sentence_ends", pa.large_list(pa.int64())),  # byte offsets in the completion
        ("p_teacher", pa.large_list(pa.float32())),  # exp(mean logprob) per sentence; NaN where no token begins
        ("p_student", pa.large_list(pa.float32())),
        ("teacher_mean_logprob", pa.float64()),  # over all tokens: its exp is the paper's geometric mean (Fig. 3a)
        ("student_mean_logprob", pa.float64()),
        ("num_teacher_tokens", pa.int64()),
        ("ids", TOKENS),  # prompt, completion and end token in the student's vocabulary: what was scored
        ("num_context_tokens", pa.int64()),  # ids before this one are the prompt
        ("rank_sum", pa.int64()),  # Σ min(rank, 100) of answer and end token by the student; null: not told
        ("surprisal_sum", pa.float64()),  # Σ −log p of the same tokens by the student
    ]
)
"""What score writes, one row per rollout. One over the student's context has no p_student and nulls."""

READING = pa.schema(
    [
        ("uid", pa.string()),  # of the rollout
        ("token_ids", TOKENS),  # of its completion in the teacher's vocabulary
        ("logprobs", pa.large_list(pa.float32())),  # null: over the teacher's context
        ("token_bytes", TOKENS),
    ]
)
"""What score keeps of answers that the teacher has read, in a folder of its own."""

KEPT = pa.schema(
    [
        *_COMPLETION,
        ("ids", TOKENS),  # prompt, completion and end token in the student's vocabulary
        ("num_context_tokens", pa.int64()),  # ids before this one are not trained on
        ("score", pa.float32()),  # what the rule ranked by; null when it ranks nothing
        ("weight", pa.float32()),  # mean 1 among its prompt's kept answers; null if rejected or without weighting
        ("num_sentences", pa.int64()),
        ("class_counts", pa.list_(pa.int64(), 3)),  # shared, teacher, student sentences; null without scores
    ]
)
"""What select keeps: rollouts as the student will read them."""

REJECTED = pa.schema([*KEPT, ("reason", pa.string()), ("value", pa.float64())])
"""What select rejects, in the same folder: why, and the number that was too large or small."""

ROW = pa.schema(
    [
        ("ids", TOKENS),  # documents one behind the other, at most seq_len
        ("loss_mask", pa.large_list(pa.bool_())),  # true where the token is a target
        ("doc_lengths", pa.large_list(pa.int32())),
        ("uids", pa.list_(pa.string())),  # the rollouts, in order
        ("weights", pa.list_(pa.float32())),  # how much each document counts; null where nothing has a weight
    ]
)
"""What pack writes: rows for training."""

GRADED = pa.schema(
    [
        *_COMPLETION,
        ("grade", pa.string()),  # "right", "wrong", or "unparseable": no answer found in it
        ("extracted", pa.string()),
        ("num_tokens", pa.int64()),
    ]
)
"""What evaluate writes."""


@dataclass(frozen=True)
class Prompt:
    """A question: its messages up to the answer, and the right answer where it is known."""

    uid: str
    messages: tuple[Message, ...]
    domain: str
    answer: str | None

    def columns(self) -> dict[str, Any]:
        """Return the columns that every row about this question carries."""
        return {
            "prompt_uid": self.uid,
            "messages": list(self.messages),
            "domain": self.domain,
            "answer": self.answer,
        }

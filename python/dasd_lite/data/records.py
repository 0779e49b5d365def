"""The rows that flow from stage to stage: one Arrow schema per kind of row.

Invariants: the `token_bytes` of a rollout add up to the UTF-8 bytes of its completion, less `prefix_bytes` and less a
`<think>` that the chat template wrote. `logprobs` are natural logarithms of the model's raw distribution (temperature
1), or null if the source had none; they are never made up. A uid is a hash, never a position: of all that decides an
answer where the row was sampled (model, messages, sampling parameters, seed, index), else of the row's content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from dasd_lite.data.seeds import digest

Message = dict[str, str]

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TOKENS = pa.large_list(pa.int32())

_QUESTION = [
    ("prompt_uid", pa.string()),
    ("messages", MESSAGES),  # the conversation before the answer
    ("domain", pa.string()),
    ("answer", pa.string()),  # the reference answer, if known
]

_COMPLETION = [
    ("uid", pa.string()),
    *_QUESTION,
    ("index", pa.int32()),  # number of the answer among those to its prompt
    ("completion", pa.large_string()),  # text, with the thinking in <think>…</think>
    # "stop", "length", "tool_calls", "malformed" (harmony), "refusal", "content_filter", "error" (skipped), or
    # "unknown" (ingested without a reason)
    ("finish_reason", pa.string()),
    ("prefix_bytes", pa.int64()),  # bytes of the completion that the student wrote (mix), or 0
]

ROLLOUT = pa.schema(
    [
        *_COMPLETION,
        ("token_ids", TOKENS),  # in the teacher's vocabulary, after prefix_bytes; null if the source had none
        ("logprobs", pa.large_list(pa.float32())),
        ("token_bytes", TOKENS),
        ("num_tokens", pa.int64()),  # that were sampled, the end token included; null if not known
        ("max_tokens", pa.int64()),  # the most that could have been; null where nothing was sampled
    ]
)
"""Rows of sample, ingest, and mix."""

SCORE = pa.schema(
    [
        ("uid", pa.string()),  # of the rollout
        ("sentence_ends", pa.large_list(pa.int64())),  # byte offsets in the completion
        ("p_teacher", pa.large_list(pa.float32())),  # exp(mean logprob) of each sentence; NaN without tokens
        ("p_student", pa.large_list(pa.float32())),
        ("teacher_mean_logprob", pa.float64()),  # over all tokens; its exp is the geometric mean of Fig. 3a
        ("student_mean_logprob", pa.float64()),
        ("num_teacher_tokens", pa.int64()),
        ("ids", TOKENS),  # what was scored: prompt, completion, and end token in the student's vocabulary
        ("num_context_tokens", pa.int64()),  # the first of the ids, which are the prompt
        ("rank_sum", pa.int64()),  # Σ min(rank, 100) of answer and end token by the student; null if not known
        ("surprisal_sum", pa.float64()),  # Σ -log p of the same tokens by the student
        ("key", pa.string()),  # hash of what was scored: messages, text and the teacher's tokens of the rollout
    ]
)
"""Rows of score, one per rollout. Student columns are null if the rollout exceeds the student's context."""

TEACHER_TOKENS = pa.schema(
    [
        ("uid", pa.string()),  # of the rollout
        ("token_ids", TOKENS),  # of its completion in the teacher's vocabulary
        ("logprobs", pa.large_list(pa.float32())),  # null if the answer exceeds the teacher's context
        ("token_bytes", TOKENS),
        ("key", pa.string()),  # as in SCORE
    ]
)
"""Answers that the teacher scored for the stage score, in a subfolder of their own."""

KEPT = pa.schema(
    [
        *_COMPLETION,
        ("ids", TOKENS),  # prompt, completion, and end token in the student's vocabulary
        ("num_context_tokens", pa.int64()),  # the first of the ids, which are not trained on
        ("score", pa.float32()),  # what the rule ranked by; null if it does not rank
        ("weight", pa.float32()),  # mean 1 over the kept answers to its prompt; null if rejected or not weighted
        ("num_sentences", pa.int64()),
        ("class_counts", pa.list_(pa.int64(), 3)),  # shared, teacher, student sentences; null without scores
        ("grade", pa.string()),  # one of the five verdicts; null without a reference answer
    ]
)
"""Rollouts that select kept, as token ids of the student."""

REJECTED = pa.schema([*KEPT, ("reason", pa.string()), ("value", pa.float64())])
"""Rollouts that select rejected, in the same folder: the reason, and the value that was too large or too small."""

ROW = pa.schema(
    [
        ("ids", TOKENS),  # documents one after another, at most seq_len
        ("loss_mask", pa.large_list(pa.bool_())),  # true where the token is a target
        ("doc_lengths", pa.large_list(pa.int32())),
        ("uids", pa.list_(pa.string())),  # the rollouts, in order
        ("weights", pa.list_(pa.float32())),  # of each document in the loss; null without weighting
    ]
)
"""Packed rows for training. Columns that the objective needs come after these."""

DOCUMENT, TOKEN = "doc:", "token:"
"""Prefixes of the names of those columns: a list with one value per document, or one per target token of the row."""

GRADED = pa.schema(
    [
        *_COMPLETION,
        ("task", pa.string()),  # name of the benchmark, or OWN_TASK
        ("grade", pa.string()),  # one of the five verdicts of grading.grade; "no_answer" if it was cut off
        ("extracted", pa.string()),  # the final answer as the completion states it
        ("reason", pa.string()),  # why it is not right, where the verdict alone does not say it
        ("vote", pa.string()),  # the same for all answers that mean the same, for maj@k; null if it has none
        ("num_tokens", pa.int64()),
        ("max_tokens", pa.int64()),
    ]
)
"""Rows of evaluate."""

RIGHT = "right"
"""Vote of every right answer, however it is written."""

OWN_TASK = "prompts"
"""Task of the questions in a file of the user's own (`evaluate.prompts`)."""

HIDDEN_TASKS = frozenset({"gpqa-diamond"})
"""Tasks whose authors ask that no question is published: no report, export or `show` prints their text."""

HIDDEN_TEXT = "(hidden: the authors of this benchmark ask that its questions are not published)"
"""What is printed in its place."""


@dataclass(frozen=True)
class Prompt:
    """A question: the messages before the answer, and the reference answer if it is known.

    `where` is its place in a file, as `file:line`; "" if it comes from none.
    """

    uid: str
    messages: tuple[Message, ...]
    domain: str
    answer: str | None
    where: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """What errors call it: its uid, or its place and first words if the uid is only a hash of the messages."""
        if self.uid != digest(list(self.messages)):
            return self.uid
        words = " ".join(self.messages[-1]["content"].split())
        quoted = f'"{words}"' if len(words) <= 40 else f'"{words[:40].rstrip()} …"'
        return f"{self.where} ({quoted})" if self.where else quoted

    @property
    def place(self) -> str:
        """Its place in a file, or its uid: a name without a word of its text."""
        return self.where or self.uid

    @property
    def key(self) -> str:
        """Hash of its messages: what a model is asked, whatever the file calls it."""
        return digest(list(self.messages))

    def columns(self) -> dict[str, Any]:
        """Return the columns that every row about this question has."""
        return {"messages": list(self.messages), **self.names()}

    def names(self) -> dict[str, Any]:
        """Return those of them on which an answer does not depend."""
        return {"prompt_uid": self.uid, "domain": self.domain, "answer": self.answer}


def times_before(questions: Iterable[str]) -> list[int]:
    """Return for each question how often it has occurred before it, so that each time it gets answers of its own."""
    counted: Counter[str] = Counter()
    before = []
    for question in questions:
        before.append(counted[question])
        counted[question] += 1
    return before

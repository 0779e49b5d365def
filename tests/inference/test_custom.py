"""Samplers from a file outside of the package: named by a recipe's table, or passed in as objects."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dasd_lite.config.models import CustomTeacher
from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import identify
from dasd_lite.data.records import ROLLOUT
from dasd_lite.data.usage import Usage
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.inference import Completion, Request, Sampler, SamplingParams
from dasd_lite.inference.backends import model_identity, open_sampler
from dasd_lite.inference.collect import collect, journal_usage, token_columns
from dasd_lite.inference.scorer import context_of, open_scorer

MODULE = '''
import json
from pathlib import Path

import numpy as np

import dasd_lite
from dasd_lite.inference import Completion


class Canned:
    """Answers from a file, with made-up log-probabilities."""

    def __init__(self, path, suffix=""):
        if not Path(path).exists():
            raise ValueError(f"{path} does not exist")
        self.answers = json.loads(Path(path).read_text())
        self.suffix, self.is_open = suffix, True

    def complete(self, requests, params):
        for request in reversed(requests):
            text = self.answers[request.messages[-1]["content"]] + self.suffix
            sizes = np.array([1] * len(text.encode()) + [0], dtype=np.int32)
            logprobs = np.full(len(sizes), -0.5, dtype=np.float32)
            yield Completion(request.position, text, logprobs=logprobs, token_bytes=sizes)

    def status(self):
        return "from a file"

    def close(self):
        self.is_open = False


class TextOnly(Canned):
    def complete(self, requests, params):
        for request in requests:
            yield Completion(request.position, self.answers[request.messages[-1]["content"]])


class Scoring(Canned):
    tokenizer = str(Path(dasd_lite.__file__).parent / "demo" / "student")

    def score(self, sequences):
        for position, ids in sequences:
            yield position, np.append(np.float32(np.nan), np.full(len(ids) - 1, -1.0, np.float32)), None


class NoClose:
    def complete(self, requests, params):
        return iter(())

    def status(self):
        return ""


class WrongParameters(Canned):
    def complete(self, requests):
        return iter(())


def a_function(requests, params):
    return iter(())
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "my_teacher.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "answers.json").write_text(json.dumps({f"question {i}": f"answer {i} →" for i in range(5)}))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("my_teacher")
    del sys.modules["my_teacher"]


def table(tmp_path: Path, name: str = "Canned", **options: Any) -> CustomTeacher:
    return CustomTeacher(kind=f"my_teacher:{name}", options={"path": str(tmp_path / "answers.json"), **options})


def fill(folder: Path, teacher: CustomTeacher | Sampler, num: int = 5) -> list[dict[str, Any]]:
    """Collect `num` answers into a journal; return its rows."""
    identity = identify("sample", 1, {}, {"teacher": model_identity(teacher)})
    with Journal(folder, identity, ROLLOUT, num) as journal:

        def request(position: int) -> Request:
            return Request(position, ({"role": "user", "content": f"question {position}"},), 50, seed=position)

        def row(completion: Completion) -> dict[str, Any]:
            return {"uid": str(completion.position), "completion": completion.text, **token_columns(completion)}

        timing = collect(journal, request, row, lambda used: open_sampler(teacher, used=used), SamplingParams(), "test")
        assert timing["sampled_answers"] == num
        return [row for batch in journal.batches(["uid", "completion", "logprobs"]) for row in batch.to_pylist()]


def test_a_class_that_a_recipe_names(module: ModuleType, tmp_path: Path) -> None:
    rows = fill(tmp_path / "out", table(tmp_path, suffix="!"))
    assert [row["completion"] for row in rows] == [f"answer {i} →!" for i in range(5)]
    assert all(row["logprobs"] == [-0.5] * (len(row["completion"].encode()) + 1) for row in rows)


def test_an_object_is_used_as_it_is_and_stays_open(module: ModuleType, tmp_path: Path) -> None:
    teacher = module.Canned(tmp_path / "answers.json")
    rows = fill(tmp_path / "out", teacher)
    assert [row["completion"] for row in rows] == [f"answer {i} →" for i in range(5)]
    assert teacher.is_open
    assert open_sampler(teacher).status() == "from a file"


def test_text_alone_has_no_token_columns(module: ModuleType, tmp_path: Path) -> None:
    rows = fill(tmp_path / "out", table(tmp_path, "TextOnly"))
    assert all(row["completion"] and row["logprobs"] is None for row in rows)


def test_the_documented_class(module: ModuleType, tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    (tmp_path / "documented.py").write_text(guide.split("```python\n")[1].split("```")[0])
    rows = fill(tmp_path / "out", importlib.import_module("documented").Canned(tmp_path / "answers.json"))
    assert [row["completion"] for row in rows] == [f"answer {i} →" for i in range(5)]


def test_code_and_options_are_part_of_the_fingerprint(module: ModuleType, tmp_path: Path) -> None:
    before = model_identity(table(tmp_path))
    assert model_identity(table(tmp_path)) == before
    assert model_identity(table(tmp_path, suffix="!")) != before
    teacher = module.Canned(tmp_path / "answers.json")
    as_object = model_identity(teacher)
    assert model_identity(module.Canned(tmp_path / "answers.json")) == as_object
    assert model_identity(module.Canned(tmp_path / "answers.json", suffix="!")) != as_object
    teacher.fingerprint = "other answers"
    assert model_identity(teacher) != as_object
    (tmp_path / "my_teacher.py").write_text(MODULE.replace("-0.5", "-0.7"))
    assert model_identity(table(tmp_path)) != before
    teacher.fingerprint = 3
    with pytest.raises(ConfigError, match=r"my_teacher:Canned\.fingerprint has the type int; it must be a string"):
        model_identity(teacher)


def test_an_object_with_state_that_cannot_be_hashed_needs_a_fingerprint(module: ModuleType, tmp_path: Path) -> None:
    teacher = module.Canned(tmp_path / "answers.json")
    teacher.lock = threading.Lock()
    with pytest.raises(ConfigError) as caught:
        model_identity(teacher)
    assert str(caught.value) == (
        "my_teacher:Canned: lock is of type _thread:lock, which cannot be hashed, so a change in it would go unnoticed;"
        " give my_teacher:Canned an attribute `fingerprint`, a string that changes with its results"
    )
    teacher.fingerprint = "a"
    first = model_identity(teacher)
    teacher.fingerprint = "b"
    assert model_identity(teacher) != first


def test_a_class_that_scores(module: ModuleType, tmp_path: Path) -> None:
    for teacher in (table(tmp_path, "Scoring"), module.Scoring(tmp_path / "answers.json")):
        scorer, chat = open_scorer(teacher)
        ids = chat.encode("one two")
        ((position, logprobs, ranks),) = scorer.score([(3, ids)])
        assert (position, ranks) == (3, None)
        assert len(logprobs) == len(ids)
        assert context_of(teacher, chat) == chat.context
    for teacher in (table(tmp_path), module.Canned(tmp_path / "answers.json")):
        with pytest.raises(ConfigError, match="my_teacher:Canned cannot score given answers; it has no method `score`"):
            open_scorer(teacher)
    module.Scoring.tokenizer = None
    with pytest.raises(ConfigError, match="my_teacher:Scoring has no `tokenizer`, the folder or hub id"):
        open_scorer(table(tmp_path, "Scoring"))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("nowhere:Canned", {}, "teacher.kind = 'nowhere:Canned': the sampler cannot be imported"),
        ("my_teacher:Other", {}, "module 'my_teacher' has no attribute 'Other'"),
        (
            "my_teacher:a_function",
            {},
            "teacher.kind = 'my_teacher:a_function' is not a class; a sampler is named by its",
        ),
        (
            "my_teacher:NoClose",
            {},
            "my_teacher:NoClose has no method `close`; a sampler has complete(requests, params)",
        ),
        ("my_teacher:WrongParameters", {"path": "."}, "cannot be a sampler's `complete`; it is called with (self, req"),
        ("my_teacher:Canned", {}, "does not accept {}: missing a required argument: 'path'"),
        ("my_teacher:Canned", {"path": ".", "x": 1}, "got an unexpected keyword argument 'x'"),
        (
            "my_teacher:Canned",
            {"path": "no/file"},
            "teacher.options: my_teacher:Canned does not accept {'path': 'no/fil",
        ),
        (
            "my_teacher:Canned",
            {"path": "/"},
            "teacher.options: my_teacher:Canned does not accept {'path': '/'}: [Errno 21] Is a directory: '/'",
        ),
    ],
)
def test_what_cannot_be_a_sampler(module: ModuleType, kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_sampler(CustomTeacher(kind=kind, options=options))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (3, "has no method `complete`"),
        ([], "has no method `complete`"),
        ("teacher", "teacher = 'teacher': a teacher is a table (Endpoint, Vllm, Transformers, CustomTeacher) or a"),
        (Path, "teacher: pathlib:Path is a class; a sampler is an instance of it"),
    ],
)
def test_an_object_that_is_no_sampler(thing: Any, words: str) -> None:
    for use in (open_sampler, model_identity):
        if use is open_sampler or not isinstance(thing, int | list):
            with pytest.raises(ConfigError) as caught:
                use(thing)
            assert words in str(caught.value)


# --- what it returns --------------------------------------------------------------------------------------


class Returns:
    """A sampler whose completions are made from keywords."""

    def __init__(self, *completions: Any) -> None:
        self.completions = completions

    def complete(self, requests: Any, params: SamplingParams) -> Iterator[Any]:
        return iter(self.completions)

    def status(self) -> str:
        return ""

    def close(self) -> None:
        """Do nothing."""


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int32)


def floats(*values: float) -> Any:
    return np.array(values, dtype=np.float32)


GOOD = {"text": "ok", "token_ids": ints(1, 2), "logprobs": floats(-1, 0), "token_bytes": ints(2, 0)}


def test_an_exception_in_a_sampler_is_one_line_with_its_place() -> None:
    class Offline(Returns):
        def complete(self, requests: Any, params: Any) -> Iterator[Any]:
            yield Completion(0, **GOOD)
            raise ConnectionError("no route\nto host")

    completions = iter(open_sampler(Offline()).complete([], SamplingParams()))
    next(completions)
    message = r"^sampler \S+Offline failed: ConnectionError: no route to host \(\S+custom\.py:\d+\)$"
    with pytest.raises(DataError, match=message):
        next(completions)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": b"ok"}, "completion 0: text is a bytes, not a str"),
        ({"text": "o\ud800"}, "completion 0: text cannot be written as UTF-8: surrogates not allowed at character 1"),
        ({"finish_reason": None}, "finish_reason is a NoneType, not a str"),
        ({"prompt_tokens": 1.5}, "prompt_tokens is 1.5, not a count"),
        ({"logprobs": [-1.0, 0.0]}, "logprobs is list, not a one-dimensional array of float32"),
        ({"logprobs": np.zeros(2)}, "logprobs is float64 [2], not a one-dimensional array of float32"),
        ({"token_bytes": np.array([[2, 0]], np.int32)}, "token_bytes is int32 [1, 2], not a one-dimensional array"),
        ({"token_ids": np.array([1, 2])}, "token_ids is int64 [2], not a one-dimensional array of int32"),
        ({"logprobs": floats(-1)}, "2 token_ids, 1 logprobs and 2 token_bytes; they must be of equal length"),
        ({"token_ids": ints(1)}, "1 token_ids, 2 logprobs and 2 token_bytes"),
        ({"logprobs": floats(-1, np.nan)}, "the log-probability of token 1 is nan; it must be finite and at most 0"),
        ({"logprobs": floats(-np.inf, -1)}, "the log-probability of token 0 is -inf"),
        ({"logprobs": floats(-1, 0.5)}, "the log-probability of token 1 is 0.5"),
        ({"token_bytes": ints(1, 0)}, "token_bytes sum to 1, the text has 2 bytes; they must be equal"),
        ({"token_bytes": ints(3, 0)}, "token_bytes sum to 3, the text has 2 bytes"),
        ({"token_bytes": ints(4, -2)}, "token_bytes sum to 2"),
    ],
)
def test_a_completion_out_of_shape(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        fill(tmp_path / "out", Returns(Completion(0, **{**GOOD, **options})), 1)
    assert str(caught.value).startswith(f"{__name__}:Returns, completion 0: ")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("completions", "words"),
    [
        ([{"text": "ok"}], "returned a dict ({'text': 'ok'}), not a Completion"),
        ([Completion(2, **GOOD)], "position 2, which was not requested or is already complete; expected one of 2 open"),
        ([Completion("0", **GOOD)], "a completion for position '0', which was not requested"),  # type: ignore[arg-type]
        ([Completion(1, **GOOD), Completion(1, **GOOD)], "position 1, which was not requested or is already"),
        ([Completion(1, **GOOD)], "returned 1 completions for 2 requests; position 0 is missing"),
        ([], "returned 0 completions for 2 requests; position 0 is missing"),
    ],
)
def test_completions_of_other_positions(tmp_path: Path, completions: list[Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        fill(tmp_path / "out", Returns(*completions), 2)
    assert words in str(caught.value) and str(caught.value).startswith(f"{__name__}:Returns ")


def test_complete_that_returns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Returns, "complete", lambda self, requests, params: None)
    with pytest.raises(DataError, match=r":Returns\.complete returned a NoneType \(None\), not an iterator"):
        fill(tmp_path / "out", Returns(), 2)


SCORED = (0, floats(np.nan, -1), None)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (None, ".score returned a NoneType (None), not an iterator of scores"),
        ([SCORED[:2]], ".score returned a tuple ((0, array([nan, -1.], dtype=float32))), not (open position, logprobs"),
        ([(5, *SCORED[1:])], "not (open position, logprobs, ranks)"),
        ([SCORED, SCORED], "not (open position, logprobs, ranks)"),
        (
            [(0, [np.nan, -1.0], None)],
            ", scores of sequence 0: logprobs is list, not a one-dimensional array of float32",
        ),
        ([(0, floats(np.nan), None)], ", scores of sequence 0: 1 logprobs for 2 tokens"),
        ([(0, floats(-1, -1), None)], ": the log-probability of the first token is -1; it must be NaN"),
        ([(0, floats(np.nan, np.nan), None)], ": the log-probability of token 1 is nan; it must be finite"),
        ([(0, SCORED[1], ints(0, 1))], ": ranks is int32 [2], not a one-dimensional array of int64"),
        ([SCORED], ".score returned no scores for sequence 1"),
    ],
)
def test_scores_out_of_shape(module: ModuleType, tmp_path: Path, scores: Any, words: str) -> None:
    def score(sequences: Any) -> Any:
        list(sequences)
        return scores

    teacher = module.Scoring(tmp_path / "answers.json")
    teacher.score = score
    scorer, _ = open_scorer(teacher)
    with pytest.raises(DataError) as caught:
        list(scorer.score([(0, ints(1, 2)), (1, ints(1, 2))]))
    assert str(caught.value).startswith("my_teacher:Scoring") and words in str(caught.value)


def test_a_template_may_have_written_the_beginning(tmp_path: Path) -> None:
    opened = {**GOOD, "text": "<think>\nok"}
    assert fill(tmp_path / "out", Returns(Completion(0, **opened)), 1)[0]["completion"] == "<think>\nok"
    continued = Request(0, ({"role": "user", "content": "q"},), 5, seed=0, prefix="<think>\n")
    identity = identify("sample", 1, {}, {})
    with Journal(tmp_path / "mixed", identity, ROLLOUT, 1) as journal, pytest.raises(DataError, match="sum to 2"):
        sampler = Returns(Completion(0, **opened))
        collect(journal, lambda _: continued, token_columns, lambda _: sampler, SamplingParams(), "test")


def test_what_arrived_before_a_bad_completion_is_kept(tmp_path: Path) -> None:
    bad = Completion(1, **{**GOOD, "text": "other"})
    sampler = Returns(Completion(0, **GOOD), bad)
    with pytest.raises(DataError, match="completion 1"):
        fill(tmp_path / "out", sampler, 2)
    identity = identify("sample", 1, {}, {"teacher": model_identity(sampler)})
    with Journal(tmp_path / "out", identity, ROLLOUT, 2) as journal:
        assert journal.done() == {0}
        assert journal_usage(journal) == Usage(0, 2)

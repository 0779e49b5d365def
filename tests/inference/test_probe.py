"""The probe: its findings about servers with various habits, in a few hundred tokens, and which are fatal."""

from __future__ import annotations

from typing import Any

import pytest
from tests.server import END, Answer, ChatServer, pieces_of

from dasd_lite.config.models import Budget, Endpoint
from dasd_lite.inference.endpoint import client
from dasd_lite.inference.endpoint.probe import Finding, Requirements, probe_servers, spread

QUESTION = ({"role": "user", "content": "How much is 2 + 2?"},)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)


def thinks(body: dict[str, Any]) -> Answer:
    """Answer with thinking in its own field; it depends on the seed alone."""
    seed = body["seed"] if body["temperature"] else 0
    text = f"two and two, seed {seed}"
    pieces = [*pieces_of(f"<think>\n{text}\n</think>\n\n4"), END]
    return Answer("4", pieces[: body["max_tokens"]], {"reasoning_content": text})


def answer(body: dict[str, Any]) -> Answer:
    if "seed" not in body:  # the requests that check whether a prefix is continued
        return Answer("x", [b"x"])
    return thinks(body)


def probe(server: ChatServer, required: Requirements | None = None, **options: Any) -> dict[str, Finding]:
    defaults = {"api_key_env": "NO_SUCH_KEY", "timeout_s": 5.0}
    model = Endpoint(kind="endpoint", model="teacher", base_urls=[server.url], **{**defaults, **options})
    (result,) = probe_servers(model, QUESTION, required or Requirements())
    assert result.base_url == server.url
    return {item.name: item for item in result.items}


def fatal(items: dict[str, Finding]) -> set[str]:
    return {name for name, item in items.items() if item.fatal}


def test_a_good_server() -> None:
    with ChatServer(answer=answer, habits=["continue"]) as server:
        items = probe(server, Requirements(prefix=True))
    assert {name: item.value for name, item in items.items()} == {
        "answers as": "teacher",
        "logprobs": "yes",
        "bytes": "add up",
        "raw": "yes",
        "noise": "0",
        "thinking": "own field",
        "seed": "works",
        "n = 2": "yes",
        "continues": "chat: continue_final_message",
    }
    assert not fatal(items)
    assert len(server.asked) < 30
    assert sum(body["max_tokens"] for body in server.asked) < 500


@pytest.mark.parametrize(
    ("habit", "name", "word", "remedy"),
    [
        ("tempered", "raw", "tempered", "--logprobs-mode raw_logprobs"),
        ("no logprobs", "logprobs", "none", "kind = 'vllm'"),
        ("refuses logprobs", "logprobs", "rejected", "use a provider that returns them"),
    ],
)
def test_what_the_method_needs_is_fatal(habit: str, name: str, word: str, remedy: str) -> None:
    with ChatServer(answer=answer, habits=[habit]) as server:
        items = probe(server)
    assert fatal(items) == {name}
    assert items[name].value == word
    assert remedy in items[name].remedy


def test_a_context_that_the_longest_answer_fills_is_fatal_through_chat() -> None:
    with ChatServer(answer=answer, habits=["vllm"]) as server:
        items = probe(server, Requirements(max_tokens=8192))
        assert fatal(items) == {"context"} and "max_tokens = 8192 leaves no room" in items["context"].remedy
        assert not fatal(probe(server, Requirements(max_tokens=2048)))


def test_tempered_logprobs_are_fine_at_temperature_1() -> None:
    with ChatServer(answer=answer, habits=["tempered"]) as server:
        items = probe(server, Requirements(tempered=False))
    assert items["raw"].value == "tempered" and not fatal(items)


def test_what_a_server_does_not_reveal_is_unknown() -> None:
    with ChatServer(answer=answer, habits=["no alternatives"]) as server:
        items = probe(server)
    assert items["raw"].value == "unknown" and "temperature 1" in items["raw"].remedy


def test_seeds_and_several_answers() -> None:
    with ChatServer(answer=answer, habits=["no seed", "no n"]) as server:
        items = probe(server)
    assert items["seed"].value == "ignored" and items["n = 2"].value == "ignored"
    with ChatServer(answer=lambda body: answer({**body, "seed": 1})) as server:
        assert probe(server)["seed"].value == "no effect seen"


def test_a_teacher_that_does_not_think() -> None:
    with ChatServer() as server:  # no thinking part in its answers
        assert fatal(probe(server)) == {"thinking"}
        assert "select.require_think = false" in probe(server)["thinking"].remedy
        assert not fatal(probe(server, Requirements(thinking=False)))


def test_no_continuation_is_fatal_only_with_a_mixed_phase() -> None:
    with ChatServer(answer=answer) as server:
        assert not fatal(probe(server))
        items = probe(server, Requirements(prefix=True))
    assert fatal(items) == {"continues"} and server.url in items["continues"].remedy


def test_bytes_that_do_not_add_up() -> None:
    with ChatServer({0: "wrong bytes"}, answer=answer) as server:
        assert fatal(probe(server)) == {"bytes"}


def test_no_usage_and_a_budget() -> None:
    with ChatServer(answer=answer, habits=["no usage"]) as server:
        assert not fatal(probe(server))
        assert fatal(probe(server, budget=Budget(max_tokens=1000))) == {"usage"}


@pytest.mark.parametrize(("fault", "words"), [("401", "NO_SUCH_KEY, which is not set"), ("404", "it has teacher")])
def test_a_server_that_does_not_answer(fault: str, words: str) -> None:
    with ChatServer({-1: fault}, answer=answer) as server:
        items = probe(server)
    assert fatal(items) == {"answers"} and words in items["answers"].remedy


def test_transient_failures_are_retried() -> None:
    faults = {0: "503", 1: "429 0.01", 2: "cut", 5: "garbage"}
    with ChatServer(faults, answer=answer) as server:
        assert not fatal(probe(server))


def test_a_vllm_server_gets_the_advice_to_set_its_tokenizer() -> None:
    with ChatServer(answer=answer, habits=["vllm"]) as server:
        assert "teacher.tokenizer = '/models/teacher'" in probe(server)["answers as"].remedy


def test_spread() -> None:
    raw = {"a": -0.1, "b": -2.5, "c": -5.0}
    assert spread(raw, raw) == pytest.approx(1)
    assert spread(raw, {name: 2 * p + 0.7 for name, p in raw.items()}) == pytest.approx(2)
    assert spread(raw, {"a": -0.1}) is None
    assert spread({"a": -1.0, "b": -1.01}, {"a": -1.0, "b": -1.02}) is None

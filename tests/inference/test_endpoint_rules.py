"""The endpoint sampler beyond retries: budgets, streams, refusals, other models, and what a reply may not hold."""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import pytest
from tests.server import END, Answer, ChatServer, pieces_of, plain

from dasd_lite.config.models import Budget, Endpoint, Prices
from dasd_lite.data.usage import Usage
from dasd_lite.errors import ConfigError, EndpointError
from dasd_lite.inference import Completion, Request, SamplingParams
from dasd_lite.inference.backends import open_sampler
from dasd_lite.inference.collect import token_columns
from dasd_lite.inference.endpoint import client, dispatch


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    monkeypatch.setattr(dispatch, "POLL_S", 0.01)


def config(*urls: str, **options: Any) -> Endpoint:
    return Endpoint(
        kind="endpoint",
        model="teacher",
        base_urls=list(urls),
        **{"concurrency": 4, "timeout_s": 5.0, "api_key_env": "NO_SUCH_KEY", **options},
    )


def run(model: Endpoint, num: int = 12, prefix: str = "", **options: Any) -> list[Completion]:
    asked = [Request(i, ({"role": "user", "content": f"question {i}"},), 50, i, prefix) for i in range(num)]
    return list(open_sampler(model, **options).complete(asked, SamplingParams()))


# --- replies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("null", "returns no log-probabilities"),
        ("short", "the tokens have"),
        ("wrong bytes", "the tokens have"),
        ("positive", "token 1 has log-probability 0.5, which is impossible for a sampled token"),
        ("placeholder", "token 1 has log-probability -9999, which is impossible for a sampled token"),
    ],
)
def test_missing_or_impossible_data_is_an_error(fault: str, words: str) -> None:
    with ChatServer({3: fault}) as server, pytest.raises(EndpointError, match=re.escape(words)) as caught:
        run(config(server.url))
    assert server.url in str(caught.value)


def test_refusals_and_answers_that_were_cut_off_are_kept() -> None:
    with ChatServer({"question 1": "refusal", "question 2": "length"}) as server:
        done = {c.position: c for c in run(config(server.url))}
    assert len(done) == 12
    assert done[1].finish_reason == "refusal"
    assert done[1].text.startswith("question 1 →")
    assert done[2].finish_reason == "length"
    for c in done.values():
        assert c.token_bytes.sum() == len(c.text.encode())
        assert len(c.logprobs) == len(c.token_bytes)


def test_a_tool_call_has_the_text_of_its_tokens() -> None:
    def call(_: dict[str, Any]) -> Answer:
        text = '<think>\nhm\n</think>\n\n<tool_call>{"name": "f"}</tool_call>'
        reasoning: Any = {"reasoning_content": "\nhm\n", "tool_calls": [{"function": {"name": "f"}}]}
        return Answer(None, [*pieces_of(text), END], reasoning, "tool_calls")

    with ChatServer(answer=call) as server:
        (done,) = run(config(server.url), 1)
    assert done.finish_reason == "tool_calls"
    assert "<tool_call>" in done.text
    assert done.token_bytes.sum() == len(done.text.encode())


def test_a_reply_of_50_mb_and_one_that_is_sent_twice() -> None:
    with ChatServer({0: "big", 3: "twice", 5: "twice"}) as server:
        done = run(config(server.url))
    assert sorted(c.position for c in done) == list(range(12))
    for c in done:
        assert c.text.startswith(f"question {c.position} →")


def test_another_model_in_the_replies_ends_the_run() -> None:
    with ChatServer({6: "another model"}) as server, pytest.raises(EndpointError) as caught:
        run(config(server.url))
    assert re.search("replies as '(teacher|cheaper-teacher)', but earlier replies came from", str(caught.value))


def test_an_unknown_model_is_reported_with_the_known_ones() -> None:
    with ChatServer() as server, pytest.raises(EndpointError, match="it has teacher") as caught:
        run(config(server.url).model_copy(update={"model": "techer"}))
    assert "'techer'" in str(caught.value)


def test_a_server_without_tls_is_reported_at_once() -> None:
    with ChatServer() as server:
        url = server.url.replace("http://", "https://")
        with pytest.raises(EndpointError, match="no TLS connection") as caught:
            run(config(url))
    assert "use http:// if the server has no TLS" in str(caught.value)


def test_a_provider_without_logprobs_returns_text() -> None:
    def thinks(body: dict[str, Any]) -> Answer:
        return Answer("4", [*pieces_of("<think>\nhm\n</think>\n\n4"), END], {"reasoning_content": "hm"})

    with ChatServer(answer=thinks, habits=["refuses logprobs"]) as server:
        with pytest.raises(EndpointError, match="does not support logprobs"):
            run(config(server.url), 1)
        done = run(config(server.url, logprobs=False), 2)
        assert "logprobs" not in server.asked[-1]
    for c in done:
        assert c.text == "<think>\nhm\n</think>\n\n4"
        assert len(c.logprobs) == len(c.token_bytes) == 0
        columns = token_columns(c)
        assert columns.pop("num_tokens") == c.completion_tokens > 0
        assert columns == {"token_ids": None, "logprobs": None, "token_bytes": None}


# --- streams ----------------------------------------------------------------------------------------------


def test_a_stream_gives_the_same_as_a_single_reply() -> None:
    with ChatServer() as server:
        whole, streamed = (run(config(server.url, stream=stream)) for stream in (False, True))
        assert all(body["stream"] and body["stream_options"] == {"include_usage": True} for body in server.asked[12:])
    for one, other in zip(*(sorted(done, key=lambda c: c.position) for done in (whole, streamed)), strict=True):
        assert (one.text, one.finish_reason, one.prompt_tokens) == (
            other.text,
            other.finish_reason,
            other.prompt_tokens,
        )
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
        np.testing.assert_array_equal(one.token_bytes, other.token_bytes)


def test_a_stream_that_breaks_off_is_retried() -> None:
    with ChatServer({2: "cut stream", 4: "503"}) as server:
        done = run(config(server.url, stream=True))
    assert sorted(c.position for c in done) == list(range(12))
    assert len(server.asked) == 14


# --- budgets ----------------------------------------------------------------------------------------------


def used(done: list[Completion]) -> int:
    return sum(c.prompt_tokens + len(c.logprobs) for c in done)


def test_a_token_budget_stops_the_run_after_the_answers_in_flight() -> None:
    with ChatServer(delay_s=0.02) as server:
        everything = used(run(config(server.url), 100))
        done: list[Completion] = []
        model = config(server.url, budget=Budget(max_tokens=everything // 2))
        asked = [Request(i, ({"role": "user", "content": f"question {i}"},), 50, i) for i in range(100)]
        with pytest.raises(EndpointError, match=r"max_tokens = [\d,]+: [\d,]+ tokens have been used.*; raise it"):
            for completion in open_sampler(model).complete(asked, SamplingParams()):
                done.append(completion)
    assert 0.8 * everything / 2 < used(done) <= everything / 2
    assert len(server.answered) == 100 + len(done), "every answer that was charged for was delivered"


def test_a_cost_budget_counts_earlier_spending() -> None:
    prices = Prices(input=1.0, output=10.0)
    with ChatServer() as server:
        model = config(server.url, prices=prices, budget=Budget(max_cost=1.0))
        assert len(run(model)) == 12
        with pytest.raises(EndpointError, match=r"teacher.budget.max_cost = 1: 1.005 has been spent"):
            run(model, used=Usage(5_000, 100_000))
    assert len(server.answered) == 12


def test_a_budget_needs_a_server_that_counts_tokens() -> None:
    with ChatServer(habits=["no usage"]) as server:
        assert len(run(config(server.url))) == 12
        with pytest.raises(EndpointError, match="do not report `usage`"):
            run(config(server.url, budget=Budget(max_tokens=10**9)))


def test_a_cost_budget_needs_prices() -> None:
    with pytest.raises(ValueError, match=r"budget\.max_cost = 5 needs prices"):
        config("http://x/v1", budget=Budget(max_cost=5.0))


# --- continuing a given prefix --------------------------------------------------------------------------------


def half(body: dict[str, Any]) -> Answer:
    text = "two, three.\n</think>\n\n3" if body["messages"][-1]["role"] == "assistant" else "<think>\none, two"
    return Answer(text, [*pieces_of(text), END])


def test_a_chat_server_that_keeps_the_thinking_continues_a_prefix() -> None:
    with ChatServer(habits=["continue"], answer=half) as server:
        (done,) = run(config(server.url), 1, prefix="<think>\none, ")
    assert done.text == "two, three.\n</think>\n\n3"
    assert done.token_bytes.sum() == len(done.text.encode())
    body = server.asked[-1]
    assert body["continue_final_message"] and not body["add_generation_prompt"]
    assert body["messages"][-1] == {"role": "assistant", "content": "<think>\none, "}


@pytest.mark.parametrize("habits", [[], ["continue", "forgets thinking"], ["continue", "no usage"]])
def test_a_server_that_does_not_is_rejected_by_name(habits: list[str]) -> None:
    with ChatServer(habits=habits, answer=half) as server, pytest.raises(EndpointError) as caught:
        run(config(server.url), 1, prefix="<think>\none, ")
    assert server.url in str(caught.value) and "set teacher.tokenizer" in str(caught.value)
    assert all(body["max_tokens"] == 1 for body in server.asked)


def test_a_vllm_server_gets_the_options_that_the_model_folder_would_set() -> None:
    with ChatServer(habits=["vllm"], answer=plain) as server:
        run(config(server.url), 1)
    assert (server.asked[0]["top_k"], server.asked[0]["min_p"], server.asked[0]["repetition_penalty"]) == (0, 0.0, 1.0)


# --- special cases ----------------------------------------------------------------------------------------


def test_questions_that_are_always_rejected_can_be_skipped(capfd: pytest.CaptureFixture[str]) -> None:
    with ChatServer({"question 3": "400", "question 5": "wrong bytes"}) as server:
        with pytest.raises(EndpointError, match=r"max_skipped = 10|the tokens have"):
            run(config(server.url))
        done = {c.position: c for c in run(config(server.url, max_skipped=2))}
    assert sorted(done) == list(range(12))
    assert {p for p, c in done.items() if c.finish_reason == "error"} == {3, 5}
    assert done[3].text == "" and len(done[3].logprobs) == 0
    assert "note: skipped a question (1 of 2): " in capfd.readouterr().err


def test_a_server_that_starts_late_is_described_before_its_first_request() -> None:
    late_was_asked = threading.Event()

    def answer_early(body: dict[str, Any]) -> Answer:
        if early.answered:
            late_was_asked.wait(60)
        return plain(body)

    def answer_late(body: dict[str, Any]) -> Answer:
        late_was_asked.set()
        return plain(body)

    late = ChatServer(habits=["vllm"], answer=answer_late)
    with ChatServer(habits=["vllm"], answer=answer_early) as early:
        asked = [Request(i, ({"role": "user", "content": f"question {i}"},), 50, i) for i in range(60)]
        model = config(early.url, late.url, timeout_s=100.0)
        completions = open_sampler(model).complete(asked, SamplingParams())
        first = next(iter(completions))
        with late:
            assert len([first, *completions]) == 60
    for body in (*early.asked, *late.asked):
        assert body["repetition_penalty"] == 1.0 and body["top_k"] == 0
    assert late.asked


def test_the_key_is_not_in_the_error_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "sk-very-secret")
    with ChatServer({-1: "error in stream"}) as server, pytest.raises(EndpointError) as caught:
        run(config(server.url, stream=True, max_retries=1, api_key_env="A_KEY"), 1)
    assert "upstream refused Bearer [key]" in str(caught.value)


def test_a_budget_that_just_suffices_and_one_without_an_estimate() -> None:
    with ChatServer(delay_s=0.02) as server:
        everything = used(run(config(server.url), 20))
        assert len(run(config(server.url, budget=Budget(max_tokens=everything)), 20)) == 20
        before = len(server.asked)
        with pytest.raises(EndpointError, match="have been used"):
            run(config(server.url, concurrency=64, budget=Budget(max_tokens=everything // 4)), 100)
        assert len(server.asked) - before <= 6


def test_a_constant_reply_id_is_not_a_reply_sent_twice() -> None:
    with ChatServer(habits=["one id"]) as server:
        assert len(run(config(server.url))) == 12
    assert len(server.asked) == 12


def test_a_template_that_writes_think_through_chat() -> None:
    def opened(_: dict[str, Any]) -> Answer:
        return Answer("hm\n</think>\n\n4", [*pieces_of("hm\n</think>\n\n4"), END])

    with ChatServer(answer=opened) as server:
        (done,) = run(config(server.url), 1)
    assert done.text == "<think>\nhm\n</think>\n\n4"
    assert done.token_bytes.sum() == len(b"hm\n</think>\n\n4"), "no token has the bytes that the template wrote"


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/v1", "http://host:65536/v1"])
def test_a_port_out_of_range(url: str) -> None:
    with pytest.raises(ConfigError, match="is not an address"):
        open_sampler(config(url))

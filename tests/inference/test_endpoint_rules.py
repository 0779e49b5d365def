"""The endpoint sampler beyond retries: budgets, streams, refusals, other models, and what a reply may not hold."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from tests.server import END, Answer, ChatServer, pieces_of, plain

from dasd_lite.config.models import Budget, Endpoint, Prices
from dasd_lite.data.usage import Usage
from dasd_lite.errors import ConfigError, EndpointError
from dasd_lite.inference import Completion, Request, SamplingParams, open_sampler
from dasd_lite.inference.collect import token_columns
from dasd_lite.inference.endpoint import client as servers
from dasd_lite.inference.endpoint import dispatch


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "BACKOFF_S", 0.01)
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
def test_nothing_is_made_of_what_a_reply_lacks(fault: str, words: str) -> None:
    with ChatServer({3: fault}) as server, pytest.raises(EndpointError, match=re.escape(words)) as caught:
        run(config(server.url))
    assert server.url in str(caught.value)


def test_a_refusal_and_a_cut_answer_are_kept_as_what_they_are() -> None:
    with ChatServer({"question 1": "refusal", "question 2": "length"}) as server:
        done = {c.position: c for c in run(config(server.url))}
    assert len(done) == 12
    assert done[1].finish_reason == "refusal"
    assert done[1].text.startswith("question 1 →")
    assert done[2].finish_reason == "length"
    for c in done.values():
        assert c.token_bytes.sum() == len(c.text.encode())
        assert len(c.logprobs) == len(c.token_bytes)


def test_a_tool_call_has_the_text_that_its_tokens_spell() -> None:
    def call(_: dict[str, Any]) -> Answer:
        text = '<think>\nhm\n</think>\n\n<tool_call>{"name": "f"}</tool_call>'
        reasoning: Any = {"reasoning_content": "\nhm\n", "tool_calls": [{"function": {"name": "f"}}]}
        return Answer(None, [*pieces_of(text), END], reasoning, "tool_calls")

    with ChatServer(answer=call) as server:
        (done,) = run(config(server.url), 1)
    assert done.finish_reason == "tool_calls"
    assert "<tool_call>" in done.text
    assert done.token_bytes.sum() == len(done.text.encode())


def test_a_reply_of_50_mb_and_one_that_comes_twice() -> None:
    with ChatServer({0: "big", 3: "twice", 5: "twice"}) as server:
        done = run(config(server.url))
    assert sorted(c.position for c in done) == list(range(12))
    for c in done:
        assert c.text.startswith(f"question {c.position} →")


def test_another_model_in_the_middle_of_a_run_ends_it() -> None:
    with ChatServer({6: "another model"}) as server, pytest.raises(EndpointError) as caught:
        run(config(server.url))
    assert re.search("replies as '(teacher|cheaper-teacher)', but earlier replies came from", str(caught.value))


def test_a_model_that_the_server_does_not_have_is_told_with_those_that_it_has() -> None:
    with ChatServer() as server, pytest.raises(EndpointError, match="it has teacher") as caught:
        run(config(server.url).model_copy(update={"model": "techer"}))
    assert "'techer'" in str(caught.value)


def test_tls_where_there_is_none_is_told_at_once() -> None:
    with ChatServer() as server:
        url = server.url.replace("http://", "https://")
        with pytest.raises(EndpointError, match="no TLS connection") as caught:
            run(config(url))
    assert "use http:// if the server has no TLS" in str(caught.value)


def test_a_provider_without_logprobs_gives_text_when_nobody_asks_for_them() -> None:
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
        assert token_columns(c) == {"token_ids": None, "logprobs": None, "token_bytes": None}


# --- streams ----------------------------------------------------------------------------------------------


def test_a_stream_gives_what_a_whole_reply_gives() -> None:
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


def test_a_stream_that_breaks_off_is_asked_for_again() -> None:
    with ChatServer({2: "cut stream", 4: "503"}) as server:
        done = run(config(server.url, stream=True))
    assert sorted(c.position for c in done) == list(range(12))
    assert len(server.asked) == 14


# --- budgets ----------------------------------------------------------------------------------------------


def used(done: list[Completion]) -> int:
    return sum(c.prompt_tokens + len(c.logprobs) for c in done)


def test_a_budget_of_tokens_stops_the_run_after_what_is_in_flight() -> None:
    with ChatServer(delay_s=0.02) as server:
        everything = used(run(config(server.url), 100))
        done: list[Completion] = []
        model = config(server.url, budget=Budget(max_tokens=everything // 2))
        asked = [Request(i, ({"role": "user", "content": f"question {i}"},), 50, i) for i in range(100)]
        with pytest.raises(EndpointError, match=r"budget.max_tokens = [\d,]+: [\d,]+ are used.*; raise it"):
            for completion in open_sampler(model).complete(asked, SamplingParams()):
                done.append(completion)
    assert 0.8 * everything / 2 < used(done) <= everything / 2
    assert len(server.answered) == 100 + len(done), "what was paid for was delivered"


def test_a_budget_of_money_counts_what_was_spent_before() -> None:
    prices = Prices(input=1.0, output=10.0)
    with ChatServer() as server:
        model = config(server.url, prices=prices, budget=Budget(max_cost=1.0))
        assert len(run(model)) == 12
        with pytest.raises(EndpointError, match=r"teacher.budget.max_cost = 1: 1.005 is spent"):
            run(model, used=Usage(5_000, 100_000))
    assert len(server.answered) == 12


def test_no_budget_where_the_server_does_not_count() -> None:
    with ChatServer(habits=["no usage"]) as server:
        assert len(run(config(server.url))) == 12
        with pytest.raises(EndpointError, match="do not report `usage`"):
            run(config(server.url, budget=Budget(max_tokens=10**9)))


def test_a_cost_without_prices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget\.max_cost = 5 needs prices"):
        config("http://x/v1", budget=Budget(max_cost=5.0))


# --- continuing a given prefix --------------------------------------------------------------------------------


def half(body: dict[str, Any]) -> Answer:
    text = "two, three.\n</think>\n\n3" if body["messages"][-1]["role"] == "assistant" else "<think>\none, two"
    return Answer(text, [*pieces_of(text), END])


def test_a_chat_server_that_keeps_the_thinking_goes_on_from_a_prefix() -> None:
    with ChatServer(habits=["continue"], answer=half) as server:
        (done,) = run(config(server.url), 1, prefix="<think>\none, ")
    assert done.text == "two, three.\n</think>\n\n3"
    assert done.token_bytes.sum() == len(done.text.encode())
    body = server.asked[-1]
    assert body["continue_final_message"] and not body["add_generation_prompt"]
    assert body["messages"][-1] == {"role": "assistant", "content": "<think>\none, "}


@pytest.mark.parametrize("habits", [[], ["continue", "forgets thinking"], ["continue", "no usage"]])
def test_one_that_does_not_is_refused_by_name(habits: list[str]) -> None:
    with ChatServer(habits=habits, answer=half) as server, pytest.raises(EndpointError) as caught:
        run(config(server.url), 1, prefix="<think>\none, ")
    assert server.url in str(caught.value) and "set teacher.tokenizer" in str(caught.value)
    assert all(body["max_tokens"] == 1 for body in server.asked)


def test_a_vllm_server_is_told_what_it_would_take_from_the_model_folder() -> None:
    with ChatServer(habits=["vllm"], answer=plain) as server:
        run(config(server.url), 1)
    assert (server.asked[0]["top_k"], server.asked[0]["min_p"], server.asked[0]["repetition_penalty"]) == (0, 0.0, 1.0)


# --- what a review has found --------------------------------------------------------------------------------


def test_a_question_that_is_refused_for_good_can_be_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    with ChatServer({"question 3": "400", "question 5": "wrong bytes"}) as server:
        with pytest.raises(EndpointError, match=r"max_skipped = 10|the tokens have"):
            run(config(server.url))
        done = {c.position: c for c in run(config(server.url, max_skipped=2))}
    assert sorted(done) == list(range(12))
    assert {p for p, c in done.items() if c.finish_reason == "error"} == {3, 5}
    assert done[3].text == "" and len(done[3].logprobs) == 0
    assert "note: skipped a question (1 of 2): " in capfd.readouterr().err


def test_a_server_is_known_before_it_is_asked_also_one_that_comes_later() -> None:
    late = ChatServer(habits=["vllm"])
    port = late.url
    with ChatServer(habits=["vllm"], delay_s=0.05) as early:
        asked = [Request(i, ({"role": "user", "content": f"question {i}"},), 50, i) for i in range(60)]
        completions = open_sampler(config(early.url, port)).complete(asked, SamplingParams())
        first = next(iter(completions))
        with late:
            assert len([first, *completions]) == 60
    for body in (*early.asked, *late.asked):
        assert body["repetition_penalty"] == 1.0 and body["top_k"] == 0
    assert late.asked


def test_the_key_is_not_in_what_a_stream_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "sk-very-secret")
    with ChatServer({-1: "error in stream"}) as server, pytest.raises(EndpointError) as caught:
        run(config(server.url, stream=True, max_retries=1, api_key_env="A_KEY"), 1)
    assert "upstream refused Bearer [key]" in str(caught.value)


def test_a_budget_that_just_suffices_is_enough_and_one_that_is_cold_is_bound() -> None:
    with ChatServer(delay_s=0.02) as server:
        everything = used(run(config(server.url), 20))
        assert len(run(config(server.url, budget=Budget(max_tokens=everything)), 20)) == 20
        before = len(server.asked)
        with pytest.raises(EndpointError, match="are used"):
            run(config(server.url, concurrency=64, budget=Budget(max_tokens=everything // 4)), 100)
        assert len(server.asked) - before <= 6


def test_an_id_that_is_always_the_same_is_no_reply_sent_twice() -> None:
    with ChatServer(habits=["one id"]) as server:
        assert len(run(config(server.url))) == 12
    assert len(server.asked) == 12


def test_a_template_that_opens_the_thought_through_chat() -> None:
    def opened(_: dict[str, Any]) -> Answer:
        return Answer("hm\n</think>\n\n4", [*pieces_of("hm\n</think>\n\n4"), END])

    with ChatServer(answer=opened) as server:
        (done,) = run(config(server.url), 1)
    assert done.text == "<think>\nhm\n</think>\n\n4"
    assert done.token_bytes.sum() == len(b"hm\n</think>\n\n4"), "no token has the bytes of what the template wrote"


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/v1", "http://host:65536/v1"])
def test_a_port_that_there_is_not(url: str) -> None:
    with pytest.raises(ConfigError, match="is not an address"):
        open_sampler(config(url))

"""The endpoint sampler over real HTTP: every request is done once whatever the server does, and errors are clear."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.server import END, Answer, ChatServer, pieces_of, plain

from dasd_lite.config.models import Endpoint
from dasd_lite.errors import ConfigError, EndpointError
from dasd_lite.inference import Completion, Request, SamplingParams
from dasd_lite.inference.backends import open_sampler
from dasd_lite.inference.endpoint import client, dispatch
from dasd_lite.inference.endpoint.replies import align

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    monkeypatch.setattr(dispatch, "POLL_S", 0.01)
    monkeypatch.setenv("TEST_KEY", KEY)


def config(*urls: str, **options: Any) -> Endpoint:
    defaults = {"model": "teacher", "api_key_env": "TEST_KEY", "concurrency": 8, "timeout_s": 5.0}
    return Endpoint(kind="endpoint", base_urls=list(urls), **{**defaults, **options})


def requests(num: int) -> list[Request]:
    return [Request(i, ({"role": "user", "content": f"question {i}"},), 50, seed=(1 << 60) + i) for i in range(num)]


def run(model: Endpoint, num: int = 20, **params: Any) -> list[Completion]:
    return list(open_sampler(model).complete(requests(num), SamplingParams(**params)))


def check_all_once(done: list[Completion], num: int) -> None:
    assert sorted(c.position for c in done) == list(range(num))
    for c in done:
        assert c.text.startswith(f"question {c.position} →")
        assert c.token_bytes.sum() == len(c.text.encode())
        assert c.token_bytes[-1] == 0  # the end token
        assert len(c.logprobs) == len(c.token_bytes)
        assert len(c.token_ids) == 0


def test_a_healthy_server() -> None:
    with ChatServer() as server:
        done = run(config(server.url), temperature=0.6, top_p=0.9)
    check_all_once(done, 20)
    assert len(server.asked) == 20
    assert server.keys == {f"Bearer {KEY}"}
    assert server.most_busy <= 8
    body = server.asked[0]
    assert body["logprobs"] is True and body["max_tokens"] == 50
    assert (body["temperature"], body["top_p"]) == (0.6, 0.9)
    assert "top_k" not in body and "top_logprobs" not in body
    first = next(c for c in done if c.position == 0)
    np.testing.assert_array_equal(first.logprobs, np.float32(-0.25) * (np.arange(len(first.logprobs)) % 7))
    assert first.finish_reason == "stop"


def test_no_request_no_connection() -> None:
    assert run(config("http://127.0.0.1:9/v1"), num=0) == []


@pytest.mark.parametrize("fault", ["429", "429 0.05", "500", "503", "cut", "garbage", "empty"])
def test_a_transient_failure_is_retried(fault: str) -> None:
    with ChatServer(faults=dict.fromkeys(range(0, 20, 3), fault)) as server:
        done = run(config(server.url))
    check_all_once(done, 20)
    assert len(server.answered) == 20
    assert len(server.asked) == 27


def test_a_request_without_a_reply_times_out_and_is_retried() -> None:
    with ChatServer(faults={1: "hang", 5: "hang"}) as server:
        done = run(config(server.url, timeout_s=1.0))
    check_all_once(done, 20)
    assert len(server.asked) >= 22, "a slow machine may time out more often"


def test_all_faults_mixed_on_two_servers() -> None:
    kinds = ["429 0.02", "500", "cut", "garbage", "503"]
    faults = {i: kinds[i // 3 % 5] for i in range(0, 200, 3)}
    with ChatServer(faults) as one, ChatServer(faults) as two:
        done = run(config(one.url, two.url), num=200)
    check_all_once(done, 200)
    assert len(one.answered) + len(two.answered) == 200
    assert min(len(one.answered), len(two.answered)) > 40


def test_retry_after_is_honored(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    sleeps: list[tuple[float, int]] = []

    async def sleep(_: Any, seconds: float) -> None:
        nonlocal clock
        sleeps.append((seconds, len(server.asked)))
        clock += seconds if seconds > dispatch.POLL_S else 0.0  # else it waits for a reply
        await asyncio.sleep(0.001)

    monkeypatch.setattr(dispatch, "time", SimpleNamespace(monotonic=lambda: clock))
    monkeypatch.setattr(dispatch.Dispatch, "_sleep", sleep)
    with ChatServer({0: "429 400"}) as server:
        run(config(server.url), num=1)
    assert len(server.asked) == 2
    assert max(seconds for seconds, asked in sleeps if asked == 1) >= 400, "before the second request"
    assert max(seconds for seconds, asked in sleeps if asked != 1) <= dispatch.POLL_S


def test_retry_after_as_a_date_and_too_long() -> None:
    with ChatServer({-1: "429 Fri, 31 Dec 2999 23:59:59 GMT"}) as server, pytest.raises(EndpointError, match="to wait"):
        run(config(server.url), num=1)


def test_a_server_that_fails_at_once_does_not_draw_all_requests() -> None:
    with ChatServer({-1: "502"}) as bad, ChatServer() as good:
        done = run(config(bad.url, good.url), num=200)
    check_all_once(done, 200)
    assert len(good.answered) == 200


def test_a_dead_server_is_skipped() -> None:
    with ChatServer() as server:
        done = run(config(f"http://127.0.0.1:{_free_port()}/v1", server.url), num=100)
    check_all_once(done, 100)


def test_all_servers_dead() -> None:
    urls = [f"http://127.0.0.1:{_free_port()}/v1" for _ in range(2)]
    with pytest.raises(EndpointError, match="no server can be reached") as caught:
        run(config(*urls, max_retries=2))
    for url in urls:
        assert f"{url}: " in str(caught.value)


def test_a_request_that_always_fails() -> None:
    with ChatServer({-1: "500"}) as server, pytest.raises(EndpointError) as caught:
        run(config(server.url, max_retries=2), num=1)
    reason = "500 Internal Server Error: fault 500 for Bearer [key]; tried 3 times"
    assert str(caught.value) == f"{server.url}: {reason}"
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("400", "400 Bad Request: fault 400 for Bearer [key]; the prompt was 'question 10'"),
        ("401", "environment variable TEST_KEY"),
        ("403", "403 Forbidden"),
        ("404", "the server does not have model = 'teacher'"),
        ("null", "returns no log-probabilities, which the method needs"),
        ("short", "the tokens have 24 bytes, but the text has 43; the server must return"),
        ("wrong bytes", "the tokens have 54 bytes, but the text has 43"),
    ],
)
def test_a_permanent_failure_ends_the_run(fault: str, words: str) -> None:
    with ChatServer({"question 10": fault}) as server:
        done = []
        with pytest.raises(EndpointError) as caught:
            for completion in open_sampler(config(server.url, concurrency=2)).complete(requests(40), SamplingParams()):
                done.append(completion.position)
    assert words in str(caught.value)
    assert str(caught.value).startswith(server.url)
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert len(done) == len(set(done)) == len(server.answered)  # no answer that was charged for is lost
    assert 10 <= len(done) <= 12
    assert len(server.asked) == len(server.answered) + 1


def test_a_missing_key_is_named() -> None:
    with ChatServer({-1: "401"}) as server, pytest.raises(EndpointError, match="TEST_NO_KEY, which is not set"):
        run(config(server.url, api_key_env="TEST_NO_KEY"))
    assert server.keys == {None}


def test_wrong_path() -> None:
    with (
        ChatServer() as server,
        pytest.raises(
            EndpointError, match="no such path: /chat/completions; most servers need base_urls that end with /v1"
        ),
    ):
        run(config(server.url.removesuffix("/v1")))


@pytest.mark.parametrize(
    "url", ["localhost:8000", "localhost:8000/v1", "http:///v1", "http://host:99999999/v1", "http://[host/v1", ""]
)
def test_not_an_address(url: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"'{url}' is not an address")):
        run(config(url))


def test_backoff_has_an_upper_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 1.0)
    assert 0.5 <= client.backoff(1) <= 1.0
    assert 30 <= client.backoff(10_000) <= 60


def test_an_invalid_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-1\nsk-2")
    with pytest.raises(ConfigError) as caught:
        run(config("http://127.0.0.1:9/v1"))
    assert "TEST_KEY" in str(caught.value) and "sk-1" not in str(caught.value)


def test_a_prefix_is_rejected() -> None:
    request = Request(0, ({"role": "user", "content": "q"},), 5, seed=0, prefix="<think>\nWell")
    with ChatServer() as server, pytest.raises(EndpointError, match="cannot continue a half-written answer"):
        list(open_sampler(config(server.url)).complete([request], SamplingParams()))


def test_leaving_early_stops_the_thread() -> None:
    with ChatServer({-1: "hang", **dict.fromkeys(range(3), "")}) as server:
        completions = open_sampler(config(server.url)).complete(requests(100), SamplingParams())
        next(iter(completions))
        completions.close()  # type: ignore[attr-defined]
        assert not [t for t in threading.enumerate() if t.name == "endpoint"]
    assert len(server.asked) < 100


def test_a_slow_consumer_keeps_memory_flat() -> None:
    with ChatServer() as server:
        completions = open_sampler(config(server.url, concurrency=2)).complete(requests(100), SamplingParams())
        next(iter(completions))
        time.sleep(0.3)
        assert len(server.answered) < 20
        assert len(list(completions)) == 99


def test_top_k_is_sent_only_if_it_is_set() -> None:
    with ChatServer() as server:
        run(config(server.url), num=1, top_k=7)
    assert server.asked[0]["top_k"] == 7


# --- bytes of the tokens -------------------------------------------------------------------------------

THINK, REPLY = "Let me see. 2 → 3.", "Answer: 3 🙂"
WHOLE = f"<think>\n{THINK}\n</think>\n\n{REPLY}"


def answered(answer: Answer) -> Completion:
    with ChatServer(answer=lambda _: answer) as server:
        return run(config(server.url), num=1)[0]


@pytest.mark.parametrize("cut", [1, 3, 1000])
@pytest.mark.parametrize(
    ("think", "spelled", "reply"),
    [
        (THINK, f"{WHOLE}", REPLY),
        (f"\n{THINK}\n", f"{WHOLE}<|im_end|>", f"\n\n{REPLY}"),
        (THINK, f"{THINK}\n</think>\n\n{REPLY}", REPLY),  # the template wrote <think>
        (THINK, f"<think>{THINK}</think>{REPLY}", REPLY),
        (THINK, f"{THINK}{REPLY}", REPLY),
        (THINK, f"{THINK}\n\n\n</think>\n\n\n\n\n{REPLY}", f"\n\n\n\n\n{REPLY}"),
    ],
)
def test_split_answers_are_joined(cut: int, think: str, spelled: str, reply: str) -> None:
    end = [END] if spelled.endswith(END.decode()) else []
    pieces = pieces_of(spelled.removesuffix(END.decode()), cut)
    text, token_bytes = align(pieces + end, think.strip(), reply, ended=True)
    assert text == WHOLE
    assert token_bytes is not None
    assert token_bytes.sum() == len(WHOLE.encode())
    assert len(token_bytes) == len(pieces + end)
    assert (token_bytes >= 0).all()
    assert not end or token_bytes[-1] == 0


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_both_names_of_the_reasoning(name: str) -> None:
    done = answered(Answer(f"\n\n{REPLY}", [*pieces_of(WHOLE), END], {name: f"\n{THINK}\n"}))
    assert done.text == WHOLE
    assert done.token_bytes.sum() == len(WHOLE.encode())


def test_tokens_begin_where_their_bytes_do() -> None:
    tokens = [b"Let", b" me.", b"</think>", b"3", b" yes", END]
    done = answered(Answer("3 yes", tokens, {"reasoning": "Let me."}))
    assert done.text == "<think>\nLet me.\n</think>\n\n3 yes"
    assert done.token_bytes.tolist() == [len("<think>\nLet"), 4, len("\n</think>\n\n"), 1, 4, 0]
    without = answered(Answer("3 yes", [b"Let", b" me.", b"3", b" yes"], {"reasoning": "Let me."}))
    assert without.token_bytes.tolist() == [len("<think>\nLet"), len(" me.\n</think>\n\n"), 1, 4]


@pytest.mark.parametrize(
    ("spelled", "text"), [("Let me", "<think>\nLet me"), ("Let me\n</think>", "<think>\nLet me\n</think>\n\n")]
)
def test_thinking_that_was_cut_off_is_not_closed(spelled: str, text: str) -> None:
    done = answered(Answer(None, pieces_of(spelled), {"reasoning_content": "Let me"}, "length"))
    assert (done.text, done.finish_reason) == (text, "length")
    assert done.token_bytes.sum() == len(text.encode())


@pytest.mark.parametrize("shown", ["ok 🙂 \ufffd", "ok 🙂 "])
def test_half_a_character_at_the_end(shown: str) -> None:
    done = answered(Answer(shown, [*pieces_of("ok 🙂 "), "🙂".encode()[:2]], finish_reason="length"))
    assert done.text == shown
    assert done.token_bytes.sum() == len(shown.encode())


def test_invalid_characters_as_vllm_sends_them() -> None:
    tokens = [b"ok", b"", b"", b" and", b"", b"", b"!", END]
    text, token_bytes = align(tokens, "", "ok\ufffd and\ufffd\ufffd!", ended=True)
    assert token_bytes is not None
    assert token_bytes.tolist() == [2, 0, 3, 4, 0, 6, 1, 0]
    text, token_bytes = align(tokens, "ok\ufffd", "and\ufffd\ufffd!", ended=True)
    assert text == "<think>\nok\ufffd\n</think>\n\nand\ufffd\ufffd!"
    assert token_bytes is not None
    assert token_bytes.sum() == len(text.encode())
    assert align(tokens, "", "ok\ufffd but\ufffd\ufffd!", ended=True)[1] is None


def test_a_token_without_bytes_is_its_text() -> None:
    answer = plain({"messages": [{"content": "q"}], "seed": 1})
    answer.pieces = [c.encode() for c in answer.content or ""]
    answer.tokens = lambda *_: [{"token": p.decode(), "logprob": -1.0, "bytes": None} for p in answer.pieces]  # type: ignore[method-assign]
    done = answered(answer)
    assert done.token_bytes.tolist() == [len(p) for p in answer.pieces]


def test_other_finish_reasons_and_empty_answers_are_kept() -> None:
    done = answered(Answer(None, [], finish_reason="content_filter"))
    assert (done.text, done.finish_reason, len(done.logprobs)) == ("", "content_filter", 0)


def test_a_token_after_the_text_is_not_taken_for_an_end_token() -> None:
    with pytest.raises(EndpointError, match="the tokens have 6 bytes, but the text has 3"):
        answered(Answer("abc", [b"abc", b"def"], finish_reason="length"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

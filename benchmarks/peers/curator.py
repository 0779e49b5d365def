"""Peers that query a server over HTTP: curator, and the openai client as it is commonly used.

    curator.py NAME BASE_URL MODEL NUMBER CONCURRENCY

Runs in .venv-curator. Each sends NUMBER questions that request log-probabilities, and reports how many of those it kept
and when (monotonic clock) it had returned everything. `one at a time` is how ms-swift's sampling queries a server.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
import time
from typing import Any

from timing import measure

# No cache of an earlier run, no telemetry, no progress display.
SCRATCH = tempfile.TemporaryDirectory()
os.environ |= {
    "HOME": SCRATCH.name,
    "CURATOR_CACHE_DIR": SCRATCH.name,
    "CURATOR_DISABLE_CACHE": "true",
    "CURATOR_DISABLE_RICH_DISPLAY": "1",
    "CURATOR_VIEWER": "false",
    "TELEMETRY_ENABLED": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    # curator counts prompt tokens with tiktoken's cl100k_base, which it would download; litellm ships a copy.
    "TIKTOKEN_CACHE_DIR": sysconfig.get_path("purelib") + "/litellm/litellm_core_utils/tokenizers",
    "OPENAI_API_KEY": "none",
}
PARAMS = {"logprobs": True, "max_tokens": 4096, "temperature": 1.0}


def curator(url: str, model: str, questions: list[str], concurrency: int) -> dict[str, Any]:
    """Call curator's LLM unchanged: its dataset has only the text."""
    from bespokelabs.curator import LLM

    answers = _dataset(LLM, url, model, questions, concurrency)
    done = time.monotonic()
    assert answers.column_names == ["response"] and all(answers["response"])
    return {"done": done, "num": len(answers), "logprobs": 0}


def curator_raw(url: str, model: str, questions: list[str], concurrency: int) -> dict[str, Any]:
    """Have curator pass the raw reply to `parse`, which extracts the log-probabilities."""
    from bespokelabs.curator import LLM

    class WithLogprobs(LLM):
        return_completions_object = True

        def parse(self, input: Any, response: Any) -> dict[str, Any]:
            choice = response["choices"][0]
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            return {"response": choice["message"]["content"], "logprobs": logprobs}

    answers = _dataset(WithLogprobs, url, model, questions, concurrency)
    return {"done": time.monotonic(), "num": len(answers), "logprobs": sum(map(len, answers["logprobs"]))}


def _dataset(llm: Any, url: str, model: str, questions: list[str], concurrency: int) -> Any:
    """Use curator's client for OpenAI-compatible servers, limited only in the requests in flight."""
    backend = {
        "base_url": url,
        "max_concurrent_requests": concurrency,
        "max_requests_per_minute": 10**9,
        "max_tokens_per_minute": 10**15,
    }
    client = llm(model_name=model, backend="openai", generation_params=dict(PARAMS), backend_params=backend)
    return client(questions).dataset


def with_semaphore(url: str, model: str, questions: list[str], concurrency: int) -> dict[str, Any]:
    """Call the openai client from one task per question; a semaphore bounds the requests in flight."""
    import asyncio

    from openai import AsyncOpenAI

    async def main() -> list[tuple[str, list[float]]]:
        semaphore = asyncio.Semaphore(concurrency)
        async with AsyncOpenAI(base_url=url) as client:

            async def ask(question: str) -> tuple[str, list[float]]:
                async with semaphore:
                    return _text_and_logprobs(await client.chat.completions.create(**_body(model, question)))

            return await asyncio.gather(*map(ask, questions))

    return _measured(asyncio.run(main()))


def one_at_a_time(url: str, model: str, questions: list[str], _concurrency: int) -> dict[str, Any]:
    """Call the openai client in a loop."""
    from openai import OpenAI

    client = OpenAI(base_url=url)
    return _measured(
        [_text_and_logprobs(client.chat.completions.create(**_body(model, question))) for question in questions]
    )


def _body(model: str, question: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}], **PARAMS}


def _text_and_logprobs(reply: Any) -> tuple[str, list[float]]:
    choice = reply.choices[0]
    return choice.message.content, [token.logprob for token in choice.logprobs.content]


def _measured(answers: list[tuple[str, list[float]]]) -> dict[str, Any]:
    return {
        "done": time.monotonic(),
        "num": len(answers),
        "logprobs": sum(len(logprobs) for _, logprobs in answers),
    }


def main() -> None:
    """Measure the named peer."""
    name, url, model, number, concurrency = sys.argv[1:]
    questions = [f"Question {i}: how much is {i} and {i}?" for i in range(int(number))]
    peer = {
        "curator": curator,
        "curator, raw replies": curator_raw,
        "AsyncOpenAI, semaphore": with_semaphore,
        "OpenAI, one at a time": one_at_a_time,
    }[name]
    measure({name: lambda: peer(url, model, questions, int(concurrency))})


if __name__ == "__main__":
    main()

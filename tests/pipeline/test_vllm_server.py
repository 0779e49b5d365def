"""A real vLLM server: the demo's teacher served, asked by token ids and through chat."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dasd_lite.config.models import Endpoint
from dasd_lite.inference import Request, SamplingParams
from dasd_lite.inference.backends import open_sampler
from dasd_lite.inference.endpoint.probe import Requirements, probe_servers

NUM = 24


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def answers(url):
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def urls(vllm_installed, demo, tmp_path_factory):
    """Base URLs of a server of the demo's teacher, which ends with the tests."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(demo / "teacher")]
    command += ["--served-model-name", "teacher", "--enforce-eager", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--distributed-executor-backend", "uni"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as file:
        # In a session of its own: the engine is another process, which must end with the server.
        server = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        while not answers(url):
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield [url]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def model(urls, **options):
    return Endpoint(kind="endpoint", model="teacher", base_urls=urls, api_key_env="NO_SUCH_KEY", **options)


@pytest.fixture(scope="module")
def questions(demo):
    with (demo / "train.jsonl").open(encoding="utf-8") as file:
        return [json.loads(next(file))["prompt"] for _ in range(NUM)]


def requests(questions, prefixes=()):
    prefixes = prefixes or [""] * len(questions)
    return [
        Request(i, ({"role": "user", "content": question},), 160, seed=i, prefix=prefix)
        for i, (question, prefix) in enumerate(zip(questions, prefixes, strict=True))
    ]


def complete(sampler, asked, temperature=0.6):
    return sorted(sampler.complete(asked, SamplingParams(temperature)), key=lambda c: c.position)


@pytest.fixture(scope="module")
def sampled(urls, demo, questions):
    return complete(open_sampler(model(urls, tokenizer=str(demo / "teacher"))), requests(questions))


@pytest.mark.parametrize("by_ids", [True, False])
def test_the_probe_reports_no_problem(urls, demo, questions, by_ids):
    teacher = model(urls, tokenizer=str(demo / "teacher") if by_ids else None)
    for server in probe_servers(
        teacher, ({"role": "user", "content": questions[0]},), Requirements(prefix=True, scoring=by_ids)
    ):
        values = {item.name: item.value for item in server.items}
        assert not [item for item in server.items if item.fatal]
        assert values["raw"] == values["logprobs"] == "yes"
        assert values["bytes"] == ("token ids" if by_ids else "add up")
        assert values["seed"] == "works"
        assert values.get("scores") == ("yes" if by_ids else None)
        assert values["continues"] == ("token ids" if by_ids else "chat: continue_final_message")


def test_token_ids_give_what_chat_gives(urls, questions, sampled):
    by_chat = complete(open_sampler(model(urls)), requests(questions))
    assert [c.text for c in by_chat] == [c.text for c in sampled]
    for one, other in zip(by_chat, sampled, strict=True):
        np.testing.assert_array_equal(one.token_bytes, other.token_bytes)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        assert one.finish_reason == other.finish_reason == "stop"
        assert one.prompt_tokens == other.prompt_tokens > 0


def test_a_stream_gives_the_same(urls, demo, questions, sampled):
    streamed = complete(open_sampler(model(urls, tokenizer=str(demo / "teacher"), stream=True)), requests(questions))
    for one, other in zip(streamed, sampled, strict=True):
        assert one.text == other.text
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
    through_chat = complete(open_sampler(model(urls, stream=True)), requests(questions))
    assert [c.text for c in through_chat] == [c.text for c in sampled]


def test_logprobs_are_raw_and_scoring_gives_the_same(urls, demo, questions, sampled):
    from dasd_lite.model.load import load_model
    from dasd_lite.model.logprobs import plain_logprobs

    sampler = open_sampler(model(urls, tokenizer=str(demo / "teacher")))
    prompts = [sampler.chat.prompt_ids(request.messages) for request in requests(questions)]
    sequences = [(c.position, np.concatenate([prompts[c.position], c.token_ids])) for c in sampled]
    read = {position: logprobs for position, logprobs, _ in sampler.score(sequences)}
    reference = load_model(demo / "teacher", dtype="float32", device="cpu")
    assert sorted(read) == list(range(NUM))
    for position, ids in sequences:
        expected = plain_logprobs(reference, ids)
        np.testing.assert_allclose(read[position], expected, rtol=0, atol=1e-4)
        answer = expected[len(prompts[position]) :]
        np.testing.assert_allclose(sampled[position].logprobs, answer, rtol=0, atol=1e-4)


@pytest.mark.parametrize("by_ids", [True, False])
def test_a_given_prefix_is_continued_where_it_ends(urls, demo, questions, sampled, by_ids):
    prefixes = [c.text[: c.text.index(" ", len(c.text) // 2)] for c in sampled]
    sampler = open_sampler(model(urls, tokenizer=str(demo / "teacher") if by_ids else None))
    done = complete(sampler, requests(questions, prefixes))
    for completion, prefix in zip(done, prefixes, strict=True):
        assert completion.text.startswith(" ") and not completion.text.lstrip().startswith("<think>")
        assert (prefix + completion.text).count("<think>") == 1
        assert completion.token_bytes.sum() == len(completion.text.encode())
        assert len(completion.logprobs) == len(completion.token_bytes)


def test_a_prompt_over_the_context_is_named_before_anything_is_sampled(urls, demo, questions):
    from dasd_lite.errors import DataError

    sampler = open_sampler(model(urls, tokenizer=str(demo / "teacher")))
    asked = requests([*questions[:1], "and " * 600])
    with pytest.raises(DataError, match=r"request 1: the prompt of \d+ tokens leaves no room"):
        complete(sampler, asked)


def served(urls, demo):
    """The table of the teacher behind the server."""
    table = {"kind": "endpoint", "model": "teacher", "base_urls": urls, "api_key_env": "NO_SUCH_KEY"}
    return table | {"tokenizer": str(demo / "teacher")}


def test_one_recipe_with_vllm_here_and_with_vllm_behind_a_server(urls, vllm_teacher, demo, small_recipe, tmp_path, cli):
    """The same seeds, the same engine: the same answers, whether the teacher runs here or is served."""
    completions = {}
    for name, teacher in (("vllm", vllm_teacher), ("endpoint", served(urls, demo))):
        folder = tmp_path / name
        folder.mkdir()
        small_recipe(folder, teacher=teacher, prompts={"path": "demo:train.jsonl", "limit": 24}, evaluate=None)
        ended = cli("run", "run.toml", cwd=folder)
        assert ended.rc == 0, ended.stderr
        assert (folder / "run/mixed/train/model/model.safetensors").exists()
        rows = pq.read_table(folder / "run/low/sample/rollouts-00000.parquet").to_pylist()
        completions[name] = [(row["prompt_uid"], row["index"], row["completion"]) for row in rows]
        mixed = pq.read_table(folder / "run/mixed/mix/rollouts-00000.parquet").to_pylist()
        assert mixed and all(row["prefix_bytes"] > 0 for row in mixed)
    same = sum(one == other for one, other in zip(*completions.values(), strict=True))
    assert len(completions["vllm"]) == 48 and same >= 46, f"{same} of 48 answers are the same"


def test_the_example_is_one_command_and_a_url(urls, tmp_path):
    script = Path(__file__).parents[2] / "examples" / "distil_endpoint.py"
    command = [sys.executable, str(script), urls[0], "--limit", "20", "--prices", "0.2", "0.8", "--max-cost", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/endpoint/results/low/train/model/model.safetensors").exists()
    assert "40 rollouts of 20 prompts" in done.stdout and "cost 0.00" in done.stdout


def test_a_served_teacher_scores_answers_without_log_probabilities(
    urls, demo, sampled, questions, small_recipe, tmp_path, cli
):
    """The teacher behind the server scores ingested text: p is that of the tokens as they were sampled."""
    rows = [
        {"input": question, "output": c.text, "domain": "x"} for question, c in zip(questions, sampled, strict=True)
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    phase = {"name": "low", "source": "ingest", "ingest.paths": ["answers.jsonl"], "score.by": "teacher"}
    small_recipe(tmp_path, teacher=served(urls, demo), phase=[phase])
    for stage in ("ingest", "score"):
        ended = cli(stage, "run.toml", cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
    assert "scores" in ended.stdout  # the probe checks it
    scores = pq.read_table(tmp_path / "run/low/score/scores-00000.parquet").to_pylist()
    for score, completion in zip(scores, sampled, strict=True):
        mean = np.mean(completion.logprobs[:-1], dtype=np.float64)  # without the end token
        assert score["teacher_mean_logprob"] == pytest.approx(mean, abs=1e-4)

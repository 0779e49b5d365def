"""`dasd-lite run` and `sample` against a real server that misbehaves: every answer once, nothing paid for twice."""

import json
import random
import re
import signal
import socket
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.kills import KILLS, started, wait_for
from tests.recipes import write_recipe
from tests.server import END, Answer, ChatServer, pieces_of

from dasd_lite.inference.endpoint import client

FAULTS = ["429 0.1", "500", "503", "cut", "garbage", "empty", "twice", "hang"]


def thinks(body):
    """Return a thought and an answer that depend on the question and the seed alone."""
    if "seed" not in body:  # the probe checks whether a prefix is continued
        return Answer("x", [b"x"])
    question = body["messages"][-1]["content"]
    rng = random.Random(f"{question} {body['seed']}")
    steps = " ".join(f"Step {i} gives {rng.randrange(10)}." for i in range(rng.randrange(3, 9)))
    pieces = [*pieces_of(f"<think>\n{steps}\n</think>\n\nAnswer: {rng.randrange(10)}"), END]
    content = b"".join(pieces[:-1]).decode().split("</think>\n\n")[1]
    return Answer(content, pieces, {"reasoning_content": steps})


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)


def write(folder, num, *servers):
    """Write a recipe of one phase and `num` questions."""
    write_recipe(
        folder,
        prompts={"path": "questions.jsonl"},
        teacher={
            "kind": "endpoint",
            "model": "teacher",
            "base_urls": [server.url for server in servers],
            "api_key_env": "NO_SUCH_KEY",
            "concurrency": 8,
            "timeout_s": 1.0,
            "max_retries": 30,
            "prices": {"input": 1.0, "output": 10.0},
        },
        select={"max_duplicate_lines": 1.0, "max_duplicate_sentences": 1.0},
        evaluate=None,
        phase=[{"name": "low", "sample.temperature": 0.6}],
    )
    questions = [json.dumps({"prompt": f"How much is {i} + {i}?"}) for i in range(num)]
    (folder / "questions.jsonl").write_text("\n".join(questions))


def rollouts(folder):
    """Return every row of a finished folder, whose files must be those of its manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [shard["file"] for shard in manifest["tables"]["rollouts"]]
    assert sorted(names) == sorted(p.name for p in folder.glob("rollouts-*"))
    return [row for name in names for row in pq.read_table(folder / name).to_pylist()]


def assert_all_once(rows, num):
    assert len(rows) == 2 * num
    assert len({(row["prompt_uid"], row["index"]) for row in rows}) == 2 * num
    assert len({row["uid"] for row in rows}) == 2 * num
    for row in rows:
        body = {"messages": row["messages"], "seed": 0}
        assert row["completion"].startswith("<think>\nStep 0 gives"), body
        assert sum(row["token_bytes"]) == len(row["completion"].encode())
        assert len(row["token_bytes"]) == len(row["logprobs"]) and np.isfinite(row["logprobs"]).all()


def of_the_run(bodies, temperature=0.6, max_tokens=192):
    """Return the requests that are not part of the probe."""
    return [b for b in bodies if b["temperature"] == temperature and b["max_tokens"] == max_tokens]


def test_probe_trial_run_and_nothing_paid_twice(tmp_path, cli):
    with ChatServer(answer=thinks) as server:
        write(tmp_path, 40, server)
        ended = cli("run", "run.toml", cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
        asked = len(server.asked)
        assert cli("run", "run.toml", cwd=tmp_path).stdout.startswith("Nothing to do.")
        assert len(server.asked) == asked
    lines = ended.stdout.splitlines()
    assert lines[0].split() == [
        *("endpoint", "logprobs", "raw", "bytes", "thinking", "seed", "n", "=", "2"),
        *("noise", "continues", "answers", "as"),
    ]
    assert "teacher" in lines[1] and "own field" in lines[1]
    order = [line.split()[1] for line in lines if line.startswith("trial: ")]
    order += [line.split()[0] for line in lines if line.startswith("low/")]
    assert order == [f"low/{stage}" for stage in ("sample", "score", "select", "pack", "train")] * 2
    assert_all_once(rollouts(tmp_path / "run/low/sample"), 40)
    real = of_the_run(server.asked)
    assert len(real) == 80, "the trial's answers are taken over"
    assert len({(b["messages"][-1]["content"], b["seed"]) for b in real}) == 80
    assert re.search(r"low/sample +80 rollouts of 40 prompts, .*cost 0\.\d\d", ended.stdout)
    tokens = sum(len(row["logprobs"]) for row in rollouts(tmp_path / "run/low/sample"))
    timing = json.loads((tmp_path / "run/low/sample/timing.json").read_text())
    assert timing["completion_tokens"] == tokens
    assert timing["cost"] == pytest.approx((timing["prompt_tokens"] + 10 * tokens) / 1e6)


def test_a_fatal_result_of_the_probe_stops_before_the_first_answer(tmp_path, cli):
    for habit, words in (("no logprobs", "enable `logprobs` on"), ("tempered", "--logprobs-mode raw_logprobs")):
        with ChatServer(answer=thinks, habits=[habit]) as server:
            write(tmp_path, 40, server)
            for command in ("run", "sample", "check"):
                ended = cli(command, "run.toml", cwd=tmp_path)
                assert ended.rc == 2
                (line,) = ended.stderr.splitlines()
                assert words in line and server.url in line
            assert not of_the_run(server.asked)
        assert not (tmp_path / "run/low").exists()


def test_another_server_is_probed_again(tmp_path, cli):
    with ChatServer(answer=thinks) as good, ChatServer(answer=thinks, habits=["tempered"]) as tempered:
        write(tmp_path, 40, good)
        assert cli("sample", "run.toml", "teacher.budget={ max_tokens = 3000 }", cwd=tmp_path).rc == 2
        ended = cli("sample", "run.toml", f'teacher.base_urls=["{tempered.url}"]', cwd=tmp_path)
        assert ended.rc == 2 and "--logprobs-mode raw_logprobs" in ended.stderr
        assert not of_the_run(tempered.asked)
        ended = cli("sample", "run.toml", cwd=tmp_path)
    assert ended.rc == 0 and "logprobs" not in ended.stdout, "those of before are known"
    assert_all_once(rollouts(tmp_path / "run/low/sample"), 40)


def test_a_budget_is_for_the_whole_run_and_raising_it_resumes(tmp_path, cli):
    with ChatServer(answer=thinks) as server:
        write(tmp_path, 60, server)
        # One at a time: with requests in flight the message is another.
        one = "teacher.concurrency=1"
        ended = cli("sample", "run.toml", "teacher.budget={ max_tokens = 3000 }", one, cwd=tmp_path)
        assert ended.rc == 2
        assert re.search(r"teacher\.budget\.max_tokens = 3,000: [\d,]+ tokens have been used; raise it", ended.stderr)
        first = len(of_the_run(server.asked))
        assert 0 < first < 120
        ended = cli("sample", "run.toml", "teacher.budget={ max_cost = 100.0 }", cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
    assert len(of_the_run(server.answered)) == 120
    assert_all_once(rollouts(tmp_path / "run/low/sample"), 60)


def test_faults_on_30_percent_of_the_requests(tmp_path, cli):
    """Every answer comes once, and each fault costs one more request."""
    num, rng = 100, random.Random(1)
    faults = {i: rng.choice(FAULTS) for i in range(20, 4 * num) if rng.random() < 0.3} | {100: "big", 200: "big"}
    with ChatServer(faults, answer=thinks) as server:
        write(tmp_path, num, server)
        ended = cli("sample", "run.toml", cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
    assert_all_once(rollouts(tmp_path / "run/low/sample"), num)
    assert len({(b["messages"][-1]["content"], b["seed"]) for b in of_the_run(server.answered)}) == 2 * num
    asked = len(of_the_run(server.asked))
    assert 2.5 * num < asked < 4 * num, "the faults were met, and each cost one request"


@pytest.mark.kills
@pytest.mark.timeout(3600)
def test_killed_again_and_again_nothing_is_lost_twice_or_paid_twice(tmp_path, cli):
    """kill -9 in the middle of 400 prompts: each kill costs at most `concurrency` requests again."""
    rng = random.Random(2)
    with ChatServer(answer=thinks, delay_s=0.02) as server:
        write(tmp_path, 400, server)
        command = ["sample", "run.toml", "teacher.timeout_s=60"]
        for left in range(KILLS, 0, -1):
            unanswered = 800 - len({(b["messages"][-1]["content"], b["seed"]) for b in of_the_run(server.answered)})
            # The process cannot end before it is killed: the server holds a reply that it needs.
            held = server.hold(len(server.asked) + 1 + rng.randrange(unanswered // (left + 1)))
            with started(*command, cwd=tmp_path) as process:
                wait_for(held, process)
                time.sleep(rng.random() * 0.02)
                process.kill()
                assert process.wait() == -signal.SIGKILL
            server.drop_held()
        ended = cli(*command, cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
    assert_all_once(rollouts(tmp_path / "run/low/sample"), 400)
    assert len({(b["messages"][-1]["content"], b["seed"]) for b in of_the_run(server.asked)}) == 800
    assert len(of_the_run(server.asked)) - 800 <= 8 * KILLS


def test_two_servers_one_of_them_dead(tmp_path, cli):
    with socket.socket() as taken, ChatServer(answer=thinks) as server:
        taken.bind(("127.0.0.1", 0))  # bound, but nothing listens
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        write(tmp_path, 20, server)
        urls = f"teacher.base_urls={json.dumps([server.url, dead])}"
        ended = cli("sample", "run.toml", urls, cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
        assert_all_once(rollouts(tmp_path / "run/low/sample"), 20)
        assert f"{dead}" in ended.stdout and "not now" in ended.stdout
        ended = cli("sample", "run.toml", f'teacher.base_urls=["{dead}"]', "out='other'", cwd=tmp_path)
    assert ended.rc == 2 and f"teacher: no server can be reached: {dead}: " in ended.stderr


@pytest.mark.parametrize(
    ("overrides", "faults", "words"),
    [
        ((), {-1: "401"}, ["401 Unauthorized", "the environment variable NO_SUCH_KEY, which is not set"]),
        (("teacher.model='techer'",), {}, ["the server does not have model = 'techer'; it has teacher"]),
        (("teacher.base_urls=['{url}/v1']",), {}, ["base_urls has /v1 twice; write {url}"]),
        (("teacher.base_urls=['{host}']",), {}, ["most servers need base_urls that end with /v1; try {url}"]),
        (("teacher.base_urls=['{tls}']",), {}, ["no TLS connection", "use http:// if the server has no TLS"]),
        (
            ("teacher.base_urls=['localhost:8000/v1']",),
            {},
            ["is not an address; write one like http://localhost:8000/v1"],
        ),
        (("teacher.tokenizer='nowhere'",), {}, ["model = 'nowhere': no such folder"]),
        (("teacher.logprobs=false",), {}, ["select.rule = 'count' needs log-probabilities", "'random' or 'all'"]),
        (("teacher.budget.max_cost=5.0", "teacher.prices=0"), {}, ["teacher.prices"]),
    ],
)
def test_what_is_wrong_with_an_endpoint_is_one_line_before_anything_is_spent(tmp_path, cli, overrides, faults, words):
    with ChatServer(faults, answer=thinks) as server:
        write(tmp_path, 20, server)
        names = {
            "url": server.url,
            "host": server.url.removesuffix("/v1"),
            "tls": server.url.replace("http:", "https:"),
        }
        for command in ("run", "check"):
            ended = cli(command, "run.toml", *(override.format(**names) for override in overrides), cwd=tmp_path)
            assert ended.rc == 2, ended.stdout
            assert "Traceback" not in ended.stderr
            for word in words:
                assert word.format(**names) in ended.stderr, ended.stderr
            assert all(line.startswith("dasd-lite: ") for line in ended.stderr.splitlines())
        assert not of_the_run(server.asked)
    assert not list((tmp_path / "run").rglob("*.parquet"))


def test_a_provider_without_logprobs_serves_a_phase_that_needs_none(tmp_path, cli):
    with ChatServer(answer=thinks, habits=["refuses logprobs"]) as server:
        write(tmp_path, 20, server)
        ended = cli("run", "run.toml", "teacher.logprobs=false", "select.rule='random'", cwd=tmp_path)
    assert ended.rc == 0, ended.stderr
    assert "not requested" in ended.stdout
    rows = rollouts(tmp_path / "run/low/sample")
    assert len(rows) == 40 and all(row["logprobs"] is None for row in rows)
    assert all(row["completion"].startswith("<think>\nStep 0 gives") for row in rows)

"""Training that is killed at any instant, or runs out of disk, and the same call after it."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

# Imports once (seconds), then forks a process per line of input: "LIMIT OUT", a limit of bytes per
# file or 0. Answers with the process's id, and with how it ended.
SERVER = """
import os, resource, sys, traceback
from pathlib import Path
import numpy as np, pyarrow as pa, torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from dasd_lite import student
from dasd_lite.config import TrainConfig
from dasd_lite.dataset import identify
from dasd_lite.errors import DasdError
from dasd_lite.journal import ShardWriter
from dasd_lite.records import ROW
from dasd_lite.stages import train

def build(base):
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=61, hidden_size=48, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, attention_dropout=0.1)
    Qwen3ForCausalLM(config).save_pretrained(base / "model")
    rng = np.random.default_rng(0)
    rows = []
    for r in range(12):
        lengths = rng.integers(5, 40, 5)
        ids = rng.integers(0, 61, lengths.sum())
        mask = np.ones(len(ids), bool)
        rows.append({"ids": ids, "loss_mask": mask, "doc_lengths": lengths, "uids": [f"{r}.{d}" for d in range(5)]})
    with ShardWriter(base / "rows", identify("pack", 1, {}, {}), {"rows": ROW}) as writer:
        writer.write("rows", pa.Table.from_pylist(rows, schema=ROW))
        writer.publish({})

def in_child(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except DasdError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(2)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def stage(limit, out):
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train.run(base / "rows", base / "model", config, Path(out), seed=0)

torch.set_num_threads(1)
base = Path(sys.argv[1])
config = TrainConfig(epochs=6, learning_rate=1e-2, grad_accum_steps=2, checkpoint_every=2)
os.waitpid(in_child(lambda: build(base)), 0)
for line in sys.stdin:
    limit, out = line.split()
    pid = in_child(lambda: stage(int(limit), out))
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Server:
    def __init__(self, base):
        import dasd_lite

        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(dasd_lite.__file__).parents[1])}
        self.errors = base / "errors.txt"
        with self.errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(base)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def run(self, out, *, kill_after=None, limit=0):
        """Call train.run in a process of its own; return its exit code, −9 when killed."""
        self._process.stdin.write(f"{limit} {out}\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it was done before
                os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(int(self._process.stdout.readline()))

    def close(self):
        self._process.kill()  # it has no child and nothing to save, and torch takes seconds to leave
        self._process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("train"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server):
    """A run that nothing disturbed, and its seconds."""
    out = server.errors.parent / "whole"
    began = time.monotonic()
    assert server.run(out) == 0, server.errors.read_text()
    return out, time.monotonic() - began


def result(out):
    """All that must not depend on how often a run was stopped."""
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    lines = [json.loads(line) for line in files.pop(Path("metrics.jsonl")).splitlines()]
    files.pop(Path("timing.json"))
    return files, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("seed", range(4))
def test_kill_at_a_random_moment_changes_nothing(server, whole, seed):
    reference, seconds = whole
    out = reference.with_name(f"killed-{seed}")
    draw, kills = random.Random(seed), 0
    while True:
        code = server.run(out, kill_after=draw.uniform(0.1, 1.0) * seconds if kills < 3 else None)
        if code == 0:
            break
        assert code == -signal.SIGKILL, server.errors.read_text()
        kills += 1
    assert result(out) == result(reference)
    assert [line["step"] for line in result(out)[1]] == list(range(1, 37))


def test_a_full_disk_is_one_line_and_the_same_call_goes_on(server, whole):
    reference, _ = whole
    out = reference.with_name("full")
    assert server.run(out, limit=60_000) == 2  # the weights are larger, rows and metrics are not
    message = server.errors.read_text().splitlines()[-1]
    assert "no space left on the device" in message
    assert [p.name for p in (out / "checkpoints").iterdir() if p.suffix != ".tmp"] == []
    assert server.run(out) == 0
    assert result(out) == result(reference)

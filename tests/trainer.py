"""A process that has imported torch and forks to train: so that a test can kill one every second.

    trainer = Trainer(folder)
    trainer.run(out, ranks=2, config={…}, moment=Moment("rename .*checkpoints/step", 3))

It trains a tiny model on rows at random (`folder`/rows): `folder`/model, or steady, without dropout, or hybrid, whose
documents cannot share a row. Several ranks find each other as torchrun would have them, without its agent.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

SERVER = """
import json, os, resource, signal, sys, traceback
from pathlib import Path
import bitsandbytes, numpy as np, pyarrow as pa, torch
from transformers import Lfm2Config, Lfm2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from dasd_lite.config.train import TrainConfig
from dasd_lite.data.manifest import identify
from dasd_lite.data.records import ROW
from dasd_lite.data.writer import ShardWriter
from dasd_lite.errors import DasdError
from dasd_lite.model import logprobs
from dasd_lite.stages.train import train
sys.path.append(sys.argv[2])
from kills import Moment, die_at, preload

def build(base):
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=61, hidden_size=48, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, attention_dropout=0.1)
    Qwen3ForCausalLM(config).save_pretrained(base / "model")
    config.attention_dropout, config.tie_word_embeddings = 0.0, True
    Qwen3ForCausalLM(config).save_pretrained(base / "steady")
    hybrid = Lfm2Config(vocab_size=61, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, layer_types=["conv", "full_attention"])
    Lfm2ForCausalLM(hybrid).save_pretrained(base / "hybrid")
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
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def stage(task, rank):
    if task["moment"] and rank == 0:
        die_at(Moment(**task["moment"]))
    if task["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["limit"], task["limit"]))
    if task["ranks"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(task["ranks"]), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(task["port"]))
    logprobs.LOGIT_BYTES = task["logit_bytes"]
    config = {"epochs": 6, "learning_rate": 1e-2, "grad_accum_steps": 2, "checkpoint_every": 2} | task["config"]
    config = TrainConfig(**config)
    train(base / "rows", base / task["model"], config, out=Path(task["out"]), seed=0)

preload()
base = Path(sys.argv[1])
os.waitpid(in_child(lambda: build(base)), 0)
print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    pids = [in_child(lambda: stage(task, rank)) for rank in range(task["ranks"])]
    print(*(os.waitpid(pid, 0)[1] for pid in pids), flush=True)
"""


class Trainer:
    """See the module."""

    def __init__(self, base):
        import dasd_lite

        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(dasd_lite.__file__).parents[1])}
        self.base, self.errors = base, base / "errors.txt"
        with self.errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(base), str(Path(__file__).parent)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._process.stdout.readline()  # model and rows are there

    def run(self, out, *, moment=None, **options):
        """Train in processes of their own; return their exit codes, −9 when killed. The first gets `moment`.

        Options: ranks, config, model, a limit of bytes per file, and of the logits that exist at once.
        """
        defaults = {"ranks": 1, "config": {}, "model": "model", "limit": 0, "logit_bytes": 1 << 28}
        assert options.keys() <= defaults.keys()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        task = {**defaults, **options, "moment": moment and asdict(moment), "out": str(out), "port": port}
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        codes = [os.waitstatus_to_exitcode(int(status)) for status in self._process.stdout.readline().split()]
        return codes[0] if task["ranks"] == 1 else codes

    def close(self):
        self._process.kill()  # it has no child and nothing to save, and torch takes seconds to leave
        self._process.communicate()


def metrics(out):
    """The figures of each step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def result(out):
    """Everything that must not depend on how often a run was stopped: bytes of files, metrics without times."""
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    files.pop(Path("metrics.jsonl"))
    files.pop(Path("timing.json"))
    same = ("step", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens")
    return files, [{name: line[name] for name in same} for line in metrics(out)]

"""Several processes: the same losses, checkpoints for any number of them, how they start and end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.rows import make_rows, write_rows

import dasd_lite

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.kills import Moment
from tests.trainer import Trainer, metrics

COUNTS = ("step", "tokens", "target_tokens")
ODD = {"micro_batch_size": 2, "grad_accum_steps": 3}
RECIPE = """
out = "run"
prompts.path = "{demo}/train.jsonl"
teacher = {{ kind = "transformers", model = "{demo}/teacher" }}
student = {{ kind = "transformers", model = "{demo}/student" }}
train = {{ epochs = 2, grad_accum_steps = 4, monitor_questions = 2, monitor_tokens = 8 }}
evaluate.prompts = "{demo}/validation.jsonl"
[[phase]]
name = "low"
"""
SPARING = {"gradient_checkpointing": "on", "offload_activations": True}
LORA = {"method": {"kind": "lora", "rank": 4, "alpha": 8.0}, "learning_rate": 1e-2}
# The stage in a process of its own, which starts the ranks by torchrun's agent.
COMMAND = """
import json, sys
from pathlib import Path
import click
from dasd_lite import cli
from dasd_lite.config.extensions import add_import_folder
from dasd_lite.stages.train import train
base, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
@click.command()
def run():
    add_import_folder(base)
    train(base / "rows", base / "steady", out=out, **options)
sys.argv = sys.argv[:1]
cli.app = run
cli.main()
"""


BROKEN = """
from dasd_lite.training.objectives.sft import per_token
class Loss:
    per_token = staticmethod(per_token)
    def loss(self, per_token_N, targets):
        raise ZeroDivisionError("of the user")
"""
DEFECT = """
from dasd_lite.training import loop
from dasd_lite.training.objectives.sft import loss, per_token
def check_step(*arguments):
    raise ZeroDivisionError("of ours")
loop.check_step = check_step
"""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp("ranks"))
    yield trainer
    trainer.close()


def same_curve(a, b):
    for one, other in zip(metrics(a), metrics(b), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert [other[k] for k in COUNTS] == [one[k] for k in COUNTS]


def weights(out):
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "model"),
    [({}, "steady"), (LORA, "steady"), (ODD, "steady"), (SPARING, "steady"), (ODD, "hybrid")],
    ids=["full", "lora", "odd", "sparing", "hybrid"],
)
def test_two_and_four_processes_learn_as_one(trainer, config, model, request):
    config = {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "grad_accum_steps": 4, "epochs": 3, **config}
    folder = trainer.base / request.node.callspec.id
    # The output head is the embedding; with "sparing" its logits come in chunks of 20 positions.
    logit_bytes = 61 * 4 * 20 if "offload_activations" in config else 1 << 28
    for ranks in (1, 2, 4):
        codes = trainer.run(folder / str(ranks), ranks=ranks, config=config, model=model, logit_bytes=logit_bytes)
        assert codes in (0, [0] * ranks), trainer.errors.read_text()
    for ranks in ("2", "4"):
        same_curve(folder / "1", folder / ranks)
        for name, weight in weights(folder / "1").items():
            assert float((weights(folder / ranks)[name] - weight).abs().max()) < 1e-4, name
    assert metrics(folder / "1")[-1]["loss"] < metrics(folder / "1")[0]["loss"]


@pytest.mark.parametrize("config", [{}, LORA], ids=["full", "lora"])
def test_a_checkpoint_of_two_processes_resumes_in_one_and_in_four(trainer, config, request):
    config = {"grad_accum_steps": 4, "epochs": 6, "checkpoint_every": 4, "learning_rate": 1e-3, **config}
    config["min_learning_rate"] = 1e-4
    folder = trainer.base / f"from-{request.node.callspec.id}"
    assert trainer.run(folder / "reference", config=config, model="steady") == 0, trainer.errors.read_text()

    stop = Moment(r"rename .*checkpoints/step-\d+$", signal=signal.SIGTERM)  # as the first checkpoint comes to be there
    codes = trainer.run(folder / "two", ranks=2, config=config, model="steady", moment=stop)
    assert codes == [130, 130], trainer.errors.read_text()  # both know of it, and stop after the same step
    done = len(metrics(folder / "two"))
    assert 4 <= done < 18
    for ranks in (1, 4):
        out = folder / f"two-{ranks}"
        shutil.copytree(folder / "two", out)
        assert trainer.run(out, ranks=ranks, config=config, model="steady") in (0, [0] * 4), trainer.errors.read_text()
        assert metrics(out)[:done] == metrics(folder / "two")  # it resumed and did not start from scratch
        same_curve(folder / "reference", out)


def start(trainer, out, **options):
    config = {"num_processes": 2, "grad_accum_steps": 2, "epochs": 400, "checkpoint_every": 10, **options}
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "python"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(trainer.base), str(out), json.dumps(config)],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid):
    """The processes that `pid` has started, according to the kernel."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            pids.append(int(stat.parent.name))
    return pids


def wait_for_steps(out, process, number=12):
    while process.poll() is None:
        path = out / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= number:
            return
        time.sleep(0.05)
    raise AssertionError(process.stderr.read())


def test_a_killed_process_ends_the_others_and_the_same_command_resumes(trainer):
    out = trainer.base / "killed"
    process = start(trainer, out)
    wait_for_steps(out, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 2
    lines = errors.strip().splitlines()
    assert len(lines) == 1 and "of 2 was ended by SIGKILL" in lines[0], errors
    assert "run the same command to resume from the last checkpoint" in lines[0]
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]

    # The same command, asked to stop this time: it finishes its step.
    done = len(metrics(out)) // 10 * 10
    process = start(trainer, out)
    wait_for_steps(out, process, done + 12)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "stopped after step" in errors and "Traceback" not in errors, errors
    newest = max((out / "checkpoints").iterdir()).name
    assert newest == f"step-{len(metrics(out)):08d}"
    assert len(metrics(out)) > done


def test_torchrun_on_the_command_line(tmp_path, cli):
    """As on several machines: each process runs the command, and the first one writes and prints."""
    demo = Path(dasd_lite.__file__).parent / "demo"
    write_rows(tmp_path / "run" / "low" / "pack", make_rows(12))
    (tmp_path / "run.toml").write_text(RECIPE.format(demo=demo))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "python"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "dasd_lite", "train", "run.toml"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("low/train        6 steps, loss ") and lines[1].startswith("Next: dasd-lite run"), lines
    assert len(lines) == 2
    assert (tmp_path / "run" / "low" / "train" / "model" / "model.safetensors").exists()
    snapshots = (tmp_path / "run" / "low" / "train" / "monitor.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in snapshots] == [0, 1, 6]
    ended = cli("sample", "run.toml", cwd=tmp_path, RANK="0", WORLD_SIZE="2")
    assert ended.rc == 2 and "dasd-lite: torchrun can start only the stage train" in ended.stderr


def test_processes_do_not_outlive_the_command(trainer):
    out = trainer.base / "orphans"
    process = start(trainer, out)
    wait_for_steps(out, process)
    ranks = children(process.pid)
    process.kill()
    process.wait()
    process.stderr.close()
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):  # or the test times out
        time.sleep(0.1)

    # Asked to stop while the processes are only starting: they are asked as soon as they can be.
    process = start(trainer, trainer.base / "early")
    while len(children(process.pid)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert not (trainer.base / "early" / "manifest.json").exists()


def test_errors_of_the_processes_come_through(trainer):
    (trainer.base / "broken.py").write_text(BROKEN)
    process = start(trainer, trainer.base / "broken", objective="broken:Loss")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.startswith("dasd-lite: objective broken:Loss failed: ZeroDivisionError: of the user ("), errors
    assert errors.count("\n") == 1

    (trainer.base / "defect.py").write_text(DEFECT + "import sys\nLoss = sys.modules[__name__]\n")
    process = start(trainer, trainer.base / "defect", objective="defect:Loss")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "Traceback" in errors and "ZeroDivisionError: of ours" in errors, errors

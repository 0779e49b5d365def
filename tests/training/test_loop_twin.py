"""examples/train_loop.py, the training loop to be read: it has the losses of the real one."""

import importlib.util
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.rows import write_kept

import dasd_lite
from dasd_lite.chat.chat import Chat
from dasd_lite.stages.pack import pack
from dasd_lite.stages.train import train

ROOT = Path(__file__).parents[2]
DEMO = Path(dasd_lite.__file__).parent / "demo"


@pytest.fixture(scope="module")
def twin():
    spec = importlib.util.spec_from_file_location("train_loop", ROOT / "examples" / "train_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Answers in the demo's words, packed for its student."""
    folder, chat, kept = tmp_path_factory.mktemp("twin"), Chat(DEMO / "student"), []
    for line in (DEMO / "train.jsonl").read_text().splitlines()[:40]:
        question = json.loads(line)
        answer = f"<think>Start at {question['answer']}. The dial shows {question['answer']}.</think>\nAnswer: 1"
        ids, context = chat.example([{"role": "user", "content": question["prompt"]}], answer)
        kept.append({"uid": question["uid"], "ids": ids.tolist(), "num_context_tokens": context})
    return pack(write_kept(folder / "select", kept), out=folder / "pack", seq_len=256)


@pytest.mark.parametrize(("micro_batch_size", "grad_accum_steps", "epochs"), [(4, 1, 2.0), (1, 3, 1.5)])
def test_the_twin_has_the_losses_of_the_real_training(twin, rows, tmp_path, micro_batch_size, grad_accum_steps, epochs):
    from safetensors.torch import load_file

    options = {"epochs": epochs, "micro_batch_size": micro_batch_size, "grad_accum_steps": grad_accum_steps}
    options |= {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "weight_decay": 0.05}
    own = twin.train(rows.folder, tmp_path / "twin", **options, seed=5)
    real = train(rows, DEMO / "student", out=tmp_path / "real", **options, seed=5)
    lines = [json.loads(line) for line in (real.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(own) == len(lines) >= 4
    for mine, line in zip(own, lines, strict=True):
        assert (mine["step"], mine["target_tokens"]) == (line["step"], line["target_tokens"])
        assert mine["learning_rate"] == pytest.approx(line["learning_rate"], rel=1e-12)
        assert mine["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]
    weights = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "twin", real.folder))
    for mine, theirs in zip(*(tensors.values() for tensors in weights), strict=True):
        assert float((mine - theirs).abs().mean()) < 1e-6  # the largest change is 3e-3
    assert [json.loads(x) for x in (tmp_path / "twin" / "metrics.jsonl").read_text().splitlines()] == own


def test_the_twin_leaves_a_model_that_can_be_trained_on(twin, rows, tmp_path):
    first = twin.train(rows.folder, tmp_path / "first", epochs=1.0)
    second = train(rows, tmp_path / "first" / "model", out=tmp_path / "second", epochs=1.0, max_steps=1, seed=0)
    assert second.counts["first_step_loss"] < first[0]["loss"]

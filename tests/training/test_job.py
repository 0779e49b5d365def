"""What is refused before the first step, and a GPU that is full: one line each, and nothing is lost."""

import dataclasses
import re

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from tests.rows import (
    QUICK,
    make_model,
    make_rows,
    write_rows,
)

from dasd_lite.config.train import Lora, TrainConfig
from dasd_lite.errors import ConfigError, TrainError
from dasd_lite.stages.train import train
from dasd_lite.training import job
from dasd_lite.training.objectives import sft


def test_a_folder_without_a_model(packed, tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(ConfigError, match=f"model = '{tmp_path / 'm'}': not a model folder: it has no config.json"):
        train(packed, tmp_path / "m", TrainConfig(**QUICK), out=tmp_path / "out")


def test_a_model_that_lacks_weights(tmp_path):
    model = make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights.pop("model.layers.0.mlp.down_proj.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = write_rows(tmp_path / "rows", make_rows(16))
    with pytest.raises(ConfigError, match=r"model: the weights of model.layers.0.mlp.down_proj.weight are missing"):
        train(rows, model, TrainConfig(**QUICK), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_objective_that_other_processes_cannot_get(tiny, packed, tmp_path):
    class Local:
        per_token, loss = staticmethod(sft.per_token), staticmethod(sft.loss)

    with pytest.raises(ConfigError, match="Local cannot be sent to 2 processes; make it a class in a module"):
        train(packed, tiny, TrainConfig(**QUICK), out=tmp_path / "out", objective=Local(), num_processes=2)
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_stays_until_training_can_begin(packed, tmp_path):
    model, out, config = make_model(tmp_path / "model"), tmp_path / "out", TrainConfig(**QUICK)
    train(packed, model, config, out=out)
    before = {path.name: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ConfigError, match="nowhere"):
        train(packed, model, config, out=out, seed=1, force=True, method=Lora(target_modules=["nowhere"]))
    (weights,) = model.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:4000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        train(packed, model, config, out=out, seed=1, force=True)
    assert {path.name: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_gpu_that_is_too_small_or_busy_is_refused_before_the_model_is_loaded(tiny, packed, tmp_path, monkeypatch):
    class LoadedError(Exception):
        pass

    def load(*args, **options):
        raise LoadedError

    def on_a_gpu(share, expected=job._expected_cost):
        def expected_cost(*args):
            cost = expected(*args)
            hardware = dataclasses.replace(cost.hardware, memory=16e9, free=share * cost.memory_bytes)
            return dataclasses.replace(cost, hardware=hardware)

        return expected_cost

    monkeypatch.setattr(job, "_gpu", lambda: ("NVIDIA T4", 16e9, 9e9))
    monkeypatch.setattr(job.trainable, "load_trainable", load)
    monkeypatch.setattr(job, "_expected_cost", on_a_gpu(0.9))
    options = {**QUICK, "gradient_checkpointing": "off"}
    with pytest.raises(TrainError) as caught:
        train(packed, tiny, TrainConfig(**options), out=tmp_path / "out")
    wanted = r"training needs about \d+\.\d MB, but NVIDIA T4 has 16.0 GB, of which other processes hold 7.0 GB; "
    wanted += r"smallest change that fits: train\..*; the prediction may be wrong, and train.must_fit=false tries it"
    assert re.match(wanted, str(caught.value)) and "\n" not in str(caught.value)
    with pytest.raises(LoadedError):
        train(packed, tiny, TrainConfig(**options), out=tmp_path / "out", must_fit=False)
    monkeypatch.setattr(job, "_expected_cost", on_a_gpu(0.97))  # within what a prediction may be off
    with pytest.raises(LoadedError):
        train(packed, tiny, TrainConfig(**options), out=tmp_path / "out")


def test_out_of_memory_is_one_line_with_what_needs_less(tiny, packed, tmp_path, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(job, "_gpu", lambda: ("NVIDIA T4", 16e9, 15.5e9))
    monkeypatch.setattr(job, "target_terms", full)
    with pytest.raises(TrainError) as caught:
        train(packed, tiny, TrainConfig(**QUICK), out=tmp_path / "out")
    start = r"out of GPU memory: NVIDIA T4 has 16.0 GB; the prediction was \d+\.\d MB; "
    pattern = start + r"try train\..*: training (resumes|starts over)"
    assert re.match(pattern, str(caught.value)) and "\n" not in str(caught.value)
    monkeypatch.setattr(job.trainable, "load_trainable", full)
    with pytest.raises(TrainError, match=r"^out of GPU memory: NVIDIA T4 has 16.0 GB; try train.method qlora"):
        train(packed, tiny, TrainConfig(**QUICK), out=tmp_path / "other")


def test_the_longest_document_is_examined_before_the_first_step(tmp_path, monkeypatch):
    rows, seen = make_rows(12), []
    longest = max(length for row in rows for length in row["doc_lengths"])
    assert all(length < longest for row in rows[:4] for length in row["doc_lengths"])
    monkeypatch.setattr(job, "check_packing", lambda model, documents, dtype: seen.extend(map(len, documents)))
    source = write_rows(tmp_path / "rows", rows)
    train(source, make_model(tmp_path / "model"), TrainConfig(**QUICK), out=tmp_path / "out", max_steps=1)
    assert max(seen) == longest

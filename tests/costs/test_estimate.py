"""What `check` says about the memory and hours of training."""

import json

import pytest
from tests.costs.models import QWEN3_4B

from dasd_lite.config.load import load_recipe
from dasd_lite.costs import estimate
from dasd_lite.costs.hardware import Gpu, Hardware
from dasd_lite.errors import ConfigError
from dasd_lite.run.check import check_recipe


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """Returns the training runs of three phases of a 4B student on a machine with this GPU; one has shorter rows."""

    def of_three_phases(gpu):
        (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B | {"model_type": "qwen3"}))
        text = f'out = "run"\nstudent = {{ kind = "transformers", model = "{tmp_path}" }}\npack.seq_len = 65536\n'
        text += 'prompts.path = "q.jsonl"\nteacher = { kind = "transformers", model = "t" }\n'
        text += '[[phase]]\nname = "low"\n[[phase]]\nname = "high"\n[[phase]]\nname = "last"\npack.seq_len = 8192\n'
        (tmp_path / "run.toml").write_text(text)
        monkeypatch.setattr(estimate, "visible_gpu", lambda: gpu)
        monkeypatch.setattr(estimate, "has_liger", lambda *kind: False)
        recipe = load_recipe(tmp_path / "run.toml")
        return estimate.trainings_of(recipe.phase, recipe.student.model)

    return of_three_phases


def test_without_a_gpu_check_says_which_ones_are_large_enough(trainings):
    groups = trainings(None)
    lines = [estimate.memory_line(group) for group in groups]
    assert [line.split(":")[0] for line in lines] == ["low, high/train", "last/train"]
    assert "on a GPU (weights 16.1 GB, gradients 16.1 GB, optimizer 32.2 GB, activations" in lines[0]
    assert lines[0].endswith("no GPU is visible here: fits GPUs of 141 GB or more")
    assert list(estimate.too_big(groups)) == []
    assert estimate.hours_line(groups, 100) is None


def test_check_names_what_does_not_fit_the_gpu_and_the_change_that_does(trainings):
    groups = trainings(Gpu("NVIDIA GeForce RTX 4090", 24 * 10**9, 1, Hardware()))
    both, last = estimate.too_big(groups)
    assert both.startswith("train: phases 'low', 'high' need about 9")
    assert "the GPU (NVIDIA GeForce RTX 4090) has 24.0 GB; smallest change that fits: train." in both
    assert last.startswith("train: phase 'last' needs about 7")
    hours = estimate.hours_line(groups, 100)
    assert "at an assumed 40% of the 165 TFLOP/s of NVIDIA GeForce RTX 4090" in hours


def test_a_phase_that_need_not_fit_is_not_reported(trainings):
    groups = trainings(Gpu("NVIDIA GeForce RTX 4090", 24 * 10**9, 1, Hardware()))
    for group in groups:
        for i, phase in enumerate(group.phases):
            group.phases[i] = phase.model_copy(update={"train": phase.train.model_copy(update={"must_fit": False})})
    assert list(estimate.too_big(groups)) == []


def test_a_busy_gpu_and_gpus_of_two_kinds_are_named(trainings):
    names = ("NVIDIA A100-SXM4-80GB", "NVIDIA H200")
    busy = Gpu("NVIDIA A100-SXM4-80GB", 85 * 10**9, 2, Hardware(), 45 * 10**9, names)
    (line,) = estimate.too_big(trainings(busy))
    assert "has 85.0 GB, of which other processes hold 40.0 GB, the least of 2 GPUs" in line
    assert "CUDA_VISIBLE_DEVICES can leave only NVIDIA H200; smallest change that fits: train." in line


def test_a_training_that_does_not_fit_is_an_error_of_check(tmp_path, monkeypatch, small_recipe):
    tiny = Gpu("a tiny GPU", 10**8, 1, Hardware())
    monkeypatch.setattr(estimate, "visible_gpu", lambda: tiny)
    with pytest.raises(ConfigError, match=r"the GPU \(a tiny GPU\) has 100\.0 MB"):  # cli.py makes it exit code 2
        check_recipe(load_recipe(small_recipe(tmp_path)), "models")

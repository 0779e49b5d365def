"""What vLLM's engines need of a machine, refused before they start; without a GPU, by a GPU that is made up."""

import pytest
from tests.costs.models import SMALL, save_model

from dasd_lite.config.load import load_recipe
from dasd_lite.config.models import DEMO
from dasd_lite.costs.hardware import Gpu, Hardware
from dasd_lite.run import engine_check
from dasd_lite.run.engine_check import memory_faults
from dasd_lite.run.questions import Questions

PER_TOKEN = 2 * 2 * 128 * 4  # keys and values, 2 bytes, 2 heads of 64, 4 layers
WEIGHTS = 6.8e6  # about


@pytest.fixture
def faults(monkeypatch, small_recipe, tmp_path):
    """`faults(free, "over=ride")` lists those of a run with SMALL as teacher and student in vLLM."""
    model = str(save_model(tmp_path / "model", **SMALL, max_position_embeddings=100_000))
    for file in DEMO.joinpath("student").glob("*token*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    table = {"kind": "vllm", "model": model}
    path = small_recipe(tmp_path, student=table, teacher=table)

    def found(free, *overrides):
        gpu = Gpu("NVIDIA T4", 10**10, 1, Hardware(), free=int(free))
        monkeypatch.setattr(engine_check, "visible_gpu", lambda: gpu)
        return list(memory_faults(load_recipe(path, overrides), Questions()))

    return found


def test_answers_that_fit_are_no_fault(faults):
    assert faults(1e9, "sample.max_tokens=100000", "evaluate.max_tokens=100000") == []


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_max_model_len_that_does_not_fit_is_named_with_the_one_that_does(faults, name):
    free = (WEIGHTS + 50_000 * PER_TOKEN) / 0.9
    (line,) = faults(free, f"{name}.max_model_len=90000")
    assert line.startswith(f"{name}.max_model_len = 90,000 needs 184.3 MB for one answer beside ")
    assert f"(NVIDIA T4); lower {name}.max_model_len to 49," in line
    fits = line.partition(" to ")[2].partition(", prompt included")[0].replace(",", "")
    assert faults(free, f"{name}.max_model_len={fits}") == []
    assert len(faults(free, f"{name}.max_model_len={int(fits) + 1}")) == 1


def test_an_answer_that_does_not_fit_is_named_by_its_limit(faults):
    (line,) = faults(100e6, "sample.max_tokens=90000")
    assert line.startswith("teacher: sample.max_tokens = 90,000 needs ")
    assert "lower sample.max_tokens or teacher.max_model_len to" in line
    (line,) = faults(100e6, "evaluate.max_tokens=900000")
    assert line.startswith("student: evaluate.max_tokens = 100,000 needs "), "no more than the context"


def test_the_share_that_vllm_may_use_is_of_all_memory(faults):
    assert faults(1e9, "sample.max_tokens=90000", "teacher.gpu_memory_utilization=0.05") == []
    assert len(faults(1e9, "sample.max_tokens=90000", "teacher.gpu_memory_utilization=0.01")) == 1


def test_weights_that_do_not_fit_are_said_to_be_it(faults):
    lines = faults(5e6)
    assert [line.split()[0].rstrip(":") for line in lines] == ["student", "teacher"]
    assert all("the weights alone do not fit: raise" in line for line in lines)

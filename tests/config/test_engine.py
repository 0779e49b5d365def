"""The engine of a student whose recipe names none."""

import importlib.util
import json

import pytest

from dasd_lite.config import engine

KIND = '\n[student]\nkind = "transformers"\n'
NAMES_NONE = "\n[student]\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(gpu=True, vllm=True)` makes this one look so, with runs in a temporary folder."""
    monkeypatch.chdir(tmp_path)

    def looks(*, gpu, vllm):
        monkeypatch.setattr(engine, "has_gpu_driver", lambda: gpu)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: vllm or None)

    looks(gpu=True, vllm=True)
    return looks


@pytest.mark.parametrize(
    ("gpu", "vllm", "line"),
    [
        (True, True, "student.kind = 'vllm': a GPU and vLLM are here"),
        (True, False, "student.kind = 'transformers': vLLM is not installed"),
        (False, True, "student.kind = 'transformers': no GPU is visible"),
    ],
)
def test_it_is_what_this_machine_has(machine, load, gpu, vllm, line):
    machine(gpu=gpu, vllm=vllm)
    recipe = load(KIND, NAMES_NONE)
    assert recipe.engine_line == line
    assert recipe.student.kind in line
    assert recipe.student.model.endswith("student")


@pytest.mark.parametrize(
    ("key", "kind", "line"),
    [
        ("student.batch_size=8", "transformers", "which student.batch_size belongs to"),
        ("student.tensor_parallel_size=2", "vllm", "which student.tensor_parallel_size belongs to"),
        ("evaluate.four_bit=true", "transformers", "which evaluate.four_bit belongs to"),
        ("high.evaluate.four_bit=true", "transformers", "which evaluate.four_bit belongs to"),
        ("student.max_model_len=512", "vllm", "a GPU and vLLM are here"),
    ],
)
def test_a_key_that_only_one_engine_has_decides(machine, load, key, kind, line):
    recipe = load(KIND, NAMES_NONE, key)
    assert recipe.student.kind == kind
    assert line in recipe.engine_line


def test_keys_of_both_are_a_mistake(machine, mistakes):
    (line,) = mistakes(KIND, NAMES_NONE + "batch_size = 8\nstall_s = 9.0\n")
    assert "student.batch_size: unknown key of kind 'vllm'; kind 'transformers' has it" in line


def test_a_run_keeps_its_engine(machine, load, tmp_path):
    began = load()
    assert began.engine_line == ""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(began.model_dump(mode="json")))
    resumed = load(KIND, NAMES_NONE)
    assert resumed.student == began.student
    assert resumed.engine_line == "student.kind = 'transformers', as this run began"


def test_a_recipe_that_names_its_engine_is_not_looked_into(machine, load):
    assert (load().student.kind, load().engine_line) == ("transformers", "")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_none(monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not engine.has_gpu_driver()

"""`check` reports mistakes in the training options before anything is spent."""

import json

import pytest

from dasd_lite.config.load import load_recipe
from dasd_lite.run.check import unread_settings

LORA = 'train.method={ kind = "lora", rank = 4, target_modules = ["q_proj", "model.layers.0.mlp.up_proj"] }'


def test_a_layer_that_the_student_does_not_have(small_recipe, tmp_path, cli):
    small_recipe(tmp_path)
    assert cli("check", "run.toml", LORA, cwd=tmp_path).rc == 0
    result = cli("check", "run.toml", LORA.replace("q_proj", "query"), cwd=tmp_path)
    assert result.rc == 2
    assert result.stderr == (
        "dasd-lite: train.method.target_modules: the student has no layer 'query'; it has down_proj, gate_proj, k_proj,"
        " o_proj, q_proj, up_proj, v_proj\n"
    )


@pytest.mark.parametrize(
    ("overrides", "most"), [((), 8), (("select.keep=2",), 16), (("select.keep=9",), 16), (('select.rule="all"',), 16)]
)
def test_more_rows_per_step_than_answers_that_are_kept(overrides, most, small_recipe, tmp_path, cli):
    small_recipe(tmp_path)
    low = "low.train.grad_accum_steps="
    assert cli("check", "run.toml", *overrides, f"{low}{most}", cwd=tmp_path).rc == 0
    result = cli("check", "run.toml", *overrides, f"{low}{most + 1}", cwd=tmp_path)
    assert result.rc == 2
    assert result.stderr == (
        f"dasd-lite: phase 'low': train.micro_batch_size × train.grad_accum_steps = {most + 1} rows per step, but"
        f" at most {most} answers of 8 prompts are kept; lower train.grad_accum_steps\n"
    )


def test_training_options_without_effect_are_noted(small_recipe, tmp_path):
    path = small_recipe(tmp_path)
    weighted = ["low.select.weighting={ lam = 1.0 }", "low.select.keep=2"]
    (note,) = unread_settings(load_recipe(path, weighted))
    assert "'low': select.weighting has no effect: train.objective = 'sft'" in note
    assert not list(unread_settings(load_recipe(path, [*weighted, 'low.train.objective="weighted"'])))
    adapter = 'train.method={ kind = "lora", start = "adapter" }'
    (first,) = unread_settings(load_recipe(path, [adapter]))
    assert first == "phase 'low': train.method.start = 'adapter' has no effect: it is the first phase"
    (second,) = unread_settings(load_recipe(path, [f"mixed.{adapter}"]))
    assert second == "phase 'mixed': train.method.start = 'adapter' has no effect: phase 'low' leaves no adapter"


def test_answers_that_the_random_rule_does_not_use_are_noted(small_recipe, tmp_path):
    path = small_recipe(tmp_path)
    random = ['low.select.rule="random"', "sample.num_samples=4"]
    (note,) = unread_settings(load_recipe(path, random))
    assert note.startswith(
        "phase 'low': select.rule = 'random' keeps 1 of 4 answers: sample.num_samples = 1 saves 75%;"
    )
    assert not list(unread_settings(load_recipe(path, [*random, "low.select.keep=4"])))
    for rule in ("longest", "fewest", "count"):
        assert not list(unread_settings(load_recipe(path, [f'low.select.rule="{rule}"']))), "it looks at all of them"


def test_wrong_answers_that_mixed_policy_cannot_see_are_noted(small_recipe, tmp_path, cli):
    rows = [{"prompt": f"{n}?"} | ({"answer": "4"} if n < 3 else {}) for n in range(8)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small_recipe(tmp_path, prompts={"path": "q.jsonl"})
    note = "mix.rescue = 'either' cannot see wrong answers to 5 of 8 prompts, which have no `answer`"
    result = cli("check", "run.toml", 'mixed.mix.rescue="either"', "--until", "models", cwd=tmp_path)
    assert note in " ".join((result.stdout + result.stderr).split())
    result = cli("check", "run.toml", "--until", "models", cwd=tmp_path)
    assert "mix.rescue" not in result.stdout + result.stderr

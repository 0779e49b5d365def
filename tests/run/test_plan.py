"""The steps of a recipe: what each phase's training starts from."""

import pytest

from dasd_lite.config.stages import RecipeConfig
from dasd_lite.run.pipeline import plan


@pytest.mark.parametrize("start", ["merged", "adapter"])
def test_a_phase_starts_from_the_merged_model_or_the_adapter_before(demo, tmp_path, monkeypatch, start):
    base, low, high = demo / "student", tmp_path / "low" / "train", tmp_path / "high" / "train"
    starts = []
    monkeypatch.setattr(
        "dasd_lite.stages.train.train",
        lambda rows, model, config, *, adapter, **options: starts.append((model, adapter)),
    )
    phases = [
        {"name": name, "train": {"method": {"kind": "qlora", "start": start}}} for name in ("low", "high", "last")
    ]
    recipe = RecipeConfig.model_validate(
        {
            "out": str(tmp_path),
            "prompts": {"path": str(demo / "train.jsonl")},
            "student": {"kind": "transformers", "model": str(base)},
            "teacher": {"kind": "transformers", "model": str(demo / "teacher")},
            "phase": phases,
        }
    )
    for step in plan(recipe):
        if step.stage == "train":
            step.work(force=False, used=None)
    assert (
        starts
        == {
            "merged": [(base, None), (low / "model", None), (high / "model", None)],
            "adapter": [(base, None), (base, low / "adapter"), (base, high / "adapter")],
        }[start]
    )

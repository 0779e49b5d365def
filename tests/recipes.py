"""The recipe of the tests: two phases over eight of the demo's questions, in a few seconds.

`write_recipe(folder, prompts={...}, phase=[...])` writes it to `folder`/run.toml with some of its tables replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "seed": 3,
    "out": "run",
    "prompts": {"path": "demo:train.jsonl", "limit": 8},
    "teacher": {"kind": "transformers", "model": "demo:teacher"},
    "student": {"kind": "transformers", "model": "demo:student"},
    "sample": {"num_samples": 2, "max_tokens": 192},
    "select": {"require_think": False, "max_duplicate_lines": 1.0, "max_duplicate_sentences": 1.0},
    "pack": {"seq_len": 512},
    "train": {"epochs": 1, "grad_accum_steps": 1, "learning_rate": 1e-4},
    "evaluate": {"prompts": "demo:heldout.jsonl", "limit": 4, "num_samples": 1, "max_tokens": 48},
    "phase": [
        {"name": "low", "sample.temperature": 0.6},
        {
            "name": "mixed",
            "source": "mix",
            "mix": {"max_length_ratio": 0.5, "max_tokens": 192, "num_prompts": 6},
            "select.rule": "all",
            "pack.replay": 1.0,
        },
    ],
}


def write_recipe(folder: Path, **tables: Any) -> Path:
    """Write `SMALL` to `folder`/run.toml; `tables` replace those of their name, and None leaves one out."""
    recipe = {name: value for name, value in {**SMALL, **tables}.items() if value is not None}
    path = folder / "run.toml"
    path.write_text("\n".join(_lines(recipe)), encoding="utf-8")
    return path


def _lines(recipe: dict[str, Any]) -> list[str]:
    lines = [f"{key} = {_value(value)}" for key, value in recipe.items() if not isinstance(value, dict | list)]
    tables = [(f"[{name}]", table) for name, table in recipe.items() if isinstance(table, dict)]
    tables += [(f"[[{name}]]", row) for name, rows in recipe.items() if isinstance(rows, list) for row in rows]
    for title, table in tables:
        lines += ["", title, *(f"{key} = {_value(value)}" for key, value in table.items())]
    return [*lines, ""]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)

"""Distribution-Aligned Sequence Distillation (arXiv 2601.09088) on one workstation.

    import dasd_lite as dl

    teacher = dl.Endpoint(model="teacher-model", base_urls=["http://localhost:8000/v1"])
    student = dl.Transformers(model="Qwen/Qwen3-4B-Instruct-2507")
    rollouts = dl.sample(dl.read_prompts("prompts.jsonl"), teacher, temperature=0.6, out="runs/low/sample")
    scores = dl.score(rollouts, student, out="runs/low/score")
    kept = dl.select(rollouts, student, scores=scores, rule="count", keep=1, out="runs/low/select")
    rows = dl.pack(kept, seq_len=16_384, out="runs/low/pack")
    trained = dl.train(rows, student, method=dl.Lora(rank=32), epochs=3, out="runs/low/train")
    print(dl.evaluate(trained, "heldout.jsonl", out="runs/low/evaluate").accuracy)

Every stage takes its options as keyword arguments, writes one folder `out`, and returns a handle of it; the same call
again finds it finished. Names are imported when they are first used: `import dasd_lite` alone loads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Where each public name lives; `__init__.pyi` says the same to type checkers.
_MODULES = {
    "config.load": ("load_recipe",),
    "config.models": ("Budget", "CustomTeacher", "Endpoint", "Prices", "Transformers", "Vllm"),
    "config.stages": ("Weighting",),
    "config.train": ("Full", "Lora"),
    "data.handles": ("Evaluation", "Kept", "Model", "Rollouts", "Rows", "Scores"),
    "data.prompts": ("Prompts", "read_prompts"),
    "data.records": ("Prompt",),
    "data.run_folder": ("RunFolder",),
    "errors": ("DasdError",),
    "grading": ("grade_answer",),
    "grading.contamination": ("Overlap", "overlaps"),
    "grading.grade": ("Grade", "Grader"),
    "grading.statistics": ("Accuracy", "Comparison"),
    "inference": ("Completion", "Request", "Sampler", "SamplingParams"),
    "method.divergence": ("SentenceClass", "classify_sentences", "sentence_spans", "sentence_stats"),
    "method.packing": ("balance_rows", "gather_rows", "pack_rows"),
    "method.selection": ("Candidates", "SelectionRule"),
    "method.sentences": ("repeated_ngrams", "sentence_ends", "text_repetition"),
    "report.compare": ("compare",),
    "report.inspect_log": ("export_evaluations",),
    "report.page": ("write_report",),
    "run.recipe": ("run_recipe",),
    "stages.evaluate": ("evaluate",),
    "stages.ingest": ("ingest",),
    "stages.mix": ("mix",),
    "stages.pack": ("pack",),
    "stages.sample": ("sample",),
    "stages.score": ("score",),
    "stages.select": ("select",),
    "stages.train": ("train",),
    "training.objectives.objective": ("Objective", "Targets"),
}
_HOMES = {name: f"dasd_lite.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dasd_lite' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(_HOMES)

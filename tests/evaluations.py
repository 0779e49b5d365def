"""Runs with evaluations of several tasks, written without a model."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from dasd_lite.config.stages import RecipeConfig
from dasd_lite.data.manifest import Identity
from dasd_lite.data.records import GRADED, KEPT, REJECTED
from dasd_lite.data.references import Choices
from dasd_lite.data.writer import ShardWriter

SECRET = "Which of the four quarks is the strangest one of them all?"
OPTIONS = ("the down quark", "the up quark", "the strange quark", "the charm quark")
QUESTIONS = {
    "prompts": {
        "a": ("Ann has 3 apples and buys 4 more at the market near the old bridge. How many are there?", "7"),
        "b": ("Bob counts 12 birds on the long wire, and 5 fly off into the woods. How many stay?", "7"),
        "c": ("What is 2 + 2?", "4"),
    },
    "aime24": {"1": ("Find the sum of all primes below ten that divide the number of letters in this.", "17")},
    "gpqa-diamond": {"rec0": (SECRET, ""), "rec1": ("Another secret question about the age of distant stars?", "")},
}
"""Task, uid: the question and its answer."""


def write(folder: Path, stage: str, seconds: float = 2.0, **tables: Any) -> None:
    """Write a dataset folder; each table is a schema and rows."""
    config = {"temperature": 1.0, "max_tokens": 100, "grader": "auto", "seed": 0}
    schemas = {name: schema for name, (schema, _) in tables.items()}
    with ShardWriter(folder, Identity(stage, 3, config, {"of": str(folder.parent.name)}), schemas) as writer:
        for name, (schema, rows) in tables.items():
            writer.write(name, pa.RecordBatch.from_pylist(rows, schema=schema))
        grades = {"graded": 0, "questions": 0, "questions_right": 0}
        counts = {"kept": 1, "rollouts": 1, "rejected": {}, "repeating": 0, "grades": grades}
        writer.publish(counts if stage == "select" else {}, seconds=seconds)


def graded(task: str, uid: str, grades: str, **more: Any) -> list[dict[str, Any]]:
    """Return the answers to a question; a letter for each: right, wrong, none, unParseable, Unknown, cut off."""
    text, answer = QUESTIONS[task][uid]
    rows = []
    for index, letter in enumerate(grades):
        order = OPTIONS[index:] + OPTIONS[:index]  # another one for each answer
        reference = Choices(order, order.index(OPTIONS[2])).encode() if task == "gpqa-diamond" else answer
        verdict = {"r": "right", "w": "wrong", "p": "unparseable", "u": "unknown"}.get(letter, "no_answer")
        extracted = {"r": "C" if task == "gpqa-diamond" else answer, "w": "99", "p": "5 apples"}.get(letter)
        rows.append(
            {
                "uid": f"{task}-{uid}-{index}",
                "prompt_uid": uid,
                "messages": [{"role": "user", "content": text}],
                "domain": "sums",
                "answer": reference,
                "index": index,
                "completion": f"<think>\nIt asks: {text}\n</think>\n\nSo: {extracted}",
                "finish_reason": "length" if letter == "c" else "stop",
                "prefix_bytes": 0,
                "task": task,
                "grade": verdict,
                "extracted": extracted,
                "reason": "took longer than 5 s" if letter == "u" else None,
                "vote": "right" if letter == "r" else OPTIONS[0] if extracted and task == "gpqa-diamond" else extracted,
                "num_tokens": 12_500 if letter == "c" else 40,
                "max_tokens": 100,
                **more,
            }
        )
    return rows


def evaluate(folder: Path, **grades: dict[str, str]) -> None:
    """Write an evaluation: `task={uid: letters}`, with _ for - in the task."""
    rows = [
        row
        for task, of_task in grades.items()
        for uid, letters in of_task.items()
        for row in graded(task.replace("_", "-"), uid, letters)
    ]
    write(folder, "evaluate", graded=(GRADED, rows))


def select(folder: Path, *prompts: str) -> None:
    """Write the answers that were kept, two to each prompt."""
    rows = [
        {
            "uid": f"r{i}-{j}",
            "prompt_uid": f"t{i}",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}],
            "domain": "sums",
            "index": j,
            "completion": "<think>x</think>y",
            "finish_reason": "stop",
            "prefix_bytes": 0,
            "ids": [1, 2],
            "num_context_tokens": 1,
            "num_sentences": 1,
        }
        for i, text in enumerate(prompts)
        for j in range(2)
    ]
    write(folder, "select", kept=(KEPT, rows), rejected=(REJECTED, []))


def make_run(folder: Path) -> Path:
    """Write a run of one phase with three tasks, before and after it, and the evaluation of the teacher."""
    recipe = RecipeConfig.model_validate(
        {
            "out": str(folder),
            "prompts": {"path": "prompts.jsonl"},
            "student": {"kind": "transformers", "model": "student"},
            "teacher": {"kind": "transformers", "model": "teacher"},
            "phase": [{"name": "low", "evaluate": {"prompts": "questions.jsonl"}}],
        }
    )
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    both = {"aime24": {"1": "rwwc"}, "gpqa_diamond": {"rec0": "rn", "rec1": "ww"}}
    evaluate(folder / "base" / "evaluate", prompts={"a": "rw", "b": "pu", "c": "rr"}, **both)
    both = {"aime24": {"1": "rrww"}, "gpqa_diamond": {"rec0": "rr", "rec1": "wr"}}
    evaluate(folder / "low" / "evaluate", prompts={"a": "rr", "b": "rw", "c": "rw"}, **both)
    evaluate(folder / "teacher" / "evaluate", prompts={"a": "rr", "b": "rr", "c": "rr"})
    like = QUESTIONS["prompts"]["b"][0].replace("Bob", "Rob")
    select(folder / "low" / "select", like, f"Tell me. {SECRET}", "Something else.")
    return folder

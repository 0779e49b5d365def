"""Write evaluations as logs of Inspect, for its viewer and its tools for analysis.

Input: the evaluate folders of a run. Output: an `.eval` file for each evaluation and task: a zip of JSON files, one for
each answer, one with a line about every answer, and a header. Invariants: an accuracy there is the one here; one answer
is in memory at a time; the same folders give the same bytes; hidden tasks are exported without their text.

The format is that of Inspect's log version 2 (inspect_ai.log.EvalLog); the package itself is not needed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from os import PathLike
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from dasd_lite.data.files import disk_errors, make_folder
from dasd_lite.data.handles import Evaluation
from dasd_lite.data.references import kind_of, read_choices
from dasd_lite.data.run_folder import RunFolder, StageFolder
from dasd_lite.data.seeds import digest
from dasd_lite.errors import DataError
from dasd_lite.grading.statistics import Accuracy
from dasd_lite.report.graded import reference_in_words, without_hidden_text
from dasd_lite.report.results import StageResult, planned_stages, read_accuracy, read_recipe, read_result

VERSION = 2
"""Version of Inspect's log format."""

_VALUES = {"right": "C", "wrong": "I"}  # all others are "N", no answer: 0 in Inspect's accuracy too
_SCORER = "dasd_lite"
_STOPPED = {"stop": "stop", "length": "max_tokens", "tool_calls": "tool_calls", "content_filter": "content_filter"}
_MOST_TEXT = 1000  # characters of a text in the list of all answers
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the time of every file in the zip, so that equal logs are equal bytes


def export_evaluations(run: str | PathLike[str], out: str | PathLike[str]) -> list[Path]:
    """Write each finished evaluation of a run as a log of Inspect.

    Args:
        run: The run folder, the `out` of a recipe.
        out: Folder to write the logs into; a log of the same evaluation is written again.

    Returns:
        The files, in the order of the run.

    Raises:
        DataError: The folder holds no run, or no finished evaluation.
    """
    run_folder, out = RunFolder(Path(run)), Path(out)
    planned = planned_stages(run_folder, read_recipe(run_folder))
    finished = [stage for stage in planned if stage.stage == "evaluate" and stage.is_finished]
    if not finished:
        raise DataError(f"{run_folder.path}: has no finished evaluation to export; `dasd-lite run` makes them")
    make_folder(out)
    with disk_errors(out):
        return [file for stage in finished for file in _export(stage, run_folder.path.resolve().name, out)]


def _export(stage: StageFolder, run: str, out: Path) -> list[Path]:
    """Write the logs of one evaluation, all of its tasks at a time."""
    result, accuracies = read_result(stage.path), read_accuracy(stage.path).tasks
    logs = {task: _Log(task, own, result, f"{run}/{stage.phase}") for task, own in accuracies.items()}
    with ExitStack() as opened:
        files = {task: opened.enter_context(_zip(out / log.file_name)) for task, log in logs.items()}
        for task, file in files.items():
            _add(file, "_journal/start.json", logs[task].start())
        for batch in Evaluation(stage.path).batches(batch_size=16):
            for row in batch.to_pylist():
                log, file = logs[row["task"]], files[row["task"]]
                sample = log.sample(row)
                log.summaries.append(_summary(sample))
                _add(file, f"samples/{sample['id']}_epoch_{sample['epoch']}.json", sample)
        for task, file in files.items():
            _add(file, "summaries.json", logs[task].summaries)
            _add(file, "header.json", logs[task].header())
    return [out / log.file_name for log in logs.values()]


@contextmanager
def _zip(path: Path) -> Iterator[ZipFile]:
    """Open a zip to write, which is there when it is complete."""
    unfinished = path.with_name(path.name + ".tmp")
    with ZipFile(unfinished, "w", ZIP_DEFLATED) as file:
        yield file
    unfinished.rename(path)


def _add(file: ZipFile, name: str, content: Any) -> None:
    entry = ZipInfo(name, _EPOCH)
    entry.compress_type = ZIP_DEFLATED
    file.writestr(entry, json.dumps(content, ensure_ascii=False, allow_nan=False))


@dataclass
class _Log:
    """One task of one evaluation in Inspect's words: answers are samples, and the k of a question are its epochs."""

    task: str
    accuracy: Accuracy
    result: StageResult
    model: str
    summaries: list[dict[str, Any]] = field(default_factory=list)
    _epochs: Counter[str] = field(default_factory=Counter)

    @property
    def _id(self) -> str:
        return digest(self.model, self.task, self.result.manifest["fingerprint"])[:16]

    @property
    def _ended(self) -> datetime:
        seconds = (self.result.folder / "manifest.json").stat().st_mtime
        return datetime.fromtimestamp(int(seconds), UTC)

    @property
    def file_name(self) -> str:
        """Time, task, model and id, as Inspect names its logs; `_` stands between them and nowhere else."""
        parts = (self._ended.strftime("%Y-%m-%dT%H-%M-%S+00-00"), self.task, self.result.phase, self._id)
        return "_".join(part.replace("_", "-") for part in parts) + ".eval"

    def start(self) -> dict[str, Any]:
        """Return what is known before the first answer."""
        config, own = self.result.manifest["config"], self.accuracy
        uids = list(dict.fromkeys(question[0] for question in own.questions))
        options = {name: config[name] for name in ("temperature", "top_p", "max_tokens", "seed") if name in config}
        spec = {
            "eval_id": self._id,
            "run_id": self._id,
            "task_id": self._id,
            "created": self._ended.isoformat(),
            "task": self.task,
            "dataset": {"name": self.task, "samples": len(uids), "sample_ids": uids, "shuffled": False},
            "model": self.model,
            "model_generate_config": options,
            "config": {"epochs": int(own.samples.max())},
            "scorers": [{"name": _SCORER}],
            "packages": self.result.manifest.get("packages", {}),
            "metadata": {"written_by": "dasd-lite", "grader": config.get("grader")},
        }
        return {"version": VERSION, "eval": spec, "plan": {"name": "plan", "steps": [], "config": options}}

    def header(self) -> dict[str, Any]:
        """Return everything but the answers."""
        own = self.accuracy
        low, high = own.interval()
        metrics = {
            "accuracy": own.mean,
            "stderr": own.standard_error,
            "ci_lower": low,
            "ci_upper": high,
            "stderr_new_answers": own.resampling_error,
            "truncated": own.truncated / own.num_answers,
            "mean_tokens": own.tokens / own.num_answers,
        }
        scores = {
            "name": _SCORER,
            "scorer": _SCORER,
            "scored_samples": own.num_answers,
            "unscored_samples": 0,
            "metrics": {
                name: {"name": name, "value": value} for name, value in metrics.items() if not math.isnan(value)
            },
        }
        begun = self._ended - timedelta(seconds=self.result.seconds or 0)
        return {
            **self.start(),
            "status": "success",
            "results": {
                "total_samples": own.num_answers,
                "completed_samples": own.num_answers,
                "scores": [scores],
            },
            "stats": {
                "started_at": begun.isoformat(),
                "completed_at": self._ended.isoformat(),
                "model_usage": {self.model: _usage(own.tokens)},
            },
        }

    def sample(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return one answer with its question and its grade."""
        row = without_hidden_text(row)
        self._epochs[row["prompt_uid"]] += 1
        answer = row["answer"] or ""
        choices = read_choices(answer) if kind_of(answer) == "choice" else None
        said = {"role": "assistant", "content": _content(row["completion"]), "source": "generate", "model": self.model}
        cut_off = row["finish_reason"] == "length"
        why = [row["grade"].replace("_", " "), *(["cut off at the length limit"] if cut_off else [])]
        return {
            "id": row["prompt_uid"],
            "epoch": self._epochs[row["prompt_uid"]],
            "input": [{"role": m["role"], "content": m["content"], "source": "input"} for m in row["messages"]],
            **({"choices": list(choices.options)} if choices is not None else {}),
            "target": choices.letter if choices is not None else reference_in_words(answer),
            "messages": [*({"role": m["role"], "content": m["content"]} for m in row["messages"]), said],
            "output": {
                "model": self.model,
                "choices": [{"message": said, "stop_reason": _STOPPED.get(row["finish_reason"], "unknown")}],
                "completion": row["completion"],
                "usage": _usage(row["num_tokens"]),
            },
            "scores": {
                _SCORER: {
                    "value": _VALUES.get(row["grade"], "N"),
                    "answer": row["extracted"],
                    "explanation": ", ".join([*why, *([row["reason"]] if row["reason"] else [])]),
                    "metadata": {"verdict": row["grade"], "vote": row["vote"]},
                }
            },
            "metadata": {"domain": row["domain"]},
            "model_usage": {self.model: _usage(row["num_tokens"])},
            "uuid": row["uid"],
        }


def _content(completion: str) -> str | list[dict[str, str]]:
    """Return a completion as Inspect keeps it: the thinking apart from the answer."""
    thinking, closed, said = completion.partition("</think>")
    if not closed:
        return completion
    thought = thinking.removeprefix("<think>").strip("\n")
    return [{"type": "reasoning", "reasoning": thought}, {"type": "text", "text": said.strip("\n")}]


def _usage(tokens: int) -> dict[str, int]:
    """Return the tokens of answers; those of the questions are not kept."""
    return {"input_tokens": 0, "output_tokens": tokens, "total_tokens": tokens}


def _summary(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer without its long texts, for the list of all answers."""
    thin = [{**message, "content": message["content"][:_MOST_TEXT]} for message in sample["input"]]
    kept = ("id", "epoch", "choices", "target", "metadata", "scores", "model_usage", "uuid")
    summary = {name: sample[name] for name in kept if name in sample}
    return {**summary, "input": thin, "completed": True, "message_count": len(sample["messages"])}

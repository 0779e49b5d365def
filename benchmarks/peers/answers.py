"""Graders of mathematics that can be installed, on the golden pairs.

    python benchmarks/peers/answers.py GRADER < PAIRS

Standard input has one pair a line: `{"completion", "reference"}`. Prints `{name: {"right": […], "ms": […]}}`, in the
order of the pairs. A grader that raises an exception has not said "right". A reference without any marks is given as
`$…$` or in a box, and a completion that is only a box in the form that the task's prompt asks for, whichever the grader
needs.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path
from types import ModuleType
from typing import Any

logging.disable(logging.CRITICAL)
PAIRS = [json.loads(line) for line in sys.stdin]
Grader = Callable[[str, str], bool]


def in_dollars(reference: str) -> str:
    """Return a bare reference as LaTeX."""
    is_marked = any(mark in reference for mark in ("$", "\\boxed", "####", "\\[", "nswer"))
    return reference if is_marked else f"${reference}$"


def in_box(reference: str) -> str:
    """Return a bare reference as the end of a solution."""
    return reference if "\\boxed" in reference else rf"\boxed{{{reference}}}"


def content_of(completion: str) -> str | None:
    """Return what is in the box of a completion that is nothing else."""
    is_box = completion.startswith("\\boxed{") and completion.endswith("}") and completion.count("\\boxed") == 1
    return completion[len("\\boxed{") : -1] if is_box else None


def of_lm_eval(task: str) -> ModuleType:
    """Load the file of a task, without the rest of the package."""
    path = next(file for file in files("lm_eval") or () if str(file).endswith(f"tasks/{task}/utils.py")).locate()
    spec = importlib.util.spec_from_file_location(task, Path(str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    datasets = ModuleType("datasets")
    datasets.Dataset = object  # type: ignore[attr-defined]  # only named in annotations
    sys.modules["datasets"] = datasets
    spec.loader.exec_module(module)
    return module


def math_verify() -> dict[str, Grader]:
    """math-verify as its readme calls it."""
    from math_verify import parse, verify

    return {"math-verify": lambda completion, reference: verify(parse(in_dollars(reference)), parse(completion))}


def trl() -> dict[str, Grader]:
    """TRL's reward for accuracy."""
    from trl.rewards.accuracy_rewards import accuracy_reward

    def grade(completion: str, reference: str) -> bool:
        return accuracy_reward([[{"role": "assistant", "content": completion}]], [in_dollars(reference)])[0] == 1.0

    return {"TRL accuracy_reward": grade}


def lm_eval() -> dict[str, Grader]:
    """lm-eval's tasks of MATH."""
    hendrycks, minerva = of_lm_eval("hendrycks_math"), of_lm_eval("minerva_math")

    def by_hendrycks(completion: str, reference: str) -> bool:
        content = content_of(completion)
        said = completion if content is None else f"${content}$"
        return bool(hendrycks.process_results({"solution": in_box(reference)}, [said])["exact_match"])

    def by_minerva(completion: str, reference: str) -> dict[str, int]:
        content = content_of(completion)
        if content is not None:
            completion = f"Final Answer: The final answer is ${content}$. I hope it is correct."
        solution = in_box(reference)
        answer = minerva.normalize_final_answer(minerva.remove_boxed(minerva.last_boxed_only_string(solution)))
        return minerva.process_results({"solution": solution, "answer": answer}, [completion])

    return {
        "lm-eval hendrycks_math": by_hendrycks,
        "lm-eval minerva_math, exact_match": lambda *pair: bool(by_minerva(*pair)["exact_match"]),
        "lm-eval minerva_math, math_verify": lambda *pair: bool(by_minerva(*pair)["math_verify"]),
    }


def measure(grade: Grader) -> dict[str, Any]:
    """Grade all pairs, each once."""
    right, ms = [], []
    grade(r"\boxed{1+x}", "x+1")
    for pair in PAIRS:
        start = time.perf_counter()
        try:
            is_right = grade(pair["completion"], pair["reference"])
        except Exception:
            is_right = False
        ms.append((time.perf_counter() - start) * 1e3)
        right.append(is_right)
    return {"right": right, "ms": ms}


if __name__ == "__main__":
    graders = {"math-verify": math_verify, "trl": trl, "lm-eval": lm_eval}[sys.argv[1]]()
    print(json.dumps({name: measure(grade) for name, grade in graders.items()}))

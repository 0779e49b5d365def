"""What training minimizes: one small module per objective, or code of the user's own.

An objective is a module, an object, or a class without arguments. `sft.py` is the shortest one. It has

    needs = ("weight", "rewards")                        columns of the rows that it reads; optional
    groups = True                                        all answers of a prompt in one micro-batch; optional
    per_token(logits_CV, target_ids_C, tokens)           what it wants to know about each target token: [C] or [C, …]
    loss(per_token_N, targets) -> (loss, metrics)        a scalar with its gradient, and sums to report

`per_token` sees the logits of one chunk of positions, because those of all positions never exist at once. It runs again
in the backward pass. `loss` sees the results of all N target tokens of a micro-batch, and the D documents they are in.
Both get the needed columns: `tokens` those per target token (of the chunk), `targets` all of them.

An objective of ours also has `token_weights(targets)`, because its loss is a weighted sum of −log p: logits are then
computed once (model/head_loss.py), and `per_token` is not called.

Invariant: a loss is a sum over target tokens divided by `targets.num_step`, so it adds up over micro-batches and
processes to the mean over the step. Metrics are sums too and are divided once, at the end of the step. "loss" is the
metric that is shown and monitored.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from dasd_lite.config.extensions import check_callable, code_hash, is_extension, load_extension, name_of, running
from dasd_lite.errors import ConfigError, TrainError
from dasd_lite.training.objectives import sft, weighted
from dasd_lite.training.objectives.objective import Objective, Targets

if TYPE_CHECKING:
    from torch import Tensor

    from dasd_lite.model.logprobs import Terms
    from dasd_lite.training.objectives.objective import Metrics

OBJECTIVES: dict[str, Objective] = {"sft": sft, "weighted": weighted}
"""The built-in objectives."""

RESERVED_METRICS = {
    *("step", "learning_rate", "grad_norm", "target_tokens", "tokens", "seconds", "tokens_per_second", "mfu"),
    *("memory_bytes", "seconds_left"),
}
"""What metrics.jsonl says of each step beside the objective's metrics."""

_KEY = "train.objective"


@dataclass(frozen=True)
class CheckedObjective:
    """An objective whose results are checked, so that a mistake in it is one line that names it.

    Attributes:
        name: As the recipe or the code names it.
        code: Hash of its source, part of the fingerprint of what it trains; None for a built-in objective.
        needs: Columns of the rows that it reads.
        groups: Whether all answers of a prompt must be in one micro-batch.
    """

    name: str
    code: str | None
    needs: tuple[str, ...]
    groups: bool
    _objective: Objective

    def terms(self, targets: Targets) -> Terms:
        """Return `per_token` for the chunks of a micro-batch: a function of logits, ids and which targets they are."""

        def of_chunk(logits_CV: Tensor, target_ids_C: Tensor, chunk: slice) -> Tensor:
            return self.per_token(logits_CV, target_ids_C, {name: x[chunk] for name, x in targets.tokens.items()})

        return of_chunk

    def token_weights(self, targets: Targets) -> Tensor | None:
        """Return the gradient of the loss by each token's −log p; None if `per_token` and `loss` have to say it."""
        if self.code is not None:  # what the user's own code does is not known
            return None
        weights: Tensor = self._objective.token_weights(targets)  # type: ignore[attr-defined]
        return weights

    def per_token(self, logits_CV: Tensor, target_ids_C: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """See Objective; raises TrainError when the result does not have one entry per target token."""
        with self._running():
            result = self._objective.per_token(logits_CV, target_ids_C, tokens)
        num = len(target_ids_C)
        if not _is_tensor(result) or result.ndim == 0 or len(result) != num:
            raise TrainError(
                f"objective {self.name}: per_token returned {_describe(result)}; it must be a tensor of shape"
                f" [{num}] or [{num}, …], one entry per target token"
            )
        return result

    def loss(self, per_token_N: Tensor, targets: Targets) -> tuple[Tensor, Metrics]:
        """See Objective; raises TrainError when the loss is no scalar with a gradient, or no metric is "loss"."""
        with self._running():
            result = self._objective.loss(per_token_N, targets)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TrainError(f"objective {self.name}: loss returned {_describe(result)}; it must be (loss, metrics)")
        loss, metrics = result
        if not _is_tensor(loss) or loss.ndim or not loss.is_floating_point() or not loss.requires_grad:
            raise TrainError(
                f"objective {self.name}: its loss is {_describe(loss)}; it must be a tensor of shape [] with a gradient"
            )
        if not isinstance(metrics, Mapping) or "loss" not in metrics:
            names = sorted(map(str, metrics)) if isinstance(metrics, Mapping) else _describe(metrics)
            raise TrainError(f"objective {self.name}: its metrics are {names}; they must be a mapping that has 'loss'")
        for name, value in metrics.items():
            if not isinstance(value, numbers.Real) and not (_is_tensor(value) and value.numel() == 1):
                raise TrainError(
                    f"objective {self.name}: its metric {name!r} is {_describe(value)}; it must be one number, a sum"
                )
        if taken := RESERVED_METRICS & metrics.keys():
            raise TrainError(f"objective {self.name}: its metric {min(taken)!r} has the name of a figure of every step")
        return loss, dict(metrics)

    def _running(self) -> AbstractContextManager[None]:
        """Name the place of an exception in the user's code; one in an objective of ours is a defect."""
        return nullcontext() if self.code is None else running(self._objective, f"objective {self.name}")


def open_objective(objective: str | Any) -> CheckedObjective:
    """Return the objective of this name, or the one handed over, ready to be used.

    Args:
        objective: Name of a built-in objective, `package.module:attribute`, or a module, object or class without
            arguments that has what `Objective` describes.

    Raises:
        ConfigError: There is no such objective, or its functions take other arguments.
    """
    if isinstance(objective, CheckedObjective):
        return objective
    if not isinstance(objective, str):
        thing, name = objective, name_of(objective)
    elif is_extension(objective):
        thing, name = load_extension(objective, kind="objective", key=_KEY), objective
    elif objective in OBJECTIVES:
        thing, name = OBJECTIVES[objective], objective
    else:
        raise ConfigError(
            f"{_KEY} = {objective!r}: it must be {', '.join(OBJECTIVES)}, or code of your own as"
            " package.module:attribute"
        )
    code = None if name in OBJECTIVES else code_hash(thing)
    if inspect.isclass(thing):
        check_callable(thing, (), kind="class of an objective", key=_KEY, accepts_class=True)
        thing = thing()
    for function, parameters in (
        ("per_token", ("logits_CV", "target_ids_C", "tokens")),
        ("loss", ("per_token_N", "targets")),
    ):
        if not hasattr(thing, function):
            raise ConfigError(f"{_KEY}: {name} has no function {function}({', '.join(parameters)})")
        check_callable(getattr(thing, function), parameters, kind=f"function {function}", key=_KEY)
    needs, groups = getattr(thing, "needs", ()), getattr(thing, "groups", False)
    if isinstance(needs, str) or not isinstance(needs, Sequence) or not all(isinstance(need, str) for need in needs):
        raise ConfigError(f"{_KEY}: {name} has needs = {needs!r}; it must be a list of column names")
    if not isinstance(groups, bool):
        raise ConfigError(f"{_KEY}: {name} has groups = {groups!r}; it must be True or False")
    return CheckedObjective(name, code, tuple(dict.fromkeys(needs)), groups, thing)


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    import torch

    return isinstance(value, torch.Tensor)


def _describe(value: object) -> str:
    """Name a wrong result: its type, and shape, dtype and lack of a gradient where it is a tensor."""
    if not _is_tensor(value):
        size = f" of {len(value)}" if isinstance(value, tuple) else ""
        return f"a {type(value).__name__}{size}"
    gradient = "" if value.requires_grad else " without a gradient"
    return f"a tensor of shape {list(value.shape)} and {str(value.dtype).removeprefix('torch.')}{gradient}"

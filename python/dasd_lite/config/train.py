"""The options of training; see config.py, which has all the others.

Input: the table `train` of a phase. Invariant: what is marked `EXECUTION` changes how fast training is, how much memory
it takes or what is told of it, but not what comes of it beyond rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from dasd_lite.config.models import EXECUTION, Dtype, Fraction, Switch, Table


class Full(Table):
    """All weights are trained."""

    kind: Literal["full"] = "full"


class Lora(Table):
    """A low-rank adapter is trained; qlora does so over weights in 4 bits (NF4, double quantisation)."""

    kind: Literal["lora", "qlora"]
    rank: PositiveInt = 32
    """Rank of the adapter."""
    alpha: PositiveFloat = 64.0
    """Scale of the adapter: alpha / rank."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Layers that get an adapter; all-linear: every linear layer of the architecture but the output head."""
    start: Literal["auto", "merged", "adapter"] = "auto"
    """What a phase starts from: the model of the phase before with its adapter merged, under a new adapter; or that
    adapter over the same base; auto: the adapter for qlora, whose 4 bits round away most of what is merged."""

    @property
    def keeps_adapter(self) -> bool:
        """Whether a phase goes on with the adapter of the phase before."""
        return self.start == "adapter" or (self.start == "auto" and self.kind == "qlora")


def _objective(name: str) -> str:
    """Refuse an objective that is no file."""
    known = sorted(path.stem for path in (Path(__file__).parents[1] / "training" / "objectives").glob("[a-z]*.py"))
    if name not in known:
        raise ValueError(f"should be one of {', '.join(known)}, the files of dasd_lite/objectives")
    return name


class TrainConfig(Table):
    """The training step (paper section 6.4)."""

    method: Annotated[Full | Lora, Field(discriminator="kind")] = Full()
    """{ kind = "full" }, { kind = "lora", rank = 32 } or { kind = "qlora", rank = 32 }."""
    epochs: PositiveFloat = 6.0
    """Passes over the rows."""
    learning_rate: PositiveFloat = 5e-5
    """Peak of the cosine."""
    min_learning_rate: NonNegativeFloat = 1e-5
    """Floor of the cosine."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's second moment decay."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's decay of matrices; vectors are not decayed."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping."""
    micro_batch_size: PositiveInt = 1
    """Rows in one forward pass."""
    grad_accum_steps: PositiveInt = 8
    """Forward passes in one optimiser step; rows per step = micro_batch_size × grad_accum_steps (the paper: 64)."""
    objective: Annotated[str, AfterValidator(_objective)] = "sft"
    """sft: every target token counts the same (the paper); weighted: by the weights that select.weighting gives; or
    another file of dasd_lite/objectives."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """AdamW with moments in float32 (8 bytes a weight) or in 8 bits (2 bytes), paged: in host memory when need be."""
    dtype: Dtype = "auto"
    """Number format of the computation; auto: bfloat16 on a GPU that has it, float16 on another, float32 on a CPU."""
    gradient_checkpointing: Annotated[Switch, EXECUTION] = "auto"
    """Keep fewer activations and compute them again: less memory, a third more time; auto: over 4,096 tokens."""
    offload_activations: Annotated[bool, EXECUTION] = False
    """Keep activations in host memory between forward and backward: with gradient_checkpointing the rest that grows
    with the row."""
    liger: Annotated[Switch, EXECUTION] = "auto"
    """Liger's kernels for norms, rotary embeddings and MLPs; auto: on a GPU where liger-kernel is installed."""
    num_processes: Annotated[PositiveInt | None, EXECUTION] = None
    """Processes that share the work, one per GPU; none: as many as GPUs are visible. What comes out does not
    depend on it, but for rounding."""
    checkpoint_every: Annotated[PositiveInt, EXECUTION] = 100
    """Optimiser steps between checkpoints; training goes on from the newest after any stop."""
    max_loss_jump: Annotated[PositiveFloat, EXECUTION] = 2.0
    """Training stops before a step whose loss is this many nats over the median of the 32 steps before it, or
    over the highest of fewer than 8."""
    monitor_questions: Annotated[int, Field(ge=0), EXECUTION] = 16
    """Questions of evaluate.prompts answered before, after 1 % of the steps and at the end: a collapse is said at once;
    0 is none."""
    watch_tokens: Annotated[PositiveInt, EXECUTION] = 1024
    """Longest of these answers."""
    tracker: Annotated[Literal["none", "trackio", "wandb", "tensorboard"], EXECUTION] = "none"
    """Where the metrics go beside metrics.jsonl."""

    @model_validator(mode="after")
    def _floor_under_peak(self) -> TrainConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is over learning_rate {self.learning_rate}")
        return self

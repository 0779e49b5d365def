"""The options of training; see stages.py, which has the other tables.

Options marked `EXECUTION` change speed, memory, or what is reported, but not the trained model beyond rounding.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from dasd_lite.config.models import EXECUTION, BuiltIn, Dtype, Fraction, Switch, Table, kind_of

OBJECTIVES = ("sft", "weighted")
"""The built-in objectives: the files of training/objectives that hold one."""


class Full(Table):
    """All weights are trained."""

    kind: Literal["full"] = "full"


def _modules_tag(value: Any) -> str | None:
    return "names" if isinstance(value, list) else "all-linear" if value == "all-linear" else None


def _layers_tag(value: Any) -> str | None:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return "number" if is_number else "auto" if value == "auto" else None


class Lora(Table):
    """Low-rank adapter; qlora trains it on top of 4-bit weights (NF4, double quantization)."""

    kind: Literal["lora", "qlora"] = "lora"
    rank: PositiveInt = 32
    """Rank of the adapter."""
    alpha: PositiveFloat = 64.0
    """The adapter's output is scaled by alpha / rank."""
    target_modules: Annotated[
        Annotated[list[str], Tag("names")] | Annotated[Literal["all-linear"], Tag("all-linear")],
        Discriminator(
            _modules_tag,
            custom_error_type="target_modules",
            custom_error_message="should be 'all-linear' or a list of layer names",
        ),
    ] = "all-linear"
    """Names of the layers that get an adapter, or all-linear: every linear layer of the language model except its
    output head. Experts and router are chosen apart from them."""
    experts: Literal["frozen", "adapted"] = "frozen"
    """Whether the experts of a mixture of experts get adapters. vLLM takes no such adapter by default: give it the
    merged model."""
    router: Literal["frozen", "adapted"] = "frozen"
    """Whether what chooses the experts gets an adapter. Give vLLM the merged model then."""
    start: Literal["auto", "merged", "adapter"] = "auto"
    """What a phase after the first starts from. merged: the previous phase's model with its adapter merged, and a new
    adapter. adapter: the previous phase's adapter on the same base. auto: adapter for qlora, because merging into 4-bit
    weights rounds most of it away, and merged for lora."""

    @property
    def keeps_adapter(self) -> bool:
        """Whether a phase continues with the adapter of the previous phase."""
        return self.start == "adapter" or (self.start == "auto" and self.kind == "qlora")


def _method_tag(value: Any) -> str | None:
    kind = kind_of(value)
    return "lora" if kind == "qlora" else kind


Method = Annotated[Annotated[Full, Tag("full")] | Annotated[Lora, Tag("lora")], Discriminator(_method_tag)]


class TrainConfig(Table):
    """Training on the packed rows (paper section 6.4)."""

    method: Method = Full()
    """{ kind = "full" }, { kind = "lora", rank = 32 } or { kind = "qlora", rank = 32 }."""
    epochs: PositiveFloat = 6.0
    """Passes over the rows."""
    learning_rate: PositiveFloat = 5e-5
    """Peak learning rate of the cosine schedule."""
    min_learning_rate: NonNegativeFloat = 1e-5
    """Final learning rate of the cosine schedule."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps during which the learning rate rises from 0."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's weight decay, for matrices only."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    micro_batch_size: PositiveInt = 1
    """Rows per forward pass."""
    grad_accum_steps: PositiveInt = 8
    """Forward passes per optimizer step, over all processes. A step has micro_batch_size × grad_accum_steps rows (the
    paper: 64)."""
    objective: Annotated[str, AfterValidator(BuiltIn(OBJECTIVES))] = "sft"
    """sft: every target token counts the same (the paper). weighted: answers count by their weights from
    select.weighting. package.module:attribute: an objective of your own."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """AdamW with moments in float32 (8 bytes per weight) or in 8 bits (2 bytes). paged: the moments move to host memory
    when the GPU is full."""
    dtype: Dtype = "auto"
    """Number format of the computation. auto: bfloat16 on a GPU that supports it, float16 on other GPUs, float32 on a
    CPU."""
    gradient_checkpointing: Annotated[Switch, EXECUTION] = "auto"
    """Recompute activations in the backward pass: less memory, a third more time. auto: on for more than 4,096 tokens
    per forward pass, or when the activations would take more than 4 GB."""
    keep_layers: Annotated[
        Annotated[
            Annotated[NonNegativeInt, Tag("number")] | Annotated[Literal["auto"], Tag("auto")],
            Discriminator(
                _layers_tag,
                custom_error_type="keep_layers",
                custom_error_message="should be 'auto' or a number of layers from 0",
            ),
        ],
        EXECUTION,
    ] = "auto"
    """With gradient_checkpointing, so many layers keep their activations, counted from the last. auto: on a GPU as many
    as its free memory has room for, on a CPU none."""
    keep_attention: Annotated[Switch, EXECUTION] = "auto"
    """With gradient_checkpointing, keep the output of attention, which takes the most time in long rows and 0.27 GB per
    layer of a 4B model for 32K tokens. auto: on a GPU, for at least 16,384 tokens per forward pass, if there is
    room."""
    offload_activations: Annotated[bool, EXECUTION] = False
    """Keep activations in host memory between the forward and backward pass. With gradient_checkpointing, this is most
    of the memory that grows with the row."""
    one_pass_loss: Annotated[bool, EXECUTION] = True
    """Compute the loss and the gradient of the output head in one pass over the logits, and add it up in float32: less
    time and memory, and a more exact gradient in 16 bits. Objectives of your own take two passes."""
    must_fit: Annotated[bool, EXECUTION] = True
    """Refuse training that is predicted to need more memory than the GPU has free. The prediction may be wrong: false
    tries it anyway."""
    liger: Annotated[Switch, EXECUTION] = "auto"
    """Liger kernels for norms, rotary embeddings and MLPs. auto: on a GPU, if liger-kernel is installed."""
    num_processes: Annotated[PositiveInt | None, EXECUTION] = None
    """Processes that share the work, one per GPU; the result is the same up to rounding. Default: one per visible
    GPU."""
    checkpoint_every: Annotated[PositiveInt, EXECUTION] = 100
    """Optimizer steps between checkpoints. Training resumes from the latest one."""
    max_loss_jump: Annotated[PositiveFloat, EXECUTION] = 2.0
    """Training stops before a step whose loss is more than this many nats above the median of the previous 32 steps,
    or above their maximum if there are fewer than 8."""
    monitor_questions: Annotated[int, Field(ge=0), EXECUTION] = 16
    """Number of evaluate.prompts answered before training, after 1% of the steps and at the end, to catch a collapse
    early; 0 disables it."""
    monitor_tokens: Annotated[PositiveInt, EXECUTION] = 1024
    """Maximum tokens of each of these answers."""
    tracker: Annotated[Literal["none", "trackio", "wandb", "tensorboard"], EXECUTION] = "none"
    """Where metrics are sent, in addition to metrics.jsonl."""

    @model_validator(mode="after")
    def _floor_is_below_peak(self) -> TrainConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate = {self.min_learning_rate:g} is above learning_rate = {self.learning_rate:g}"
            )
        return self

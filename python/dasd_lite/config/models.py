"""The models that a recipe names, and what all of its tables have in common.

A teacher or student is run by transformers, by vLLM, or is asked behind a URL; `kind` says which. Options marked
`EXECUTION` say how fast or in what portions the work is done and do not change its result, so they are
left out of fingerprints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator


class _Execution:
    """Marks an option that cannot change a result."""


EXECUTION = _Execution()
Probability = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Switch = Literal["auto", "on", "off"]
FilePath = Annotated[Path, Field(strict=False)]  # TOML has no paths, so a text is one


class Table(BaseModel):
    """A table of the recipe: frozen, and an unknown key or a value of another type is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def result_options(table: BaseModel) -> dict[str, Any]:
    """Return the options of `table` that can change a result, as plain JSON values."""
    values = table.model_dump(mode="json")
    fields = type(table).model_fields
    for name, field in fields.items():
        if any(isinstance(mark, _Execution) for mark in field.metadata):
            del values[name]
        elif isinstance(inner := getattr(table, name), BaseModel):
            values[name] = result_options(inner)
    return values


class TransformersModel(Table):
    """A model run by transformers in this process: on a CPU or one GPU."""

    kind: Literal["transformers"] = "transformers"
    model: str
    """Local folder or hub id."""
    dtype: Dtype = "auto"
    """Number format of the weights; auto: bfloat16 on a GPU that has it, float16 on another, float32 on a CPU."""
    batch_size: Annotated[PositiveInt, EXECUTION] = 64
    """Answers that are sampled side by side."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class VllmModel(Table):
    """A model run by vLLM, in processes of its own."""

    kind: Literal["vllm"]
    model: str
    """Local folder or hub id."""
    dtype: Dtype = "auto"
    """Number format of the weights."""
    tensor_parallel_size: Annotated[PositiveInt, EXECUTION] = 1
    """GPUs that share one copy of the model."""
    data_parallel_size: Annotated[PositiveInt | None, EXECUTION] = None
    """Copies of the model, each on tensor_parallel_size GPUs; none: as many as the GPUs that are visible allow."""
    gpu_memory_utilization: Annotated[Probability, EXECUTION] = 0.9
    """Share of the GPU's memory that the engine may take."""
    max_model_len: PositiveInt | None = None
    """Longest prompt plus completion in tokens; none takes the model's own."""
    enforce_eager: Annotated[bool, EXECUTION] = False
    """Start faster, run slower: no compilation."""
    stall_s: Annotated[PositiveFloat, EXECUTION] = 600.0
    """Seconds without a step of the engine after which it counts as hung and is started again."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class Prices(Table):
    """What a provider charges for a million tokens, in any currency."""

    input: NonNegativeFloat
    """Price of a million prompt tokens."""
    output: NonNegativeFloat
    """Price of a million tokens written, thinking included."""


class Budget(Table):
    """Where asking a paid teacher stops; what is done by then is kept, and a raised budget goes on from there."""

    max_tokens: PositiveInt | None = None
    """Most tokens read and written in the whole run."""
    max_cost: PositiveFloat | None = None
    """Most that the whole run may cost, by `prices`."""


class EndpointModel(Table):
    """A model behind OpenAI-compatible servers."""

    kind: Literal["endpoint"]
    model: str
    """Name that the server knows the model by."""
    base_urls: Annotated[list[str], Field(min_length=1), EXECUTION]
    """Servers that all serve this model, each up to and with /v1; the least busy one is asked."""
    tokenizer: str | None = None
    """Local folder or hub id of the model's tokenizer and template. With it servers are asked by token ids through
    /completions (vLLM; mix and score.by = 'teacher' need it), without it through /chat/completions."""
    logprobs: bool = True
    """Ask for log-probabilities; false for a provider that has none, with select.rule = 'random' or 'all'."""
    api_key_env: Annotated[str, EXECUTION] = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written anywhere."""
    concurrency: Annotated[int, Field(ge=1, le=4096), EXECUTION] = 32
    """Requests in flight at one server."""
    timeout_s: Annotated[PositiveFloat, EXECUTION] = 600.0
    """Seconds that one reply may take; with `stream`, the longest silence within one."""
    max_retries: Annotated[int, Field(ge=0), EXECUTION] = 8
    """Times that one request is sent again after a failure that can pass."""
    max_skipped: Annotated[int, Field(ge=0), EXECUTION] = 0
    """Questions that may be left out, with an empty answer that select rejects, when a server refuses them for good or
    answers unreadably; one more ends the run."""
    stream: Annotated[bool, EXECUTION] = False
    """Take replies piece by piece: for answers so long that something on the way cuts silent connections."""
    prices: Annotated[Prices | None, EXECUTION] = None
    """{ input = 0.15, output = 0.60 }: what a million tokens cost; costs are told when it is set."""
    budget: Annotated[Budget, EXECUTION] = Budget()
    """{ max_cost = 20.0 } or { max_tokens = 5000000 }: where the run stops asking."""

    @model_validator(mode="after")
    def _cost_has_prices(self) -> EndpointModel:
        if self.budget.max_cost is not None and self.prices is None:
            raise ValueError(
                f"budget.max_cost = {self.budget.max_cost:g} needs prices = {{ input = …, output = … }}, per million"
            )
        return self


def engine_options(model: BaseModel) -> dict[str, Any]:
    """Return what of a model's table can change its answers, beside the weights themselves."""
    return {key: value for key, value in result_options(model).items() if key != "model"}


Teacher = Annotated[TransformersModel | VllmModel | EndpointModel, Field(discriminator="kind")]
Student = Annotated[TransformersModel | VllmModel, Field(discriminator="kind")]

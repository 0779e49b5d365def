"""The tables that name models, and what all tables of a recipe have in common.

`kind` says how a teacher or student is run: by transformers, by vLLM, behind servers, or by a sampler of the user's
own. Options marked `EXECUTION` change how fast the work is done but not its result, so fingerprints leave them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)

from dasd_lite.config.explain import Places, explain
from dasd_lite.config.extensions import is_extension
from dasd_lite.errors import ConfigError


class _Execution:
    """Marks an option that cannot change a result."""


EXECUTION = _Execution()
DEMO = Path(__file__).parents[1] / "demo"
"""The demo's files; `demo:NAME` is one of them."""
Probability = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Switch = Literal["auto", "on", "off"]
FilePath = Annotated[Path, Field(strict=False)]  # TOML has no paths, only strings


class Table(BaseModel):
    """A table of the recipe. It is frozen; an unknown key or a value of another type is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    if not TYPE_CHECKING:  # type checkers derive the arguments from the fields

        def __init__(self, /, **options: Any) -> None:
            """Take the options by keyword; a wrong one is a ConfigError."""
            self._set(options)

        # So marked, it is not called for the tables inside others, whose errors pydantic collects.
        __init__.__pydantic_base_init__ = True

    def _set(self, options: dict[str, Any]) -> None:
        try:
            BaseModel.__init__(self, **options)
        except ValidationError as error:
            own = type(self)
            raise ConfigError(
                "\n".join(line for _, line in explain(error, (), Places(own, table=own.__name__)))
            ) from None


@dataclass(frozen=True)
class BuiltIn:
    """Validates a name: one of `names`, or the user's own of the form `package.module:attribute`."""

    names: tuple[str, ...]

    def __call__(self, name: str) -> str:
        """Return `name`, or raise a ValueError that lists what it may be."""
        if name not in self.names and not is_extension(name):
            known = ", ".join(map(repr, self.names))
            raise ValueError(f"should be {known}, or code of your own as 'package.module:attribute'")
        return name


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


def engine_options(model: BaseModel) -> dict[str, Any]:
    """Return the options of a model's table that can change its answers, without the model's name."""
    return {key: value for key, value in result_options(model).items() if key != "model"}


class Transformers(Table):
    """A model that transformers runs in this process, on a CPU or one GPU."""

    kind: Literal["transformers"] = "transformers"
    model: str
    """Local folder or Hugging Face Hub id."""
    dtype: Dtype = "auto"
    """Number format of the weights. auto: bfloat16 on a GPU that supports it, float16 on other GPUs, float32 on a
    CPU."""
    batch_size: Annotated[PositiveInt, EXECUTION] = 64
    """Answers that are sampled in parallel; halved, with a note, when memory is full."""
    max_model_len: PositiveInt | None = None
    """Maximum tokens of prompt plus answer when it samples. A model with longrope has the factors of this context
    throughout, as in vLLM. Default: the model's context length."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class Vllm(Table):
    """A model that vLLM runs in separate processes."""

    kind: Literal["vllm"] = "vllm"
    model: str
    """Local folder or Hugging Face Hub id."""
    dtype: Dtype = "auto"
    """Number format of the weights."""
    tensor_parallel_size: Annotated[PositiveInt, EXECUTION] = 1
    """GPUs that share one copy of the model."""
    data_parallel_size: Annotated[PositiveInt | None, EXECUTION] = None
    """Copies of the model, each on tensor_parallel_size GPUs. Default: as many as the visible GPUs allow."""
    gpu_memory_utilization: Annotated[Probability | None, EXECUTION] = None
    """Share of each GPU's memory that the engine may use. Default: 0.9 of what is free when it starts; without a GPU,
    half of the machine's memory that is available then."""
    max_model_len: PositiveInt | None = None
    """Maximum tokens of prompt plus answer. A model with longrope has the factors of this context throughout. Default:
    what the longest prompt and `max_tokens` need, at most the model's context length; a model with longrope has the
    factors of that length."""
    enforce_eager: Annotated[bool, EXECUTION] = False
    """Skip compilation: starts faster, runs slower."""
    stall_s: Annotated[PositiveFloat, EXECUTION] = 600.0
    """Seconds without an engine step after which the engine counts as hung and is restarted."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class Prices(Table):
    """What a provider charges per million tokens, in any currency."""

    input: NonNegativeFloat
    """Price of a million prompt tokens."""
    output: NonNegativeFloat
    """Price of a million generated tokens, thinking included."""


class Budget(Table):
    """Spending limit. The run stops when it is reached; finished answers are kept, and raising it resumes the run."""

    max_tokens: PositiveInt | None = None
    """Maximum prompt and generated tokens of the whole run."""
    max_cost: PositiveFloat | None = None
    """Maximum cost of the whole run, computed from `prices`."""


class Endpoint(Table):
    """A model behind OpenAI-compatible servers."""

    kind: Literal["endpoint"] = "endpoint"
    model: str
    """The model's name on the servers."""
    base_urls: Annotated[list[str], Field(min_length=1), EXECUTION]
    """URLs of servers that all serve this model, each ending in /v1. Each request goes to the least busy one."""
    tokenizer: str | None = None
    """Local folder or Hugging Face Hub id of the model's tokenizer and chat template. With it, requests send token ids
    to /completions (vLLM; mix and score.by = 'teacher' need it). Without it, they go to /chat/completions."""
    logprobs: bool = True
    """Request log-probabilities. false is for providers without them and needs select.rule = 'likelihood', 'rsr',
    'longest', 'shortest', 'random' or 'all'."""
    api_key_env: Annotated[str, EXECUTION] = "OPENAI_API_KEY"
    """Name of the environment variable that holds the API key. The key itself is never written anywhere."""
    concurrency: Annotated[int, Field(ge=1, le=4096), EXECUTION] = 32
    """Maximum requests in flight per server."""
    timeout_s: Annotated[PositiveFloat, EXECUTION] = 600.0
    """Seconds until a reply times out; with `stream`, seconds of silence within a reply."""
    max_retries: Annotated[int, Field(ge=0), EXECUTION] = 8
    """Times that a request is retried after a transient failure."""
    max_skipped: Annotated[int, Field(ge=0), EXECUTION] = 0
    """Prompts that may be skipped when a server rejects them or sends an unreadable reply. A skipped prompt gets an
    empty answer, which select rejects. One more stops the run."""
    stream: Annotated[bool, EXECUTION] = False
    """Stream replies. Use it when answers take so long that a proxy closes silent connections."""
    prices: Annotated[Prices | None, EXECUTION] = None
    """{ input = 0.15, output = 0.60 }: price per million tokens. When set, costs are reported."""
    budget: Annotated[Budget, EXECUTION] = Budget()
    """{ max_cost = 20.0 } or { max_tokens = 5000000 }: the run stops when this is spent."""

    @model_validator(mode="after")
    def _cost_limit_has_prices(self) -> Endpoint:
        if self.budget.max_cost is not None and self.prices is None:
            raise ValueError(
                f"budget.max_cost = {self.budget.max_cost:g} needs prices per million tokens:"
                " prices = { input = …, output = … }"
            )
        return self


def _sampler_name(name: str) -> str:
    if not is_extension(name):
        raise ValueError("should be a sampler of your own as 'package.module:Class'")
    return name


class CustomTeacher(Table):
    """A sampler of your own as the teacher."""

    kind: Annotated[str, AfterValidator(_sampler_name)]
    """The sampler's class, as package.module:Class."""
    options: dict[str, Any] = Field(default={})
    """Keyword arguments for the class."""

    @property
    def model(self) -> str:
        """What reports and errors call the model."""
        return self.kind


def student_table(student: Student | str | PathLike[str]) -> Student:
    """Return the table of a student; transformers runs one that is given by its name or folder alone."""
    if isinstance(student, Transformers | Vllm):
        return student
    if isinstance(student, str | PathLike):
        return Transformers(model=str(student))
    raise ConfigError(
        f"student = {str(student)[:60]!r}: should be a Transformers or Vllm table, a folder or a hub name"
    )


def kind_of(table: Any) -> str | None:
    """Return the `kind` of a table or of the raw values for one; None if there is none."""
    kind = table.get("kind") if isinstance(table, dict) else getattr(table, "kind", None)
    return kind if isinstance(kind, str) else None


def _teacher_tag(table: Any) -> str | None:
    kind = kind_of(table)
    return "custom" if kind is not None and ":" in kind else kind


Student = Annotated[Annotated[Transformers, Tag("transformers")] | Annotated[Vllm, Tag("vllm")], Discriminator(kind_of)]
Teacher = Annotated[
    Annotated[Transformers, Tag("transformers")]
    | Annotated[Vllm, Tag("vllm")]
    | Annotated[Endpoint, Tag("endpoint")]
    | Annotated[CustomTeacher, Tag("custom")],
    Discriminator(_teacher_tag),
]

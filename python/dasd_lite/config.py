"""Every option, one frozen model per table of the recipe, each documented under its field.

Input: the raw tables of a TOML file (see recipe.py, which reads them). Invariant: a validator may
reject, never rewrite; what is resolved is exactly what was written plus these defaults. Options
marked `EXECUTION` say how fast or in what portions the work is done and do not change its result,
so they are left out of fingerprints.
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
SCORED_RULES = ("count", "ratio", "length_matched")  # selection rules that rank by both models' probabilities
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
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


def semantic(table: BaseModel) -> dict[str, Any]:
    """Return the options of `table` that can change a result, as plain JSON values."""
    values = table.model_dump(mode="json")
    fields = type(table).model_fields
    for name, field in fields.items():
        if any(isinstance(mark, _Execution) for mark in field.metadata):
            del values[name]
        elif isinstance(inner := getattr(table, name), BaseModel):
            values[name] = semantic(inner)
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
    """A model run by vLLM in this process."""

    kind: Literal["vllm"]
    model: str
    """Local folder or hub id."""
    dtype: Dtype = "auto"
    """Number format of the weights."""
    tensor_parallel_size: Annotated[PositiveInt, EXECUTION] = 1
    """GPUs that share one copy of the model."""
    gpu_memory_utilization: Annotated[Probability, EXECUTION] = 0.9
    """Share of the GPU's memory that the engine may take."""
    max_model_len: PositiveInt | None = None
    """Longest prompt plus completion in tokens; none takes the model's own."""
    enforce_eager: Annotated[bool, EXECUTION] = False
    """Start faster, run slower: no compilation."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class EndpointModel(Table):
    """A model behind OpenAI-compatible servers."""

    kind: Literal["endpoint"]
    model: str
    """Name that the server knows the model by."""
    base_urls: Annotated[list[str], Field(min_length=1), EXECUTION]
    """Servers that all serve this model, each up to and with /v1; the least busy one is asked."""
    api_key_env: Annotated[str, EXECUTION] = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written anywhere."""
    concurrency: Annotated[PositiveInt, EXECUTION] = 32
    """Requests in flight at one server."""
    timeout_s: Annotated[PositiveFloat, EXECUTION] = 600.0
    """Seconds that one reply may take."""
    max_retries: Annotated[int, Field(ge=0), EXECUTION] = 8
    """Times that one request is sent again after a failure that can pass."""


def engine(model: BaseModel) -> dict[str, Any]:
    """Return what of a model's table can change its answers, beside the weights themselves."""
    return {key: value for key, value in semantic(model).items() if key != "model"}


Teacher = Annotated[TransformersModel | VllmModel | EndpointModel, Field(discriminator="kind")]
Student = Annotated[TransformersModel | VllmModel, Field(discriminator="kind")]


class PromptsConfig(Table):
    """The questions to distil on."""

    path: FilePath | None = None
    """JSONL or Parquet with `prompt` or `messages`, and if you have them `uid`, `answer`, `domain`; sample needs it."""
    limit: PositiveInt | None = None
    """Take only the first so many."""
    system: str | None = None
    """System prompt of all stages, put before every question (the paper: "You are a helpful assistant.")."""


class SampleConfig(Table):
    """How the teacher is sampled (paper section 3)."""

    temperature: Temperature = 1.0
    """Sampling temperature; log-probabilities are kept of the model at temperature 1 whatever stands here."""
    top_p: Probability = 1.0
    """Nucleus: sample from the smallest set of tokens with this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from so many most likely tokens only; 0 is all."""
    num_samples: PositiveInt = 4
    """Candidates per question."""
    max_tokens: PositiveInt = 32768
    """Longest completion in the teacher's tokens; one that reaches it is kept as truncated and rejected by select."""


class IngestConfig(Table):
    """Answers that exist already, in place of a teacher."""

    paths: list[FilePath] = []
    """JSONL or Parquet with `input`/`output` or `messages`; `uid`, `domain`, `answer`, `finish_reason` are kept."""
    limit: PositiveInt | None = None
    """Take only the first so many of all files."""


class ScoreConfig(Table):
    """How the student scores the teacher's answers (paper section 4)."""

    batch_tokens: Annotated[PositiveInt, EXECUTION] = 8192
    """Tokens in one forward pass; a longer answer is a pass of its own."""
    chunk_tokens: Annotated[PositiveInt, EXECUTION] = 1024
    """Positions whose logits exist at once: memory is this × vocabulary × 4 bytes."""


class SelectConfig(Table):
    """Which candidates are trained on."""

    rule: Literal["count", "ratio", "length_matched", "random", "all"] = "count"
    """Rank of a question's candidates: by number of teacher sentences (the paper), by their share, by number at equal
    length, at random (the baseline); `all` ranks nothing and keeps every candidate that passes the filters."""
    keep: PositiveInt = 1
    """Candidates kept per question."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """A sentence is the teacher's when p_T − p_S is over this, the student's when p_S − p_T is."""
    budget: dict[str, PositiveInt] = {}
    """Most rollouts kept of a domain, e.g. { math = 45400, code = 20100 }; domains not named are not limited."""
    max_tokens: PositiveInt | None = None
    """Longest question plus answer in the student's tokens, at most its context; none is the phase's pack.seq_len."""
    require_think: bool = True
    """Reject an answer without a thinking part and a final answer."""
    max_duplicate_lines: Fraction = 0.3
    """Reject an answer with more than this share of its bytes in repeated lines."""
    max_duplicate_sentences: Fraction = 0.3
    """Reject an answer with more than this share of its bytes in repeated sentences."""
    max_repeated_ngrams: Fraction = 0.5
    """Reject an answer with more than this share of its 20-grams of student tokens seen before in it."""


class PackConfig(Table):
    """How rollouts become rows."""

    seq_len: Annotated[PositiveInt, Field(le=1 << 24)] = 65536
    """Tokens in one row."""
    method: Literal["best_fit", "tight", "in_order"] = "best_fit"
    """best_fit: the longest first; tight: often fewer rows yet, more slowly; in_order: as the data come."""
    replay: NonNegativeFloat = 0.0
    """Rollouts of the phase before that are joined, per rollout of this one (the paper's mixed ablation: 20/7.7)."""


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
    """Layers that get an adapter."""


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
    dtype: Dtype = "auto"
    """Number format of the computation; auto: bfloat16 on a GPU that has it, float16 on another, float32 on a CPU."""
    gradient_checkpointing: Annotated[bool, EXECUTION] = False
    """Keep fewer activations and compute them again: less memory, a third more time."""
    checkpoint_every: Annotated[PositiveInt, EXECUTION] = 100
    """Optimiser steps between checkpoints; training goes on from the newest after any stop."""

    @model_validator(mode="after")
    def _floor_under_peak(self) -> TrainConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is over learning_rate {self.learning_rate}")
        return self


class MixConfig(Table):
    """Mixed-policy rollouts: the student begins, the teacher ends (paper section 5)."""

    num_prompts: PositiveInt | None = None
    """Questions put to the student; none is all that the phase before trained on."""
    temperature: Temperature = 1.0
    """Temperature of the student and of the teacher."""
    top_p: Probability = 1.0
    """Nucleus of the student and of the teacher."""
    cap: PositiveFloat = 1.5
    """The student is cut off at this many times the teacher's length, in the student's tokens."""
    max_tokens: PositiveInt = 32768
    """Longest rest that the teacher may write."""
    mask_prefix: bool = False
    """Leave the student's part out of the loss (the paper: worse)."""


class EvaluateConfig(Table):
    """Accuracy on questions with answers (paper section 7)."""

    prompts: FilePath | None = None
    """JSONL or Parquet with `prompt` and `answer`; none: nothing is evaluated."""
    limit: PositiveInt | None = None
    """Take only the first so many."""
    num_samples: PositiveInt = 4
    """Answers per question (the paper: 64)."""
    temperature: Temperature = 1.0
    """Sampling temperature."""
    top_p: Probability = 1.0
    """Nucleus."""
    max_tokens: PositiveInt = 32768
    """Longest answer in the student's tokens; those that reach it are counted as truncated."""


class Phase(Table):
    """One pass down the chain, with every option resolved."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """Name of its folder."""
    source: Literal["sample", "ingest", "mix"] = "sample"
    """Where its rollouts come from."""
    sample: SampleConfig = SampleConfig()
    ingest: IngestConfig = IngestConfig()
    score: ScoreConfig = ScoreConfig()
    select: SelectConfig = SelectConfig()
    pack: PackConfig = PackConfig()
    train: TrainConfig = TrainConfig()
    mix: MixConfig = MixConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _rule_has_scores(self) -> Phase:
        if self.source == "mix" and self.select.rule not in ("all", "random"):
            raise ValueError(
                f"select.rule = {self.select.rule!r} needs scores, which mixed rollouts lack; use 'all' or 'random'"
            )
        if self.source == "ingest" and not self.ingest.paths:
            raise ValueError("source = 'ingest' needs ingest.paths, a list of files")
        if self.select.max_tokens is not None and self.select.max_tokens > self.pack.seq_len:
            raise ValueError(
                f"select.max_tokens = {self.select.max_tokens} lets answers through that are longer than a row,"
                f" pack.seq_len = {self.pack.seq_len}"
            )
        return self


# Folders of a run that are no phase's, and tables that an override like select.keep=2 begins with.
_RESERVED = ("base", "report", "seed", "out", "prompts", "student", "teacher", "phase", *Phase.model_fields)


class RecipeConfig(Table):
    """A whole recipe, resolved: what `run.toml` says with every default filled in."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything that is drawn."""
    out: FilePath
    """Folder that the run's results go to."""
    prompts: PromptsConfig = PromptsConfig()
    student: Student
    teacher: Teacher | None = None
    phase: Annotated[list[Phase], Field(min_length=1)]

    @model_validator(mode="after")
    def _phases_fit(self) -> RecipeConfig:
        names = [phase.name for phase in self.phase]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"phase name {name!r} is used {names.count(name)} times; each needs its own")
            if name in _RESERVED:
                raise ValueError(f"phase name {name!r} means something else already; call it differently")
        for i, phase in enumerate(self.phase):
            if phase.source != "ingest" and self.teacher is None:
                raise ValueError(f"phase {phase.name!r} asks a teacher, but there is no [teacher] table")
            if phase.source == "sample" and self.prompts.path is None:
                raise ValueError(f"phase {phase.name!r} samples, but prompts.path names no questions")
            if phase.source == "mix" and i == 0:
                raise ValueError(f"phase {phase.name!r} needs the student of the phase before, but it is the first")
            if phase.pack.replay and i == 0:
                raise ValueError(
                    f"phase {phase.name!r}: pack.replay joins the phase before's rollouts, but it is the first"
                )
        return self

"""Every option, one frozen model per table of the recipe, each documented under its field.

Input: the raw tables of a TOML file (see load.py, which reads them). Invariant: a validator may reject, never
rewrite; what is resolved is exactly what was written plus these defaults. Tables of models are in models.py, that
of training in train_options.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from dasd_lite.config.models import (
    EXECUTION,
    FilePath,
    Fraction,
    Probability,
    Student,
    Table,
    Teacher,
    Temperature,
)
from dasd_lite.config.train import TrainConfig

SCORED_RULES = ("count", "ratio", "length_matched")  # selection rules that rank by both models' probabilities


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
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Leave out tokens less likely than this share of the likeliest; 0 is none."""
    num_samples: PositiveInt = 4
    """Candidates per question."""
    max_tokens: PositiveInt = 32768
    """Longest completion in the teacher's tokens; one that reaches it is kept as truncated and rejected by select."""


class IngestConfig(Table):
    """Answers that exist already, in place of a teacher."""

    paths: list[FilePath] = Field(default=[])
    """JSONL or Parquet with `input`/`output` or `messages`; `uid`, `domain`, `answer`, `finish_reason` are kept."""
    limit: PositiveInt | None = None
    """Take only the first so many of all files."""


class ScoreConfig(Table):
    """How given answers are scored: by the student, and where they came without log-probabilities by the teacher."""

    by: Literal["student", "teacher"] = "student"
    """student: the teacher's log-probabilities are those that came with the answers (paper section 4); teacher: the
    teacher reads the answers too, for those that came without."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the student here; with vllm a few answers are read by transformers as well, and the noise is told."""
    four_bit: bool = False
    """Read the student's weights in 4 bits (NF4), with transformers."""
    batch_tokens: Annotated[PositiveInt, EXECUTION] = 8192
    """Tokens in one forward pass; a longer answer is a pass of its own."""
    chunk_tokens: Annotated[PositiveInt | None, EXECUTION] = None
    """Positions whose logits exist at once: memory is this × vocabulary × 4 bytes; none: as many as make 128 MiB."""

    @model_validator(mode="after")
    def _four_bits_have_their_engine(self) -> ScoreConfig:
        if self.four_bit and self.engine != "transformers":
            raise ValueError(f"four_bit = true needs engine = 'transformers', not {self.engine!r}")
        return self


class Weighting(Table):
    """Weights of kept answers by the teacher's probability, w ∝ exp(λ · mean log-probability) within a prompt."""

    lam: float | None = None
    """λ: over 0 favours what the teacher finds likely, under 0 the unlikely, 0 nothing; none: by the next two."""
    effective_sample_size: Annotated[float, Field(gt=0, le=1)] = 0.7
    """λ is chosen so that (Σw)²/Σw² is on average this share of a prompt's kept answers."""
    favour: Literal["likely", "unlikely"] = "likely"
    """Sign of the λ that is chosen."""


class SelectConfig(Table):
    """Which candidates are trained on, and how much each counts."""

    rule: Literal["count", "ratio", "length_matched", "random", "all"] = "count"
    """Rank of a question's candidates: by number of teacher sentences (the paper), by their share, by number at equal
    length, at random (the baseline); `all` ranks nothing and keeps every candidate that passes the filters."""
    keep: PositiveInt = 1
    """Candidates kept per question."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """A sentence is the teacher's when p_T − p_S is over this, the student's when p_S − p_T is."""
    budget: dict[str, PositiveInt] = Field(default={})
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
    weighting: Weighting | None = None
    """{ } or { lam = 0.5 }: weights for train.objective = "weighted"; needs the teacher's log-probabilities and keep
    over 1, since weights are among one prompt's answers (the paper's future work)."""


class PackConfig(Table):
    """How rollouts become rows."""

    seq_len: Annotated[PositiveInt, Field(le=1 << 24)] = 65536
    """Tokens in one row."""
    method: Literal["best_fit", "tight", "in_order"] = "best_fit"
    """best_fit: the longest first; tight: often fewer rows yet, more slowly; in_order: as the data come."""
    replay: NonNegativeFloat = 0.0
    """Rollouts of the phase before that are joined, per rollout of this one (the paper's mixed ablation: 20/7.7)."""


class MixConfig(Table):
    """Mixed-policy rollouts: the student begins, the teacher ends (paper section 5)."""

    num_prompts: PositiveInt | None = None
    """Questions put to the student; none is all that the phase before trained on."""
    temperature: Temperature = 1.0
    """Temperature of the student and of the teacher."""
    top_p: Probability = 1.0
    """Nucleus of the student and of the teacher."""
    max_length_ratio: PositiveFloat = 1.5
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

    @property
    def needs_logprobs(self) -> bool:
        """Whether the teacher's log-probabilities decide what is kept, or how much it counts."""
        weighs = self.select.weighting is not None and self.select.weighting.lam != 0
        return self.select.rule in SCORED_RULES or weighs

    @property
    def is_scored(self) -> bool:
        """Whether the stage score runs: for the rule, or so that the teacher reads what is to be weighted."""
        return self.select.rule in SCORED_RULES or (self.needs_logprobs and self.score.by == "teacher")

    @model_validator(mode="after")
    def _rule_has_scores(self) -> Phase:
        if self.source == "mix" and self.select.rule not in ("all", "random"):
            raise ValueError(
                f"select.rule = {self.select.rule!r} needs scores, which mixed rollouts lack; use 'all' or 'random'"
            )
        if self.train.objective == "weighted" and self.select.weighting is None:
            raise ValueError(
                "train.objective = 'weighted' needs select.weighting, e.g. { effective_sample_size = 0.7 }"
            )
        weighting, chosen = self.select.weighting, self.select.keep > 1 or self.select.rule == "all"
        if weighting is not None and weighting.lam != 0 and (self.source == "mix" or not chosen):
            raise ValueError(
                "select.weighting is among one prompt's answers, and this phase keeps one each; raise select.keep, or"
                " set select.weighting = { lam = 0.0 } and train.objective = 'sft' here"
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
_RESERVED = ("base", "report", "trial", "seed", "out", "prompts", "student", "teacher", "phase", *Phase.model_fields)


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

    def _silent_teacher(self, phase: Phase) -> bool:
        """Tell whether the phase's answers come without log-probabilities, and nobody reads them afterwards."""
        silent = self.teacher is not None and self.teacher.kind == "endpoint" and not self.teacher.logprobs
        return silent and phase.score.by == "student"

    def _check_reader(self, phase: Phase) -> None:
        """Refuse a phase whose answers the teacher is to read, and cannot."""
        if self.teacher is None:
            raise ValueError(
                f"phase {phase.name!r}: score.by = 'teacher' asks a teacher, but there is no [teacher] table"
            )
        if self.teacher.kind == "endpoint" and self.teacher.tokenizer is None:
            raise ValueError(
                f"phase {phase.name!r}: score.by = 'teacher' needs teacher.tokenizer: servers read by token ids"
            )

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
            if phase.source == "sample" and phase.needs_logprobs and self._silent_teacher(phase):
                what = f"rule = {phase.select.rule!r}" if phase.select.rule in SCORED_RULES else "weighting"
                raise ValueError(
                    f"phase {phase.name!r}: select.{what} needs log-probabilities, but teacher.logprobs = false;"
                    " use 'random' or 'all', without weighting"
                )
            if phase.score.by == "teacher" and phase.is_scored:
                self._check_reader(phase)
            if phase.source == "mix" and i == 0:
                raise ValueError(f"phase {phase.name!r} needs the student of the phase before, but it is the first")
            if phase.pack.replay and i == 0:
                raise ValueError(
                    f"phase {phase.name!r}: pack.replay joins the phase before's rollouts, but it is the first"
                )
        return self

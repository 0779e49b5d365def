"""Every option of a recipe: one frozen model per table, each field documented below its name.

Validators may reject values but never change them: a resolved recipe is what was written plus these defaults. The
tables of models are in models.py, the options of training in train.py; load.py reads the TOML.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    model_validator,
)

from dasd_lite.config.chain import ASKING, BASE, STAGES
from dasd_lite.config.evaluate import EvaluateConfig
from dasd_lite.config.extensions import is_extension
from dasd_lite.config.models import (
    EXECUTION,
    BuiltIn,
    Endpoint,
    FilePath,
    Fraction,
    Probability,
    Student,
    Table,
    Teacher,
    Temperature,
)
from dasd_lite.config.reading import DataPath, Reading
from dasd_lite.config.train import TrainConfig

CLASS_RULES = ("count", "ratio", "length_matched", "fewest")
"""Selection rules that compare teacher and student, sentence by sentence."""

STUDENT_RULES = ("rsr", "likelihood")
"""Selection rules that need the student's scores alone."""

_UNSCORED_RULES = ("longest", "shortest", "random", "all")
RULES = (*CLASS_RULES, *STUDENT_RULES, *_UNSCORED_RULES)
"""The built-in selection rules."""

NEED_NO_LOGPROBS = "'likelihood', 'rsr', 'longest', 'shortest', 'random' or 'all'"
"""The rules for answers without log-probabilities of the teacher, for messages."""

NGRAM = 20
"""Student tokens that are compared as one when repetition is measured."""


class PromptsConfig(Reading):
    """The prompts to distill on."""

    path: DataPath | None = None
    """File of prompts: JSONL, JSON, CSV or Parquet, also with .gz or .zst; a folder; a pattern; or
    hf://datasets/ORG/NAME@REVISION/path. The sample stage needs it."""
    limit: PositiveInt | None = None
    """Use only the first prompts, up to this number."""
    system: str | None = None
    """System prompt of all stages (the paper: "You are a helpful assistant.")."""
    skip_overlong: bool = False
    """Leave out prompts that fill the context of student or teacher, and count them; otherwise `check` names them and
    they end the run."""
    drop_contaminated: bool = False
    """Leave out prompts that share at least half of an evaluation question's 8-grams, or are equal to one, and count
    them; otherwise `check` and the report only name them."""
    trial: Annotated[PositiveInt, EXECUTION] = 16
    """Prompts of the trial, which go through the whole chain before an endpoint gets the others. With more of them, its
    figures on the teacher at each temperature say more."""


class SampleConfig(Table):
    """Sampling of the teacher (paper section 3)."""

    temperature: Temperature = 1.0
    """Sampling temperature. Stored log-probabilities are always those at temperature 1."""
    top_p: Probability = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with this total probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the top_k most likely tokens; 0 means all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Exclude tokens whose probability is below this share of the most likely token's; 0 excludes none."""
    num_samples: PositiveInt = 4
    """Answers per prompt."""
    max_tokens: PositiveInt = 32768
    """Maximum tokens of an answer, in the teacher's tokens. Answers that reach it are kept as truncated and rejected by
    select."""


class IngestConfig(Reading):
    """Existing answers, used instead of a teacher."""

    paths: list[DataPath] = Field(default=[])
    """Files of questions with answers: JSONL, JSON, CSV or Parquet, also with .gz or .zst; folders; patterns; or
    hf://datasets/ORG/NAME@REVISION/path."""
    limit: PositiveInt | None = None
    """Use only the first answers, up to this number over all files."""
    logprobs: list[DataPath] = Field(default=[])
    """Files of log-probabilities apart from the answers (as the published Logprob set): rows with `sample_uuid` (or
    `uuid`), `token_ids` and `logprobs`, joined to the answers of that uuid."""
    tokenizer: str | None = None
    """Local folder or Hugging Face Hub id of the tokenizer whose ids come with the answers. Needed for token ids
    without their bytes. Default: the teacher's, if it is a local model or names one."""
    require_logprobs: bool = False
    """Leave out answers without log-probabilities, or whose tokens do not spell them; each reason is counted. false:
    they are kept without log-probabilities."""


class ScoreConfig(Table):
    """Scoring of answers by the student, and by the teacher if they came without log-probabilities."""

    by: Literal["student", "teacher"] = "student"
    """student: only the student scores; the teacher's log-probabilities are those that came with the answers (paper
    section 4). teacher: the teacher also scores answers that came without log-probabilities."""
    when: Literal["needed", "always", "never"] = "needed"
    """needed: score runs unless select.rule is longest, shortest, random or all, which use no scores. always: it runs
    for these too, so that the report can count sentence classes. never: it does not run; for a rule of your own that
    uses no scores. Mixed answers are never scored."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Engine that runs the student. With vllm, transformers scores a few answers too, and the difference is
    reported."""
    four_bit: bool = False
    """Load the student's weights in 4 bits (NF4); transformers only."""
    batch_tokens: Annotated[PositiveInt, EXECUTION] = 8192
    """Tokens per forward pass. A longer answer gets a pass of its own."""
    chunk_tokens: Annotated[PositiveInt | None, EXECUTION] = None
    """Positions whose logits are in memory at once; they take chunk_tokens × vocabulary × 4 bytes. Default: as many as
    fit in 128 MiB."""

    @model_validator(mode="after")
    def _four_bit_has_its_engine(self) -> ScoreConfig:
        if self.four_bit and self.engine != "transformers":
            raise ValueError(f"four_bit = true needs engine = 'transformers', not {self.engine!r}")
        return self


class Weighting(Table):
    """Weights of kept answers: w ∝ exp(λ · mean log-probability by the teacher) among the answers of a prompt."""

    lam: float | None = None
    """λ. Above 0 favors answers that the teacher finds likely, below 0 unlikely ones; 0 weights all the same. Default:
    chosen from the other two options."""
    effective_sample_size: Annotated[float, Field(gt=0, le=1)] = 0.7
    """λ is chosen so that (Σw)²/Σw² is on average this share of a prompt's kept answers."""
    favor: Literal["likely", "unlikely"] = "likely"
    """Sign of the chosen λ."""


class SelectConfig(Table):
    """Which answers are trained on, and how much each counts."""

    rule: Annotated[str, AfterValidator(BuiltIn(RULES))] = "count"
    """How the answers to a prompt are ranked. count: by number of teacher sentences (the paper). ratio: by their share
    of the sentences that have a class. length_matched: by number at equal length. rsr: by the student's ranks ÷
    surprisals, lower is better (arXiv 2601.14249). likelihood: by the student's mean log-probability (GRAPE). fewest,
    longest, shortest: by few teacher sentences, by length (controls). random: at random (the baseline). all: not
    ranked, every answer that passes the filters is kept. package.module:attribute: a rule of your own. rsr and
    likelihood need no log-probabilities of the teacher."""
    keep: PositiveInt = 1
    """Answers kept per prompt."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """A teacher sentence has p_T − p_S above this; a student sentence has p_S − p_T above it."""
    budget: dict[str, PositiveInt] = Field(default={})
    """Maximum answers kept per domain, e.g. { math = 45400, code = 20100 }. Other domains are not limited."""
    max_tokens: PositiveInt | None = None
    """Maximum tokens of prompt plus answer, in the student's tokens and at most its context length. Default:
    pack.seq_len."""
    require_think: bool = True
    """Reject answers without a thinking part or without a final answer."""
    max_duplicate_lines: Fraction = 0.3
    """Reject answers with more than this share of their bytes in repeated lines."""
    max_duplicate_sentences: Fraction = 0.3
    """Reject answers with more than this share of their bytes in repeated sentences."""
    max_repeated_ngrams: Fraction = 0.5
    """Reject answers in which more than this share of the 20-grams of student tokens are repeats."""
    max_repeated_span: Annotated[PositiveInt, Field(ge=3 * NGRAM)] = 512
    """Reject answers with a loop of more than this many student tokens: the same text at least three times in a row.
    The other limits are shares of the whole answer, so a long answer would pass them with a long loop. Text that is
    given twice, such as a listing, is no loop."""
    require_right: Literal["no", "where_known", "yes"] = "no"
    """Whether answers must be right by evaluate.grader. where_known: answers that are wrong, or that state no answer,
    are rejected where the question has a reference answer. yes: so are all answers to questions without one. Answers
    that cannot be compared are never taken for wrong."""
    filter_prefix: bool = False
    """Whether these four limits look at the student's part of a mixed answer too. By default they look at the teacher's
    part alone: mixed policy is for answers on which the student drifts, often into a loop."""
    weighting: Weighting | None = None
    """{ } or { lam = 0.5 }: weights for train.objective = "weighted" (the paper's future work). It needs the teacher's
    log-probabilities, and keep > 1, because weights compare the answers to one prompt."""

    @property
    def needs_scores(self) -> bool:
        """Whether the rule cannot rank without scores."""
        return self.rule in CLASS_RULES + STUDENT_RULES

    @property
    def needs_teacher(self) -> bool:
        """Whether choice or weights cannot do without the teacher's log-probabilities."""
        return self.uses_weights or (self.uses_scores and self.rule not in STUDENT_RULES)

    @property
    def uses_scores(self) -> bool:
        """Whether the rule gets scores where answers have them: the rules that need them, and those of the user."""
        return self.rule not in _UNSCORED_RULES

    @property
    def uses_weights(self) -> bool:
        """Whether answers get weights other than 1."""
        return self.weighting is not None and self.weighting.lam != 0


class PackConfig(Table):
    """Packing of answers into training rows."""

    seq_len: Annotated[PositiveInt, Field(le=1 << 24)] = 65536
    """Tokens per row."""
    method: Literal["best_fit", "tight", "in_order"] = "best_fit"
    """best_fit: longest answers first. tight: often fewer rows, but slower. in_order: in the order of the data."""
    replay: NonNegativeFloat = 0.0
    """Answers of an earlier phase that are added, per answer of this one (the paper's mixed ablation: 20/7.7)."""
    replay_answers: PositiveInt | None = None
    """Instead of replay, their number. With source = "replay", it is the number of all answers; by default those of
    replay_from are all taken."""
    replay_from: FilePath | None = None
    """Where they come from: the name of an earlier phase, or a folder that select wrote, of this run or another with
    the same student (the paper's "additional" 20K). Default: the last earlier phase that is neither mix nor replay."""
    columns: FilePath | None = None
    """Parquet file with the columns that train.objective needs: `uid` of the rollout, and for each column a number (a
    reward), a list with one number per target token, the end token included (log-probabilities), or a list of lists."""

    @property
    def replays(self) -> bool:
        """Whether answers of another phase are added."""
        return self.replay > 0 or self.replay_answers is not None

    @model_validator(mode="after")
    def _one_number_of_replayed_answers(self) -> PackConfig:
        if self.replay and self.replay_answers is not None:
            raise ValueError(
                f"replay = {self.replay:g} and replay_answers = {self.replay_answers} both say how many answers are"
                " replayed; set one of them"
            )
        return self


class MixConfig(Table):
    """Mixed-policy answers: the student starts, the teacher finishes (paper section 5)."""

    num_prompts: PositiveInt | None = None
    """Prompts that the student answers. Default: all that the previous phase trained on."""
    rescue: Literal["cut_off", "wrong", "either"] = "cut_off"
    """Which of the student's answers the teacher finishes. cut_off: those that reach the length limit (the paper).
    wrong: finished ones that evaluate.grader finds wrong or without an answer, by the `answer` of their question; those
    that cannot be graded are counted and left out. either: both. A wrong answer is cut in the second half of its
    thinking."""
    temperature: Temperature = 1.0
    """Sampling temperature of both models."""
    top_p: Probability = 1.0
    """Nucleus of both models."""
    max_length_ratio: PositiveFloat = 1.5
    """The student is cut off at this multiple of the length of the teacher's answer, in the student's tokens."""
    max_tokens: PositiveInt = 32768
    """Maximum tokens that the teacher adds."""
    mask_prefix: bool = False
    """Do not train on the student's part (worse in the paper)."""


class Phase(Table):
    """One pass down the chain of stages, with every option resolved."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]
    """Name of the phase and of its folder."""
    source: Literal["sample", "ingest", "mix", "replay"] = "sample"
    """The stage that its answers come from. replay: none, it trains on answers of an earlier phase again (see
    pack.replay_from), to compare equal numbers of steps."""
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
        """Whether the teacher's log-probabilities decide which answers are kept, or how much each counts."""
        return (self.is_scored and not self.is_scored_by_student_alone) or self.select.uses_weights

    @property
    def replays(self) -> bool:
        """Whether it trains on answers of another phase."""
        return self.source == "replay" or self.pack.replays

    @property
    def is_scored(self) -> bool:
        """Whether score runs: the rule or the report wants scores, or the teacher must score what will be weighted."""
        if self.source in ("mix", "replay") or self.score.when == "never":
            return False
        needed = self.select.uses_scores or (self.select.uses_weights and self.score.by == "teacher")
        return needed or self.score.when == "always"

    @property
    def is_scored_by_student_alone(self) -> bool:
        """Whether answers that have no log-probabilities of the teacher are scored all the same."""
        return self.is_scored and self.score.by == "student" and not self.select.needs_teacher

    @property
    def is_scored_by_teacher(self) -> bool:
        """Whether the teacher scores answers that came without log-probabilities."""
        return self.is_scored and self.score.by == "teacher"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that this phase runs, in order."""
        runs = {"pack", "train"} | ({self.source, "select"} if self.source != "replay" else set())
        if self.is_scored:
            runs.add("score")
        if self.evaluate.has_questions:
            runs.add("evaluate")
        return tuple(stage for stage in STAGES if stage in runs)

    @model_validator(mode="after")
    def _mixed_answers_have_no_scores(self) -> Phase:
        if self.source == "mix" and self.select.needs_scores:
            raise ValueError(
                f"select.rule = {self.select.rule!r} needs scores, which mixed answers do not have;"
                " use 'all', 'random', 'longest' or 'shortest'"
            )
        return self

    @model_validator(mode="after")
    def _score_runs_where_it_must(self) -> Phase:
        if self.score.when == "always" and self.source == "mix":
            raise ValueError("score.when = 'always', but mixed answers have no scores; use 'needed' for this phase")
        if self.score.when == "never" and self.select.needs_scores:
            raise ValueError(f"score.when = 'never', but select.rule = {self.select.rule!r} needs scores")
        if self.select.rule == "rsr" and self.score.engine != "transformers":
            raise ValueError(
                f"select.rule = 'rsr' needs ranks, which score.engine = {self.score.engine!r} does not count; use"
                " 'transformers'"
            )
        if self.score.when == "never" and self.select.uses_weights and self.score.by == "teacher":
            raise ValueError("score.when = 'never', but select.weighting needs what score.by = 'teacher' scores")
        return self

    @model_validator(mode="after")
    def _weighted_objective_has_weights(self) -> Phase:
        if self.train.objective == "weighted" and self.select.weighting is None and self.source != "replay":
            raise ValueError(
                "train.objective = 'weighted' needs select.weighting, e.g. { effective_sample_size = 0.7 }"
            )
        return self

    @model_validator(mode="after")
    def _weights_compare_answers(self) -> Phase:
        keeps_several = self.select.keep > 1 or self.select.rule == "all"
        if self.select.uses_weights and (self.source == "mix" or not keeps_several):
            raise ValueError(
                "select.weighting compares the answers to one prompt, but this phase keeps one per prompt; raise"
                " select.keep, or set select.weighting = { lam = 0.0 } and train.objective = 'sft' for this phase"
            )
        return self

    @model_validator(mode="after")
    def _ingest_has_files(self) -> Phase:
        if self.source == "ingest" and not self.ingest.paths:
            raise ValueError("source = 'ingest' needs ingest.paths, a list of files")
        return self

    @model_validator(mode="after")
    def _replay_alone_is_no_multiple(self) -> Phase:
        if self.source == "replay" and self.pack.replay:
            raise ValueError(
                f"pack.replay = {self.pack.replay:g} is per answer of this phase, which has none of its own (source ="
                " 'replay'); set pack.replay_answers, or leave both out to take all"
            )
        return self

    @model_validator(mode="after")
    def _answers_fit_rows(self) -> Phase:
        if self.select.max_tokens is not None and self.select.max_tokens > self.pack.seq_len:
            raise ValueError(
                f"select.max_tokens = {self.select.max_tokens} allows answers longer than a row,"
                f" pack.seq_len = {self.pack.seq_len}"
            )
        return self


# What stands for a phase in a run folder or on the command line, as in select.keep=2.
_RESERVED = (
    BASE,
    "report",
    "trial",
    "seed",
    "out",
    "reuse",
    "prompts",
    "student",
    "teacher",
    "phase",
    *Phase.model_fields,
)


class RecipeConfig(Table):
    """A whole recipe, resolved: what `run.toml` says, with every default filled in."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of all random choices."""
    out: FilePath
    """Folder for the results of the run."""
    reuse: list[FilePath] = Field(default=[])
    """Folders of other runs. Answers and scores that they have are taken over instead of made again, where all that
    decides them is the same."""
    prompts: PromptsConfig = PromptsConfig()
    student: Student
    """Table of the model to train. Without `kind`, evaluate and mix run it in vLLM where a GPU and vLLM are, else in
    transformers; keys that only one of them has decide before that, and a run keeps its engine."""
    teacher: Teacher | None = None
    """Table of the model to learn from. Phases that ingest their answers need none."""
    phase: Annotated[list[Phase], Field(min_length=1)]
    """One [[phase]] table per pass down the chain of stages, in order."""
    _engine_line: str = PrivateAttr("")

    @property
    def engine_line(self) -> str:
        """Which engine runs the student and why, where the recipe leaves that open; "" where it says so."""
        return self._engine_line

    @property
    def extensions(self) -> tuple[tuple[str, str], ...]:
        """The code of the user's own that the recipe names: each key with its name."""
        names = [] if self.teacher is None else [("teacher.kind", self.teacher.kind)]
        for phase in self.phase:
            names.append(("select.rule", phase.select.rule))
            names.append(("train.objective", phase.train.objective))
            names.append(("evaluate.grader", phase.evaluate.grader))
        return tuple(pair for pair in dict.fromkeys(names) if is_extension(pair[1]))

    @model_validator(mode="after")
    def _phase_names_are_unique(self) -> RecipeConfig:
        for name, count in Counter(phase.name for phase in self.phase).items():
            if count > 1:
                raise ValueError(f"phase name {name!r} is used {count} times; each phase needs its own")
        return self

    @model_validator(mode="after")
    def _phase_names_are_free(self) -> RecipeConfig:
        for phase in self.phase:
            if phase.name in _RESERVED:
                raise ValueError(f"phase name {phase.name!r} is reserved; use another")
        return self

    @model_validator(mode="after")
    def _first_phase_needs_no_other(self) -> RecipeConfig:
        first = self.phase[0]
        if first.source == "mix":
            raise ValueError(f"phase {first.name!r} needs the student of the previous phase, but it is the first")
        if first.replays and first.pack.replay_from is None:
            raise ValueError(
                f"phase {first.name!r}: pack.replay adds answers of an earlier phase, but it is the first; name a"
                " folder in pack.replay_from"
            )
        return self

    @model_validator(mode="after")
    def _replay_is_from_an_earlier_phase(self) -> RecipeConfig:
        for phase in self.phase:
            name = str(phase.pack.replay_from)
            if not phase.replays or name not in [other.name for other in self.phase]:
                continue
            if (earlier := self.replayed_phase(phase)) is None:
                raise ValueError(f"phase {phase.name!r}: pack.replay_from = {name!r} is not an earlier phase")
            if earlier.source == "replay":
                raise ValueError(
                    f"phase {phase.name!r}: pack.replay_from = {name!r} has no answers of its own (source = 'replay')"
                )
        return self

    def replayed_phase(self, phase: Phase) -> Phase | None:
        """Return the earlier phase that pack.replay_from names; None if it is not set, or a folder."""
        earlier = self.phase[: next(i for i, other in enumerate(self.phase) if other.name == phase.name)]
        return next((other for other in earlier if other.name == str(phase.pack.replay_from)), None)

    @model_validator(mode="after")
    def _sources_are_given(self) -> RecipeConfig:
        for phase in self.phase:
            if phase.source in ASKING and self.teacher is None:
                raise ValueError(f"phase {phase.name!r} asks a teacher, but there is no [teacher] table")
            if phase.source == "sample" and self.prompts.path is None:
                raise ValueError(f"phase {phase.name!r} samples, but prompts.path is not set")
        return self

    @model_validator(mode="after")
    def _evaluated_teacher_is_given(self) -> RecipeConfig:
        for phase in self.phase:
            if phase.evaluate.teacher and self.teacher is None:
                raise ValueError("evaluate.teacher = true evaluates the teacher, but there is no [teacher] table")
        return self

    @model_validator(mode="after")
    def _logprobs_are_requested(self) -> RecipeConfig:
        if not isinstance(self.teacher, Endpoint) or self.teacher.logprobs:
            return self
        for phase in self.phase:
            if phase.source == "sample" and phase.needs_logprobs and phase.score.by == "student":
                what = f"select.rule = {phase.select.rule!r}" if phase.select.uses_scores else "select.weighting"
                what = "score.when = 'always'" if phase.score.when == "always" else what
                raise ValueError(
                    f"phase {phase.name!r}: {what} needs log-probabilities, but teacher.logprobs = false;"
                    f" use {NEED_NO_LOGPROBS}, without weighting"
                )
        return self

    @model_validator(mode="after")
    def _teacher_can_score(self) -> RecipeConfig:
        for phase in self.phase:
            if not phase.is_scored_by_teacher:
                continue
            key = f"phase {phase.name!r}: score.by = 'teacher'"
            if self.teacher is None:
                raise ValueError(f"{key} asks a teacher, but there is no [teacher] table")
            if isinstance(self.teacher, Endpoint) and self.teacher.tokenizer is None:
                raise ValueError(f"{key} needs teacher.tokenizer: servers score token ids")
        return self

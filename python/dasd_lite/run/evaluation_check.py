"""Check what a recipe evaluates: its questions, references and benchmarks, the sandbox, and what it will cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dasd_lite.chat.chat import Chat
from dasd_lite.config.evaluate import EvaluateConfig
from dasd_lite.config.models import Transformers
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.console import say, say_note
from dasd_lite.costs.estimate import Training
from dasd_lite.costs.evaluation import Load, evaluation_line
from dasd_lite.costs.hardware import visible_gpu
from dasd_lite.data.asked import QuestionSet, question_sets
from dasd_lite.data.hub import model_folder
from dasd_lite.data.prompts import Prompts
from dasd_lite.data.records import OWN_TASK, Prompt
from dasd_lite.errors import DasdError, DataError
from dasd_lite.grading import grader_kind, open_grader
from dasd_lite.run.questions import Questions, overlong
from dasd_lite.stages.evaluate import reference_faults

_MARKS = ("box", "answer", "####")  # words by which questions say how to mark the final answer


def evaluation_faults(recipe: RecipeConfig, questions: Questions) -> Iterator[str]:
    """Yield what keeps the evaluations of a recipe from being right, each fault once."""
    different = {phase.evaluate.model_dump_json(): phase.evaluate for phase in recipe.phase}
    seen = [line for config in different.values() for line in _faults(config, recipe, questions)]
    yield from dict.fromkeys(seen)


def _faults(config: EvaluateConfig, recipe: RecipeConfig, questions: Questions) -> Iterator[str]:
    if not config.has_questions:
        return
    if config.four_bit and not isinstance(recipe.student, Transformers):
        yield f"evaluate.four_bit = true needs student.kind = 'transformers', not {recipe.student.kind!r}"
    try:
        sets = _sets(config, recipe, questions)
    except DasdError as error:
        yield from str(error).splitlines()
        return
    try:
        grade = open_grader(config.grader)
    except DasdError:
        return  # reported with the other code of the user
    yield from (
        line if line.startswith("evaluate.") else f"evaluate.prompts: {line}"
        for line in reference_faults(sets, grade, config.prompts or "")
    )
    answers = [question.answer for each in sets for question in each.questions if question.answer is not None]
    kinds = {grader_kind(answer) for answer in answers} if config.grader == "auto" else {config.grader}
    if "code" in kinds:
        from dasd_lite.grading.code import sandbox_name

        try:
            say(f"programs run in {sandbox_name()}")
        except DasdError as error:
            yield str(error)
    yield from _too_long(sets, recipe)
    for task in config.task_configs:
        number = next(len(each.questions) for each in sets if each.name == task.name)
        if task.limit is not None and task.limit > number:
            say_note(
                f"evaluate.tasks: {task.name}: limit = {task.limit:,}, but it has {number:,} questions; limit counts"
                " questions, max_tokens is the length of an answer"
            )
    own = next((each for each in sets if each.name == OWN_TASK), None)
    if own is not None and own.template is None and config.grader in ("auto", "math"):
        formulas = [q for q in own.questions if q.answer is not None and grader_kind(q.answer) == "math"]
        if formulas and not any(map(_asks_for_mark, formulas)):
            say_note(
                f"{config.prompts}: no question says how its final answer is to be marked, so a right one may not be"
                ' found; evaluate.template = "{prompt}\\n\\nPut your final answer in \\\\boxed{}." asks for it'
            )


def _asks_for_mark(question: Prompt) -> bool:
    return any(mark in message["content"].lower() for message in question.messages for mark in _MARKS)


def _too_long(sets: Sequence[QuestionSet], recipe: RecipeConfig) -> Iterator[str]:
    """Report questions that leave no room for an answer in the student's context."""
    try:
        chat = Chat(model_folder(recipe.student.model))
    except DasdError:
        return  # reported with the student
    for each in sets:
        if long := list(overlong(Prompts(each.questions), chat)):
            question, length = long[0]
            what = "evaluate.prompts" if each.name == OWN_TASK else f"evaluate.tasks: {each.name}"
            yield (
                f"{what}: {len(long):,} of {len(each.questions):,} questions leave no room for an answer in the"
                f" student's context of {chat.context:,} tokens, the first is {question.place} ({length:,} tokens);"
                " set a limit before it, or use another student"
            )


def _sets(config: EvaluateConfig, recipe: RecipeConfig, questions: Questions) -> list[QuestionSet]:
    try:
        own = questions.to_evaluate(config, recipe.prompts.system)
    except DasdError as error:
        raise DataError("\n".join(f"evaluate.prompts: {line}" for line in str(error).splitlines())) from error
    try:
        return question_sets(config, own)
    except DasdError as error:
        raise DataError("\n".join(f"evaluate.tasks: {line}" for line in str(error).splitlines())) from error


def longest_answers(config: EvaluateConfig, recipe: RecipeConfig, questions: Questions) -> list[int]:
    """Return the most tokens of an answer to each set of questions."""
    return [each.max_tokens for each in _sets(config, recipe, questions)]


def _loads(config: EvaluateConfig, recipe: RecipeConfig, questions: Questions) -> list[Load]:
    sets = _sets(config, recipe, questions)
    return [
        Load(
            len(each.questions),
            len(each.questions) * each.num_samples,
            each.max_tokens,
            each.num_samples * sum(len(m["content"]) for q in each.questions for m in q.messages),
        )
        for each in sets
    ]


def reference_lines(recipe: RecipeConfig, prompts: Prompts) -> tuple[list[str], list[str]]:
    """Return faults and notes about the reference answers of training prompts: faults where right answers decide."""
    faults: list[str] = []
    notes: list[str] = []
    different = {phase.evaluate.grader: open_grader(phase.evaluate.grader) for phase in recipe.phase}
    for name, grade in different.items():
        own = QuestionSet(OWN_TASK, tuple(prompt for prompt in prompts if prompt.answer is not None), 1, 1)
        phases = [phase for phase in recipe.phase if phase.evaluate.grader == name]
        decides = any(
            p.select.require_right != "no" or (p.source == "mix" and p.mix.rescue != "cut_off") for p in phases
        )
        for line in reference_faults([own], grade, prompts.path or "prompts"):
            line += "; if it means that there is none: prompts.columns = { no_answer = ['…'] }"
            (faults if decides else notes).append(f"prompts.path: {line}")
    return faults, notes


def contamination_lines(recipe: RecipeConfig, questions: Questions, prompts: Prompts) -> Iterator[str]:
    """Say how many prompts contain evaluation questions."""
    if found := questions.contaminated(prompts, recipe):
        prompt, question, share = found[0]
        number = len({each.uid for each, _, _ in found})
        yield (
            f"{number:,} of {len(prompts):,} prompts contain evaluation questions, the first is {prompt.place}:"
            f" {share:.0%} of the 8-grams of {question.place}; accuracies on these say what was remembered;"
            " prompts.drop_contaminated = true leaves such prompts out"
        )


def teacher_load(recipe: RecipeConfig, questions: Questions) -> Sequence[Load]:
    """Return what the evaluation of the teacher asks; nothing if there is none."""
    phase = next((phase for phase in recipe.phase if phase.evaluate.teacher), None)
    return _loads(phase.evaluate, recipe, questions) if phase is not None else ()


def evaluations_line(recipe: RecipeConfig, questions: Questions, trainings: Sequence[Training]) -> str | None:
    """Say what the evaluations of the student cost; None if there are none."""
    evaluated: list[Phase] = [recipe.phase[0], *recipe.phase]  # the first time before training
    evaluated = [phase for phase in evaluated if phase.evaluate.has_questions]
    loads = [load for phase in evaluated for load in _loads(phase.evaluate, recipe, questions)]
    if not loads:
        return None
    shape = trainings[0].shape if trainings else None
    line = evaluation_line(loads, len(evaluated), recipe.student, shape, visible_gpu())
    if ceiling := teacher_load(recipe, questions):
        answers, tokens = sum(load.num_answers for load in ceiling), sum(load.tokens for load in ceiling)
        line += f"; and of the teacher {answers:,} answers, at most {tokens:,} tokens"
    return line

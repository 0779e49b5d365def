"""Several tasks, the teacher as the ceiling, comparisons, contamination, and what must never be printed."""

import io
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console
from tests.evaluations import OPTIONS, QUESTIONS, SECRET, evaluate, graded, make_run, write

import dasd_lite as dl
from dasd_lite import console
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.data.records import GRADED, HIDDEN_TEXT
from dasd_lite.data.run_folder import RunFolder
from dasd_lite.errors import DataError
from dasd_lite.grading.statistics import compare_accuracies
from dasd_lite.report.page import write_report
from dasd_lite.report.results import planned_stages, read_accuracy
from dasd_lite.report.show.show import show
from dasd_lite.report.summary import summary


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that tests only read."""
    return make_run(tmp_path_factory.mktemp("tasks") / "run")


def printed(command, width=200):
    """What a command prints, its lines without the spaces at their ends."""
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "out", lambda: Console(file=text, width=width, highlight=False))
        result = command()
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()), result


@pytest.fixture(scope="module")
def reported(run):
    text, path = printed(lambda: write_report(run))
    return text, path.read_text(encoding="utf-8")


def rows(text, title):
    """The cells of a table of the terminal."""
    lines = text.splitlines()
    first = next(i for i in range(lines.index(title), len(lines)) if lines[i].startswith("───")) + 1
    last = next(i for i in range(first, len(lines)) if not re.search(r"\S {2,}\S", lines[i]))
    return [re.split(r" {2,}", line.strip()) for line in lines[first:last]]


def test_a_row_for_each_task_and_model(reported):
    text, _ = reported
    table = rows(text, "Accuracy")
    assert [row[:4] for row in table] == [
        ["prompts", "(before)", "3 × 2", "50.0 ± 28.9"],
        ["low", "3 × 2", "66.7 ± 16.7", "11.2–96.9"],
        ["teacher", "3 × 2", "100.0 ± 0.0", "43.9–100.0"],
        ["aime24", "(before)", "1 × 4", "25.0 ± –"],
        ["low", "1 × 4", "50.0 ± –", "–"],
        ["gpqa-diamond", "(before)", "2 × 2", "25.0 ± 25.0"],
        ["low", "2 × 2", "75.0 ± 25.0", "1.0–99.9"],
    ]


def test_the_verdicts_that_are_not_zero_have_columns(reported):
    text, _ = reported
    header = text[text.index("\nNeither right nor wrong\n") :].split("───")[0].split("\n", 2)[2]
    assert header.split() == [
        *("task", "after", "no", "answer", "unparseable", "unknown"),
        *("accuracy", "at", "least,", "at", "most"),
    ]
    table = rows(text, "Neither right nor wrong")
    assert table[0] == ["prompts", "(before)", "0.0 %", "16.7 %", "16.7 %", "50.0–83.3"]
    assert table[3] == ["aime24", "(before)", "0.0 %", "0.0 %", "0.0 %", "25.0–25.0"], "cut off is no other verdict"
    assert table[5][2] == "25.0 %"
    assert rows(text, "Accuracy")[3][-2:] == ["25.0 %", "3,155.0"]


def test_columns_of_verdicts_are_left_out_where_nothing_is_in_them(tmp_path):
    folder = make_run(tmp_path / "run")
    for phase in ("base", "low"):
        evaluate(folder / phase / "evaluate", prompts={"a": "rw", "b": "rc"})
    text, _ = printed(lambda: write_report(folder))
    assert "Neither right nor wrong" not in text
    assert "task" not in text.partition("\nAccuracy\n")[2].splitlines()[0]
    evaluate(folder / "low" / "evaluate", prompts={"a": "rn", "b": "rc"})
    text, _ = printed(lambda: write_report(folder))
    assert rows(text, "Neither right nor wrong")[1] == ["low", "25.0 %"]


def test_changes_are_paired_by_question_and_the_teacher_is_the_ceiling(reported):
    text, page = reported
    assert rows(text, "Changes in accuracy") == [
        # a: ½ → 1, b: 0 → ½, c: 1 → ½
        ["prompts", "low since before", "+16.7 ± 33.3", "−100.0 to +100.0", "2", "0", "1", "3"],
        ["teacher against low", "+33.3 ± 16.7", "−38.4 to +100.0", "2", "1", "0", "3"],
        ["aime24", "low since before", "+25.0 ± –", "–", "1", "0", "0", "1"],
        ["gpqa-diamond", "low since before", "+50.0 ± 0.0", "–", "2", "0", "0", "2"],
    ]
    assert "accuracy of the teacher" in page and "Dashed: the teacher." in page
    assert "Not finished" in text and "teacher/" not in text.partition("Not finished")[2]


def test_every_sign_of_an_error_says_of_what(reported):
    """Each table with ± has a note with it that names the error."""
    text, page = reported
    for title in ("Accuracy", "Changes in accuracy"):
        notes = " ".join(text[text.index(f"\n{title}\n") :].partition("\n\n")[0].split())
        assert re.search(r"± (its )?standard error over questions", notes), title
    assert "one standard error over questions to either side" in page


def test_several_answers(reported):
    text, _ = reported
    table = rows(text, "Several answers to a question")
    assert table[0] == ["prompts", "(before)", "2", "50.0 %", "66.7 %", "50.0 %", "33.3 %"]
    assert table[3] == ["aime24", "(before)", "4", "25.0 %", "100.0 %", "0.0 %", "0.0 %"]  # 1 right, 2 × 99, 1 abstains
    assert table[4] == ["low", "4", "50.0 %", "100.0 %", "50.0 %", "0.0 %"]


def test_questions_that_were_trained_on_are_said_and_shown(reported):
    text, page = reported
    line = "Contamination: 1 of 3 questions of evaluate.prompts, 1 of 2 questions of gpqa-diamond have half or more"
    assert line in " ".join(text.split())
    ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    part = page[page.index("Questions that share text") :]
    assert "Rob counts 12 birds" in part and "Bob counts 12 birds" in part
    assert part.count(HIDDEN_TEXT) == 2, "both texts"


def test_without_contamination_it_says_that_it_looked(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "teacher" / "evaluate" / "manifest.json").unlink()
    for phase in ("base", "low"):
        evaluate(folder / phase / "evaluate", prompts={"a": "rw", "c": "rr"})
    text, page = printed(lambda: write_report(folder))
    assert "Contamination: no question has half of its 8-grams in one of the 3 training prompts." in text
    assert ">Contamination</h2>" not in page.read_text()


def test_the_line_in_the_terminal(run, tmp_path):
    line = summary(run / "base" / "evaluate")
    assert line == (
        "accuracy 50.0 ± 28.9% (standard error over 3 questions × 2), unparseable 16.7%, unknown 16.7%, cut off 0.0%,"
        " mean length 40.0 tokens, aime24 25.0 ± –% (standard error over 1 questions × 4), cut off 25.0%, mean length"
        " 3,155.0 tokens, gpqa-diamond 25.0 ± 25.0% (standard error over 2 questions × 2), no answer 25.0%, cut off"
        " 0.0%, mean length 40.0 tokens, 2.0 s"
    )


@pytest.mark.parametrize("width", [80, 100, 200])
def test_nothing_is_cut_at_any_width(run, reported, width):
    text, _ = printed(lambda: write_report(run), width)
    assert max(map(len, text.splitlines())) <= width
    assert sorted(text.replace("─", "").split()) == sorted(reported[0].replace("─", "").split())


# --- hidden -----------------------------------------------------------------------------------------


def secrets(text):
    """Words of hidden questions and options that stand in a text."""
    flat = " ".join(text.split())
    return [word for word in (SECRET, "distant stars", *OPTIONS, "strangest") if word in flat]


def test_no_question_of_a_hidden_task_is_in_a_report(reported):
    assert not any(map(secrets, reported))


def test_show_hides_questions_and_says_why(run):
    folder = run / "low" / "evaluate"
    text, _ = printed(lambda: show(folder, None, rejected=False, limit=99))
    assert "It asks: Ann has 3 apples" in text
    assert "gpqa-diamond" in text and HIDDEN_TEXT in text
    assert not secrets(text)
    text, _ = printed(lambda: show(folder, "rec0", rejected=False))
    assert not secrets(text)
    assert re.search(
        r"prompt rec0 · sums · candidate 0 · answer C · extracted C · right · gpqa-diamond · 40 tokens", text
    )


def test_show_has_options_and_tests_in_few_words(tmp_path):
    (row,) = graded("gpqa-diamond", "rec0", "r")
    row["task"] = "quarks"
    tests = '{"tests": [{"input": "1", "output": "2"}], "private": "x"}'
    write(tmp_path / "e", "evaluate", graded=(GRADED, [row, {**row, "uid": "u", "answer": tests}]))
    text, _ = printed(lambda: show(tmp_path / "e", None, rejected=False))
    assert "answer C (the strange quark)" in text
    assert "answer 1 tests and private ones" in text


# --- comparing --------------------------------------------------------------------------------------


def test_two_evaluations_are_compared_from_python(run):
    first, second = dl.Evaluation(run / "base" / "evaluate"), run / "low" / "evaluate"
    own = dl.compare(first, second, task="prompts")
    assert (own.difference, own.standard_error) == (pytest.approx(1 / 6), pytest.approx(1 / 3))
    assert (own.wins, own.ties, own.losses, own.shared) == (2, 0, 1, 3)
    assert dl.compare(second, run / "teacher" / "evaluate").wins == 2, "the only task that both have"
    with pytest.raises(DataError, match=r"task is not set: .* share prompts, aime24, gpqa-diamond; name one"):
        dl.compare(first, second)
    with pytest.raises(DataError, match=r"task = 'aime25': "):
        dl.compare(first, second, task="aime25")


def test_two_evaluations_are_compared_on_the_command_line(run, tmp_path, cli):
    again = tmp_path / "other" / "low" / "evaluate"
    evaluate(again, prompts={"a": "rrrr", "c": "rrrr"})
    result = cli("show", run / "low" / "evaluate", "--against", again, cwd=tmp_path)
    assert (result.rc, result.stderr) == (0, "")
    (row,) = rows(result.stdout, "Difference")
    assert row[0].endswith("run/low/evaluate against other/low/evaluate") or " against " in row[0]
    assert row[1:] == ["−25.0 ± 25.0", "−100.0 to +100.0", "0", "1", "1", "2", "1"], "b is unpaired"
    assert [row[-5] for row in rows(result.stdout, "Accuracy")[:2]] == ["100.0 ± 0.0", "66.7 ± 16.7"]
    wrong = cli("show", run / "low" / "evaluate", "a", "--against", again, cwd=tmp_path)
    assert (wrong.rc, wrong.stderr) == (
        2,
        "dasd-lite: --against compares whole evaluations; leave uid and --rejected out\n",
    )
    missing = cli("show", run / "low" / "evaluate", "--against", run / "low" / "select", cwd=tmp_path)
    assert missing.rc == 2 and "written by select, but Evaluation needs a folder of evaluate" in missing.stderr


def test_files_that_number_their_questions_alike_are_not_paired(tmp_path):
    for name, answer in (("one", "7"), ("two", "8")):
        write(tmp_path / name / "evaluate", "evaluate", graded=(GRADED, graded("prompts", "a", "rw", answer=answer)))
    with pytest.raises(DataError, match=r"share no question, so they cannot be compared$"):
        dl.compare(tmp_path / "one" / "evaluate", tmp_path / "two" / "evaluate")


def test_options_in_another_order_are_the_same_question(run):
    own = read_accuracy(run / "low" / "evaluate").tasks["gpqa-diamond"]
    assert (own.num_questions, own.k) == (2, 2)
    assert set(QUESTIONS["gpqa-diamond"]) == {uid for uid, _ in own.questions}


def test_an_evaluation_of_benchmarks_alone_has_a_before(tmp_path):
    run = RunFolder(tmp_path)
    phase = {"name": "low", "evaluate": {"tasks": ["aime24"]}}
    recipe = RecipeConfig.model_validate(
        {
            "out": str(tmp_path),
            "prompts": {"path": "prompts.jsonl"},
            "student": {"kind": "transformers", "model": "student"},
            "teacher": {"kind": "transformers", "model": "teacher"},
            "phase": [phase],
        }
    )
    names = [stage.name for stage in planned_stages(run, recipe)]
    assert names[0] == "base/evaluate" and names[-1] == "low/evaluate"
    with_teacher = {"evaluate": recipe.phase[0].evaluate.model_copy(update={"teacher": True})}
    asked = recipe.model_copy(update={"phase": [recipe.phase[0].model_copy(update=with_teacher)]})
    assert "teacher/evaluate" in [stage.name for stage in planned_stages(run, asked)]


def test_benchmarks_are_paired_whatever_stands_beside_them(tmp_path):
    evaluate(tmp_path / "a" / "evaluate", prompts={"a": "rw"}, aime24={"1": "rwwc"})
    evaluate(tmp_path / "b" / "evaluate", aime24={"1": "rrww"})
    first, second = (read_accuracy(tmp_path / name / "evaluate").tasks["aime24"] for name in "ab")
    assert compare_accuracies(first, second).shared == 1

"""The report: its numbers by hand, one voice with the summary, its page well-formed, escaped, and self-contained."""

import io
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from dasd_lite import console
from dasd_lite.config.chain import STAGES
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.data.manifest import Identity
from dasd_lite.data.records import GRADED, KEPT, REJECTED, ROLLOUT, ROW, SCORE
from dasd_lite.data.run_folder import RunFolder
from dasd_lite.data.writer import ShardWriter, begin
from dasd_lite.errors import DataError
from dasd_lite.grading import open_grader
from dasd_lite.method.sentences import sentence_ends
from dasd_lite.report import accuracy_tables, results, tables
from dasd_lite.report.page import write_report
from dasd_lite.report.rollouts import PhaseRollouts, Preference, opening_of, read_phase
from dasd_lite.report.show.show import show
from dasd_lite.report.summary import summary

EVIL = 'pick<script>alert("x")</script>'
LONG = "<think> Start at 9. Wait, no. Up 3 is 2.</think>\nAnswer: 2"
WRONG = "<think> Start at 9. Up 3 is 2.</think>\nAnswer: 3"
SHORT = "<think> Start at 1. Up 4 is 5.</think>\nAnswer: 5"
# uid, prompt, answer, completion, class of each sentence, tokens of the answer, reason
ROLLOUTS = [
    ("u0", "q1", "2", LONG, "==TT==", 12, ""),
    ("u1", "q1", "2", WRONG, "==S=·", 10, "rank"),
    ("u2", "q1", "2", "<think> Start", "==", 4, "truncated"),
    ("u3", "q2", "5", SHORT, "==T==", 10, ""),
    ("u4", "q2", "5", SHORT, "==T==", 10, "rank"),
]
P_OF = {"=": (0.9, 0.85), "T": (0.9, 0.3), "S": (0.2, 0.6), "·": (np.nan, 0.5)}
# question, domain: the grades of two answers, before, after low and after mixed
GRADES = {
    ("a", "dial"): (("right", "wrong"), ("right", "right"), ("right", "wrong")),
    ("b", "dial"): (("wrong", "no_answer"), ("right", "right"), ("wrong", "right")),
    ("c", EVIL): (("right", "right"), ("right", "right"), ("right", "right")),
}


GRADER = open_grader("math")
NOT_GRADED = {"graded": 0, "questions": 0, "questions_right": 0}


def dataset(folder, stage, tables=None, counts=None, **timing):
    tables = tables or {}
    identity = Identity(stage, 1, {}, {"of": str(folder.parent.name)})
    with ShardWriter(folder, identity, {name: schema for name, (schema, _) in tables.items()}) as writer:
        for name, (schema, rows) in tables.items():
            for part in (rows[:2], rows[2:]) if name == "scores" else (rows,):  # row groups of the two differ
                writer.write(name, pa.RecordBatch.from_pylist(part, schema=schema))
        writer.publish(counts or {}, **timing)


def question(prompt, answer, domain="dial"):
    return {
        "prompt_uid": prompt,
        "messages": [{"role": "user", "content": "<script>alert(1)</script>"}],
        "domain": domain,
        "answer": answer,
        "index": 0,
        "finish_reason": "stop",
        "prefix_bytes": 0,
    }


def graded(folder, which):
    rows = []
    for (uid, domain), grades in GRADES.items():
        for i, grade in enumerate(grades[which]):
            reason = "length" if grade == "no_answer" else "stop"
            row = {**question(uid, "1", domain), "uid": f"{uid}{i}", "completion": "x", "index": i, "task": "prompts"}
            rows.append({**row, "grade": grade, "vote": grade, "finish_reason": reason, "num_tokens": 10 + i})
    dataset(folder, "evaluate", {"graded": (GRADED, rows)}, seconds=1.0)


def score_row(uid, completion, classes):
    ends = sentence_ends(completion)
    assert len(ends) == len(classes), uid
    p_teacher, p_student = np.array([P_OF[c] for c in classes], np.float32).T
    return {
        "uid": uid,
        "sentence_ends": ends,
        "p_teacher": p_teacher,
        "p_student": p_student,
        "teacher_mean_logprob": np.log(0.8),
        "student_mean_logprob": -1.0,
        "num_teacher_tokens": 9,
        "ids": [1, 2, 3],
        "num_context_tokens": 1,
    }


def select(folder, rows):
    columns = [
        {
            **question(prompt, answer),
            "uid": uid,
            "completion": completion,
            "ids": [0] * (3 + tokens),
            "num_context_tokens": 3,
            "num_sentences": len(classes),
            "grade": GRADER(completion, answer).verdict,
            "reason": reason,
            "value": 1.0,
        }
        for uid, prompt, answer, completion, classes, tokens, reason in rows
    ]
    kept = [{k: v for k, v in row.items() if k in KEPT.names} for row in columns if not row["reason"]]
    rejected = [row for row in columns if row["reason"]]
    reasons = dict(Counter(row["reason"] for row in rejected).most_common())
    counts = {"rollouts": len(rows), "kept": len(kept), "rejected": reasons, "repeating": 1, "grades": NOT_GRADED}
    dataset(folder, "select", {"kept": (KEPT, kept), "rejected": (REJECTED, rejected)}, counts, seconds=1.0)


def train(folder, loss):
    snapshots = [{"step": step, "questions": 16, "right": right} for step, right in ((0, 3), (1, 2), (3, 12))]
    counts = {"tokens": 4936, "monitored": snapshots}
    dataset(folder, "train", {}, counts, tokens_per_second=1234.0, seconds=4.0)
    rows = [
        {"step": i + 1, "loss": value, "learning_rate": 1e-3 / (i + 1), "grad_norm": 1.0, "tokens": 9, "seconds": 0.1}
        for i, value in enumerate(loss)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99')


def low(folder):
    rollouts = [
        {**question(prompt, answer), "uid": uid, "completion": completion}
        for uid, prompt, answer, completion, *_ in ROLLOUTS
    ]
    timing = {"seconds": 2.0, "sampled_tokens": 500, "tokens_per_second": 251.0}  # without the time to publish
    dataset(folder / "sample", "sample", {"rollouts": (ROLLOUT, rollouts)}, {"prompts": 2, "rollouts": 5}, **timing)
    scores = [score_row(uid, completion, classes) for uid, _, _, completion, classes, *_ in ROLLOUTS]
    dataset(folder / "score", "score", {"scores": (SCORE, scores)}, {"rollouts": 5}, seconds=1.0, scored_tokens=300)
    select(folder / "select", ROLLOUTS)
    counts = {"rollouts": 2, "replayed": 0, "rows": 1, "tokens": 28, "target_tokens": 22, "fill": 0.875}
    dataset(folder / "pack", "pack", {"rows": (ROW, [])}, counts, seconds=0.5)
    train(folder / "train", [3.0, 2.0, 1.0])
    graded(folder / "evaluate", 1)


def mixed(folder):
    rows = [
        {
            **question("q1", "2"),
            "uid": "m0",
            "completion": LONG,
            "prefix_bytes": 29,
            "token_ids": [5, 6, 7],
            "logprobs": np.log([0.5, 0.5, 1.0]),
            "token_bytes": [20, 9, 0],  # the end token has no bytes and does not count
        }
    ]
    started = [
        {**question("q1", "2"), "uid": "s0", "completion": LONG, "finish_reason": "length"},
        {**question("q2", "5"), "uid": "s1", "completion": SHORT},
    ]
    timing = {"seconds": 2.0, "sampled_tokens": 90, "tokens_per_second": 45.0}
    dataset(folder / "mix" / "student", "mix.student", {"rollouts": (ROLLOUT, started)}, **timing)
    # mix writes its manifest around the finished folder of the student's part, which ShardWriter would clear.
    dataset(
        folder / "mix-",
        "mix",
        {"rollouts": (ROLLOUT, rows)},
        {"prompts": 2, "cut_off": 1, "rollouts": 1},
        seconds=1.0,
        sampled_tokens=60,
        tokens_per_second=60.0,
    )
    for path in (folder / "mix-").iterdir():
        path.rename(folder / "mix" / path.name)
    select(folder / "select", [("m0", "q1", "2", LONG, "======", 12, "")])
    graded(folder / "evaluate", 2)


def make_run(place):
    folder = place / "tiny <run>"
    test = {"prompts": str(place / "questions.jsonl")}
    recipe = RecipeConfig.model_validate(
        {
            "out": str(folder),
            "prompts": {"path": "prompts.jsonl", "system": "</pre><script>"},
            "student": {"kind": "transformers", "model": "student"},
            "teacher": {"kind": "transformers", "model": "teacher"},
            "phase": [
                {"name": "low", "sample": {"temperature": 0.6}, "evaluate": test},
                {"name": "mixed", "source": "mix", "select": {"rule": "all"}, "evaluate": test},
                {"name": "late", "evaluate": test},
            ],
        }
    )
    folder.mkdir()
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    graded(folder / "base" / "evaluate", 0)
    low(folder / "low")
    mixed(folder / "mixed")
    begin(folder / "late" / "sample", Identity("sample", 1, {}, {}))
    return folder


@pytest.fixture
def run_folder(tmp_path):
    """A run that the test may change."""
    return make_run(tmp_path)


def shown(run_folder, width=120):
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "out", lambda: Console(file=text, width=width, highlight=False))
        path = write_report(run_folder)
    return text.getvalue(), path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that tests only read."""
    return make_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def reported(whole):
    """What the terminal shows of it, and its page."""
    text, path = shown(whole)
    return text, path.read_text(encoding="utf-8")


def table_rows(text, title):
    """Return the rows of one table of the terminal as lists of cells."""
    lines = [line.rstrip() for line in text.splitlines()]
    rule = next(i for i in range(lines.index(title), len(lines)) if lines[i].startswith("───"))
    body = itertools.takewhile(lambda line: re.search(r"\S {2,}\S", line), lines[rule + 1 :])
    return [re.split(r" {2,}", line.strip()) for line in body]


def test_accuracy_by_hand(reported):
    text, _ = reported
    before, after_low, after_mixed = table_rows(text, "Accuracy")
    # means per question: ½ 0 1, then 1 1 1, then ½ ½ 1; standard deviations with n − 1, over √3. New answers: one
    # question of ½, √(¼/(2−1))/3, and two. The interval: ½/0.289² is 3 answers, t of 2 degrees 4.303
    assert before == ["(before)", "3 × 2", "50.0 ± 28.9", "3.6–96.4", "16.7", "16.7 %", "10.5"]
    assert after_low[:3] + after_low[4:] == ["low", "3 × 2", "100.0 ± 0.0", "0.0", "0.0 %", "10.5"]
    assert after_low[3] == "43.9–100.0"  # 3 of 3 by Wilson: 3/(3 + 1.96²)
    assert after_mixed[:3] + after_mixed[4:] == ["mixed", "3 × 2", "66.7 ± 16.7", "23.6", "0.0 %", "10.5"]
    assert table_rows(text, "Changes in accuracy") == [
        # d: ½ 1 0, 0 ½ 0, −½ −½ 0
        ["low since before", "+50.0 ± 28.9", "−74.2 to +100.0", "2", "1", "0", "3"],
        ["mixed since before", "+16.7 ± 16.7", "−55.0 to +88.4", "1", "2", "0", "3"],
        ["mixed since low", "−33.3 ± 16.7", "−100.0 to +38.4", "0", "1", "2", "3"],
    ]
    assert table_rows(text, "Several answers to a question") == [
        ["(before)", "2", "50.0 %", "66.7 %", "50.0 %", "33.3 %"],  # maj@2 of right and wrong is half
        ["low", "2", "100.0 %", "100.0 %", "100.0 %", "100.0 %"],
        ["mixed", "2", "66.7 %", "100.0 %", "66.7 %", "33.3 %"],
    ]
    dial = table_rows(text, "Accuracy by domain")[:3]
    assert dial[0] == ["dial", "(before)", "2", "25.0 ± 25.0", "–", "25.0 %", "10.5"]
    assert dial[1] == ["low", "2", "100.0 ± 0.0", "+75.0 ± 25.0", "0.0 %", "10.5"]
    lower = "Lower than after the previous phase, ± standard error over questions: mixed (−33.3 ± 16.7)."
    assert lower in " ".join(text.split())
    assert "docs/evidence.md" in text


def test_what_a_choice_says_about_its_rule():
    measured = {"questions": 400, "length_correlation": -0.414, "teacher_share": 0.93, "tied": 0.0, "could_flip": None}
    phases = [
        PhaseRollouts("low", "sample", 1.0, "count", 0.1, choice=measured),
        PhaseRollouts("mixed", "mix", 1.0, "all", 0.1),
    ]
    table = tables.choices(phases)
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["low", "count", "400", "−0.41", "93.0 %", "0.0 %", "–"]
    ]
    assert tables.choices(phases[1:]) is None


def test_no_line_about_lower_when_nothing_fell(whole):
    models = [results.read_accuracy(whole / phase / "evaluate") for phase in ("base", "low")]
    assert accuracy_tables.lowered(models) == []


def test_selection_and_classes_by_hand(reported):
    text, _ = reported
    assert table_rows(text, "Kept and rejected")[:4] == [
        ["kept", "2 (40.0 %)", "1 (100.0 %)"],
        ["rejected: rank", "2 (40.0 %)", "–"],
        ["rejected: truncated", "1 (20.0 %)", "–"],
        ["all", "5", "1"],
    ]
    assert table_rows(text, "Sentence classes") == [
        ["low", "candidates", "5", "4.6", "73.9 %", "0.80 (17.4 %)", "4.3 %", "4.3 %"],  # 17, 4, 1, 1 of 23
        ["kept", "2", "5.5", "72.7 %", "1.50 (27.3 %)", "0.0 %", "0.0 %"],  # 8, 3 of 11
    ]
    chosen, rest = table_rows(text, "What the rule “count” prefers in low")
    assert chosen == ["chosen", "2", "100.0 %", "0.0 %", "0.0 %", "0.0 %", "11.0", "5.5", "1.50 (27.3 %)"]
    assert rest == ["rest", "2", "50.0 %", "50.0 %", "0.0 %", "0.0 %", "10.0", "5.0", "0.50 (10.0 %)"]


def test_the_report_needs_no_grader(run_folder, reported, capsys):
    """A finished run may outlive the user's code: what is right stands in what select wrote."""
    recipe = json.loads((run_folder / "recipe.json").read_text())
    for phase in recipe["phase"]:
        phase["evaluate"]["grader"] = "graders_gone:strict"
    (run_folder / "recipe.json").write_text(json.dumps(recipe))
    text, page = shown(run_folder)
    assert page.exists() and capsys.readouterr().err == ""
    for title in ("What the rule “count” prefers in low", "Mixed policy"):
        assert table_rows(text, title) == table_rows(reported[0], title)


def test_the_teacher_at_each_temperature(reported):
    text, _ = reported
    # q1: right, wrong, and cut off without an answer; q2: right twice. Means ⅓ and 1, √2 · ⅓ / √2 = ⅓.
    (row,) = table_rows(text, "The teacher at each temperature")
    assert row == ["0.6", "5", "2", "66.7 ± 33.3", "20.0 %", "0.0 %"]


def test_rollouts_packing_time_by_hand(reported):
    text, _ = reported
    assert table_rows(text, "Rollouts") == [
        ["low", "sample", "0.6", "2", "5", "0.56", "0.800", "9.2", "11.0"],  # varied: (8/13 + 5/10) / 2
        ["mixed", "mix", "1", "1", "1", "1.00", "0.500", "12.0", "12.0"],
    ]
    assert table_rows(text, "Mixed policy") == [
        ["mixed", "2", "1 (50.0 %)", "–", "100.0 %", "0.0 %", "0.0 %", "0.0 %", "50.0 %"]
    ]
    assert table_rows(text, "Packing") == [["low", "2", "0", "1", "28", "22", "87.5 %"]]
    assert table_rows(text, "Training") == [["low", "3", "3.000 → 1.000", "1.00", "1,234", "3 → 12 of 16 right"]]
    times = table_rows(text, "Seconds of each stage (tokens per second)")
    assert times[0] == ["sample", "–", "2.0 (251)", "–"]
    assert times[1] == ["mix", "–", "–", "3.0 (50)"]  # both parts: 150 tokens in 3 s
    assert times[-1][:3] == ["all", "1.0", "9.5"]


def test_classes_add_up_over_positions(whole):
    run = RunFolder(whole)
    measured = read_phase(run, results.read_recipe(run).phase[0], None)
    assert measured.candidates.totals.tolist() == [17, 4, 1, 1]
    shared, teacher, student, none = measured.candidates.by_position[:6].T.tolist()
    assert (shared, teacher) == ([5, 5, 0, 3, 3, 1], [0, 0, 3, 1, 0, 0])
    assert (student, none) == ([0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0])
    assert measured.difference.sum() == measured.plane.sum() == 22  # all but the sentence without a probability


def test_openings_are_compared_with_indifference():
    preference = Preference()
    preference.add_openings(["Wait, no"] * 10 + ["Start at"] * 10, 50, chosen=True)
    preference.add_openings(["Start at"] * 20, 10, chosen=False)
    over, under = preference.openings()
    assert [(o.text, o.chosen, o.ranked, o.expected, o.mean_tokens) for o in over] == [("Wait, no", 10, 10, 5.0, 50)]
    assert over[0].ratio == pytest.approx(15 / 10)
    assert [(o.text, o.chosen, o.expected, o.ratio, o.mean_tokens) for o in under] == [
        ("Start at", 10, 15.0, pytest.approx(15 / 20), 30)
    ]


@pytest.mark.parametrize(
    ("sentence", "opening"),
    [
        (" Wait, no. So it is 3.", "Wait, no"),
        ("Check: 7, yes.", "Check: #"),
        ("12.5 and 3", "# and"),
        ("<think>\n", ""),
        ("</think>\n\n", ""),
        ("  \n", ""),
        ("So", "So"),
    ],
)
def test_opening_of(sentence, opening):
    assert opening_of(sentence) == opening


def test_page_is_well_formed_and_needs_nothing_else(whole, reported):
    _, page = reported
    assert [path.name for path in (whole / "report").iterdir()] == ["report.html"]
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        assert element.tag.rpartition("}")[2] not in ("script", "link", "iframe", "object", "embed")
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            if name.rpartition("}")[2] in ("href", "src"):
                assert re.match(r"#|data:image/png;base64,", value)
                assert not value.startswith("#") or value[1:] in ids
    assert not re.search(r"url\((?!#)|@import", page)
    svgs = [element for element in root.iter() if element.tag.endswith("}svg")]
    assert len(svgs) == 9
    assert all(any(e.tag.endswith("}text") for e in svg.iter()) for svg in svgs)  # text stays text
    assert "svg text { font-family: inherit !important; fill: var(--ink) !important; }" in page


def test_data_is_escaped(reported):
    _, page = reported
    assert "<script" not in page
    assert "pick&lt;script&gt;" in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page
    assert "tiny &lt;run&gt;" in page


def test_what_is_missing_is_said(reported):
    text, page = reported
    assert "Not finished:" in text
    printed = " ".join(text.split())
    for state in ("late/sample (unfinished)", "late/score (not started)", "mixed/pack (not started)"):
        assert state in printed
    assert "<li>late / sample: unfinished</li>" in page


def test_a_run_that_has_only_begun(tmp_path, whole):
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "recipe.json").write_bytes((whole / "recipe.json").read_bytes())
    text, path = shown(begun)
    assert "before/evaluate (not started)" in " ".join(text.split())
    ElementTree.fromstring(path.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n"))


@pytest.mark.parametrize("gone", ["score", "select", "pack", "train", "evaluate"])
def test_any_stage_may_be_missing(run_folder, gone):
    (run_folder / "low" / gone / "manifest.json").unlink()
    text, _ = shown(run_folder)
    assert f"low/{gone} (unfinished)" in " ".join(text.split())


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_lines_fit(whole, width):
    text, _ = shown(whole, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_quiet_prints_nothing(monkeypatch, run_folder):
    text = io.StringIO()
    monkeypatch.setattr(console, "out", lambda: Console(file=text))
    page = run_folder / "elsewhere" / "report.html"
    assert write_report(run_folder, page.parent, quiet=True) == page
    assert page.exists()
    assert text.getvalue() == ""


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(DataError, match=r"no recipe\.json"):
        write_report(tmp_path)


def test_scores_of_other_rollouts_are_refused(run_folder):
    rows = [score_row(f"x{i}", completion, classes) for i, (_, _, _, completion, classes, *_) in enumerate(ROLLOUTS)]
    dataset(run_folder / "low" / "score", "score", {"scores": (SCORE, rows)})
    with pytest.raises(DataError, match="score them again"):
        write_report(run_folder, quiet=True)


# --- one voice --------------------------------------------------------------------------------------


def test_time_and_tokens_of_mix_are_those_of_both_models(whole):
    figures = results.read_result(whole / "mixed" / "mix")
    assert (figures.seconds, figures.tokens, figures.tokens_per_second) == (3.0, 150, 50.0)  # 90 + 60 in 2 s + 1 s
    line = "1 of 2 student answers cut off and finished by the teacher, 50 tokens/s, 3.0 s"
    assert summary(whole / "mixed" / "mix") == line


def test_time_and_tokens_of_scores_by_the_teacher_are_those_of_both_models(run_folder):
    score = run_folder / "low" / "score"
    timing = {"seconds": 4.0, "scored_tokens": 700, "tokens_per_second": 180.0}
    dataset(score / "teacher", "score.teacher", {}, {"rollouts": 5}, **timing)
    figures = results.read_result(score)
    assert (figures.seconds, figures.tokens, figures.tokens_per_second) == (5.0, 1000, 200.0)  # 300 + 700 in 1 s + 4 s
    assert summary(score) == "5 rollouts, 200 tokens/s, 5.0 s"
    times = table_rows(shown(run_folder)[0], "Seconds of each stage (tokens per second)")
    assert times[2] == ["score", "–", "5.0 (200)", "–"]


def test_unknown_tokens_are_no_rate_and_skipped_questions_are_counted(tmp_path):
    counts, timing = {"prompts": 3, "rollouts": 6}, {"sampled_tokens": 0, "tokens_per_second": 0.0}
    dataset(tmp_path / "sample", "sample", {}, counts, seconds=2.0, skipped=1, **timing)
    figures = results.read_result(tmp_path / "sample")
    assert (figures.tokens, figures.tokens_per_second) == (None, None)
    assert summary(tmp_path / "sample") == "6 rollouts of 3 prompts, 1 skipped, 2.0 s"


def test_a_stage_without_words_of_its_own_shows_its_counts(tmp_path):
    dataset(tmp_path / "new", "new", {}, {"rollouts": 6, "share": 0.5, "why": {}}, seconds=2.0)
    assert summary(tmp_path / "new") == "rollouts 6, share 0.5, 2.0 s"


def test_a_part_that_an_earlier_command_finished_counts_no_tokens_of_this_one(run_folder):
    """The command that finished mix sampled nothing: the tokens of the student's part and both times remain."""
    (run_folder / "mixed" / "mix" / "timing.json").write_text('{"seconds": 0.5, "completion_tokens": 60}')
    figures = results.read_result(run_folder / "mixed" / "mix")
    assert (figures.seconds, figures.tokens, figures.tokens_per_second) == (2.5, 90, 36.0)


TABLES = {
    "sample": "Rollouts",
    "mix": "Mixed policy",
    "select": "Kept and rejected",
    "pack": "Packing",
    "train": "Training",
    "evaluate": "Accuracy",
}
IN_NO_TABLE = r"95% interval|process peak .*? for training\), |over 4 questions × 1"


def numbers(text):
    """All numbers of a text, as they are written; a digit in a word such as T4 is none."""
    return set(re.findall(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?", text))


def test_summary_and_report_print_the_same_numbers(finished):
    """Every number in the line of a stage is in the rows about it."""
    text, _ = shown(finished / "run", width=200)
    run = RunFolder(finished / "run")
    times = {row[0]: row[1:] for row in table_rows(text, "Seconds of each stage (tokens per second)")}
    phases = ["base", *(phase.name for phase in results.read_recipe(run).phase)]
    stages = results.planned_stages(run, results.read_recipe(run))
    assert {stage.stage for stage in stages} == {*STAGES} - {"ingest"}
    for stage in stages:
        line = re.sub(IN_NO_TABLE, "", summary(stage.path))
        rows = table_rows(text, TABLES[stage.stage]) if stage.stage in TABLES else []
        if stage.stage == "select":  # a column per phase
            column = phases.index(stage.phase)
            rows = [[row[column]] for row in rows]
        else:
            rows = [row for row in rows if row[0] in (stage.phase, f"({results.phase_label(stage.phase)})")]
        printed = [times[stage.stage][phases.index(stage.phase)], *(cell for row in rows for cell in row)]
        if stage.stage == "select":
            titles = ("The teacher at each temperature", "Mixed policy")
            printed += [cell for title in titles for row in table_rows(text, title) for cell in row]
        if stage.stage == "score":
            printed += [cell for row in table_rows(text, "Rollouts") for cell in row]
        missing = numbers(line) - numbers(" ".join(printed))
        assert not missing, f"{stage.name}: {line}"


def test_tokens_of_mix_are_all_that_were_sampled(finished):
    mix = finished / "run" / "mixed" / "mix"
    timings = [json.loads((folder / "timing.json").read_text()) for folder in (mix, mix / "student")]
    tokens, seconds = (sum(timing[name] for timing in timings) for name in ("completion_tokens", "seconds"))
    assert results.read_result(mix).tokens_per_second == pytest.approx(tokens / seconds)


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"step": "\xff"}\n', "can't decode byte 0xff"),
        (b'{"step": 2, "loss": 1, "learning_rate": "small", "grad_norm": 1}\n', "'small'"),
        (b"{}\n", "'step'"),
        (b"[1]\n", "indices"),
        (b"1,\n", "Extra"),
    ],
)
def test_damaged_metrics_are_one_line(run_folder, line, reason):
    metrics = run_folder / "low" / "train" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().splitlines(keepends=True)[0] + line)
    for command in (lambda: write_report(run_folder, quiet=True), lambda: show(metrics.parent, None, rejected=False)):
        with pytest.raises(DataError, match=r"low/train/metrics\.jsonl:2: damaged") as error:
            command()
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


RECIPES = [
    (None, "no recipe.json"),
    (b"\xff\xfe", "recipe.json: damaged (UnicodeDecodeError"),
    (b'{"phase": [', "recipe.json: damaged (JSONDecodeError"),
    (b'{"phase": []}', "recipe.json: names no phase"),
    (
        b'{"phase": [{"name": "low", "cap": 1}]}',
        "recipe.json: out: Field required; another version of dasd-lite wrote it",
    ),
]


@pytest.mark.parametrize(("recipe", "message"), RECIPES)
def test_a_missing_or_damaged_recipe_is_one_line(run_folder, recipe, message):
    path = run_folder / "recipe.json"
    path.unlink() if recipe is None else path.write_bytes(recipe)
    with pytest.raises(DataError) as error:
        write_report(run_folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if recipe is not None:  # show works without a recipe, but not with a damaged one
        with pytest.raises(DataError) as same:
            show(run_folder / "low" / "sample", None, rejected=False)
        assert str(same.value) == str(error.value)

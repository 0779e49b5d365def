"""How good the teacher is at each temperature, by hand."""

import pyarrow as pa
import pytest
from tests.rows import BLANK

from dasd_lite.data.manifest import identify
from dasd_lite.data.records import KEPT, REJECTED
from dasd_lite.data.writer import ShardWriter
from dasd_lite.grading.temperatures import advice, by_temperature, teacher_lines


def selected(folder, right, *, repeating=0, cut=0, undecided=0):
    """A folder of select: `right` has for each question whether its two answers are right."""
    rows = []
    for number, answers in enumerate(right):
        for index, is_right in enumerate(answers):
            row = {"prompt_uid": f"q{number}", "uid": f"{number}-{index}", "grade": "right" if is_right else "wrong"}
            row |= {"grade": "unparseable"} if len(rows) < undecided else {}
            reason = "length" if len(rows) < cut else "stop"
            rows.append(BLANK | row | {"ids": [1], "num_context_tokens": 0, "finish_reason": reason})
    identity = identify("select", 1, {}, {"rows": str(rows)})
    with ShardWriter(folder, identity, {"kept": KEPT, "rejected": REJECTED}) as writer:
        writer.write("kept", pa.Table.from_pylist(rows[::2], schema=KEPT))
        rest = [{**row, "reason": "rank", "value": 0.0} for row in rows[1::2]]
        writer.write("rejected", pa.Table.from_pylist(rest, schema=REJECTED))
        writer.publish({"rollouts": len(rows), "repeating": repeating})
    return folder


def test_phases_of_one_temperature_are_one_line_and_the_worse_is_named(tmp_path):
    low = selected(tmp_path / "low", [(True, False)] * 10 + [(False, False)] * 10, repeating=8, cut=4)
    again = selected(tmp_path / "again", [(True, False)] * 10 + [(False, False)] * 10)
    high = selected(tmp_path / "high", [(True, True)] * 15 + [(True, False)] * 5)
    found = by_temperature([(1.0, high), (0.6, low), (0.6, again)])
    assert [(each.temperature, each.answers, each.repeating, each.cut_off) for each in found] == [
        (0.6, 80, 8, 4),
        (1.0, 40, 0, 0),
    ]
    lines = teacher_lines(found)
    # 10 questions at one half and 10 at zero: sd 0.2565, over √20 questions.
    assert lines[0] == (
        "teacher at T = 0.6: 80 answers, right 25.0 ± 5.7% (standard error over 20 questions), repeating 10.0%,"
        " cut off 5.0%"
    )
    assert "right less often at T = 0.6 than at T = 1 (+62.5 ±" in lines[2] and "gained 5.4 ± 1.4" in lines[2]


def test_a_teacher_that_is_no_worse_at_the_low_temperature(tmp_path):
    same = [(True, False)] * 12
    found = by_temperature([(0.6, selected(tmp_path / "a", same)), (1.0, selected(tmp_path / "b", same))])
    assert "not worse at T = 0.6 than at T = 1 (+0.0 ± 0.0 points, standard error over 12 questions)" in advice(found)


def test_a_difference_within_its_interval_tells_nothing(tmp_path):
    low = selected(tmp_path / "low", [(True, False)] * 16)
    high = selected(tmp_path / "high", [(True, True)] * 9 + [(False, False)] * 7)
    said = advice(by_temperature([(0.6, low), (1.0, high)]))
    assert said.startswith("whether the teacher is worse at T = 0.6 than at T = 1 cannot be told (+6.2 ± 12.8 points,")


def test_answers_that_cannot_be_compared_are_not_wrong(tmp_path):
    folder = selected(tmp_path / "a", [(True, True)] * 3, undecided=2)
    (found,) = by_temperature([(1.0, folder)])
    assert (found.graded, found.undecided, set(found.means.values())) == (4, 2, {1.0})
    assert "right 100.0" in teacher_lines([found])[0] and "2 not comparable" in teacher_lines([found])[0]


@pytest.mark.parametrize("number", [0, 1, 9])
def test_no_verdict_on_a_few_questions(tmp_path, number):
    folders = [(t, selected(tmp_path / str(t), [(True, True)] * number or [()])) for t in (0.6, 1.0)]
    said = advice(by_temperature(folders))
    assert said is None if number < 2 else "cannot be told" in said
    assert advice(by_temperature(folders[:1])) is None

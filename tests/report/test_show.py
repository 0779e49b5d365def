"""The show command: what it prints for each kind of folder, with and without colors."""

import io
import json
import math

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dasd_lite import console
from dasd_lite.chat.chat import Chat
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.data.manifest import Identity, read_manifest
from dasd_lite.data.records import GRADED, KEPT, REJECTED, ROLLOUT, ROW, SCORE
from dasd_lite.data.writer import ShardWriter, begin, publish
from dasd_lite.errors import DataError
from dasd_lite.method.sentences import sentence_ends
from dasd_lite.report.results import read_curve
from dasd_lite.report.show.show import show

TEXT = "<think> Start at 9. Wait, é no. Up 3 is 2.</think>\nAnswer: 2"
P_TEACHER = [0.99, 0.9, 0.9, 0.2, np.nan, 0.9]
P_STUDENT = [0.99, 0.85, 0.3, 0.6, 0.5, 0.9]


def make_student(folder, template_opener=""):
    """A tokenizer whose tokens are bytes, and a chat template; no weights are needed to show tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]" + template_opener + "{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    return Chat(folder)


def dataset(folder, stage, counts=None, **tables):
    schemas = {name: schema for name, (schema, _) in tables.items()}
    with ShardWriter(folder, Identity(stage, 1, {}, {}), schemas) as writer:
        for name, (schema, rows) in tables.items():
            writer.write(name, pa.RecordBatch.from_pylist(rows, schema=schema))
        writer.publish(counts or {})


def rollout(uid, prompt="q1", completion=TEXT, **more):
    return {
        "uid": uid,
        "prompt_uid": prompt,
        "messages": [{"role": "user", "content": "What does it show?"}],
        "domain": "dial",
        "answer": "2",
        "index": 0,
        "completion": completion,
        "finish_reason": "stop",
        "prefix_bytes": 0,
        **more,
    }


def example(chat, row, **more):
    ids, context = chat.example(row["messages"], row["completion"])
    return {**row, "ids": ids, "num_context_tokens": context, "score": 1.0, "num_sentences": 6, **more}


@pytest.fixture
def run_folder(tmp_path):
    chat = make_student(tmp_path / "student")
    run = tmp_path / "run"
    run.mkdir()
    recipe = RecipeConfig.model_validate(
        {
            "out": str(run),
            "prompts": {"path": "prompts.jsonl"},
            "student": {"kind": "transformers", "model": str(tmp_path / "student")},
            "teacher": {"kind": "transformers", "model": "teacher"},
            "phase": [
                {"name": "low", "select": {"beta": 0.2}},
                {"name": "mixed", "source": "mix", "select": {"rule": "all"}},
            ],
        }
    )
    (run / "recipe.json").write_text(recipe.model_dump_json())
    low = run / "low"
    a, b = rollout("aa01"), rollout("bb02", "q2", finish_reason="length")
    dataset(low / "sample", "sample", rollouts=(ROLLOUT, [a, b]))
    scores = [
        {
            "uid": row["uid"],
            "sentence_ends": sentence_ends(TEXT),
            "p_teacher": P_TEACHER,
            "p_student": P_STUDENT,
            "ids": [1],
            "num_context_tokens": 0,
        }
        for row in (a, b)
    ]
    dataset(low / "score", "score", scores=(SCORE, scores))
    rejected = [example(chat, b, reason="truncated", value=77.0)]
    dataset(low / "select", "select", kept=(KEPT, [example(chat, a)]), rejected=(REJECTED, rejected))
    made = [example(chat, row) for row in (a, rollout("cc03", completion="Plain."))]
    row = {
        "ids": np.concatenate([m["ids"] for m in made]),
        "loss_mask": np.concatenate([np.arange(len(m["ids"])) >= m["num_context_tokens"] for m in made]),
        "doc_lengths": [len(m["ids"]) for m in made],
        "uids": ["aa01", "cc03"],
    }
    counts = {"rollouts": 2, "rows": 1, "tokens": 141, "target_tokens": 69, "fill": 0.875}
    dataset(low / "pack", "pack", counts, rows=(ROW, [row]))
    (low / "train").mkdir()
    mixed = rollout("mm04", prefix_bytes=len(b"<think> Start at 9. Wait"))
    dataset(run / "mixed" / "mix", "mix", rollouts=(ROLLOUT, [mixed]))
    graded = {**rollout("ee05"), "grade": "wrong", "extracted": "3", "num_tokens": 12}
    dataset(low / "evaluate", "evaluate", graded=(GRADED, [graded]))
    return run


def shown(monkeypatch, folder, uid=None, *, color=False, rejected=False, width=100, limit=3):
    text = io.StringIO()
    terminal = Console(file=text, width=width, highlight=False, force_terminal=color, no_color=not color)
    monkeypatch.setattr(console, "out", lambda: terminal)
    show(folder, uid, rejected=rejected, limit=limit)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


SENTENCES = """\
   p_T  p_S
= 0.99 0.99 <think>
= 0.90 0.85 Start at 9.
T 0.90 0.30 Wait, é no.
S 0.20 0.60 Up 3 is 2.
·    – 0.50 </think>↵
= 0.90 0.90 Answer: 2
"""


@pytest.mark.parametrize("stage", ["sample", "score"])
def test_sentences_have_letters_and_probabilities(monkeypatch, run_folder, stage):
    text = shown(monkeypatch, run_folder / "low" / stage)
    assert text.count(SENTENCES) == 2
    assert "rollout aa01  prompt q1 · dial · candidate 0 · answer 2\nWhat does it show?\n" in text
    assert "rollout bb02  truncated  prompt q2 · dial · candidate 0 · answer 2" in text
    assert "T teacher: p_T − p_S > 0.2 " in text  # the phase's own β


def test_sentences_without_scores(monkeypatch, run_folder):
    (run_folder / "low" / "score" / "manifest.json").unlink()
    text = shown(monkeypatch, run_folder / "low" / "sample", "aa01")
    assert "\nStart at 9.\nWait, é no.\n" in text
    assert "p_T" not in text


def test_trained_and_masked_tokens(monkeypatch, run_folder):
    text = shown(monkeypatch, run_folder / "low" / "select", limit=1)
    expected = [
        "░             [user]What does it show?<|end|>[assistant]",
        "█ = 0.99 0.99 <think>",
        "█ = 0.90 0.85 Start at 9.",
        "█ T 0.90 0.30 Wait, é no.",
        "█ S 0.20 0.60 Up 3 is 2.",
        "█ ·    – 0.50 </think>↵",
        "█ = 0.90 0.90 Answer: 2",
        "█             <|end|>  the end token, trained",
    ]
    assert "\n".join(expected) in text
    assert "█ trained: in the loss   ░ masked: read, not in the loss" in text


@pytest.mark.parametrize("stage", ["pack", "train"])
def test_rows_for_training(monkeypatch, run_folder, stage):
    text = shown(monkeypatch, run_folder / "low" / stage)
    assert "2 rollouts in 1 rows, 87.5% full; 69 of 141 tokens are trained on (48.9%)" in text
    assert "row 0  141 tokens, 69 trained (48.9%) · 2 documents, none attends to another ━━━" in text
    assert "rollout aa01  document 1 of 2 · 98 tokens, 62 trained" in text
    assert "█ T 0.90 0.30 Wait, é no." in text
    assert "rollout cc03  document 2 of 2 · 43 tokens, 7 trained" in text
    assert "░ [user]What does it show?<|end|>[assistant]\n█ Plain.\n█ <|end|>  the end token, trained" in text
    one = shown(monkeypatch, run_folder / "low" / stage, "cc03")
    assert "aa01" not in one
    assert "row 0  141 tokens" in one


def row_of(chat, completions, **columns):
    made = [example(chat, rollout(f"r{i}", completion=text)) for i, text in enumerate(completions)]
    row = {
        "ids": np.concatenate([m["ids"] for m in made]),
        "loss_mask": np.concatenate([np.arange(len(m["ids"])) >= m["num_context_tokens"] for m in made]),
        "doc_lengths": [len(m["ids"]) for m in made],
        "uids": [m["uid"] for m in made],
    }
    return row | columns


def test_documents_that_are_not_shown_are_named(monkeypatch, run_folder, tmp_path):
    rows = [row_of(Chat(tmp_path / "student"), ["One."] * 5), row_of(Chat(tmp_path / "student"), ["Two."])]
    dataset(run_folder / "low" / "pack", "pack", rows=(ROW, rows))
    text = shown(monkeypatch, run_folder / "low" / "pack", limit=2)
    assert text.count("rollout r") == 3
    assert "… 3 more in this row: r2, r3, r4\n" in text
    assert "row 1  41 tokens, 5 trained (12.2%) · 1 document ━━" in text
    assert "r4" in shown(monkeypatch, run_folder / "low" / "pack", "r4")


def test_documents_without_scores_are_cut_into_sentences_too(monkeypatch, run_folder, tmp_path):
    row = row_of(Chat(tmp_path / "student"), ["Wait, é no. Up 3 is 2.</think>\nAnswer: 2"])
    dataset(run_folder / "low" / "pack", "pack", rows=(ROW, [row]))
    text = shown(monkeypatch, run_folder / "low" / "pack")
    assert (
        "[assistant]\n█ Wait, é no.\n█ Up 3 is 2.\n█ </think>↵\n█ Answer: 2\n█ <|end|>  the end token, trained" in text
    )
    row["loss_mask"] = [i > 42 for i in range(len(row["ids"]))]  # from within the é on
    dataset(run_folder / "low" / "pack", "pack", rows=(ROW, [row]))
    assert "█ � no. Up 3 is 2.</think>\n█ Answer: 2\n" in shown(monkeypatch, run_folder / "low" / "pack")


def test_an_end_token_that_is_masked_is_said(monkeypatch, run_folder, tmp_path):
    row = row_of(Chat(tmp_path / "student"), ["One."])
    row["loss_mask"][-1] = False
    dataset(run_folder / "low" / "pack", "pack", rows=(ROW, [row]))
    assert "█ One.\n░ <|end|>  the end token, not trained" in shown(monkeypatch, run_folder / "low" / "pack")


def test_a_wrapped_text_has_its_mark_on_every_line(monkeypatch, run_folder):
    lines = shown(monkeypatch, run_folder / "low" / "pack", "cc03", width=30).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("░ [user]"))
    assert lines[first : first + 4] == [
        "░ [user]What does it",
        "░ show?<|end|>[assistant]",
        "█ Plain.",
        "█ <|end|>  the end token,",
    ]


def test_the_middle_of_a_long_answer_is_left_out_unless_it_is_asked_for(monkeypatch, run_folder, tmp_path):
    sentences = [f"Step {i} is done." for i in range(60)]
    kept = [example(Chat(tmp_path / "student"), rollout("long", completion=" ".join(sentences)))]
    dataset(run_folder / "low" / "select", "select", kept=(KEPT, kept))
    text = shown(monkeypatch, run_folder / "low" / "select")
    assert "Step 22 is done." in text and "Step 23 is done." not in text
    assert "Step 53 is done." in text and "Step 52 is done." not in text
    assert "… 30 pieces, 510 bytes left out; pass its uid to see it in full" in text
    whole = shown(monkeypatch, run_folder / "low" / "select", "long")
    assert all(sentence in whole for sentence in sentences)


METRICS = {"learning_rate": 1e-3, "grad_norm": 0.5, "tokens": 600, "target_tokens": 400, "seconds": 0.2}


def write_training(folder, num_steps, rows=None):
    """A train folder of so many steps, whose last line is being written; `rows` is the fingerprint of what it read."""
    lines = [json.dumps({"step": i, "loss": 1 / i, **METRICS}) for i in range(1, num_steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 10')
    if rows is not None:
        publish(folder, Identity("train", 1, {}, {"rows": rows}), tables={}, counts={}, config={})


def test_a_training_s_steps_are_before_its_rows(monkeypatch, run_folder):
    write_training(run_folder / "low" / "train", 99)
    text = shown(monkeypatch, run_folder / "low" / "train")
    lines = text.splitlines()
    assert lines[0].split() == ["step", "loss", "learning", "rate", "gradient", "trained", "tokens", "tokens/s"]
    assert [line.split()[0] for line in lines[1:9]] == ["1", "15", "29", "43", "57", "71", "85", "99"]
    assert lines[8].split() == ["99", "0.0101", "1.00e-03", "0.5", "400", "3,000"]
    assert lines[9] == f"Every step: {run_folder}/low/train/metrics.jsonl"
    assert lines[10] == f"Its training rows: {run_folder}/low/pack"
    assert "row 0  141 tokens" in text and "packed again" not in text
    assert "Every step" in text and "1.00e-03" not in shown(monkeypatch, run_folder / "low" / "train", "cc03")


def test_a_gradient_that_is_unknown_is_a_dash(monkeypatch, run_folder):
    """Training writes null for what is not a finite number."""
    line = {"step": 1, "loss": 2.0, **METRICS, "grad_norm": None}
    (run_folder / "low" / "train" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    text = shown(monkeypatch, run_folder / "low" / "train")
    assert text.splitlines()[1].split() == ["1", "2.0000", "1.00e-03", "–", "400", "3,000"]
    assert math.isnan(read_curve(run_folder / "low" / "train").max_grad_norm)


def test_rows_that_are_not_those_it_was_trained_on(monkeypatch, run_folder):
    packed = read_manifest(run_folder / "low" / "pack")["fingerprint"]
    write_training(run_folder / "low" / "train", 1, rows=packed)
    assert "packed again" not in shown(monkeypatch, run_folder / "low" / "train")
    write_training(run_folder / "low" / "train", 1, rows="another")
    assert "packed again later: they are not the rows that this model was trained on" in shown(
        monkeypatch, run_folder / "low" / "train"
    )


def test_a_training_without_rows_beside_it(monkeypatch, run_folder, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    write_training(folder, 2)
    text = shown(monkeypatch, folder)
    assert "Every step: " in text
    assert "The rows it was trained on are not in a folder next to it." in text
    with pytest.raises(DataError, match="elsewhere: no rollout 'aa01'"):
        shown(monkeypatch, folder, "aa01")
    write_training(folder, 2, rows="another")
    with pytest.raises(DataError, match=r"show can read .*elsewhere"):
        shown(monkeypatch, tmp_path)


def test_weights_of_documents(monkeypatch, run_folder, tmp_path):
    if "weights" not in ROW.names:
        pytest.skip("rows have no weights")
    row = row_of(Chat(tmp_path / "student"), ["One.", "Two."], weights=[1.25, 0.75])
    dataset(run_folder / "low" / "pack", "pack", rows=(ROW, [row]))
    assert "document 2 of 2 · 41 tokens, 5 trained · weight 0.75" in shown(monkeypatch, run_folder / "low" / "pack")


def test_an_opener_in_the_template_is_masked(monkeypatch, run_folder, tmp_path):
    chat = make_student(tmp_path / "opened", "<think>\n")
    recipe = json.loads((run_folder / "recipe.json").read_text())
    recipe["student"]["model"] = str(tmp_path / "opened")
    (run_folder / "recipe.json").write_text(json.dumps(recipe))
    text = "<think>\nOne. Two.</think>\nAnswer: 2"
    row = example(chat, rollout("oo06", completion=text))
    dataset(run_folder / "low" / "select", "select", kept=(KEPT, [row]))
    lines = shown(monkeypatch, run_folder / "low" / "select").splitlines()
    at = lines.index("░ <think>↵")
    assert lines[at - 1].endswith("[assistant]")
    assert lines[at + 1 : at + 4] == ["█ One.", "█ Two.", "█ </think>↵"]


def test_rejected_with_reason_and_value(monkeypatch, run_folder):
    text = shown(monkeypatch, run_folder / "low" / "select", rejected=True)
    assert "rejected: truncated (77)" in text
    assert "aa01" not in text
    by_uid = shown(monkeypatch, run_folder / "low" / "select", "bb02")
    assert "rejected: truncated (77)" in by_uid


def test_mixed_rollouts_say_who_wrote(monkeypatch, run_folder):
    text = shown(monkeypatch, run_folder / "mixed" / "mix")
    assert "student Start at 9.\nstudent Wait\nteacher , é no.\nteacher Up 3 is 2.\n" in text


def test_graded_answers(monkeypatch, run_folder):
    text = shown(monkeypatch, run_folder / "low" / "evaluate")
    assert "answer 2 · extracted 3 · wrong · 12 tokens" in text


def test_all_answers_of_a_prompt(monkeypatch, run_folder):
    assert "rollout bb02" in shown(monkeypatch, run_folder / "low" / "sample", "q2")


def test_colors(monkeypatch, run_folder):
    text = shown(monkeypatch, run_folder / "low" / "select", "aa01", color=True)
    assert "\x1b[33mWait, é no." in text
    assert "\x1b[36mUp 3 is 2." in text
    assert "\x1b[32m█" in text


def test_text_cannot_control_the_terminal(monkeypatch, run_folder):
    evil = rollout("ev07\x1b[2J", completion="[bold red]\x1b]0;owned\x07 Done.")
    dataset(run_folder / "low" / "sample", "sample", rollouts=(ROLLOUT, [evil]))
    (run_folder / "low" / "score" / "manifest.json").unlink()
    text = shown(monkeypatch, run_folder / "low" / "sample")
    assert "\x1b" not in text
    assert "[bold red]␛]0;owned␇ Done." in text


def test_long_sentences_stay_in_their_column(monkeypatch, run_folder):
    text = shown(monkeypatch, run_folder / "low" / "select", "aa01", width=40)
    assert max(map(len, text.splitlines())) <= 40


def test_without_a_recipe_text_is_shown(monkeypatch, run_folder):
    (run_folder / "recipe.json").unlink()
    text = shown(monkeypatch, run_folder / "low" / "select")
    assert "Tokens are not shown: without a recipe.json above the folder, the student is unknown." in text
    assert SENTENCES.splitlines()[1] in text


def test_errors(monkeypatch, run_folder, tmp_path):
    sample = run_folder / "low" / "sample"
    with pytest.raises(DataError, match=r"has no rollout or prompt 'aa0l'; the closest is 'aa01'"):
        shown(monkeypatch, sample, "aa0l")
    with pytest.raises(DataError, match=r"show can read .*low/evaluate, .*low/pack"):
        shown(monkeypatch, run_folder)
    with pytest.raises(DataError, match="no such folder"):
        shown(monkeypatch, tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no finished folder of rollouts"):
        shown(monkeypatch, tmp_path / "student")
    with pytest.raises(DataError, match="only a select folder"):
        shown(monkeypatch, sample, rejected=True)
    begin(run_folder / "late" / "sample", Identity("sample", 1, {}, {}))
    with pytest.raises(DataError, match="unfinished"):
        shown(monkeypatch, run_folder / "late" / "sample")

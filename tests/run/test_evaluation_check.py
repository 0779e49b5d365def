"""What `check` says about evaluations, and the evaluation of the teacher."""

import json

import pytest
from tests.server import Answer, ChatServer, pieces_of

from dasd_lite.config.load import load_recipe
from dasd_lite.data.handles import Evaluation
from dasd_lite.errors import ConfigError
from dasd_lite.run.evaluation_check import evaluation_faults
from dasd_lite.run.pipeline import plan, run_steps
from dasd_lite.run.questions import Questions


def heldout(folder, *rows):
    path = folder / "heldout.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"prompts": str(path), "num_samples": 2, "max_tokens": 48}


def faults(recipe):
    return list(evaluation_faults(recipe, Questions()))


def test_references_that_state_no_answer_are_refused_once(small_recipe, tmp_path):
    rows = [{"prompt": "1?", "answer": "1"}, {"prompt": "2?", "answer": r"\boxed{}"}, {"prompt": "3?", "answer": "  "}]
    recipe = load_recipe(small_recipe(tmp_path, evaluate=heldout(tmp_path, *rows)), [])
    (line,) = faults(recipe)
    assert line.startswith("evaluate.prompts: ") and 'heldout.jsonl:2 ("2?"): answer = ' in line
    assert r"answer = '\\boxed{}': " in line and line.endswith("(1 more are like it)")


def test_questions_without_an_answer_are_refused(small_recipe, tmp_path):
    rows = [{"prompt": "1?", "answer": "1"}, {"prompt": "2?"}]
    recipe = load_recipe(small_recipe(tmp_path, evaluate=heldout(tmp_path, *rows)), [])
    (line,) = faults(recipe)
    assert "1 of 2 questions have no answer to grade by, the first is" in line


def test_a_solution_is_a_reference(small_recipe, tmp_path):
    rows = [{"prompt": "1?", "answer": "6*12=72\n#### 72"}, {"prompt": "2?", "answer": r"So it is \boxed{5}."}]
    assert not faults(load_recipe(small_recipe(tmp_path, evaluate=heldout(tmp_path, *rows)), []))


def test_a_missing_mark_is_noted(small_recipe, tmp_path, capsys):
    evaluate = heldout(tmp_path, {"prompt": "What is 1 + 1?", "answer": "2"})
    recipe = load_recipe(small_recipe(tmp_path, evaluate=evaluate), [])
    assert not faults(recipe)
    assert "no question says how its final answer is to be marked" in " ".join(capsys.readouterr().out.split())
    for said in (
        {"template": r"{prompt} Use \boxed{}."},
        heldout(tmp_path, {"prompt": "Box the answer", "answer": "2"}),
    ):
        assert not faults(load_recipe(small_recipe(tmp_path, evaluate=evaluate | said), []))
        assert "marked" not in capsys.readouterr().out


def test_four_bits_need_transformers(small_recipe, tmp_path):
    student = {"kind": "vllm", "model": "demo:student"}
    recipe = load_recipe(small_recipe(tmp_path, student=student), ["evaluate.four_bit=true"])
    assert faults(recipe) == ["evaluate.four_bit = true needs student.kind = 'transformers', not 'vllm'"]


def test_the_teacher_needs_a_table_and_questions(small_recipe, tmp_path):
    path = small_recipe(tmp_path)
    with pytest.raises(ConfigError, match="teacher = true needs questions; set prompts or tasks"):
        load_recipe(small_recipe(tmp_path, evaluate={"teacher": True}), [])
    ingest = {"paths": ["demo:train.jsonl"]}
    phases = [{"name": "low", "source": "ingest", "select.rule": "random"}]
    path = small_recipe(tmp_path, teacher=None, ingest=ingest, phase=phases)
    with pytest.raises(ConfigError, match=r"evaluate.teacher = true .* but there is no \[teacher\] table"):
        load_recipe(path, ["evaluate.teacher=true"])


def test_tokens_of_evaluations_are_said(small_recipe, tmp_path, cli):
    small_recipe(tmp_path)
    result = cli("check", "run.toml", "--until", "models", cwd=tmp_path)
    # 4 questions × 1 answer × 48 tokens: before training and after each of two phases.
    assert "evaluation: 12 answers in 3 evaluations, at most 576 tokens" in result.stdout


@pytest.fixture
def boxing():
    """A server that gives 2 as its answer to everything."""

    def answer(body):
        text = r"It is \boxed{2}."
        return Answer(text, pieces_of(text))

    with ChatServer(answer=answer) as server:
        yield server


def test_the_teacher_behind_a_server_is_evaluated_within_its_budget(boxing, small_recipe, tmp_path):
    rows = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "1 + 2?", "answer": "3"}]
    teacher = {
        "kind": "endpoint",
        "base_urls": [boxing.url],
        "model": "teacher",
        "prices": {"input": 0.0, "output": 1000.0},
    }
    path = small_recipe(tmp_path, teacher=teacher, evaluate=heldout(tmp_path, *rows) | {"teacher": True})
    recipe = load_recipe(path, [f'out="{tmp_path}/run"'])
    assert [step.name for step in plan(recipe)][:2] == ["teacher/evaluate", "base/evaluate"]
    run_steps(recipe, only_phase="teacher")
    evaluation = Evaluation(tmp_path / "run" / "teacher" / "evaluate")
    assert (evaluation.accuracy, evaluation.counts["samples"]) == (0.5, 4)
    assert evaluation.timing["cost"] > 0
    before = len(boxing.answered)
    run_steps(recipe, only_phase="teacher")
    assert len(boxing.answered) == before, "nothing is asked again"


# --- contamination ------------------------------------------------------------------------------------

SHARED = "A train leaves the town of Ilmenau at noon and drives sixty miles in every hour; when has it driven {} miles?"


def contaminated_recipe(small_recipe, folder, **prompts):
    rows = [{"prompt": SHARED.format(n), "answer": str(n)} for n in (120, 180)]
    rows += [{"prompt": f"Something else altogether, number {n}: how many legs have {n} spiders?"} for n in range(8)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = heldout(folder, {"prompt": SHARED.format(120), "answer": "2"})
    return small_recipe(folder, prompts={"path": str(folder / "train.jsonl"), **prompts}, evaluate=questions)


def test_prompts_that_are_evaluation_questions_are_named_by_check(small_recipe, tmp_path, cli):
    contaminated_recipe(small_recipe, tmp_path)
    result = cli("check", "run.toml", "--until", "models", cwd=tmp_path)
    said = " ".join(result.stdout.split())
    assert "2 of 10 prompts contain evaluation questions, the first is" in said and "100% of the 8-grams" in said


def test_they_are_left_out_on_request_alone(small_recipe, tmp_path, capsys):
    recipe = load_recipe(contaminated_recipe(small_recipe, tmp_path), [])
    assert len(Questions().to_sample(recipe)) == 10
    recipe = load_recipe(contaminated_recipe(small_recipe, tmp_path, drop_contaminated=True), [])
    prompts = Questions().to_sample(recipe)
    assert (len(prompts), prompts.left_out) == (8, {"evaluation questions": 2})
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of 10 prompts left out (prompts.drop_contaminated)" in said


def test_a_training_prompt_whose_answer_is_empty_is_noted_and_refused_where_it_decides(small_recipe, tmp_path, cli):
    rows = [{"prompt": f"{n}?", "answer": str(n) if n else " "} for n in range(8)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small_recipe(tmp_path, prompts={"path": "q.jsonl"})
    noted = cli("check", "run.toml", "--until", "models", cwd=tmp_path)
    assert noted.rc == 0 and "note: prompts.path: q.jsonl:1" in " ".join(noted.stdout.split())
    for key in ('select.require_right="where_known"', 'mixed.mix.rescue="either"'):
        refused = cli("check", "run.toml", "--until", "models", key, cwd=tmp_path)
        assert refused.rc == 2 and refused.stderr.startswith("dasd-lite: prompts.path: q.jsonl:1")


# --- what a new user meets ----------------------------------------------------------------------------


def test_questions_that_fill_the_context_are_refused_by_name(small_recipe, tmp_path):
    long = {"prompt": "How many? Answer with a number. " * 200, "answer": "1"}
    evaluate = heldout(tmp_path, {"prompt": "Answer: 1?", "answer": "1"}, long)
    (line,) = faults(load_recipe(small_recipe(tmp_path, evaluate=evaluate), []))
    assert line.startswith(
        "evaluate.prompts: 1 of 2 questions leave no room for an answer in the student's context of 512"
    )
    assert "heldout.jsonl:2" in line


def test_every_benchmark_that_cannot_be_loaded_is_named(small_recipe, tmp_path):
    evaluate = {"tasks": ["aime24", "math-500"], "tasks_folder": str(tmp_path / "none")}
    lines = faults(load_recipe(small_recipe(tmp_path, evaluate=evaluate), []))
    assert [line.partition(": /")[0] for line in lines] == ["evaluate.tasks: aime24", "evaluate.tasks: math-500"]


def test_a_limit_that_nothing_reads(small_recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"limit = 3 is for prompts, which are not set; .*gsm8k"):
        load_recipe(small_recipe(tmp_path, evaluate={"tasks": ["gsm8k"], "limit": 3}), [])
    with pytest.raises(ConfigError, match=r"evaluate.tasks\[0\] = 'GSM8K': did you mean 'gsm8k'"):
        load_recipe(small_recipe(tmp_path, evaluate={"tasks": ["GSM8K"]}), [])


def test_report_and_export_take_the_recipe_and_the_folder(finished, tmp_path, cli):
    for command in (["report"], ["export", "--to", "inspect", "--out", str(tmp_path)]):
        for place in ("run.toml", "run"):
            result = cli(*command, place, cwd=finished)
            assert result.rc == 0, result.stderr

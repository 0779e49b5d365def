"""`check` reports mistakes in the training options, in files of prompts and in answers before anything is spent."""

import json
import re
import shutil

import pytest

from dasd_lite.config.load import load_recipe
from dasd_lite.costs.estimate import disk_bytes
from dasd_lite.data.manifest import read_manifest
from dasd_lite.data.prompts import read_prompts
from dasd_lite.data.run_folder import export_trial
from dasd_lite.run import check
from dasd_lite.run.check import unread_settings
from dasd_lite.run.ingest_check import check_ingest

LORA = 'train.method={ kind = "lora", rank = 4, target_modules = ["q_proj", "model.layers.0.mlp.up_proj"] }'


def test_a_layer_that_the_student_does_not_have(small_recipe, tmp_path, cli):
    small_recipe(tmp_path)
    assert cli("check", "run.toml", LORA, cwd=tmp_path).rc == 0
    result = cli("check", "run.toml", LORA.replace("q_proj", "query"), cwd=tmp_path)
    assert result.rc == 2
    assert result.stderr == (
        "dasd-lite: train.method.target_modules: the student has no layer 'query'; it has down_proj, gate_proj, k_proj,"
        " o_proj, q_proj, up_proj, v_proj\n"
    )


@pytest.mark.parametrize(
    ("overrides", "most"), [((), 8), (("select.keep=2",), 16), (("select.keep=9",), 16), (('select.rule="all"',), 16)]
)
def test_more_rows_per_step_than_answers_that_are_kept(overrides, most, small_recipe, tmp_path, cli):
    small_recipe(tmp_path)
    low = "low.train.grad_accum_steps="
    assert cli("check", "run.toml", *overrides, f"{low}{most}", cwd=tmp_path).rc == 0
    result = cli("check", "run.toml", *overrides, f"{low}{most + 1}", cwd=tmp_path)
    assert result.rc == 0
    assert (
        f"note: phase 'low': train.micro_batch_size × train.grad_accum_steps = {most + 1} rows per step, but"
        f" at most {most} answers of 8 prompts are kept, so each step reads all of them; lower train.grad_accum_steps"
        " for more steps\n"
    ) in result.stdout


def test_the_engine_that_a_recipe_leaves_open_is_said(small_recipe, tmp_path, cli, demo, monkeypatch):
    small_recipe(tmp_path, student={"model": str(demo / "student")})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = cli("check", "run.toml", "--until", "config", cwd=tmp_path)
    assert "note: student.kind = 'transformers': no GPU is visible\n" in result.stdout
    result = cli("check", "run.toml", "student.batch_size=8", "--until", "config", cwd=tmp_path)
    assert "note: student.kind = 'transformers', which student.batch_size belongs to\n" in result.stdout


def test_training_options_without_effect_are_noted(small_recipe, tmp_path):
    path = small_recipe(tmp_path)
    weighted = ["low.select.weighting={ lam = 1.0 }", "low.select.keep=2"]
    (note,) = unread_settings(load_recipe(path, weighted))
    assert "'low': select.weighting has no effect: train.objective = 'sft'" in note
    assert not list(unread_settings(load_recipe(path, [*weighted, 'low.train.objective="weighted"'])))
    adapter = 'train.method={ kind = "lora", start = "adapter" }'
    (first,) = unread_settings(load_recipe(path, [adapter]))
    assert first == "phase 'low': train.method.start = 'adapter' has no effect: it is the first phase"
    (second,) = unread_settings(load_recipe(path, [f"mixed.{adapter}"]))
    assert second == "phase 'mixed': train.method.start = 'adapter' has no effect: phase 'low' leaves no adapter"


def test_answers_that_the_random_rule_does_not_use_are_noted(small_recipe, tmp_path):
    path = small_recipe(tmp_path)
    random = ['low.select.rule="random"', "sample.num_samples=4"]
    (note,) = unread_settings(load_recipe(path, random))
    assert note.startswith(
        "phase 'low': select.rule = 'random' keeps 1 of 4 answers: sample.num_samples = 1 saves 75%;"
    )
    assert not list(unread_settings(load_recipe(path, [*random, "low.select.keep=4"])))
    for rule in ("longest", "fewest", "count"):
        assert not list(unread_settings(load_recipe(path, [f'low.select.rule="{rule}"']))), "it looks at all of them"


def test_wrong_answers_that_mixed_policy_cannot_see_are_noted(small_recipe, tmp_path, cli):
    rows = [{"prompt": f"{n}?"} | ({"answer": "4"} if n < 3 else {}) for n in range(8)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small_recipe(tmp_path, prompts={"path": "q.jsonl"})
    note = "mix.rescue = 'either' cannot see wrong answers to 5 of 8 prompts, which have no `answer`"
    result = cli("check", "run.toml", 'mixed.mix.rescue="either"', "--until", "models", cwd=tmp_path)
    assert note in " ".join((result.stdout + result.stderr).split())
    result = cli("check", "run.toml", "--until", "models", cwd=tmp_path)
    assert "mix.rescue" not in result.stdout + result.stderr


def test_what_a_killed_trial_of_the_export_left_is_room_for_the_next_one(small_recipe, tmp_path, monkeypatch):
    recipe = load_recipe(small_recipe(tmp_path, out=str(tmp_path / "run")), [])
    wanted = disk_bytes(recipe.phase, recipe.student.model, 8)
    monkeypatch.setattr(check, "free_bytes", lambda folder: wanted - 1000)
    assert any("but the disk has" in line for line in check._training(recipe, 8))
    left = export_trial(tmp_path / "run" / "low" / "train") / "model"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(bytes(1000))
    assert not list(check._training(recipe, 8))


# --- files of prompts and answers ---------------------------------------------------------------------


def have(tmp_path, small_recipe, *rows, rule="random", **ingest):
    """A recipe that takes existing answers from a file of these rows."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "have.jsonl").write_text("\n".join(lines))
    phase = {"name": "have", "source": "ingest", "ingest": {"paths": ["have.jsonl"], **ingest}, "select.rule": rule}
    return small_recipe(tmp_path, prompts=None, evaluate=None, teacher=None, phase=[phase])


GOOD = {"prompt": "q", "output": "<think>a</think>b", "answer": 5, "source": "x"}


def test_check_reads_the_files_of_answers(small_recipe, tmp_path, cli):
    have(tmp_path, small_recipe, GOOD, GOOD | {"output": "c"}, GOOD | {"prompt": "r", "answer": None})
    ended = cli("check", "run.toml", cwd=tmp_path)
    assert ended.rc == 0, ended.stderr
    assert (
        "have: 3 answers to 2 prompts, 1.5 per prompt; the first 3 rows: 2 answers with thinking, 0 with something for"
        " each token; 2 rows with a reference answer\n"
        "note: have.jsonl: not read: source, of 3 rows\n"
    ) in ended.stdout


def test_check_says_each_fault_of_a_file_of_answers_once(small_recipe, tmp_path, cli):
    have(tmp_path, small_recipe, GOOD, "nonsense", {"prompt": "q", "tools": ["x"], "output": "a"}, {"prompt": "q"})
    ended = cli("check", "run.toml", cwd=tmp_path)
    assert ended.rc == 2
    assert [line.partition(": ")[2].partition(": ")[2][:30] for line in ended.stderr.splitlines()] == [
        "have.jsonl:2: not JSON: Expect",
        "have.jsonl:3: has tools, which",
        "have.jsonl:4: has no answer; a",
    ]
    (tmp_path / "have.jsonl").unlink()
    ended = cli("check", "run.toml", cwd=tmp_path)
    assert ended.stderr == "dasd-lite: ingest.paths: have.jsonl: no such file\n"


def test_check_knows_what_answers_without_log_probabilities_cannot_be_used_for(small_recipe, tmp_path, cli):
    have(tmp_path, small_recipe, GOOD, rule="count")
    ended = cli("check", "run.toml", cwd=tmp_path)
    assert (ended.rc, ended.stderr) == (
        2,
        "dasd-lite: phase 'have': select.rule = 'count' needs log-probabilities, which 1 of 1 answers lack; use"
        " 'random' or 'all', or let the teacher score them: score.by = 'teacher'\n",
    )
    teacher = ("score.by='teacher'", 'teacher={ kind = "transformers", model = "demo:teacher" }')
    assert cli("check", "run.toml", *teacher, cwd=tmp_path).rc == 0


def test_check_knows_that_mixed_answers_have_log_probabilities_of_the_teacher_s_part_alone(small_recipe, tmp_path, cli):
    own = {"prompt_uid": "q", "messages": [{"role": "user", "content": "q"}], "completion": "<think>a</think>b"}
    tokens = {"logprobs": [-0.5], "token_bytes": [1]}
    have(tmp_path, small_recipe, own | tokens | {"uid": "1", "prefix_bytes": 16}, rule="count")
    ended = cli("check", "run.toml", cwd=tmp_path)
    assert ended.rc == 2 and "needs log-probabilities, which 1 of 1 answers lack" in ended.stderr


def test_check_knows_that_no_answer_thinks(small_recipe, tmp_path, cli):
    have(tmp_path, small_recipe, GOOD | {"output": "c"})
    assert cli("check", "run.toml", cwd=tmp_path).rc == 0
    ended = cli("check", "run.toml", "select.require_think=true", cwd=tmp_path)
    assert ended.rc == 2 and "rejects every answer: none has <think>…</think>" in ended.stderr


def test_a_budget_for_a_domain_that_no_answer_has(small_recipe, tmp_path, cli):
    rows = [GOOD | {"prompt": f"q{i}", "domain": domain} for i, domain in enumerate(("math", "code", None))]
    path = have(tmp_path, small_recipe, *rows)
    assert cli("check", path.name, "select.budget={ math = 1, code = 1, all = 1 }", cwd=tmp_path).rc == 0
    ended = cli("check", path.name, "select.budget={ maths = 1, code = 1 }", cwd=tmp_path)
    assert (ended.rc, ended.stderr) == (
        2,
        "dasd-lite: phase 'have': select.budget: no answer has the domain 'maths'; the domains are all, code, math\n",
    )
    recipe = load_recipe(path, ["select.budget={ code = 1 }", "ingest.limit=1"])
    assert list(check_ingest(recipe.phase, None)) == [], "the stage may read further, to the next domain"
    many = have(tmp_path, small_recipe, *(GOOD | {"prompt": f"q{i}"} for i in range(200)))
    recipe = load_recipe(many, ["select.budget={ code = 1 }"])
    assert list(check_ingest(recipe.phase, None, seconds=0.0)) == [], "not all of the file was read"


def test_a_long_file_of_answers_is_read_in_part(small_recipe, tmp_path, capsys):
    recipe = load_recipe(have(tmp_path, small_recipe, *(GOOD | {"prompt": f"q{i}"} for i in range(200))))
    assert list(check_ingest(recipe.phase, None, seconds=0.0)) == []
    shown = capsys.readouterr().out
    assert "have: 64 answers to 64 prompts in what was read in 0 s, 1.0 per prompt; the first 64 rows: " in shown


def test_prompts_over_the_context_are_named_or_left_out(small_recipe, tmp_path, cli):
    rows = [
        {"prompt": "What?"},
        {"prompt": "far too long " * 500},
        {"prompt": "Who?"},
        {"prompt": "long as well " * 600},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small_recipe(tmp_path, evaluate=None, prompts={"path": "q.jsonl"}, phase=[{"name": "low"}])
    ended = cli("check", "run.toml", cwd=tmp_path)
    assert ended.rc == 2
    student, teacher = ended.stderr.splitlines()
    assert student.startswith(
        'dasd-lite: student: prompt q.jsonl:2 ("far too long far too long far too long f …") has '
    )
    assert student.endswith(
        " (1 more are too long); shorten it, or leave such prompts out with prompts.skip_overlong = true"
    )
    assert teacher.startswith("dasd-lite: teacher: prompt q.jsonl:2 (")
    for command in ("check", "sample"):
        ended = cli(command, "run.toml", "prompts.skip_overlong=true", cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
        assert (
            ended.stderr.count('note: 2 of 4 prompts left out (prompts.skip_overlong); the first is q.jsonl:2 ("') == 1
        )
    manifest = read_manifest(tmp_path / "run" / "low" / "sample")
    assert manifest["counts"] == {"prompts": 2, "rollouts": 4, "prompts over the context": 2}
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(rows[i]) for i in (0, 2)))
    assert manifest["inputs"]["prompts"] == read_prompts(tmp_path / "q.jsonl").fingerprint
    (tmp_path / "q.jsonl").write_text(json.dumps(rows[1]))
    ended = cli("check", "run.toml", "prompts.skip_overlong=true", cwd=tmp_path)
    assert ended.stderr.startswith("dasd-lite: prompts.path: all 1 prompts are too long, the first is q.jsonl:1 (")


def test_a_missing_file_of_prompts_is_said_once(small_recipe, tmp_path, cli):
    teacher = {"kind": "endpoint", "model": "x", "base_urls": ["http://127.0.0.1:9/v1"], "max_retries": 0}
    small_recipe(tmp_path, evaluate=None, prompts={"path": "gone.jsonl"}, teacher=teacher, phase=[{"name": "low"}])
    ended = cli("check", "run.toml", cwd=tmp_path)
    assert ended.rc == 2
    assert ended.stderr.count("gone.jsonl") == 1


def test_students_that_cannot_be_trained_rightly_are_refused_before_anything_is_sampled(small_recipe, tmp_path, cli):
    from tests.model.zoo import REFUSED, build, save

    small_recipe(tmp_path)
    for name, (_, _, word) in REFUSED.items():
        save(build(name), tmp_path / name)
        result = cli("check", "run.toml", f"student.model={name}", cwd=tmp_path)
        assert result.rc == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"dasd-lite: student.model = '{name}': ")
        assert word in line and line.endswith("; use another student")


def test_teachers_that_cannot_be_sampled_are_refused_before_anything_runs(small_recipe, tmp_path, cli, demo):
    from tests.model.zoo import UNSAMPLED, build, save

    small_recipe(tmp_path)
    expected = {name: f"{word}.*; use kind = 'vllm'" for name, word in UNSAMPLED.items()}
    for name in expected:
        save(build(name), tmp_path / name)
    shutil.copytree(demo / "teacher", tmp_path / "quantized")
    change(tmp_path / "quantized", quantization_config={"quant_method": "gptq", "bits": 4})
    expected["quantized"] = "its files are quantized, and transformers cannot load them here: .*; install what it needs"
    shutil.copytree(demo / "teacher", tmp_path / "vision")
    change(tmp_path / "vision", model_type="vit")
    expected["vision"] = "vit is no causal language model"
    for name, words in expected.items():
        result = cli("check", "run.toml", f"teacher.model={name}", cwd=tmp_path)
        assert result.rc == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith("dasd-lite: teacher") and re.search(words, line)


def test_students_that_are_only_sampled_elsewhere(small_recipe, tmp_path, cli):
    from tests.model.zoo import build, save

    save(build("minimax"), tmp_path / "minimax")
    phase = [{"name": "low", "sample.temperature": 0.6}]
    small_recipe(tmp_path, phase=phase)
    result = cli("check", "run.toml", "student.model=minimax", cwd=tmp_path)
    (line,) = result.stderr.splitlines()
    assert "student.model = 'minimax': minimax has a cache of its own" in line and line.endswith("use kind = 'vllm'")
    small_recipe(tmp_path, phase=phase, evaluate=None)
    result = cli("check", "run.toml", "student.model=minimax", cwd=tmp_path)
    assert (result.rc, result.stderr) == (0, "")


def test_a_student_that_cannot_be_in_four_bits(small_recipe, tmp_path, cli):
    from tests.model.zoo import build, save

    save(build("mamba"), tmp_path / "mamba")
    small_recipe(tmp_path)
    result = cli("check", "run.toml", "student.model=mamba", 'train.method={kind="qlora"}', cwd=tmp_path)
    assert result.rc == 2
    assert "mamba multiplies by its weights directly, so they cannot be in 4 bits; use lora" in result.stderr


def change(folder, **entries):
    """Change entries of a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_what_is_done_differently_for_a_student_is_noted(small_recipe, tmp_path, cli):
    from tests.model.zoo import build, save

    small_recipe(tmp_path)
    save(build("lfm2"), tmp_path / "lfm2")
    result = cli("check", "run.toml", "student.model=lfm2", cwd=tmp_path)
    assert (result.rc, result.stderr) == (0, "")
    words = "documents are computed one at a time, not packed (lfm2: it has layers of type conv)"
    assert words in " ".join(result.stdout.split())
    save(build("phi3_longrope"), tmp_path / "phi3")
    for options, words in (
        ((), "for contexts over 600 tokens throughout; student.max_model_len at most 600 chooses the others"),
        (("student.max_model_len=600",), "for contexts of up to 600 tokens throughout; student.max_model_len over 600"),
    ):
        result = cli("check", "run.toml", "student.model=phi3", *options, cwd=tmp_path)
        assert (result.rc, result.stderr) == (0, "")
        assert words in " ".join(result.stdout.split())


def test_which_programs_read_an_adapter_on_experts_is_said_before_anything_is_sampled(small_recipe, tmp_path, cli):
    from tests.model.zoo import build, save

    small_recipe(tmp_path)
    for name in ("qwen3_moe", "deepseek_v3"):
        save(build(name), tmp_path / name)
    experts = "adapters on experts are read by vLLM only with enable_mixed_moe_lora_format; the merged model is what"
    routers = "adapters on routers have not been tried in vLLM; the merged model is what others load"
    by_peft = "PEFT reads adapters of deepseek_v3 by other names"
    for name, options, said in (
        ("qwen3_moe", "", ()),
        ("qwen3_moe", ', experts = "adapted"', (experts,)),
        ("qwen3_moe", ', experts = "adapted", router = "adapted"', (experts, routers)),
        ("deepseek_v3", "", (by_peft,)),
    ):
        method = f'train.method={{ kind = "lora", rank = 4{options} }}'
        result = cli("check", "run.toml", f"student.model={name}", method, "--until", "models", cwd=tmp_path)
        assert (result.rc, result.stderr) == (0, "")
        shown = " ".join(result.stdout.split())
        assert [line for line in (experts, routers, by_peft) if line in shown] == list(said)


def test_a_folder_that_is_no_language_model_is_named(small_recipe, tmp_path, cli):
    small_recipe(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "no_such_kind"}')
    result = cli("check", "run.toml", "student.model=m", cwd=tmp_path)
    assert result.rc == 2
    assert "cannot be loaded as a language model" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "is already quantized (awq, 4 bits)"),
        ({"model_type": "t5"}, "t5 is no causal language model"),
        ({"num_hidden_layers": "two"}, "cannot be loaded as a language model: "),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type = 'spiral'"),
    ],
)
def test_run_refuses_a_student_before_it_samples_the_teacher(change, words, small_recipe, tmp_path, cli, demo):
    small_recipe(tmp_path)
    shutil.copytree(demo / "student", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
    for verb in ("check", "run"):
        result = cli(verb, "run.toml", "student.model=m", cwd=tmp_path)
        assert result.rc == 2 and words in result.stderr, result.stderr
        assert all(line.startswith("dasd-lite: ") for line in result.stderr.splitlines())
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_file_of_weights_that_was_cut_short_is_refused(small_recipe, tmp_path, cli, demo):
    small_recipe(tmp_path)
    shutil.copytree(demo / "student", tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-1], whole[:100], b"", whole + b"x"):
        weights.write_bytes(content)
        result = cli("check", "run.toml", "student.model=m", cwd=tmp_path)
        assert (result.rc, result.stderr) == (
            2,
            "dasd-lite: student.model = 'm': model.safetensors is not whole, or no file of safetensors; download it"
            " again\n",
        )


def test_a_student_without_weights_is_refused(small_recipe, tmp_path, cli, demo):
    small_recipe(tmp_path)
    shutil.copytree(demo / "student", tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    result = cli("check", "run.toml", "student.model=m", cwd=tmp_path)
    assert (result.rc, result.stderr) == (
        2,
        "dasd-lite: student.model = 'm': the folder has no weights (*.safetensors)\n",
    )

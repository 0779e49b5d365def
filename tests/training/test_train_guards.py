"""What stops training, or is said of it: fewer rows than a step, a jump of the loss, other tokenizers, a collapse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import dasd_lite

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.rows import VOCAB, make_model, make_rows, write_rows

from dasd_lite.chat.chat import Chat
from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.data.hub import engine_stop_ids
from dasd_lite.data.prompts import read_prompts
from dasd_lite.errors import ConfigError, TrainError
from dasd_lite.model import load as student
from dasd_lite.model import logprobs
from dasd_lite.model.row import Row
from dasd_lite.stages import train
from dasd_lite.training import checkpoint, trainable
from dasd_lite.training import monitor as watch
from dasd_lite.training.guard import StepStats, check_step, worst_rollouts
from dasd_lite.training.job import Job
from dasd_lite.training.monitor import Snapshot, has_collapsed
from dasd_lite.training.optimizer import make_optimizer
from dasd_lite.training.requirements import conflicts
from dasd_lite.training.schedule import Schedule

QUICK = {"epochs": 4, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "micro_batch_size": 2, "grad_accum_steps": 2}
DEMO = Path(dasd_lite.__file__).parent / "demo"
EVERY_ROW = {"grad_accum_steps": 1, "checkpoint_every": 5}
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows", make_rows(16))


def test_fewer_rows_than_a_step_leave_nothing_behind(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows", make_rows(3))
    with pytest.raises(TrainError, match="3 rows are fewer than one optimiser step reads"):
        train.run(rows, tiny, TrainConfig(**QUICK), tmp_path / "out", seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


# --- loss and gradient ------------------------------------------------------------------------------


def test_faults():
    usual = [1.0, 1.2, 0.9, 1.1] * 8
    assert check_step(1.0, 1.0, usual, 2.0, None) is None
    assert check_step(float("nan"), 1.0, [], 2.0, None) == "the loss is nan"
    assert check_step(1.0, float("inf"), [], 2.0, None) == "the gradient is inf, the loss 1"
    told = "the loss is 3.2, 1.05 in the steps before, and train.max_loss_jump = 2; lower train.learning_rate, or"
    assert told in check_step(3.2, 1.0, usual, 2.0, None)
    assert check_step(3.2, 1.0, usual, 2.5, None) is None
    # Of fewer than 8 steps nobody knows what is usual: their highest stands in for it.
    assert check_step(30.0, 1.0, [], 2.0, None) is None
    assert check_step(3.1, 1.0, usual[:7], 2.0, None) is None
    assert "the loss is 3.3, 1.2 in the steps before" in check_step(3.3, 1.0, usual[:2], 2.0, None)
    assert check_step(3.0, 1.0, [9.0] * 90 + [0.5] * 32, 2.0, None) is not None  # the last ones count
    # In float16 a gradient that is too large lowers the loss's scale; one that stays so teaches nothing.
    assert check_step(1.0, float("inf"), [], 2.0, 3) is None
    assert check_step(1.0, float("nan"), [], 2.0, 24) == "the gradient is nan for 25 steps, the loss 1"


def test_a_jump_of_the_loss_keeps_the_weights_before_it_and_more_leave_goes_on(tiny, tmp_path):
    rows = make_rows(40)
    odd = np.random.default_rng(0)
    rows[7]["ids"] = odd.integers(0, VOCAB, len(rows[7]["ids"])).tolist()  # after the rest is learnt, a stranger
    folder = write_rows(tmp_path / "rows", rows)
    config = {
        "epochs": 6,
        "learning_rate": 3e-2,
        "min_learning_rate": 1e-2,
        "grad_accum_steps": 1,
        "checkpoint_every": 5,
    }
    with pytest.raises(
        TrainError, match=r"step \d+: the loss is .* in the steps before, .* highest loss: r7d0, "
    ) as caught:
        train.run(folder, tiny, TrainConfig(**config, max_loss_jump=1.0), tmp_path / "out", seed=0)
    step = int(str(caught.value).split()[1].rstrip(":"))
    kept = (step - 2) // 5 * 5  # not that of the step just before, whose weights may be what is at fault
    assert str(caught.value).endswith(f"the checkpoint of step {kept} is kept, from which the same command goes on")
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == [f"step-{kept:08d}"]
    with pytest.raises(TrainError, match=f"step {step}: the loss is"):  # it is no accident
        train.run(folder, tiny, TrainConfig(**config, max_loss_jump=1.0), tmp_path / "out", seed=0)
    manifest = train.run(folder, tiny, TrainConfig(**config, max_loss_jump=50.0), tmp_path / "out", seed=0)
    assert manifest["counts"]["steps"] == 240


def test_weights_that_went_bad_are_not_kept(tiny, packed, tmp_path, monkeypatch):
    """The loss of a step shows what the step before has done."""
    clip, calls = Job.clip, []

    def broken(job, trained):
        calls.append(1)
        norm = clip(job, trained)
        if len(calls) == 6:
            for p in trained:
                p.grad.fill_(1e30)  # finite, and the weights are not after it
        return norm

    monkeypatch.setattr(Job, "clip", broken)
    monkeypatch.setattr(Schedule, "learning_rate", lambda schedule, step: 1e38 if step == 5 else 1e-3)
    config = TrainConfig(**QUICK | {"checkpoint_every": 2})
    with pytest.raises(TrainError, match=r"step 7: the loss is nan.*the checkpoint of step 4 is kept"):
        train.run(packed, tiny, config, tmp_path / "out", seed=0)
    monkeypatch.undo()
    manifest = train.run(packed, tiny, config, tmp_path / "out", seed=0)
    assert np.isfinite(manifest["counts"]["final_loss"])


def test_the_worst_micro_batch_is_that_of_the_highest_loss_per_token():
    long = Row(np.zeros(10_000, int), np.ones(10_000, bool), np.array([10_000]), ("long",))
    short = Row(np.zeros(500, int), np.ones(500, bool), np.array([500]), ("short",))
    told = StepStats.of([{"loss": 5000.0}, {"loss": 4500.0}], [long, short], False, 0)
    assert "short" in worst_rollouts([told], 1.0) and told.sums == {"loss": 9500.0}


def test_out_of_memory_is_one_line_with_what_needs_less(tiny, packed, tmp_path, monkeypatch):
    from dasd_lite.training import job as training

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "_card", lambda: ("NVIDIA T4", 16e9))
    monkeypatch.setattr(training, "target_terms", full)
    config = TrainConfig(**QUICK)
    with pytest.raises(
        TrainError, match=r"^NVIDIA T4: its 16.0 GB are full, 0.0 GB were predicted; try train\..*: it"
    ) as e:
        train.run(packed, tiny, config, tmp_path / "out", seed=0)
    assert "\n" not in str(e.value)
    monkeypatch.setattr(training.trainable, "load_trainable", full)
    with pytest.raises(TrainError, match=r"^NVIDIA T4: its 16.0 GB are full; try train.method qlora"):
        train.run(packed, tiny, config, tmp_path / "other", seed=0)


def test_what_cannot_be_is_said_before_anything_is_loaded(monkeypatch):
    sharded = TrainConfig(num_processes=2, optimizer="adamw_8bit")
    assert next(iter(conflicts(sharded))).startswith("train.optimizer = 'adamw_8bit' cannot be spread over 2")
    assert not list(conflicts(TrainConfig(num_processes=2, optimizer="adamw_8bit", method=LORA)))
    (line,) = conflicts(TrainConfig(num_processes=2, dtype="float16"))
    assert line.startswith("train.method full in float16 over several processes")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert not list(conflicts(TrainConfig(num_processes=2, dtype="float32")))
    found = list(conflicts(TrainConfig(num_processes=3, dtype="bfloat16", tracker="trackio", liger=True)))
    assert [line.partition(":")[0] for line in found] == [
        "train.num_processes = 3",
        "train.dtype = 'bfloat16'",
        "train.method full in float16 over several processes",
        "train.liger = true",
        "train.tracker = 'trackio'",
    ]


def test_the_gap_shows_a_model_that_is_not_what_was_trained(tiny, packed, tmp_path, monkeypatch):
    from dasd_lite.training import export

    config = TrainConfig(**QUICK | {"method": LORA, "learning_rate": 3e-2})
    right = train.run(packed, tiny, config, tmp_path / "right", seed=0)
    assert right["counts"]["export_gap"] < 1e-3

    def without_adapter(source, adapter, method, **loading):
        return student.load_model(source, device="cpu", **loading)

    monkeypatch.setattr(export, "_merge", without_adapter)
    wrong = train.run(packed, tiny, config, tmp_path / "wrong", seed=0)
    assert wrong["counts"]["export_gap"] > 0.05


# --- the rows against the model ---------------------------------------------------------------------


def test_rows_packed_with_another_tokenizer(tiny, tmp_path):
    right = write_rows(tmp_path / "right", make_rows(8), tokenizer=Chat(DEMO / "student").fingerprint)
    config = TrainConfig(**QUICK | {"epochs": 1})
    train.run(right, DEMO / "student", config, tmp_path / "fits", seed=0)
    wrong = write_rows(tmp_path / "wrong", make_rows(8), tokenizer=Chat(DEMO / "teacher").fingerprint)
    with pytest.raises(
        TrainError, match=f"^{wrong}: packed with another tokenizer or chat template than that of .*student"
    ):
        train.run(wrong, DEMO / "student", config, tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()


def test_more_embeddings_than_the_tokenizer_has_ids_is_said(tmp_path, capsys):
    model = tmp_path / "padded"
    shutil.copytree(DEMO / "student", model)
    padded = transformers.AutoModelForCausalLM.from_pretrained(model)
    padded.resize_token_embeddings(448)
    padded.save_pretrained(model)
    rows = write_rows(tmp_path / "rows", make_rows(8), tokenizer=Chat(model).fingerprint)
    train.run(rows, model, TrainConfig(**QUICK | {"epochs": 1}), tmp_path / "out", seed=0)
    assert "note: the model has 448 embeddings, its tokenizer 440 ids: 8 are padding" in capsys.readouterr().err
    beyond = make_rows(8)
    beyond[5]["ids"][2] = 445
    rows = write_rows(tmp_path / "beyond", beyond, tokenizer=Chat(model).fingerprint)
    with pytest.raises(TrainError, match=r"row 5, document 0 .*token id 445, the model has 440"):
        train.run(rows, model, TrainConfig(**QUICK), tmp_path / "out2", seed=0)


def test_a_model_that_would_not_stop_where_its_data_end(tiny, tmp_path, capsys):
    rows = make_rows(8)
    for row in rows:
        row["ids"] = [5 if i % 7 == 3 else x for i, x in enumerate(row["ids"])]
        for end in np.cumsum(row["doc_lengths"]):
            row["ids"][end - 1] = 60
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 59}))
    train.run(write_rows(tmp_path / "rows", rows), model, TrainConfig(**QUICK), tmp_path / "out", seed=0)
    assert "answers end with token 60, the student stops at 59" in capsys.readouterr().err
    assert engine_stop_ids(tmp_path / "out" / "model") == {59, 60}


# --- adapters ---------------------------------------------------------------------------------------


def test_a_phase_goes_on_with_the_adapter_of_the_one_before(tiny, packed, tmp_path):
    config = TrainConfig(**QUICK | {"method": LORA, "learning_rate": 3e-2})
    first = train.run(packed, tiny, config, tmp_path / "first", seed=0)
    adapter = tmp_path / "first" / "adapter"
    second = train.run(packed, tiny, config, tmp_path / "second", seed=1, adapter=adapter)
    assert second["counts"]["first_loss"] == pytest.approx(first["counts"]["final_loss"], abs=0.3)
    assert second["counts"]["first_loss"] < first["counts"]["first_loss"] - 0.1
    start = second["counts"]["start"]
    assert start["model"] == "tiny" and start["adapter"].endswith("/first/adapter")
    other = TrainConfig(**QUICK | {"method": LORA | {"rank": 8}})
    with pytest.raises(ConfigError, match=r"method.rank = 8, the adapter to start from has 4; make them equal"):
        train.run(packed, tiny, other, tmp_path / "third", seed=1, adapter=adapter)


def test_a_recipe_hands_over_merged_models_or_the_adapter(tmp_path):
    from dasd_lite.config.stages import RecipeConfig
    from dasd_lite.run.pipeline import plan

    def trains(start):
        method = {"kind": "qlora", "start": start}
        phases = [{"name": name, "train": {"method": method}} for name in ("low", "high", "last")]
        recipe = RecipeConfig.model_validate(
            {
                "out": str(tmp_path),
                "prompts": {"path": str(DEMO / "train.jsonl")},
                "student": {"model": str(DEMO / "student")} | {"kind": "transformers"},
                "teacher": {"kind": "transformers", "model": str(DEMO / "teacher")},
                "phase": phases,
            }
        )
        return [(s.arguments["model"], s.arguments["adapter"]) for s in plan(recipe) if s.stage == "train"]

    base, low, high = DEMO / "student", tmp_path / "low" / "train", tmp_path / "high" / "train"
    assert trains("merged") == [(base, None), (low / "model", None), (high / "model", None)]
    assert trains("adapter") == [(base, None), (base, low / "adapter"), (base, high / "adapter")]


# --- memory -----------------------------------------------------------------------------------------


def gradients(tiny, *, offload, checkpointing):
    model = trainable.load_trainable(tiny, Full(), device="cpu", gradient_checkpointing=checkpointing)
    ids, lengths = np.arange(4000) % VOCAB, [60] * 66 + [40]
    positions = logprobs.target_positions(np.ones(4000, dtype=bool), lengths)
    terms = logprobs.target_terms(model, ids, positions, lengths, logprobs.negative_logprobs, offload=offload)
    terms.sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_offloaded_activations_give_the_same_gradients(tiny, monkeypatch):
    moved = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: moved.append(a) or empty(*a, **k))
    wanted = gradients(tiny, offload=False, checkpointing=False)
    assert not [a for a in moved if a and getattr(a[0], "numel", lambda: 0)() >= 4000 * 32]
    for checkpointing in (False, True):
        before = len(moved)
        found = gradients(tiny, offload=True, checkpointing=checkpointing)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        kept = [a[0].numel() for a in moved[before:] if a and isinstance(a[0], torch.Size)]
        assert kept.count(4000 * 32) >= 2  # at least what each of the two layers reads
        assert VOCAB * 32 not in kept  # weights stay


def test_checkpoints_of_many_files(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 20_000)

    def fresh():
        model = trainable.load_trainable(tiny, Full(), device="cpu")
        return model, make_optimizer(model, TrainConfig())

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model, optimizer = fresh()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(3):
        logprobs.loss_sum(model, np.arange(30), np.ones(30, dtype=bool), [30]).backward()
        optimizer.step()
    checkpoint.save(tmp_path, 3, model, optimizer, scaler, "f")
    assert len(list((tmp_path / "step-00000003").glob("*.safetensors"))) > 3
    again, its = fresh()
    assert checkpoint.restore(tmp_path, again, its, scaler, "f") == 3
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(its.state[q], optimizer.state[p], rtol=0, atol=0)
    with pytest.raises(checkpoint.CheckpointError, match="another configuration"):
        checkpoint.restore(tmp_path, again, its, scaler, "g")


def test_what_this_machine_cannot_do(tiny, packed, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("it can")
    with pytest.raises(ConfigError, match="paged_adamw_8bit' needs a GPU"):
        train.run(packed, tiny, TrainConfig(optimizer="paged_adamw_8bit"), tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"train.liger = true: .*(not installed|need a GPU)"):
        trainable.load_trainable(tiny, Full(), device="cpu", liger=True)
    trainable.load_trainable(tiny, Lora(kind="lora"), device="cpu", liger="auto")


# --- the look at a few questions --------------------------------------------------------------------


def test_a_look_grades_answers_and_leaves_the_model_as_it_was():
    model = trainable.load_trainable(DEMO / "student", Full(), device="cpu")
    before = model.config._attn_implementation
    questions = read_prompts(DEMO / "validation.jsonl", limit=12)
    found = watch.take_snapshot(model, DEMO / "student", questions, 7, max_tokens=160)
    assert model.training and model.config._attn_implementation == before
    assert (found.step, found.questions) == (7, 12)
    assert 2 <= found.right <= found.finished <= 12 and found.mean_tokens > 10
    short = watch.take_snapshot(model, DEMO / "student", questions, 7, max_tokens=8)
    assert (short.finished, short.right, short.mean_tokens) == (0, 0, 8.0)
    with torch.no_grad():  # one that says the same for ever
        model.lm_head.weight.zero_()
        model.lm_head.weight[100] = 1
        model.base_model.norm.weight.fill_(1.0)
    looping = watch.take_snapshot(model, DEMO / "student", questions, 9, max_tokens=160)
    assert looping.looping >= 6 or looping.finished == 12


def test_collapse_is_told_from_learning_to_think_at_length():
    before = Snapshot(0, 16, 16, 12, 0, 80.0)
    assert has_collapsed(before, Snapshot(2, 16, 16, 11, 0, 80.0)) is None
    assert "3 of 16 finished answers are right, 12 of 16 before training" in has_collapsed(
        before, Snapshot(2, 16, 16, 3, 0, 80.0)
    )
    assert has_collapsed(before, Snapshot(2, 16, 2, 0, 1, 1024.0)) is None  # still writing: nothing is known
    assert "12 of 16 answers repeat themselves" in has_collapsed(before, Snapshot(2, 16, 2, 0, 12, 1024.0))
    assert (
        has_collapsed(Snapshot(0, 16, 16, 1, 0, 80.0), Snapshot(2, 16, 16, 0, 0, 80.0)) is None
    )  # it could do nothing before


def test_a_training_is_watched_before_early_and_at_the_end(packed, tmp_path):
    rows = write_rows(tmp_path / "rows", make_rows(16))
    config = TrainConfig(**QUICK | {"monitor_questions": 3, "watch_tokens": 4, "max_loss_jump": 50.0})
    out = tmp_path / "out"
    manifest = train.run(rows, DEMO / "student", config, out, seed=0, questions=DEMO / "validation.jsonl")
    assert sorted(watch.read_snapshots(out / "watch.jsonl")) == [0, 1, 16]
    assert [look["questions"] for look in manifest["counts"]["watched"]] == [3, 3, 3]
    # Neither the look nor its absence changes the weights.
    plain = train.run(rows, DEMO / "student", config, tmp_path / "plain", seed=0)
    assert "watched" not in plain["counts"] and plain["counts"]["final_loss"] == manifest["counts"]["final_loss"]


def test_questions_without_answers_are_said_not_to_watch(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows", make_rows(8))
    questions = [{"prompt": f"Question {i}?"} | ({"answer": "7"} if i > 5 else {}) for i in range(9)]
    config = TrainConfig(**QUICK | {"epochs": 1, "monitor_questions": 2, "watch_tokens": 4})
    for name, asked in (("none", questions[:5]), ("some", questions)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, asked)))
        train.run(rows, DEMO / "student", config, tmp_path / name, seed=0, questions=tmp_path / f"{name}.jsonl")
    assert capsys.readouterr().err.count("no question has an answer, so the student is not watched") == 1
    assert not (tmp_path / "none" / "watch.jsonl").exists()
    assert {found.questions for found in watch.read_snapshots(tmp_path / "some" / "watch.jsonl").values()} == {2}

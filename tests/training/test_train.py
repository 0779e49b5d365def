"""The training stage: its plan, the loss over micro-batches, what it refuses, how it stops and goes on."""

import json
import math
import os
import signal
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.rows import VOCAB, make_model, make_rows, write_rows

from dasd_lite.config.train import Full, TrainConfig
from dasd_lite.errors import CheckpointError, ConfigError, DataError, TrainError
from dasd_lite.method.ragged import offsets_of
from dasd_lite.model.packed_check import check_packing, documents_of, probe_row
from dasd_lite.stages import train
from dasd_lite.training.rows import open_rows
from dasd_lite.training.schedule import Schedule
from dasd_lite.training.trainable import load_trainable

QUICK = {"epochs": 2, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "micro_batch_size": 2, "grad_accum_steps": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows", make_rows(16))


def schedule_of(rows, config, seed=0):
    """The schedule that train makes of these rows; the model's hidden size is 32."""
    lengths = np.array([n for row in rows for n in row["doc_lengths"]])
    return Schedule(lengths, offsets_of([len(r["doc_lengths"]) for r in rows]), config, seed, (6.0 * 32, 1.0))


def weights(out):
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- training ---------------------------------------------------------------------------------------


def test_full_training_learns_and_is_not_repeated(tiny, packed, tmp_path):
    config = TrainConfig(**QUICK | {"epochs": 8})
    out = tmp_path / "out"
    manifest = train.run(packed, tiny, config, out, seed=0)
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 33))
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert lines[0].keys() == {
        *("step", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens", "seconds"),
        *("tokens_per_second", "mfu", "memory_bytes", "seconds_left"),
    }
    counts = manifest["counts"]
    rows = make_rows(16)
    assert counts["tokens"] == 8 * sum(len(row["ids"]) for row in rows)
    assert counts["target_tokens"] == 8 * sum(sum(row["loss_mask"]) for row in rows)
    assert (counts["steps"], counts["rows"], counts["rows_seen"]) == (32, 16, 128)
    assert counts["final_loss"] == lines[-1]["loss"]
    assert json.loads((out / "timing.json").read_text())["tokens_per_second"] > 0
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "metrics.jsonl", "model", "timing.json"]
    assert (out / "model" / "tokenizer.json").exists()
    transformers.AutoModelForCausalLM.from_pretrained(out / "model")

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert train.run(packed, tiny, config, out, seed=0) == manifest
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 now"):
        train.run(packed, tiny, config, out, seed=1)


def test_loss_does_not_depend_on_how_a_step_is_cut(tiny, packed, tmp_path):
    found = []
    for micro, accum in ((1, 8), (2, 4), (8, 1)):
        config = TrainConfig(**QUICK | {"micro_batch_size": micro, "grad_accum_steps": accum, "learning_rate": 1e-3})
        train.run(packed, tiny, config, tmp_path / f"{micro}x{accum}", seed=0)
        found.append(metrics(tmp_path / f"{micro}x{accum}"))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
            assert (b["tokens"], b["target_tokens"]) == (a["tokens"], a["target_tokens"])


def test_loss_of_a_step_is_the_mean_over_its_target_tokens(tiny, packed, tmp_path):
    """The first step by hand: a plain forward pass of each document of its rows."""
    config = TrainConfig(**QUICK)
    train.run(packed, tiny, config, tmp_path / "out", seed=3, max_steps=1)
    rows, model = make_rows(16), transformers.AutoModelForCausalLM.from_pretrained(tiny)
    total, targets = 0.0, 0
    for i in schedule_of(make_rows(16), config, seed=3).rows_of(0):
        start = 0
        for length in rows[i]["doc_lengths"]:
            ids = torch.tensor(rows[i]["ids"][start : start + length])
            mask = torch.tensor(rows[i]["loss_mask"][start : start + length])[1:]
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
            total -= float(logprobs[mask].sum())
            targets += int(mask.sum())
            start += length
    (line,) = metrics(tmp_path / "out")
    assert line["loss"] == pytest.approx(total / targets, rel=1e-6)
    assert line["target_tokens"] == targets


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_adapters_learn(tiny, packed, tmp_path, kind):
    method = {"kind": kind, "rank": 8, "alpha": 16}
    config = TrainConfig(**QUICK | {"method": method, "epochs": 6, "learning_rate": 3e-2})
    manifest = train.run(packed, tiny, config, tmp_path / "out", seed=0)
    # Not more than this: the embeddings, drawn at random and tied to the head, stay as they are.
    assert manifest["counts"]["final_loss"] < manifest["counts"]["first_loss"] - 0.15
    assert manifest["counts"]["export_gap"] < 1e-3
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_computation_trains_float32_weights(tiny, packed, tmp_path, dtype):
    config = TrainConfig(**QUICK | {"dtype": dtype})
    manifest = train.run(packed, tiny, config, tmp_path / "out", seed=0)
    assert manifest["counts"]["final_loss"] < manifest["counts"]["first_loss"]
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "out").values())


def test_only_matrices_decay(tiny):
    from dasd_lite.training import trainable
    from dasd_lite.training.optimizer import make_optimizer

    config = TrainConfig(weight_decay=0.3)
    optimizer = make_optimizer(trainable.load_trainable(tiny, config.method, device="cpu"), config)
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {1: 0.0, 2: 0.3}


# --- stopping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_the_same_call_goes_on(tiny, packed, tmp_path, number, capsys, monkeypatch):
    config = TrainConfig(**QUICK | {"checkpoint_every": 100})
    train.run(packed, tiny, config, tmp_path / "whole", seed=0)
    out, steps = tmp_path / "out", []
    learning_rate = Schedule.learning_rate

    def interrupted(plan, step):
        steps.append(step)
        if step == 2:
            os.kill(os.getpid(), number)
        return learning_rate(plan, step)

    monkeypatch.setattr(Schedule, "learning_rate", interrupted)
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 8"):
        train.run(packed, tiny, config, out, seed=0)
    assert signal.getsignal(number) is handler
    assert capsys.readouterr().err.count("stopped after step 3 of 8, whose checkpoint is written") == 1
    assert not (out / "manifest.json").exists()
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]

    monkeypatch.setattr(Schedule, "learning_rate", learning_rate)
    train.run(packed, tiny, config, out, seed=0)
    assert [line["step"] for line in metrics(out)] == list(range(1, 9))
    torch.testing.assert_close(weights(out), weights(tmp_path / "whole"), rtol=0, atol=0)
    same = ("loss", "learning_rate", "grad_norm")
    assert [[a[k] for k in same] for a in metrics(out)] == [[b[k] for k in same] for b in metrics(tmp_path / "whole")]


def test_training_off_the_main_thread(tiny, packed, tmp_path):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(train.run(packed, tiny, TrainConfig(**QUICK), tmp_path / "o", seed=0, max_steps=1))
    )
    thread.start()
    thread.join()
    assert found[0]["counts"]["steps"] == 1


def test_a_loss_that_is_not_a_number_names_step_and_rollouts(tiny, packed, tmp_path, monkeypatch):
    from dasd_lite.training.objectives import sft

    whole, calls = sft.loss, []

    def broken(terms, targets):
        calls.append(1)
        loss, metrics = whole(terms, targets)
        factor = math.nan if len(calls) == 6 else 1
        return loss * factor, {"loss": metrics["loss"] * factor}

    monkeypatch.setattr(sft, "loss", broken)
    config = TrainConfig(**QUICK | {"checkpoint_every": 1})
    bad = schedule_of(make_rows(16), config).rows_of(2)[2:]  # the sixth forward pass: third step, second micro-batch
    rows = make_rows(16)
    named = ", ".join(rows[bad[0]]["uids"])
    with pytest.raises(TrainError, match=f"step 3: the loss is nan; rollouts: {named}, .*checkpoint of step 1 is kept"):
        train.run(packed, tiny, config, tmp_path / "out", seed=0)
    # That of step 2 has made the gradient that is at fault, so it may be at fault itself.
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001"]


# --- what is refused --------------------------------------------------------------------------------


def changed(row, **columns):
    return {**row, **columns}


ROWS = make_rows(6)
LENGTH = len(ROWS[4]["ids"])
FIRST = ROWS[4]["doc_lengths"][0]
LONG = {"ids": [1] * 65, "loss_mask": [True] * 65, "doc_lengths": [65], "uids": ["long"]}
BAD = {
    "vocabulary": (
        changed(ROWS[4], ids=[*ROWS[4]["ids"][:-1], VOCAB]),
        r"document 3 \(r4d3\): token id 61, the model has 61",
    ),
    "negative": (changed(ROWS[4], ids=[-1, *ROWS[4]["ids"][1:]]), r"document 0 \(r4d0\): token id -1"),
    "positions": (LONG, r"document 0 \(long\): 65 tokens, the model has 64 positions"),
    "no target": (
        changed(ROWS[4], loss_mask=[True] + [False] * (FIRST - 1) + ROWS[4]["loss_mask"][FIRST:]),
        rf"document 0 \(r4d0\): none of its {FIRST} tokens is a target",
    ),
    "end token": (
        changed(ROWS[4], loss_mask=[*ROWS[4]["loss_mask"][:-1], False]),
        r"\(r4d3\): its last token \(\d+\), which ends",
    ),
    "one token": (
        changed(ROWS[4], doc_lengths=[FIRST - 1, 1, *ROWS[4]["doc_lengths"][1:]]),
        "1 token; a document needs",
    ),
    "lengths": (
        changed(ROWS[4], doc_lengths=ROWS[4]["doc_lengths"][:-1]),
        f"row 4: {LENGTH} ids, {LENGTH} mask entries",
    ),
    "mask": (changed(ROWS[4], loss_mask=[True]), f"row 4: {LENGTH} ids, 1 mask entries"),
    "empty": (changed(ROWS[4], ids=[], loss_mask=[], doc_lengths=[], uids=[]), "row 4: 0 ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_must_not_be_trained_on(tiny, tmp_path, case):
    row, message = BAD[case]
    folder = write_rows(tmp_path / "rows", [*ROWS[:4], row, ROWS[5]])
    with pytest.raises(TrainError, match=message) as caught:
        train.run(folder, tiny, TrainConfig(**QUICK), tmp_path / "out", seed=0)
    assert str(caught.value).startswith(f"{folder}: row 4")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]  # nothing that stands in the way of the right rows


def test_no_rows(tiny, tmp_path):
    with pytest.raises(TrainError, match="no row to train on"):
        train.run(write_rows(tmp_path / "rows", []), tiny, TrainConfig(**QUICK), tmp_path / "out", seed=0)


def test_rows_that_are_not_there(tiny, tmp_path):
    with pytest.raises(DataError, match=str(tmp_path / "rows")):
        train.run(tmp_path / "rows", tiny, TrainConfig(**QUICK), tmp_path / "out", seed=0)


def test_a_model_folder_that_is_none(packed, tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(ConfigError, match=f"{tmp_path / 'm'}: cannot be loaded"):
        train.run(packed, tmp_path / "m", TrainConfig(**QUICK), tmp_path / "out", seed=0)


def test_documents_that_leak_are_refused(tiny, packed, tmp_path, monkeypatch):
    from dasd_lite.model import logprobs

    of = logprobs.Documents.of
    # One document where there are several: what a wrong mask would do.
    monkeypatch.setattr(logprobs.Documents, "of", lambda lengths, device="cpu": of([sum(lengths)], device))
    model = load_trainable(tiny, Full(), device="cpu")
    with torch.no_grad():  # weights at random are next to blind to what they read
        for p in model.parameters():
            p.mul_(8 if p.ndim == 2 else 1)
    rows = open_rows(packed, tmp_path / "m", vocab_size=VOCAB, max_positions=None)
    with pytest.raises(TrainError, match="documents leak into each other"):
        check_packing(model, documents_of([rows[0]]))


def test_weights_that_are_no_numbers_are_refused(tiny, packed, tmp_path):
    model = load_trainable(tiny, Full(), device="cpu")
    with torch.no_grad():
        model.base_model.norm.weight[0] = math.nan
    rows = open_rows(packed, tmp_path / "m", vocab_size=VOCAB, max_positions=None)
    with pytest.raises(TrainError, match="not finite before the first step"):
        check_packing(model, documents_of([rows[0]]))


def test_rows_are_read_as_they_were_written(packed, tmp_path):
    rows = open_rows(packed, tmp_path / "mapped", vocab_size=VOCAB, max_positions=64)
    assert not (tmp_path / "mapped").exists()
    wanted = make_rows(16)
    assert len(rows) == 16
    for i in (15, 0, 7, 6):
        row = rows[i]
        assert (row.ids.tolist(), row.loss_mask.tolist()) == (wanted[i]["ids"], wanted[i]["loss_mask"])
        assert (row.doc_lengths.tolist(), list(row.uids)) == (wanted[i]["doc_lengths"], wanted[i]["uids"])
        assert rows.num_tokens[i] == len(row.ids)
        assert not row.ids.flags.owndata  # a view of the file


def test_the_probe_is_the_beginning_of_a_few_documents():
    lengths = [600, 30, 2, 700, 9]
    ids = np.arange(sum(lengths))
    cut = probe_row(np.split(ids, np.cumsum(lengths)[:-1]))
    assert cut.doc_lengths.tolist() == [512, 30, 2, 512]
    assert cut.ids.tolist() == [*range(512), *range(600, 632), *range(632, 1144)]

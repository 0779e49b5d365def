"""A training run from its task to the finished folder: what it learns, its loss, how it stops and resumes."""

import json
import os
import signal
import threading

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.rows import ADAPTER, QUICK, make_rows, schedule_of, weights
from tests.trainer import metrics

from dasd_lite.config.train import TrainConfig
from dasd_lite.errors import CheckpointError, ConfigError
from dasd_lite.stages.train import train
from dasd_lite.training.schedule import Schedule


def test_full_training_learns_and_is_not_repeated(tiny, packed, tmp_path):
    config = TrainConfig(**QUICK | {"epochs": 8})
    out = tmp_path / "out"
    manifest = train(packed, tiny, config, out=out).manifest
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
    assert counts["last_step_loss"] == lines[-1]["loss"]
    assert json.loads((out / "timing.json").read_text())["tokens_per_second"] > 0
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "metrics.jsonl", "model", "timing.json"]
    assert (out / "model" / "tokenizer.json").exists()
    transformers.AutoModelForCausalLM.from_pretrained(out / "model")

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert train(packed, tiny, config, out=out).manifest == manifest
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 now"):
        train(packed, tiny, config, out=out, seed=1)


def test_loss_does_not_depend_on_how_a_step_is_cut(tiny, packed, tmp_path):
    curves = []
    for micro, accum in ((1, 8), (2, 4), (8, 1)):
        config = TrainConfig(**QUICK | {"micro_batch_size": micro, "grad_accum_steps": accum, "learning_rate": 1e-3})
        train(packed, tiny, config, out=tmp_path / f"{micro}x{accum}")
        curves.append(metrics(tmp_path / f"{micro}x{accum}"))
    for other in curves[1:]:
        for a, b in zip(curves[0], other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
            assert (b["tokens"], b["target_tokens"]) == (a["tokens"], a["target_tokens"])


def test_loss_of_a_step_is_the_mean_over_its_target_tokens(tiny, packed, tmp_path):
    """The first step by hand: a plain forward pass of each document of its rows."""
    config = TrainConfig(**QUICK)
    train(packed, tiny, config, out=tmp_path / "out", seed=3, max_steps=1)
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
    counts = train(packed, tiny, config, out=tmp_path / "out").counts
    # Not more than this: the embeddings, drawn at random and tied to the head, stay as they are.
    assert counts["last_step_loss"] < counts["first_step_loss"] - 0.15
    assert counts["export_gap_mean"] < 1e-3
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_computation_trains_float32_weights(tiny, packed, tmp_path, dtype):
    config = TrainConfig(**QUICK | {"dtype": dtype})
    counts = train(packed, tiny, config, out=tmp_path / "out").counts
    assert counts["last_step_loss"] < counts["first_step_loss"]
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "out").values())


def test_training_continues_an_adapter(tiny, packed, tmp_path):
    config = TrainConfig(**QUICK | {"epochs": 4, "method": ADAPTER, "learning_rate": 3e-2})
    first = train(packed, tiny, config, out=tmp_path / "first").counts
    adapter = tmp_path / "first" / "adapter"
    second = train(packed, tiny, config, out=tmp_path / "second", seed=1, adapter=adapter).counts
    assert second["first_step_loss"] == pytest.approx(first["last_step_loss"], abs=0.3)
    assert second["first_step_loss"] < first["first_step_loss"] - 0.1
    start = second["start"]
    assert start["model"] == "tiny" and start["adapter"].endswith("/first/adapter")
    other = TrainConfig(**QUICK | {"method": ADAPTER | {"rank": 8}})
    with pytest.raises(ConfigError, match=r"method.rank = 8, but the adapter to start from has 4; make them equal"):
        train(packed, tiny, other, out=tmp_path / "third", seed=1, adapter=adapter)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_the_same_call_resumes(tiny, packed, tmp_path, number, capsys, monkeypatch):
    config = TrainConfig(**QUICK | {"checkpoint_every": 100})
    train(packed, tiny, config, out=tmp_path / "reference")
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
        train(packed, tiny, config, out=out)
    assert signal.getsignal(number) is handler
    assert capsys.readouterr().err.count("stopped after step 3 of 8 with a checkpoint") == 1
    assert not (out / "manifest.json").exists()
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]

    monkeypatch.setattr(Schedule, "learning_rate", learning_rate)
    train(packed, tiny, config, out=out)
    assert [line["step"] for line in metrics(out)] == list(range(1, 9))
    torch.testing.assert_close(weights(out), weights(tmp_path / "reference"), rtol=0, atol=0)
    same = ("loss", "learning_rate", "grad_norm")
    assert [[a[k] for k in same] for a in metrics(out)] == [
        [b[k] for k in same] for b in metrics(tmp_path / "reference")
    ]


def test_training_off_the_main_thread(tiny, packed, tmp_path):
    config, models = TrainConfig(**QUICK), []
    thread = threading.Thread(
        target=lambda: models.append(train(packed, tiny, config, out=tmp_path / "out", max_steps=1))
    )
    thread.start()
    thread.join()
    assert models[0].counts["steps"] == 1

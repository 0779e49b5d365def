"""The exported model: that it is the trained one, and what its folder has."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.model.tiny import LORA, QLORA, random_model, random_row
from tests.rows import ADAPTER, QUICK, loss_sum

from dasd_lite.config.train import Full, TrainConfig
from dasd_lite.model.load import is_float32, load_model
from dasd_lite.stages.train import train
from dasd_lite.training import export
from dasd_lite.training.trainable import load_trainable


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model") / "random")


def fit(model, data, steps=30):
    """Train what is trainable on one row; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = loss_sum(model, data.ids, data.loss_mask, data.doc_lengths) / data.loss_mask.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_adapter_trains_and_merges_into_the_same_logits(random, tmp_path, method):
    from peft import PeftModel

    data = random_row(40, 50, 33)
    torch.manual_seed(1)
    model = load_trainable(random, method, device="cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    assert sum(p.numel() for p in trained) < 0.3 * sum(p.numel() for p in model.parameters())
    losses = fit(model, data)
    assert losses[-1] < 0.7 * losses[0]

    gap = export.export(model, method, random, tmp_path, data)
    assert gap < 1e-3
    modules = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(modules) > 1 and modules == sorted(modules)  # a set's order differs from process to process
    base = load_model(random, device="cpu", attention="sdpa", four_bit=method.kind == "qlora")
    base = base.dequantize() if method.kind == "qlora" else base
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.from_numpy(data.ids[:40])[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert getattr(merged.config, "quantization_config", None) is None


def test_saved_model_keeps_tokenizer_dtype_and_weights(tmp_path):
    source = random_model(tmp_path / "source", dtype="bfloat16")
    (source / "README.md").write_text("not part of the model")
    model = load_trainable(source, Full(), device="cpu")
    assert is_float32(model)
    data = random_row(30)
    fit(model, data, steps=3)
    gap = export.export(model, Full(), source, tmp_path / "out", data)
    assert 0 < gap < 0.1  # rounding to bfloat16
    saved = tmp_path / "out" / "model"
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert (saved / "chat_template.jinja").exists() and not (saved / "README.md").exists()
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    again = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert again.dtype == torch.bfloat16
    assert "attn_implementation" not in (saved / "config.json").read_text()
    trained = model.to(torch.bfloat16).state_dict()
    torch.testing.assert_close(again.state_dict(), trained, rtol=0, atol=0)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model"]


def test_saving_replaces_what_a_killed_run_left(random, tmp_path):
    for name in ("model", "model.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.safetensors").write_text("x")
    export.save_model(load_model(random, device="cpu"), tmp_path / "model", random)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "half.safetensors").exists()


def test_the_gap_shows_a_model_that_is_not_what_was_trained(tiny, packed, tmp_path, monkeypatch):
    config = TrainConfig(**QUICK | {"epochs": 4, "method": ADAPTER, "learning_rate": 3e-2})
    right = train(packed, tiny, config, out=tmp_path / "right")
    assert right.counts["export_gap"] < 1e-3

    def without_adapter(source, adapter, method, **loading):
        return load_model(source, device="cpu", **loading)

    monkeypatch.setattr(export, "_merge", without_adapter)
    wrong = train(packed, tiny, config, out=tmp_path / "wrong")
    assert wrong.counts["export_gap"] > 0.05


def test_all_files_have_the_same_permissions(tiny, packed, tmp_path):
    """safetensors would let only their owner read the weights."""
    model = train(packed, tiny, TrainConfig(**QUICK), out=tmp_path / "out", max_steps=1)
    assert len({path.stat().st_mode for path in model.path.iterdir()}) == 1

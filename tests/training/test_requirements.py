"""Options that a machine, a model or other options rule out."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.rows import ADAPTER

from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.costs import cards
from dasd_lite.errors import ConfigError
from dasd_lite.stages.train import train
from dasd_lite.training.requirements import conflicts
from dasd_lite.training.trainable import load_trainable


def test_conflicts_between_options_and_with_the_machine(monkeypatch):
    sharded = TrainConfig(num_processes=2, optimizer="adamw_8bit")
    assert next(iter(conflicts(sharded))).startswith("train.optimizer = 'adamw_8bit' cannot be sharded over 2")
    assert not list(conflicts(TrainConfig(num_processes=2, optimizer="adamw_8bit", method=ADAPTER)))
    (line,) = conflicts(TrainConfig(num_processes=2, dtype="float16"))
    assert line.startswith("train.method full in float16 over several processes")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cards, "_cards", lambda names: [("Tesla T4", 16 << 30)] * len(names))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert not list(conflicts(TrainConfig(num_processes=2, dtype="float32")))
    lines = list(conflicts(TrainConfig(num_processes=3, dtype="bfloat16", tracker="trackio", liger="on")))
    assert [line.partition(":")[0] for line in lines] == [
        "train.num_processes = 3",
        "train.dtype = 'bfloat16'",
        "train.method full in float16 over several processes",
        "train.liger = 'on'",
        "train.tracker = 'trackio'",
    ]


def test_options_that_need_a_gpu(tiny, packed, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("it can")
    with pytest.raises(ConfigError, match="paged_adamw_8bit' needs a GPU"):
        train(packed, tiny, TrainConfig(optimizer="paged_adamw_8bit"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"train.liger = 'on': .*needs a GPU and liger-kernel"):
        load_trainable(tiny, Full(), device="cpu", liger="on")
    load_trainable(tiny, Lora(kind="lora"), device="cpu", liger="auto")

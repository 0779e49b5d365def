"""Options that a machine, a model or other options rule out."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.rows import ADAPTER

from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.costs import cards
from dasd_lite.errors import ConfigError
from dasd_lite.stages.train import train
from dasd_lite.training import requirements
from dasd_lite.training.requirements import conflicts, model_conflicts
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
    monkeypatch.setattr(requirements, "has_liger", lambda: False)
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


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_students_that_are_quantized_already(tmp_path, quantization, words):
    for config in ({"quantization_config": quantization}, {"text_config": {"quantization_config": quantization}}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
        (line,) = model_conflicts(tmp_path, [Full()])
        assert line == f"student {tmp_path} is already quantized ({words}); name the model that it was made from"


def test_parts_that_a_student_does_not_have(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    methods = [Full(), Lora(), Lora(router="adapted", experts="adapted")]
    assert not list(model_conflicts(tmp_path, methods[:2]))
    assert list(model_conflicts(tmp_path, methods)) == [
        f"train.method.{part} = 'adapted': the student (qwen3) has no {part}; use 'frozen'"
        for part in ("experts", "router")
    ]
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 128}')
    assert not list(model_conflicts(tmp_path, methods))

"""Tokens and hours of evaluations, against numbers worked out by hand."""

import pytest

from dasd_lite.config.models import Transformers, Vllm
from dasd_lite.costs.evaluation import Load, batch_that_fits, evaluation_line, transformers_hours, vllm_hours
from dasd_lite.costs.hardware import Gpu, Hardware
from dasd_lite.costs.shape import ModelShape

QWEN_4B = ModelShape(
    hidden_size=2560,
    intermediate_size=9728,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    tied=True,
    qk_norm=True,
)
H200 = Gpu("NVIDIA H200", 141_000_000_000, 1, Hardware())
AIME = Load(30, 30 * 64, 81_920)


def test_the_batch_is_what_the_cache_leaves_room_for():
    # 2 (keys, values) × 2 bytes × 1,024 × 36 layers × 81,920 tokens = 12.08 GB each, in 0.9 × (141 − 8.04) GB.
    assert batch_that_fits(QWEN_4B, H200, 81_920, 64) == 9
    assert batch_that_fits(QWEN_4B, H200, 1_024, 64) == 64
    small = Gpu("NVIDIA GeForce RTX 3060", 12_000_000_000, 1, Hardware())
    assert batch_that_fits(QWEN_4B, small, 81_920, 64) == 1


def test_days_by_transformers_are_said_and_vllm_is_named():
    hours = transformers_hours(QWEN_4B, H200, [AIME], 64)
    assert hours == pytest.approx(214 * 81_920 * 0.028 / 3600)  # ⌈1,920 ÷ 9⌉ batches
    fast = vllm_hours(QWEN_4B, H200, [AIME])
    assert fast == pytest.approx(30 * 64 * 81_920 / 20_000 / 3600, rel=0.02)
    line = evaluation_line([AIME], 1, Transformers(model="m"), QWEN_4B, H200)
    assert line.startswith(
        "evaluation: 1,920 answers in 1 evaluation, at most 157,286,400 tokens; at most 5.7 days with"
    )
    assert "student.kind = 'vllm' takes at most 2.2 h, and vLLM" in line


def test_without_a_gpu_only_tokens_are_said():
    line = evaluation_line([AIME, Load(5, 5, 10)], 4, Transformers(model="m"), QWEN_4B, None)
    assert line == "evaluation: 1,925 answers in 4 evaluations, at most 157,286,450 tokens"
    assert evaluation_line([AIME], 1, Vllm(model="m"), QWEN_4B, H200).endswith("at most 2.2 h with vLLM, assumed")

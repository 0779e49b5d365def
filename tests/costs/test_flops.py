"""FLOPs of training, against those that torch counts, and the peaks of GPUs."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.costs.models import FULL, LORA, QWEN3_4B, SHAPE_4B, SMALL, save_model
from tests.rows import loss_sum
from torch.utils.flop_counter import FlopCounterMode

from dasd_lite.costs.flops import training_flops
from dasd_lite.costs.hardware import assumed_mfu, peak_flops
from dasd_lite.costs.shape import read_shape, shape_of
from dasd_lite.training import trainable


def counted_flops(model, num_tokens):
    """What torch counts in a forward and backward pass over a document, without attention."""
    ids = np.zeros(num_tokens, dtype=np.int64)

    def added(total, one, other, **options):  # how adapters add; torch leaves it out
        return 2 * one[0] * one[1] * other[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
        loss_sum(model, ids, np.ones(num_tokens, bool), [num_tokens]).backward()
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))


def test_flops_are_those_that_torch_counts(tmp_path):
    shape, num_tokens = read_shape(save_model(tmp_path)), 64
    attention = 6 * shape.num_layers * shape.q_size * num_tokens**2  # 3 passes, 2 products, 2 each, half of the pairs
    full = trainable.load_trainable(tmp_path, FULL, device="cpu")
    ours = training_flops(shape, [num_tokens], FULL, num_targets=num_tokens - 1) - attention
    assert ours == counted_flops(full, num_tokens)
    adapted = trainable.load_trainable(tmp_path, LORA, device="cpu")
    ours = training_flops(shape, [num_tokens], LORA, num_targets=num_tokens - 1) - attention
    assert ours == pytest.approx(counted_flops(adapted, num_tokens), rel=0.03)  # nothing needs the embedding's gradient


def test_documents_that_do_not_see_each_other_are_less_work():
    one, four = (training_flops(SHAPE_4B, lengths, FULL) for lengths in ([4096], [1024] * 4))
    assert one - four == 6 * 36 * 4096 * (4096**2 - 4 * 1024**2)
    windowed = shape_of(QWEN3_4B | {"model_type": "mistral", "sliding_window": 1024})
    assert training_flops(windowed, [1024], FULL) == pytest.approx(four / 4)
    assert four < training_flops(windowed, [4096], FULL) < one


def test_of_adapted_experts_those_count_that_a_token_visits():
    options = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    shape = shape_of(SMALL | options | {"model_type": "qwen3_moe"})
    frozen, adapted = LORA, LORA.model_copy(update={"experts": "adapted"})
    more = training_flops(shape, [64], adapted) - training_flops(shape, [64], frozen)
    assert more == 6 * 64 * LORA.rank * 4 * 2 * ((256 + 2 * 96) + (96 + 256))  # tokens, rank, layers, experts, widths


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L20", 119.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3060 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA T400 4GB", None),
        ("some GPU", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(name, peak):
    assert peak_flops(name) == peak


def test_the_assumed_share_of_the_peak_is_that_of_the_generation():
    names = ("NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA B200", "Tesla T4", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S")
    assert [assumed_mfu(name) for name in names] == [0.35, 0.35, 0.35, 0.2, 0.4, 0.4]

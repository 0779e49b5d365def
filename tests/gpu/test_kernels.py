"""Attention and the loss in 16 bits against float32: on a GPU where there is one, and the same code on a CPU."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dasd_lite.model.attention import Documents
from dasd_lite.model.head_loss import head_loss

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
)
LENGTHS = [40, 7, 90]


def attention_gap(device, heads, kv_heads, width, dtype):
    """Largest error of packed attention and its gradients, as a share of their norm, against each document alone."""
    from dasd_lite.model.attention import _packed_attention

    generator = torch.Generator().manual_seed(0)
    shapes = [(1, number, sum(LENGTHS), width) for number in (heads, kv_heads, kv_heads)]
    given = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    module = torch.nn.Identity()
    packed = _packed_attention(module, *given, None, scaling=width**-0.5, documents=Documents.of(LENGTHS, device))[0]
    exact = [x.detach().float().requires_grad_() for x in given]
    parts = []
    for q, k, v in zip(*(x.split(LENGTHS, dim=2) for x in exact), strict=True):
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))
    alone = torch.cat(parts, dim=1)
    seed = torch.randn(alone.shape, generator=generator).to(device)
    pairs = [(packed, alone)]
    pairs += zip(
        torch.autograd.grad(packed, given, seed.to(dtype)), torch.autograd.grad(alone, exact, seed), strict=True
    )
    return max(((one.float() - other).norm() / other.norm()).item() for one, other in pairs)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(4, 2, 64), (4, 4, 128), (2, 1, 12), (2, 2, 320)],  # kernels take multiples of 8 up to 256; SDPA the others
)
def test_packed_attention_is_that_of_each_document_alone(device, heads, kv_heads, width):
    if device == "cuda":
        assert attention_gap(device, heads, kv_heads, width, torch.float16) < 0.02
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return
    assert attention_gap(device, heads, kv_heads, width, torch.bfloat16) < 0.02


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_one_pass_loss_has_the_gradients_of_float32(device):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 64, generator=generator).to(device)
    head = torch.nn.Linear(64, 500, bias=False)
    head.weight.data = torch.randn(500, 64, generator=generator) / 8
    head.to(device)
    ids = torch.from_numpy(np.random.default_rng(0).integers(500, size=256)).to(device)
    exact = hidden.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(head(exact), ids, reduction="sum")
    wanted = torch.autograd.grad(loss, [exact, head.weight])
    given = hidden.clone().requires_grad_()
    with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
        ours = head_loss(given, head, ids, torch.ones(256, device=device), 16).sum()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-2)
    for one, other in zip(torch.autograd.grad(ours, [given, head.weight]), wanted, strict=True):
        assert ((one - other).norm() / other.norm()).item() < 0.01

"""Which kernel computes attention on a GPU, and windows where there is none. The kernels are stubs: this is a CPU."""

import sys
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dasd_lite.model import attention, kernels
from dasd_lite.model.kernels import HeadSizes, pick_kernel

F = torch.nn.functional
CPU = torch.device("cpu")
HEADS = HeadSizes(4, 2, 32, 32, 32)


def reference(q, k, v, edges, longest, scale, window):
    """What a right kernel computes, document by document."""
    parts = []
    sizes = edges.diff().tolist()
    for each in zip(*(x.split(sizes) for x in (q, k, v)), strict=True):
        mask = torch.ones(len(each[0]), len(each[0]), dtype=torch.bool).tril()
        mask = mask if window is None else mask.triu(1 - window)
        turned = (x.transpose(0, 1) for x in each)
        parts.append(F.scaled_dot_product_attention(*turned, attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat([part.transpose(0, 1) for part in parts])


def leaking(q, k, v, edges, longest, scale, window):
    return reference(q, k, v, edges[[0, 2]], longest, scale, window)


class Gpu:
    """A GPU with packages: `pick` says which kernel it gets, `works` what each of them does there."""

    def __init__(self, monkeypatch):
        self.active, self.works, self.capability, self.calls = None, {}, (9, 0), []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", self.activate)
        monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: self.activate(None))
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", self.varlen_attn)
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: self.active)
        package = ModuleType("flash_attn")
        package.flash_attn_varlen_func = self.flash_attn
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        # A device of type "cuda" whose tensors are on the CPU.
        self.device = type("Device", (), {"type": "cuda", "__hash__": lambda self: 0})()
        is_right = kernels._is_right
        monkeypatch.setattr(kernels, "_is_right", lambda kernel, device, *rest: is_right(kernel, CPU, *rest))

    def activate(self, name):
        if name is not None and name not in self.works:
            raise ModuleNotFoundError("No module named 'flash_attn_interface'")
        self.active = name

    def varlen_attn(self, q, k, v, edges, _, longest, __, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        return self.compute(self.active or "torch", q, k, v, edges, longest, scale, window_size)

    def flash_attn(self, q, k, v, edges, _, longest, __, *, softmax_scale, causal, window_size):
        assert causal
        return self.compute("flash_attn", q, k, v, edges, longest, softmax_scale, window_size)

    def compute(self, name, q, k, v, edges, longest, scale, spans):
        self.calls.append(name)
        assert q.dtype == torch.bfloat16 and edges.dtype == torch.int32
        window = None if spans[0] == -1 else spans[0] + 1
        return self.works[name](q, k, v, edges, longest, scale, window)

    def pick(self, heads=HEADS, dtype=torch.bfloat16):
        forget()
        kernel = pick_kernel(self.device, dtype, heads)
        return kernel and kernel.name


def forget():
    kernels.pick_kernel.cache_clear()
    kernels._in_use.clear()


@pytest.fixture
def gpu(monkeypatch):
    yield Gpu(monkeypatch)
    forget()


def broken(*arguments):
    raise RuntimeError("no kernel image is available for execution on the device")


def test_the_newest_kernel_that_is_right_is_taken_and_named_once(gpu, capsys):
    gpu.works = {"FA3": reference, "FA4": reference, "torch": reference, "flash_attn": reference}
    assert gpu.pick() == "flash attention 3" and gpu.active == "FA3"
    gpu.capability = (10, 0)
    assert gpu.pick() == "flash attention 4" and gpu.active == "FA4"
    gpu.capability = (8, 6)
    gpu.active = None
    assert gpu.pick() == "torch's flash attention 2" and gpu.active is None
    assert capsys.readouterr().err.count("attention over packed documents") == 3
    assert pick_kernel(gpu.device, torch.bfloat16, HEADS).name == "torch's flash attention 2"
    assert not capsys.readouterr().err


def test_heads_of_another_size_do_not_change_the_kernel_of_the_first(gpu):
    gpu.works = {"FA3": lambda q, *rest: broken() if q.shape[2] == 64 else reference(q, *rest), "torch": reference}
    gpu.works |= {"FA4": reference, "flash_attn": reference}
    assert gpu.pick() == "flash attention 3"
    other = pick_kernel(gpu.device, torch.bfloat16, HeadSizes(4, 2, 64, 64, 64))
    assert other.name == "flash-attn's flash attention 2" and gpu.active == "FA3"
    assert pick_kernel(gpu.device, torch.bfloat16, HeadSizes(8, 2, 32, 32, 32)).name == "flash attention 3"
    assert kernels.kernels_in_use() == "flash attention 3, flash-attn's flash attention 2"


@pytest.mark.parametrize("fault", [broken, leaking, lambda q, *rest: q * float("nan")])
def test_a_kernel_that_fails_or_is_wrong_is_passed_over(gpu, fault):
    gpu.works = {"FA3": fault, "FA4": reference, "torch": reference, "flash_attn": reference}
    assert gpu.pick() == "flash attention 4" and gpu.active == "FA4"
    gpu.works |= {"FA4": fault}
    assert gpu.pick() == "torch's flash attention 2" and gpu.active is None
    gpu.works |= {"torch": fault}
    assert gpu.pick() == "flash-attn's flash attention 2"
    gpu.works |= {"flash_attn": fault}
    assert gpu.pick() is None
    assert list(dict.fromkeys(gpu.calls)) == ["FA3", "FA4", "torch", "flash_attn"]


def test_a_kernel_with_wrong_gradients_is_passed_over(gpu):
    def stopped(q, k, v, *rest):
        return reference(q, k.detach() + 0 * k, v, *rest)

    gpu.works = {"torch": stopped, "flash_attn": reference}
    assert gpu.pick() == "flash-attn's flash attention 2"


def test_without_the_switch_or_with_another_gpu_torch_brings_its_own(gpu, monkeypatch):
    gpu.works = {"torch": reference}
    assert gpu.pick() == "torch's flash attention 2"  # neither package is installed
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    assert gpu.pick() == "torch's flash attention 2"


def test_what_no_kernel_takes_is_not_even_tried(gpu):
    gpu.works = {"FA3": reference, "torch": reference}
    for heads in (
        HeadSizes(4, 2, 192, 192, 128),  # DeepSeek
        HeadSizes(4, 2, 512, 512, 512),
        HeadSizes(4, 2, 36, 36, 36),
    ):
        assert gpu.pick(heads) is None
    assert gpu.pick(dtype=torch.float32) is None
    gpu.capability = (7, 5)  # a T4
    assert gpu.pick(dtype=torch.float16) is None
    assert pick_kernel(CPU, torch.bfloat16, HEADS) is None
    assert not gpu.calls


def test_the_trial_runs_in_inference_mode_and_under_autocast(gpu):
    gpu.works = {"torch": reference}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert gpu.pick() == "torch's flash attention 2"


@pytest.mark.parametrize("length", [17, 32, 33, 100])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_window_in_blocks_equals_a_mask_over_all(length, kv_heads):
    torch.manual_seed(0)
    window = 16
    inputs = [torch.randn(3, heads, length, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
    wanted = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3, enable_gqa=True)
    found = attention._windowed(*inputs, window, 0.3, 0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    given = torch.randn_like(wanted)
    gradients = (torch.autograd.grad(out, inputs, given) for out in (found, wanted))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_window_in_blocks_makes_nothing_of_the_size_of_the_row_squared():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    inputs = [torch.randn(1, 2, 2048, 8) for _ in range(3)]
    with Largest() as largest:
        attention._windowed(*inputs, 64, None, 0.0)
    assert largest.numel <= 4 * inputs[0].numel()

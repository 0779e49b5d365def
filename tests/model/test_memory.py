"""Which errors mean that memory ran out, and that what is free is given back."""

import pytest
import torch

from dasd_lite.model.memory import free_gpu, is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: tried 9 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("the budget is out of memory"), False),
    ],
)
def test_out_of_memory_has_many_names(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch has no AcceleratorError")
def test_an_accelerator_error_is_told_by_its_text():
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory", 2))
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: device-side assert triggered", 710))


def test_free_gpu_gives_device_and_pinned_memory_back(monkeypatch):
    freed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("device"))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: freed.append("pinned"), raising=False)
    free_gpu()
    assert freed == ["device", "pinned"]

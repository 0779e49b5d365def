"""Out-of-memory errors under all of their names, and giving memory back.

Input: an exception; output: whether it means that memory ran out. Invariant: `free_gpu` frees what nothing refers to
any more, so another process or engine can take it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_WORDS = (
    "out of memory",  # "CUDA error: out of memory", "CUDA out of memory", "HIP out of memory"
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cusparse_status_alloc_failed",
    "can't allocate memory",  # torch's allocator on a CPU
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means that memory, of a GPU or of the host, ran out.

    torch.OutOfMemoryError is raised by torch's own allocator alone. What a library or the driver allocates itself
    fails with a RuntimeError or a torch.AcceleratorError, which only its text tells from others.
    """
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _WORDS)


def free_gpu_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process can still take on a device; None if it is not a CUDA GPU."""
    import torch

    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def free_gpu() -> None:
    """Give back the GPU memory and the pinned host memory that nothing refers to any more."""
    import gc

    import torch

    if not torch.cuda.is_available():
        return  # a collection takes 0.2 s, and what is not part of a cycle is freed without it
    gc.collect()
    torch.cuda.empty_cache()
    if empty_host := getattr(torch._C, "_host_emptyCache", None):  # pinned blocks; private, and not in every build
        empty_host()

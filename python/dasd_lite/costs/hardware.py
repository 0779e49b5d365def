"""The hardware that training runs on: GPUs, their memory, and their peak speed."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
from dataclasses import dataclass

from dasd_lite.config.engine import has_gpu_driver

# Dense peak in 16 bits with float32 accumulation, in 10^12 FLOP/s, from the vendors' data sheets (half of the figure
# where only the one with 2:4 sparsity is printed; GeForce: the row "FP16 with FP32 accumulate" of the architecture
# whitepapers). The first pattern found in the device's name counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"B200", 2250),
    (r"GB200", 2500),
    (r"H200 NVL", 835),
    (r"H200|GH200", 989),
    (r"H100 PCIe|H800 PCIe", 756),
    (r"H100 NVL", 835),
    (r"H100|H800", 989),
    (r"H20\b", 148),
    (r"A100|A800", 312),
    (r"A10G", 70),
    (r"A10\b", 125),
    (r"A30\b", 165),
    (r"A40\b", 150),
    (r"RTX A6000", 155),
    (r"RTX 6000 Ada", 364),
    (r"L40S", 362),
    (r"L40\b", 181),
    (r"L20\b", 119.5),
    (r"L4\b", 121),
    (r"V100-PCIE", 112),
    (r"V100", 125),
    (r"T4\b", 65),
    (r"RTX 5090\b", 209),
    (r"RTX 4090\b", 165),
    (r"RTX 4080\b", 97),
    (r"RTX 3090\b", 71),
    (r"RTX 3080\b", 60),
    (r"RTX 3060\b", 25),
    (r"MI300X", 1307),
)

_VARIANT = re.compile(r"\bMIG\b|Laptop|Max-Q| D\b| Ti\b| SUPER\b")  # part of a GPU, or another chip of a similar name

# Shares of the peak that training is assumed to reach, from the table of benchmarks/roofline.py with Liger's kernels,
# between the one for flash-attention 2 and 3, and rounded down; not measured. Hopper's products are faster than what
# feeds them, a T4 has no flash-attention.
_ASSUMED_MFU: tuple[tuple[str, float], ...] = ((r"G?[BH]\d+", 0.35), (r"T4\b|V100", 0.2))
_USUAL_MFU = 0.4

GPU_SIZES = (8, 12, 15.6, 24, 48, 80, 141)
"""Memory of common GPUs as torch reports it, or less, in GB of 10⁹ bytes; 15.6 is a T4's, sold as 16 GB."""


def peak_flops(device_name: str) -> float | None:
    """Return a GPU's dense 16-bit peak in FLOP/s, by the name that torch gives it; None if it is not known."""
    if _VARIANT.search(device_name):
        return None
    return next((peak * 1e12 for pattern, peak in _PEAKS if re.search(rf"\b(?:{pattern})", device_name)), None)


def assumed_mfu(device_name: str) -> float:
    """Return the share of a GPU's peak that training is assumed to reach; an assumption, not a measurement."""
    return next((mfu for pattern, mfu in _ASSUMED_MFU if re.search(rf"\b(?:{pattern})", device_name)), _USUAL_MFU)


@dataclass(frozen=True)
class Hardware:
    """What the GPU and the installed packages decide about which tensors exist."""

    element_bytes: int = 2
    """Of the format that dtype = "auto" stands for: 2 on a GPU, 4 on a CPU."""
    is_float16: bool = False
    """Whether that format is float16, as before Ampere."""
    varlen: bool = True
    """Whether attention has a kernel for documents of any length (Ampere or later); else they are laid side by side."""
    liger: bool = False
    """Whether liger-kernel is installed."""
    on_gpu: bool = True
    memory: float | None = None
    """Bytes of the GPU; None: which one it is, is not known."""
    free: float | None = None
    """Bytes of it that are free before training."""


@dataclass(frozen=True)
class Gpu:
    """The visible GPUs, as the one with the least memory."""

    name: str
    memory: int
    """Bytes."""
    number: int
    """How many train."""
    hardware: Hardware
    free: int | None = None
    """Bytes that no other process holds; None: all of it."""
    names: tuple[str, ...] = ()
    """Names of all that train, each once."""

    @property
    def usable(self) -> int:
        """Bytes that training can take."""
        return self.memory if self.free is None else self.free


def visible_gpu() -> Gpu | None:
    """Ask torch for the GPUs that train; None if there are none, or torch is not installed."""
    if importlib.util.find_spec("torch") is None or not has_gpu_driver():  # asking torch takes 3 s
        return None
    import torch

    from dasd_lite.costs.cards import usable_gpus, visible_gpus

    if not torch.cuda.is_available():
        return None
    usable = set(usable_gpus())
    indices = [index for index, name in enumerate(visible_gpus()) if name in usable]
    known = [torch.cuda.get_device_properties(index) for index in indices]
    free = _free_bytes()
    room = [min(p.total_memory, free.get(str(getattr(p, "uuid", "")), p.total_memory)) for p in known]
    smallest = min(range(len(known)), key=lambda i: room[i])
    properties = known[smallest]
    is_old = any((p.major, p.minor) < (8, 0) for p in known)
    hardware = Hardware(
        is_float16=is_old,
        varlen=not is_old and has_varlen_kernel(),
        liger=has_liger(),
        memory=properties.total_memory,
        free=room[smallest],
    )
    names = tuple(dict.fromkeys(p.name for p in known))
    return Gpu(properties.name, properties.total_memory, len(known), hardware, room[smallest], names)


def _free_bytes() -> dict[str, int]:
    """Return the free memory of GPUs by their UUIDs, as the driver's program says; torch would make a CUDA context."""
    command = ["nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # it is not installed, or cannot reach the driver
        return {}
    pairs = (line.rpartition(",") for line in done.stdout.splitlines())
    return {uuid.strip().removeprefix("GPU-"): int(mib) << 20 for uuid, _, mib in pairs if mib.strip().isdecimal()}


def has_varlen_kernel() -> bool:
    """Return whether a kernel for documents of any length is installed: flash-attn's, or torch's from 2.11 on."""
    if importlib.util.find_spec("flash_attn") is not None:
        return True
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


def has_liger(model_type: str | None = None) -> bool:
    """Return whether liger-kernel is installed and, if a model's type is given, knows it."""
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    if model_type is None:
        return True
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN

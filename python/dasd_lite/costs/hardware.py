"""The hardware that training runs on: GPUs, their memory, and their peak speed."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

# Dense peak in 16 bits with float32 accumulation, in 10^12 FLOP/s, from the vendors' data sheets (half of the figure
# where only the one with 2:4 sparsity is printed; GeForce: the row "FP16 with FP32 accumulate" of the architecture
# whitepapers). The first pattern found in the device's name counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"B200", 2250),
    (r"H200|GH200", 989),
    (r"H100 PCIe", 756),
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

GPU_SIZES = (8, 12, 16, 24, 48, 80, 141)
"""Memory of common GPUs, in GB of 10⁹ bytes."""

_DRIVERS = ("nvidiactl", "dxg", "nvmap", "kfd")  # CUDA, in Windows, on a Jetson, ROCm: asking torch takes 3 s


def peak_flops(device_name: str) -> float | None:
    """Return a GPU's dense 16-bit peak in FLOP/s, by the name that torch gives it; None if it is not known."""
    if _VARIANT.search(device_name):
        return None
    return next((peak * 1e12 for pattern, peak in _PEAKS if re.search(rf"\b(?:{pattern})", device_name)), None)


@dataclass(frozen=True)
class Hardware:
    """What the GPU and the installed packages decide about which tensors exist."""

    element_bytes: int = 2
    """Of the format that dtype = "auto" stands for: 2 on a GPU, 4 on a CPU."""
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
    """How many are visible."""
    hardware: Hardware


def visible_gpu() -> Gpu | None:
    """Ask torch for the GPUs; None if there are none, or torch is not installed."""
    on_linux = Path("/dev").is_dir()
    if importlib.util.find_spec("torch") is None or (on_linux and not any(Path("/dev", d).exists() for d in _DRIVERS)):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    number = torch.cuda.device_count()
    smallest = min(range(number), key=lambda i: torch.cuda.get_device_properties(i).total_memory)
    properties = torch.cuda.get_device_properties(smallest)
    hardware = Hardware(varlen=(properties.major, properties.minor) >= (8, 0), liger=has_liger())
    return Gpu(properties.name, properties.total_memory, number, hardware)


def has_liger() -> bool:
    """Return whether liger-kernel is installed."""
    return importlib.util.find_spec("liger_kernel") is not None

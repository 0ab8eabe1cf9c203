"""What the machine itself can do: bytes from memory and disk, products per second."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np

from benchmarks.harness import in_turn


def memory_rate() -> float:
    """Return bytes per second of one thread that reads an array larger than every cache."""
    words = np.ones(1 << 25, dtype=np.int64)  # 256 MB
    return words.nbytes / in_turn({"read": words.sum}, 5)["read"]


def read_file(path: Path) -> None:
    """Read a file from its first byte to its last, and do nothing with it."""
    buffer = bytearray(1 << 22)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def drop_cached(path: Path) -> None:
    """Ask the system to forget a file's pages, so that the next read comes from the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def product_rate(m: int, n: int, k: int, dtype: str = "float64") -> float:
    """Return floating-point operations per second of an ``(m, k)·(k, n)`` product."""
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k), (k, n)))
    return 2 * m * n * k / in_turn({"product": lambda: left @ right}, 5)["product"]


def machine() -> str:
    """Return one line that describes the machine and the libraries."""
    import scipy
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    cores = len(os.sched_getaffinity(0))
    cards = {torch.cuda.get_device_name(i): None for i in range(torch.cuda.device_count())}
    gpus = f", {torch.cuda.device_count()} × {', '.join(cards)}" if cards else ""
    return (
        f"{model}, {cores} cores{gpus}; {platform.system()}, Python {platform.python_version()}, "
        f"numpy {np.__version__}, scipy {scipy.__version__}, torch {torch.__version__}"
    )

"""Time what users would write by hand against the package, side by side in one process.

Every row runs its sides in turn and prints the median ratio, with the difference of the results
beside it: a fast wrong number is no gain. BLAS is held to one thread.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from lora_analysis import LowRankUpdate, singular_values, subspace_similarity
from lora_analysis.spectra import spectrum

Side = Callable[[], np.ndarray]


def timed(side: Callable[[], object]) -> tuple[float, object]:
    """Return seconds and result of one call."""
    start = time.perf_counter()
    result = side()
    return time.perf_counter() - start, result


def compare(name: str, naive: Side, ours: Side, rounds: int) -> None:
    """Print the median ratio naive/ours, and the largest relative difference."""
    ratios, difference = [], 0.0
    for _ in range(rounds):
        slow, expected = timed(naive)
        fast, found = timed(ours)
        ratios.append(slow / fast)
        difference = float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
    print(f"{name:<58} {statistics.median(ratios):>9.1f} x   {difference:.0e}")


def update(rng: np.random.Generator, d: int, rank: int) -> LowRankUpdate:
    """Return a random d × d update."""
    return LowRankUpdate(
        name="m", A=rng.standard_normal((rank, d)), B=rng.standard_normal((d, rank)), scale=1.0
    )


def dense_values(one: LowRankUpdate) -> np.ndarray:
    """Return the singular values by forming ΔW."""
    return np.linalg.svd(one.delta_weight(), compute_uv=False)[: one.rank]


def looped_grid(U: np.ndarray, V: np.ndarray) -> np.ndarray:
    """Return φ cell by cell."""
    grid = np.empty((U.shape[1], V.shape[1]))
    for i in range(1, U.shape[1] + 1):
        for j in range(1, V.shape[1] + 1):
            grid[i - 1, j - 1] = np.linalg.norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j)
    return grid


def process(code: str) -> float:
    """Return the seconds a fresh interpreter takes for a line of code."""
    return timed(lambda: subprocess.run([sys.executable, "-c", code], check=True))[0]


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    print(f"{'what':<58} {'ratio':>9}     difference")
    with threadpool_limits(1):
        for d, rank in ((1024, 16), (1024, 64)):
            one = update(rng, d, rank)
            compare(
                f"singular values, {d} x {d}, r = {rank}, against dense SVD",
                lambda one=one: dense_values(one),
                lambda one=one: singular_values(one),
                3,
            )
        for low, high in ((8, 64), (64, 64)):
            a, b = (spectrum(update(rng, 4096, r)) for r in (low, high))
            compare(
                f"φ grid {low} x {high}, d = 4096, against the double loop",
                lambda a=a, b=b: looped_grid(a.vectors("input"), b.vectors("input")),
                lambda a=a, b=b: subspace_similarity(a, b).values,
                3,
            )
    numpy = statistics.median(process("import numpy") for _ in range(5))
    package = statistics.median(process("import lora_analysis.formats") for _ in range(5))
    torch = statistics.median(process("import torch") for _ in range(3))
    print(f"importing the readers: {package / numpy:.1f} x numpy; torch: {torch / numpy:.1f} x")


if __name__ == "__main__":
    main()

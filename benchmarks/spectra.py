"""Spectra from the factors: against dense SVDs of the product, and how accurate they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import mpmath
import numpy as np
from safetensors.numpy import load_file

from benchmarks import peers
from benchmarks.harness import Row, in_turn, repeated
from benchmarks.synthetic import lokr_file, update
from lora_analysis import LowRankUpdate, read_adapter, singular_values, spectrum

SHAPE = (4096, 4096)


def rows(rounds: int, folder: Path) -> Iterator[Row]:
    """Yield the rows about spectra."""
    rng = np.random.default_rng(0)
    for rank, target in ((16, "≥ 5,000"), (64, "≥ 800")):
        one = update(rng, SHAPE, rank)
        delta = one.delta_weight()
        model = peers.peft_model(one)
        ours = in_turn({"both": repeated(lambda one=one: spectrum(one), 20)}, rounds)["both"] / 20
        values = in_turn(
            {
                "values": repeated(lambda one=one: singular_values(one), 20),
                "vectors": repeated(lambda one=one: spectrum(one), 20),
            },
            rounds,
        )
        heavy = in_turn(
            {
                "dense": lambda delta=delta: np.linalg.svd(delta, full_matrices=False),
                "convert": lambda model=model, rank=rank: peers.convert(model, rank),
                "merge": lambda model=model, rank=rank: peers.merge(model, rank),
            },
            1,
            warm=False,
        )
        exact = np.linalg.svd(delta, compute_uv=False)[:rank]
        error = f"{np.max(np.abs(spectrum(one).S / exact - 1)):.0e} from the dense values"
        what = f"spectrum of a 4096 × 4096 module, r = {rank}"
        yield Row(what, "dense float64 SVD of ΔW", heavy["dense"] / ours, target, error)
        yield Row(what, "PEFT's convert_to_lora of the layer", heavy["convert"] / ours, "≥ 1,000")
        yield Row(what, "PEFT's merging by SVD", heavy["merge"] / ours, "≥ 1,000")
        yield Row(
            f"values only, r = {rank}",
            "with vectors",
            values["values"] / values["vectors"],
            "≤ 0.5",
        )
    yield from lokr(rounds, folder)
    yield from accuracy()


def lokr(rounds: int, folder: Path) -> Iterator[Row]:
    """Yield the row about LoKr, whose spectrum comes from its Kronecker parts."""
    path = lokr_file(folder / "lokr.safetensors")
    (update,) = read_adapter(path).values()
    took = in_turn({"ours": lambda: spectrum(update)}, rounds, clock=time.process_time)["ours"]
    ours, tensors = spectrum(update), load_file(path)
    parts = {key.rpartition("_w")[2]: value.astype(np.float64) for key, value in tensors.items()}
    exact = update.known_scale() * np.kron(parts["1"], parts["2_a"] @ parts["2_b"])
    error = np.max(np.abs((ours.U * ours.S) @ ours.V.T - exact)) / np.max(np.abs(exact))
    yield Row(
        "spectrum of a 4096 × 4096 LoKr, rank 512, with vectors", "0.3 CPU-s", took / 0.3, "≤ 1",
        f"{error:.0e} from np.kron", f"{took:.3f} CPU-s",
    )  # fmt: skip


def graded(rng: np.random.Generator, condition: float) -> LowRankUpdate:
    """Return a 96 × 80 update of rank 8 whose factors both have the given condition."""
    scale = np.geomspace(1, 1 / condition, 8)
    turn = [np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(2)]
    b = np.linalg.qr(rng.standard_normal((96, 8)))[0] * scale @ turn[0]
    a = turn[1] @ (scale[:, None] * np.linalg.qr(rng.standard_normal((80, 8)))[0].T)
    return LowRankUpdate(name="m", A=a, B=b, scale=1.0)


def exact_values(one: LowRankUpdate) -> np.ndarray:
    """Return the singular values of B·A in sixty digits, from the factors' Gram matrices."""
    with mpmath.workdps(60):
        b, a = mpmath.matrix(one.B.tolist()), mpmath.matrix(one.A.tolist())
        core = mpmath.cholesky(b.T * b).T * mpmath.cholesky(a * a.T)
        return np.array([float(value) for value in mpmath.svd_r(core, compute_uv=False)])


def accuracy() -> Iterator[Row]:
    """Yield the errors of σ, over condition numbers of the factors, next to the dense route's."""
    for condition in (1e2, 1e4, 1e6):
        ours, dense = [], []
        for seed in range(5):
            one = graded(np.random.default_rng(seed), condition)
            exact = exact_values(one)
            naive = np.linalg.svd(one.delta_weight(), compute_uv=False)[:8]
            ours.append(np.max(np.abs(singular_values(one) / exact - 1)))
            dense.append(np.max(np.abs(naive / exact - 1)))
        yield Row(
            f"relative error of σ, factors of condition {condition:.0e}",
            "dense float64 SVD's error",
            float(np.max(ours) / np.max(dense)),
            "≤ 1" if condition >= 1e6 else "",
            f"{np.max(ours):.0e} (dense {np.max(dense):.0e})",
        )

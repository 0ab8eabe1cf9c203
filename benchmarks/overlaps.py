"""φ for all (i, j) and for all pairs of adapters, against loops and against bare products."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import combinations

import numpy as np

from benchmarks.harness import Row, in_turn, repeated
from benchmarks.synthetic import update
from lora_analysis import spectrum, subspace_similarity
from lora_analysis.execution import in_threads
from lora_analysis.pairwise import module_pairs
from lora_analysis.spectra import Spectrum
from lora_analysis.studies.pair_products import module_products

D = 4096


def looped_grid(U: np.ndarray, V: np.ndarray) -> np.ndarray:
    """Return φ cell by cell, as the formula reads."""
    grid = np.empty((U.shape[1], V.shape[1]))
    for i in range(1, U.shape[1] + 1):
        for j in range(1, V.shape[1] + 1):
            grid[i - 1, j - 1] = np.linalg.norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j)
    return grid


def svd_of_a_cell(one: np.ndarray, two: np.ndarray, cells: int) -> np.ndarray:
    """Do what one cell costs where ΔW is decomposed anew for each: two dense SVDs, once."""
    u, v = (np.linalg.svd(delta, full_matrices=False)[2].T for delta in (one, two))
    return looped_grid(u[:, :cells], v[:, :cells])


def rows(rounds: int) -> Iterator[Row]:
    """Yield the rows about φ."""
    rng = np.random.default_rng(0)
    for low, high, target in ((8, 64, "≥ 100"), (64, 64, "≥ 1,000")):
        a, b = (spectrum(update(rng, (D, D), rank)) for rank in (low, high))
        U, V = a.vectors("input"), b.vectors("input")
        ours = in_turn({"ours": repeated(lambda a=a, b=b: subspace_similarity(a, b), 50)}, rounds)
        loop = in_turn({"loop": lambda U=U, V=V: looped_grid(U, V)}, min(rounds, 3), warm=False)
        difference = np.max(np.abs(subspace_similarity(a, b).values - looped_grid(U, V)))
        yield Row(
            f"φ grid {low} × {high}, d = {D}",
            "a product per cell",
            loop["loop"] / (ours["ours"] / 50),
            target,
            f"{difference:.0e}",
        )
    one, two = (update(rng, (1024, 1024), 64) for _ in range(2))
    deltas = one.delta_weight(), two.delta_weight()
    a, b = spectrum(one), spectrum(two)
    ours = in_turn({"ours": repeated(lambda: subspace_similarity(a, b), 50)}, rounds)["ours"] / 50
    cell = in_turn({"cell": lambda: svd_of_a_cell(*deltas, 1)}, 2)["cell"]
    yield Row(
        "φ grid 64 × 64, d = 1024", "two dense SVDs per cell (one cell timed, × 4,096)",
        4096 * cell / ours, "≥ 100,000",
    )  # fmt: skip
    for rank, target, times in ((64, "≤ 1.7", 50), (256, "≤ 1.3", 5)):
        a, b = (spectrum(update(rng, (D, D), rank)) for _ in range(2))
        U, V = a.vectors("input"), b.vectors("input")
        took = in_turn(
            {
                "ours": repeated(lambda a=a, b=b: subspace_similarity(a, b), times),
                "product": repeated(lambda U=U, V=V: U.T @ V, times),
            },
            rounds,
        )
        yield Row(
            f"φ grid {rank} × {rank}, d = {D}", "its own matrix product",
            took["ours"] / took["product"], target,
        )  # fmt: skip


def looped_pairs(spectra: list[Spectrum]) -> list[tuple[float, ...]]:
    """Return φ(r, r), ω and the signed cosine of every pair, from bases made once."""
    found = []
    for a, b in combinations(spectra, 2):
        left, right = a.U.T @ b.U, a.V.T @ b.V
        s, t = a.S**2, b.S**2
        scale = np.linalg.norm(s) * np.linalg.norm(t)
        cosine = a.S @ (left * right) @ b.S / (a.norm * b.norm)
        sides = [(np.sum(g**2) / min(g.shape), s @ g**2 @ t / scale) for g in (left, right)]
        found.append((*sides[0], *sides[1], cosine))
    return found


def halved_products(bases: list[list[np.ndarray]]) -> None:
    """Multiply every basis with itself, of which BLAS computes half."""
    for one, _ in bases:
        _ = one.T @ one


def many(rounds: int) -> Iterator[Row]:
    """Yield the rows about all pairs of 100 adapters in one module."""
    for rank, share in ((8, None), (16, 0.5), (64, 0.7)):
        rng = np.random.default_rng(rank)
        spectra = [spectrum(update(rng, (D, D), rank)) for _ in range(100)]
        # Two arrays a side: numpy would see through X.T @ X and compute half of it.
        bases = [
            [np.hstack([getattr(one, side) for one in spectra]) for _ in "ab"] for side in "UV"
        ]
        took = in_turn(
            {
                "ours": lambda spectra=spectra: module_pairs(spectra),
                "products": lambda bases=bases: [one.T @ two for one, two in bases],
            },
            min(rounds, 3),
        )
        if rank == 8:  # two modules a side: the package spreads modules over workers
            pair = in_turn(
                {
                    "ours": lambda spectra=spectra: list(
                        in_threads(module_pairs, [spectra, spectra], workers=2)
                    ),
                    "products": lambda bases=bases: list(
                        in_threads(halved_products, [bases, bases], workers=2)
                    ),
                    "loop": lambda spectra=spectra: [looped_pairs(spectra) for _ in "ab"],
                },
                min(rounds, 3),
            )
            what = f"100 adapters, all pairs, r = {rank}, two workers"
            yield Row(
                what, "a loop over cached bases",
                pair["loop"] / pair["ours"], "≥ 5",
                note=f"its products alone would be {pair['loop'] / pair['products']:.1f} ×",
            )  # fmt: skip
            yield Row(
                what, "its own products, computed by half", pair["ours"] / pair["products"], "≤ 1.3"
            )
            updates = [update(rng, (D, D), rank) for _ in range(100)]
            factored = in_turn(
                {
                    "ours": lambda updates=updates: module_pairs(
                        module_products(updates, vectors=False)
                    ),
                    "products": lambda bases=bases: halved_products(bases),
                },
                min(rounds, 3),
                clock=time.process_time,
            )
            yield Row(
                f"the same from the factors, r = {rank}, spectra included",
                "products of cached bases, computed by half",
                factored["ours"] / factored["products"], "≤ 1.3",
            )  # fmt: skip
        if share:
            yield Row(
                f"100 adapters, all pairs, r = {rank}", "share of the machine's product rate",
                took["products"] / took["ours"], f"≥ {share}",
            )  # fmt: skip

"""ΔW against W: amplification in one pass, W's own directions, intruder dimensions."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import peers
from benchmarks.floors import drop_cached, memory_rate, read_file
from benchmarks.harness import Call, Row, in_turn
from benchmarks.synthetic import LLAMA_8B, base_file, flat_weight, update
from lora_analysis import amplification, open_base, spectrum
from lora_analysis.bases import BaseWeights
from lora_analysis.bases.sanity_checks import WeightWatch
from lora_analysis.execution import in_threads
from lora_analysis.intruders import intruder_dimensions
from lora_analysis.linalg import leading_singular_values, thin_product
from lora_analysis.spectra import Spectrum, weight_svd

RANK = 16


def amplification_rows(rounds: int, folder: Path) -> Iterator[Row]:
    """Yield the rows about amplification over the seven weights of a Llama-8B layer, bfloat16."""
    rng = np.random.default_rng(0)
    spectra = {
        name: spectrum(update(rng, shape, RANK, name=name)) for name, shape in LLAMA_8B.items()
    }
    path = base_file(LLAMA_8B, folder / "layer.safetensors")
    base = open_base(path)

    def one(name: str) -> np.ndarray:
        weight = base.weight(name, transposed=False)
        return amplification(spectra[name], weight, draws=0, weight_directions=False).projected

    largest_first = sorted(spectra, key=lambda name: -np.prod(LLAMA_8B[name]))
    layers = 4 * largest_first  # the last of seven weights alone would leave one worker idle

    def ours() -> list[np.ndarray]:
        return list(in_threads(one, layers, workers=2))

    tensors = {name: torch.randn(shape).bfloat16() for name, shape in LLAMA_8B.items()}
    sides = {
        name: [torch.from_numpy(m.astype(np.float32)) for m in (s.U, s.V)]
        for name, s in spectra.items()
    }

    def naive() -> None:
        for name in layers:
            u, v = sides[name]
            torch.linalg.norm(u.T @ tensors[name].float() @ v)

    def products() -> None:
        list(in_threads(thin_products, [LLAMA_8B[name] for name in layers], workers=2))

    torch.set_num_threads(2)
    took = in_turn({"ours": ours, "naive": naive, "products": products}, rounds)
    torch.set_num_threads(1)
    what = "amplification, four bfloat16 Llama-8B layers, r = 16, two workers"
    size = 4 * sum(2 * m * n for m, n in LLAMA_8B.values())
    yield Row(
        what,
        "torch on two threads: `U.T @ W.float() @ V`",
        took["naive"] / took["ours"],
        "≥ 4",
        error(base, spectra, one),
    )
    yield Row(what, "reading the bytes from memory", took["ours"] * memory_rate() / size, "≤ 6")
    yield Row(
        what,
        "its thin products alone, W in float32 in the cache",
        took["ours"] / took["products"],
        "",
        note=f"these alone would be {took['naive'] / took['products']:.1f} × torch",
    )
    yield from amplification_terms(base, lambda: one("self_attn.q_proj"), rounds)
    cold = in_turn(
        {
            "ours": lambda: list(in_threads(one, largest_first, workers=2)),
            "read": lambda: read_file(path),
        },
        rounds,
        before=lambda: drop_cached(path),
    )
    yield Row(
        "the same of one layer, cold", "reading the bytes from disk",
        cold["ours"] / cold["read"], "≤ 1.2",
    )  # fmt: skip
    tracemalloc.start()
    list(in_threads(one, spectra, workers=2))
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    yield Row(what, "64 MB of extra memory", peak / 64, "≤ 1", f"{peak:.0f} MB")


def amplification_terms(base: BaseWeights, whole: Call, rounds: int) -> Iterator[Row]:
    """Yield what each part of one amplification takes, in CPU-seconds, against its products."""
    shape = LLAMA_8B["self_attn.q_proj"]
    tile = np.ones(((1 << 20) // shape[1], shape[1]), np.float32)
    tiles = shape[0] // len(tile)
    squares = np.ones(len(tile), np.float32)

    def read() -> None:
        for _ in base.weight("self_attn.q_proj", transposed=False).blocks(check=False):
            pass

    def norms() -> None:
        for _ in range(tiles):
            _ = (tile[:, None, :] @ tile[:, :, None])[:, 0, 0]

    def watch() -> None:
        statistics = WeightWatch(shape[0] * shape[1])
        for _ in range(tiles):
            statistics.add(tile, squares)

    took = in_turn(
        {
            "all of it": whole,
            "reading and widening to float32": read,
            "the norms of W's rows": norms,
            "looking for damage": watch,
            "products": lambda: thin_products(shape),
        },
        rounds,
        clock=time.process_time,
    )
    products = took.pop("products")
    for what, seconds in took.items():
        yield Row(
            f"amplification of 4096 × 4096, one thread: {what}", "its thin products alone",
            seconds / products, "",
        )  # fmt: skip


def thin_products(shape: tuple[int, int]) -> None:
    """Multiply as often as a weight of this shape needs, always the same tile."""
    rows, columns = 1 << 20, shape[1]
    tile = np.ones((rows // columns, columns), np.float32)
    right = np.ones((columns, RANK), np.float32)
    for _ in range(shape[0] // len(tile)):
        thin_product(tile, right)


def error(base: object, spectra: dict[str, Spectrum], one: object) -> str:
    """Return the largest relative error over the layer's square weights."""
    found = 0.0
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        s = spectra[name]
        core = s.U.T @ base.weight(name, transposed=False).array().astype(float) @ s.V
        exact = np.sqrt(np.diagonal(np.cumsum(np.cumsum(core**2, 0), 1)))
        found = max(found, float(np.max(np.abs(one(name) / exact - 1))))
    return f"{found:.0e}"


def own_directions(rounds: int) -> Iterator[Row]:
    """Yield the rows about W's leading singular values, on the flattest spectrum."""
    W = flat_weight(4096)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    dense = in_turn({"dense": lambda: torch.linalg.svdvals(torch.from_numpy(W))}, 1, warm=False)
    for k, target in ((16, "≥ 10"), (64, "≥ 4")):
        ours = in_turn({"ours": lambda k=k: leading_singular_values(W, k)}, min(rounds, 3))
        found = np.max(np.abs(leading_singular_values(W, k) / exact[:k] - 1))
        low = torch.svd_lowrank(torch.from_numpy(W), q=k)[1].numpy() / exact[:k] - 1
        yield Row(
            f"W's top {k}, flat 4096 × 4096",
            "torch float32 svdvals",
            dense["dense"] / ours["ours"],
            target,
            f"{found:.0e}",
            f"svd_lowrank's defaults are off by {np.max(np.abs(low)):.0%}",
        )


def intruders() -> Iterator[Row]:
    """Yield the rows about intruder dimensions, with and without W's SVD at hand."""
    rng = np.random.default_rng(0)
    W, one = flat_weight(4096), update(rng, (4096, 4096), RANK)
    model = peers.peft_model(one, W)
    merged = W.astype(np.float64) + one.delta_weight()

    def dense() -> None:
        for matrix in (W, merged, one.delta_weight()):
            np.linalg.svd(matrix.astype(np.float64), full_matrices=False)

    heavy = in_turn({"peft": lambda: peers.intruders(model), "dense": dense}, 1, warm=False)
    whole = in_turn(
        {"ours": lambda: intruder_dimensions(one, W, weight=weight_svd(W, cache=False))},
        1,
        warm=False,
    )
    known = weight_svd(W, cache=False)
    cached = in_turn({"ours": lambda: intruder_dimensions(one, W, weight=known)}, 3)
    what = "intruder dimensions, 4096 × 4096, r = 16"
    yield Row(what, "three dense float64 SVDs", heavy["dense"] / whole["ours"], "≥ 2")
    yield Row(
        f"{what}, W's SVD known",
        "PEFT's reduce_intruder_dimension",
        heavy["peft"] / cached["ours"],
        "≥ 300",
    )

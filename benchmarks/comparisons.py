"""What comparing costs: whole processes, and modules against their own matrix products."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness import Row, in_turn, process_usage
from benchmarks.synthetic import base_file, large_llama, llama, written
from lora_analysis import LowRankUpdate, merge_check, open_base, read_adapter
from lora_analysis.studies import study

# Of 560; every module takes the same time and memory.
LARGE_MODULES = 28


def rows(rounds: int, folder: Path) -> Iterator[Row]:
    """Yield the rows about comparisons, all in CPU-seconds."""
    yield from whole_processes(folder)
    yield from large_modules(min(rounds, 3), folder)
    yield from merged_module(min(rounds, 3), folder)


def whole_processes(folder: Path) -> Iterator[Row]:
    """Yield the rows about whole processes on Llama-8B adapters."""
    paths = [
        str(written(llama(np.random.default_rng(seed)), folder / f"llama-{seed}"))
        for seed in range(12)
    ]
    inspected = np.median([process_usage("inspect", paths[0])[0] for _ in range(3)])
    for what, command, bound, memory in (
        ("`compare` of two", ["compare", *paths[:2]], "≤ 3.3", None),
        ("`report` of two", ["report", *paths[:2], "-o", str(folder / "two")], "≤ 8.3", None),
        ("`report` of twelve", ["report", *paths, "-o", str(folder / "twelve")], "≤ 42", 433),
    ):
        seconds, peak = process_usage(*command)
        name = f"{what} Llama-8B adapters (224 modules, r = 16), whole process"
        note = f"{seconds:.1f} CPU-s, {peak:.0f} MB"
        yield Row(name, "`inspect` of one", seconds / inspected, bound, note=note)
        if memory:
            yield Row(name, f"{memory} MB of memory", peak / memory, "≤ 1", note=note)


def large_modules(rounds: int, folder: Path) -> Iterator[Row]:
    """Yield the rows about comparing two Llama-70B-shaped adapters."""
    paths = [
        written(large_llama(np.random.default_rng(seed), LARGE_MODULES), folder / f"large-{seed}")
        for seed in range(2)
    ]
    adapters = [read_adapter(path) for path in paths]
    took = in_turn(
        {
            "ours": lambda: study(adapters, workers=1),
            "products": lambda: [
                own_products([adapter[name] for adapter in adapters])  # type: ignore[misc]
                for name in adapters[0]
            ],
        },
        rounds,
        clock=time.process_time,
    )
    seconds, peak = process_usage("compare", *map(str, paths))
    what = f"`compare` of two 70B-shaped adapters ({LARGE_MODULES} modules of 8192², r = 64)"
    yield Row(
        what, "its own products: Gram, Cholesky, rotation, overlaps",
        took["ours"] / took["products"], "≤ 1.8",
        note=f"{560 / LARGE_MODULES * took['ours']:.0f} CPU-s for 560 modules, the process for "
        f"these {seconds:.1f}",
    )  # fmt: skip
    yield Row(what, "250 MB of memory", peak / 250, "≤ 1", note=f"{peak:.0f} MB")


def own_products(updates: list[LowRankUpdate]) -> list[np.ndarray]:
    """Read, widen and multiply what comparing two updates by their vectors takes."""
    bases = []
    for update in updates:
        sides = [factor.astype(np.float64) for factor in (update.B, update.A.T)]
        triangles = [np.linalg.cholesky(side.T @ side).T for side in sides]
        left, _, right = np.linalg.svd(triangles[0] @ triangles[1].T)
        turns = (left, right.T)
        bases.append(
            [
                side @ np.linalg.solve(triangle, turn)
                for side, triangle, turn in zip(sides, triangles, turns, strict=True)
            ]
        )
    return [left.T @ right for left, right in zip(*bases, strict=True)]


def merged_module(rounds: int, folder: Path) -> Iterator[Row]:
    """Yield the row about checking one merged module of 4096², bfloat16."""
    import torch
    from safetensors.torch import load_file, save_file

    shapes = {"m": (4096, 4096)}
    base = base_file(shapes, folder / "base.safetensors")
    (update,) = read_adapter(
        written(iter([_module(np.random.default_rng(0))]), folder / "adapter")
    ).values()
    delta = torch.from_numpy(update.delta_weight()).float()
    merged = folder / "merged.safetensors"
    save_file({"m.weight": (load_file(base)["m.weight"].float() + delta).bfloat16()}, merged)

    def read() -> None:
        for path in (base, merged):
            for _ in open_base(path).weight("m", transposed=False).blocks():
                pass

    took = in_turn(
        {
            "ours": lambda: merge_check(folder / "adapter", base, merged, transposed=False),
            "read": read,
        },
        rounds,
        clock=time.process_time,
    )
    yield Row(
        "`merge-check` of one 4096 × 4096 module, bfloat16", "reading both models",
        took["ours"] / took["read"], "≤ 2", note=f"{took['ours']:.2f} CPU-s",
    )  # fmt: skip


def _module(rng: np.random.Generator) -> LowRankUpdate:
    a, b = rng.standard_normal((16, 4096)) / 64, rng.standard_normal((4096, 16)) * 1e-2
    return LowRankUpdate(
        name="m", A=a.astype(np.float32), B=b.astype(np.float32), scale=2.0, stored_dtype="bfloat16"
    )

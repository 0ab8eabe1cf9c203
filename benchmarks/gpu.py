"""What a GPU computes against the CPU, and how long a training step takes on it: make gpu-check.

Nothing is fetched, and it ends within minutes. On a machine without a GPU there are no rows; with
``device="cpu"`` both sides are the CPU, which checks this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import training
from benchmarks.harness import Row, in_turn
from benchmarks.synthetic import update
from lora_analysis import amplification, read_adapter, spectrum
from lora_analysis.spectra import stacked_spectra
from lora_analysis.training import demo_sweep, train_run

# Float64 on both sides: rounding errors of a factorization, relative to the largest value.
SPECTRA_BOUND = 1e-12
# Float32 on both sides, 60 steps: two kernels of one CPU differ by 1e-7 of a loss and 1e-12 of a
# cosine. TensorFloat-32, if a user allows it, is the reason for the width.
LOSS_BOUND, COSINE_BOUND = 1e-3, 1e-4
STEPS = 60
COUNT, WIDTH, RANK = 64, 4096, 16


class GpuError(Exception):
    """A GPU's numbers are not those of the CPU."""


def rows(
    rounds: int, folder: Path, *, device: str | None = None, width: int = WIDTH, steps: int = STEPS
) -> Iterator[Row]:
    """Yield the rows about a GPU; none without one.

    Raises
    ------
    GpuError
        Its numbers are beyond a bound.
    """
    device = device or ("cuda" if torch.cuda.is_available() else None)
    if device is None:
        return
    yield from spectra(rounds, device, width)
    yield amplified(device, width)
    yield trained(folder, device, steps)
    if device == "cuda":
        for size, target in (((8, 128), ""), ((64, 512), "≤ 0.75")):
            yield from stepped(rounds, size, target)
        if torch.cuda.device_count() > 1:
            yield shared(folder, steps)


def spectra(rounds: int, device: str, width: int) -> Iterator[Row]:
    """Yield the rows about many spectra at once, in both precisions."""
    rng = np.random.default_rng(0)
    updates = [update(rng, (width, width), RANK) for _ in range(COUNT if width == WIDTH else 4)]
    expected = [spectrum(one) for one in updates]
    for dtype, bound in (("float64", SPECTRA_BOUND), ("float32", 1e-5)):
        spectra_there = stacked_spectra(updates, device=device, dtype=dtype)
        error = max(
            float(np.abs(one.S - two.S).max() / two.S[0])
            for one, two in zip(spectra_there, expected, strict=True)
        )
        sides = {
            "device": lambda dtype=dtype: list(
                stacked_spectra(updates, device=device, dtype=dtype)
            ),
            "CPU": lambda: [spectrum(one) for one in updates],
        }
        times = in_turn(sides, max(1, rounds // 3))
        what = f"{len(updates)} spectra, {width}², r = {RANK}, {dtype}, {device}"
        yield _checked(what, "one by one on the CPU", times["device"] / times["CPU"], error, bound)


def amplified(device: str, width: int) -> Row:
    """Return the row about amplification with W on the device."""
    rng = np.random.default_rng(1)
    delta = update(rng, (width, width), RANK)
    W = rng.standard_normal((width, width)).astype(np.float32)
    on_device = torch.from_numpy(W).to(device)
    times = in_turn(
        {"device": lambda: amplification(delta, on_device), "CPU": lambda: amplification(delta, W)},
        1,
    )
    factors, expected = (amplification(delta, w).amplification_factor for w in (on_device, W))
    error = float(np.abs(factors / expected - 1).max())
    what = f"amplification, {width}², r = {RANK}, W on {device}"
    return _checked(what, "W in memory", times["device"] / times["CPU"], error, 1e-12)


def trained(folder: Path, device: str, steps: int) -> Row:
    """Return the row about a training of the demo."""
    config = demo_sweep()[0]
    config = replace(config, loop=replace(config.loop, steps=steps))
    seconds, losses, adapters = {}, {}, {}
    for where in {device: None, "cpu": None}:
        start = time.perf_counter()
        run = train_run(config, folder / f"gpu-{where}", device=where)
        seconds[where] = time.perf_counter() - start
        lines = (folder / f"gpu-{where}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[where] = np.array([json.loads(line)["loss"] for line in lines[1:]])
        adapters[where] = read_adapter(run)
    loss = float(np.abs(losses[device] / losses["cpu"] - 1).max())
    deltas = [
        [adapters[where][name].delta_weight() for where in (device, "cpu")]
        for name in adapters["cpu"]
    ]
    cosine = max(
        1 - float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in deltas
    )
    row = _checked(
        f"{steps} steps of the demo's training, {device}: loss", "the CPU",
        seconds[device] / seconds["cpu"], loss, LOSS_BOUND,
    )  # fmt: skip
    if cosine > COSINE_BOUND:
        message = f"{row.what}: ΔW differs, 1 − cos = {cosine:.1e} > {COSINE_BOUND:.0e}"
        raise GpuError(message)
    return replace(row, note=f"1 − cos of ΔW ≤ {cosine:.1e} (bound {COSINE_BOUND:.0e})")


def stepped(rounds: int, size: tuple[int, int], target: str) -> Iterator[Row]:
    """Yield the rows about the time of a training step."""
    sides = ("ours", "PEFT", "full fine-tuning")
    times = in_turn({side: training.step_of(side, size)[0] for side in sides}, 3 * rounds)
    what = f"LoRA step, d = {training.WIDTH}, {size[0]} × {size[1]}, r = {training.RANK}, cuda"
    yield Row(what, "PEFT", times["ours"] / times["PEFT"], "≤ 1.0")
    yield Row(what, "full fine-tuning", times["ours"] / times["full fine-tuning"], target)


def shared(folder: Path, steps: int) -> Row:
    """Return the row about a training that two GPUs share through NCCL."""
    options = ["--base", "digits", "--name", "rotate", "--rank", "8", "--steps", str(steps),
               "--device", "cuda"]  # fmt: skip
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    seconds = {}
    for name, start in (("alone", [sys.executable]), ("two", launch)):
        command = [*start, "-m", "lora_analysis", "train", *options, "-o", str(folder / name)]
        began = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds[name] = time.perf_counter() - began
    one, two = read_adapter(folder / "alone"), read_adapter(folder / "two")
    error = max(
        float(np.abs(one[name].delta_weight() - two[name].delta_weight()).max()
              / np.abs(one[name].delta_weight()).max())
        for name in one
    )  # fmt: skip
    return _checked(
        f"{steps} steps on two GPUs, NCCL",
        "one GPU",
        seconds["two"] / seconds["alone"],
        error,
        1e-2,
    )


def _checked(what: str, against: str, ratio: float, error: float, bound: float) -> Row:
    """Return a row with its error; raise if it is beyond the bound, or not a number."""
    if not error <= bound:
        message = f"{what}: error {error:.1e} > {bound:.0e}"
        raise GpuError(message)
    return Row(what, against, ratio, "", f"{error:.1e} (bound {bound:.0e})")

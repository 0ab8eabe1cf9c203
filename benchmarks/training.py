"""A training step on six blocks of GPT-2's size, against PEFT, loralib and full fine-tuning.

On a GPU where there is one. Ratios of step times are from one run, the sides in turn; memory is
what each side adds to a process of its own, or on a GPU the allocator's peak.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Row, in_turn
from lora_analysis.lora import add_lora, merge_lora, parameter_counts, unmerge_lora

WIDTH, HEADS, BLOCKS, RANK = 768, 12, 6, 8
BATCH, TOKENS = 8, 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The second size is for a GPU, which the first does not fill.
SIZES = [(BATCH, TOKENS), (64, 512)] if DEVICE == "cuda" else [(BATCH, TOKENS)]
# With one thread on a CPU, its own time counts: others that want the CPU then change nothing.
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time


class Block(nn.Module):
    """A block as GPT-2 has it, with projections of their own for q, k and v."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next residual stream."""
        seen = self.first(x)
        q, k, v = (
            f(seen).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.second(x))))


def blocks() -> nn.Sequential:
    """Return six blocks, drawn from one seed."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS))).to(DEVICE)


def ours(model: nn.Sequential) -> nn.Module:
    """Adapt q and v here."""
    add_lora(model, rank=RANK, alpha=16, targets=["q", "v"], seed=0)
    return model


def pefts(model: nn.Sequential) -> nn.Module:
    """Adapt them with PEFT."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["q", "v"])
    return peft.get_peft_model(model, config)


def loralibs(model: nn.Sequential) -> nn.Module:
    """Adapt them with loralib's layers, where it is installed."""
    import loralib

    for block in model:
        for name in ("q", "v"):
            layer = loralib.Linear(WIDTH, WIDTH, r=RANK, lora_alpha=16)
            layer.load_state_dict(getattr(block, name).state_dict(), strict=False)
            setattr(block, name, layer.to(DEVICE))
    loralib.mark_only_lora_as_trainable(model)
    return model


def full(model: nn.Sequential) -> nn.Module:
    """Train everything."""
    return model.requires_grad_(True)


SIDES: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "ours": ours,
    "PEFT": pefts,
    "loralib": loralibs,
    "full fine-tuning": full,
}


def step_of(
    side: str, size: tuple[int, int] = (BATCH, TOKENS)
) -> tuple[Callable[[], None], nn.Module, torch.optim.Optimizer]:
    """Return a side's step: forward, backward, AdamW."""
    model = SIDES[side](blocks()).train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    x = torch.randn(*size, WIDTH, device=DEVICE)

    def step() -> None:
        loss = model(x).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return step, model, optimizer


def rows(rounds: int) -> Iterator[Row]:
    """Yield the rows about training."""
    for size in SIZES:
        yield from timed(rounds, size)
    yield from launched()
    steps = {side: step_of(side) for side in ("ours", "full fine-tuning")}
    for step, _, _ in steps.values():
        step()
    held = {side: _held(*steps[side][1:]) for side in ("ours", "full fine-tuning")}
    ratio = held["ours"] / held["full fine-tuning"]
    yield Row("gradients and AdamW's state", "full fine-tuning", ratio, "≤ 0.01")
    peaks = {side: peak(side) for side in ("ours", "PEFT", "full fine-tuning")}
    for side, target in (("full fine-tuning", "≤ 0.70"), ("PEFT", "")):
        yield Row("peak memory of three steps", side, peaks["ours"] / peaks[side], target)
    yield from merged(rounds)
    yield share()


def timed(rounds: int, size: tuple[int, int]) -> Iterator[Row]:
    """Yield the rows about the time of a step."""
    there = [side for side in SIDES if side != "loralib" or _has("loralib")]
    times = in_turn({side: step_of(side, size)[0] for side in there}, rounds, clock=CLOCK)
    what = f"step of {BLOCKS} blocks, d = {WIDTH}, {size[0]} × {size[1]}, r = {RANK}, {DEVICE}"
    for side, target in (("PEFT", "≤ 1.03"), ("loralib", "≤ 1.03"), ("full fine-tuning", "≤ 0.72")):
        if side in times:
            yield Row(what, side, times["ours"] / times[side], target)
    yield Row(what, "PEFT over full fine-tuning", times["PEFT"] / times["full fine-tuning"], "")


def launched() -> Iterator[Row]:
    """Yield the rows about how many operations forward and backward launch."""
    sides = ("ours", "PEFT", "full fine-tuning")
    counts = {side: operations(SIDES[side](blocks())) for side in sides}
    for side in ("PEFT", "full fine-tuning"):
        ours, theirs = counts["ours"], counts[side]
        note = f"{ours} to {theirs}"
        yield Row("operations of forward and backward", side, ours / theirs, "", note=note)


def operations(model: nn.Module) -> int:
    """Return how many operations forward and backward run; views cost nothing."""
    counted = _Counted()
    x = torch.randn(1, TOKENS, WIDTH, device=DEVICE)
    with counted:
        model(x).square().mean().backward()
    return counted.number


class _Counted(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        aliased = any(one.alias_info is not None for one in func._schema.returns)
        is_view = aliased and not func._schema.is_mutable
        self.number += not is_view and func is not torch.ops.aten._unsafe_view.default
        return found


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of a side's gradients and optimizer state, after a step."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    states = [
        v for held in optimizer.state.values() for v in held.values() if isinstance(v, Tensor)
    ]
    return sum(t.numel() * t.element_size() for t in (*gradients, *states))


def peak(side: str) -> float:
    """Return the bytes that three steps of a side take at most, base weights included."""
    command = [sys.executable, "-m", "benchmarks.training", side]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def _own_peak(side: str) -> float:
    """Run a side in this process and return its peak: GPU bytes, or growth of this process."""
    SIDES[side](nn.Sequential(Block(WIDTH)))  # what is imported on the way is not counted
    before = _resident()
    torch.set_num_threads(1)
    step, _, _ = step_of(side)
    for _ in range(3):
        step()
    if DEVICE == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return float(_resident() - before)


def _resident() -> int:
    """Return the most bytes this process was resident with; getrusage counts its parent's in."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    message = "how much memory a process took is read from /proc, which is not here"
    raise OSError(message)


def merged(rounds: int) -> Iterator[Row]:
    """Yield the row about the cost of a merged model's forward pass."""
    base = blocks().eval()
    model = ours(copy.deepcopy(base)).eval()
    x = torch.randn(BATCH, TOKENS, WIDTH, device=DEVICE)

    def forward(one: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                one(x)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return run

    handle = merge_lora(model)
    times = in_turn({"base": forward(base), "merged": forward(model)}, 3 * rounds, clock=CLOCK)
    unmerge_lora(handle)
    yield Row("forward of the merged model", "the base", times["merged"] / times["base"], "≤ 1.05")


def share() -> Row:
    """Return the row about the trained share at GPT-3's shape, on the meta device."""
    layers, width = 96, 12288
    with torch.device("meta"):
        model = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(width, width), "v": nn.Linear(width, width)})
            for _ in range(layers)
        )
    add_lora(model, rank=4, alpha=4, targets=["q", "v"], seed=0)
    trained, _ = parameter_counts(model)
    formula = layers * 2 * 4 * 2 * width
    assert trained == formula
    exact = f"{trained:,} of 175 · 10⁹ = {100 * trained / 175e9:.3f} %"
    return Row("trained numbers at GPT-3's shape, r = 4, q and v", "the formula",
               trained / formula, "≤ 1", exact)  # fmt: skip


if __name__ == "__main__":
    print(math.ceil(_own_peak(sys.argv[1])))

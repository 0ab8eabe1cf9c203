"""Whole processes, start to end: what a user waits for in a terminal."""

from __future__ import annotations

import compileall
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import lora_analysis
from benchmarks.harness import Row, in_turn, process
from benchmarks.synthetic import llama, roberta, written

INSPECT = "import sys; sys.argv.insert(1, 'inspect'); from lora_analysis.cli import main; main()"

# The shortest script that a user would write with torch, float32 as stored.
TORCH_QR = """
import sys, torch
from safetensors.torch import load_file
tensors = load_file(sys.argv[1] + "/adapter_model.safetensors")
for key, a in tensors.items():
    if "lora_A" in key:
        b = tensors[key.replace("lora_A", "lora_B")].float()
        rb, ra = (torch.linalg.qr(m)[1] for m in (b, a.float().T))
        torch.linalg.svdvals(rb @ ra.T)
"""
OURS = """
import sys
from lora_analysis import read_adapter, singular_values
from lora_analysis.execution import in_threads
adapter = read_adapter(sys.argv[1])
list(in_threads(lambda name: singular_values(adapter[name]), adapter))
"""


def rows(rounds: int, folder: Path) -> Iterator[Row]:
    """Yield the rows about whole processes."""
    # As it is installed: numpy and torch are compiled, and some environments keep no bytecode.
    compileall.compile_dir(Path(lora_analysis.__file__).parent, quiet=1)
    adapters = (
        ("RoBERTa q, v, r = 8 (24 modules)", roberta, "≤ 3", "≥ 5"),
        ("Llama-8B, r = 16 (224 modules, 84 MB)", llama, "≤ 6", "≥ 3"),
    )
    for name, updates, floor, torch_bound in adapters:
        path = str(written(updates(np.random.default_rng(0)), folder / updates.__name__))
        took = in_turn(
            {
                "ours": process(INSPECT, path),
                "numpy": process("import numpy"),
                "torch": process("import torch"),
                "values": process(OURS, path),
                "qr": process(TORCH_QR, path),
            },
            rounds,
        )
        what = f"`inspect` of {name}, whole process"
        yield Row(what, '`python -c "import numpy"`', took["ours"] / took["numpy"], floor)
        yield Row(what, '`python -c "import torch"`', took["torch"] / took["ours"], torch_bound)
        yield Row(
            f"singular values of {name}, whole process", "a torch float32 QR loop",
            took["values"] / took["qr"], "≤ 0.5",
        )  # fmt: skip

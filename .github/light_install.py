"""Run the analysis verbs on two small adapters with nothing installed but the core."""

import os
import subprocess
import sys
import tempfile

import numpy as np

from lora_analysis import Adapter, LowRankUpdate, write_adapter

folder = tempfile.mkdtemp()
os.chdir(folder)
rng = np.random.default_rng(0)
for name, rank in (("a", 4), ("b", 8)):
    updates = {
        module: LowRankUpdate(
            name=module,
            A=rng.standard_normal((rank, 32)),
            B=rng.standard_normal((32, rank)),
            scale=1.0,
        )
        for module in ("layers.0.q_proj", "layers.1.q_proj")
    }
    write_adapter(Adapter(updates, label=name), name)
for arguments in (
    ["inspect", "a"],
    ["compare", "a", "b"],
    ["heatmap", "a", "b", "-o", "grid.svg"],
    ["report", "a", "b", "-o", "report"],
    ["resize", "b", "--rank", "2", "-o", "small"],
    ["convert", "a", "--to", "kohya", "-o", "a.safetensors"],
):
    subprocess.run([sys.executable, "-m", "lora_analysis", *arguments], check=True)

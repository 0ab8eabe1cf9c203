"""A study the size of Llama-8B's: 224 modules × 12 adapters."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.report import write_report
from lora_analysis.studies import Study, study

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = [f"model.layers.{n}.{kind}" for n in range(32) for kind in KINDS]


@pytest.fixture(scope="module")
def large() -> Study:
    """Three tasks × two ranks × two seeds; each task has a direction of its own."""
    rng = np.random.default_rng(11)
    made = []
    for task, rank, seed in itertools.product("abc", (4, 8), (0, 1)):
        told = np.random.default_rng(ord(task))
        updates = {}
        for name in NAMES:
            B = 0.1 * rng.standard_normal((40, rank))
            B[:, :1] += told.standard_normal((40, 1))
            A = rng.standard_normal((rank, 32))
            updates[name] = LowRankUpdate(name=name, A=A, B=B, scale=1.0)
        known = Provenance(task=task, rank=rank, seed=seed)
        made.append(Adapter(updates, label=f"{task}-r{rank}-s{seed}", provenance=known))
    return study(made)


@pytest.mark.long
@pytest.mark.slow
def test_a_large_study_stays_small_on_disk_and_draws_a_few_modules(
    large: Study, tmp_path: Path
) -> None:
    path = write_report(large, tmp_path, figures=())
    text = path.read_text()
    assert path.stat().st_size < 15e6
    assert (tmp_path / "results.json").stat().st_size < 5e6
    assert len(re.findall(r'id="figure-module_\d+"', text)) == 12
    assert text.count("<details>") > 4
    # Heat-maps and crowds of points are pictures inside the drawings.
    assert text.count("<image") > 36
    results = json.loads((tmp_path / "results.json").read_text())
    said = " ".join(one["text"] for one in results["findings"])
    assert "more alike than unrelated adapters" in said or "too few runs" in said
    for word in ("predict", "will merge", "proves", "significant"):
        assert word not in said
    with np.load(tmp_path / "grids.npz") as grids:
        assert len(grids) == 4 * 2 * len(NAMES)


_MANY_ADAPTERS = """
import resource, sys
import numpy as np
from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.report import write_report
from lora_analysis.studies import study

rng = np.random.default_rng(0)
made = []
for i in range(2000):
    updates = {
        name: LowRankUpdate(
            name=name, A=rng.standard_normal((2, 32)), B=rng.standard_normal((32, 2)), scale=1.0
        )
        for name in ("layers.0.q_proj", "layers.0.v_proj")
    }
    known = Provenance(task=f"t{i % 20}", rank=2, seed=i // 20)
    made.append(Adapter(updates, label=f"t{i % 20}-r2-s{i // 20}", provenance=known))
write_report(study(made), sys.argv[1], figures=())
try:  # the maximum that getrusage gives starts at that of the process that forked this one
    status = open("/proc/self/status").read()
    print(status.partition("VmHWM:")[2].split()[0])
except FileNotFoundError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_report_on_two_thousand_adapters_takes_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _MANY_ADAPTERS, str(tmp_path / "report")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    kilobytes = int(run.stdout) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 0.6e6
    assert (tmp_path / "report" / "report.html").stat().st_size < 5e6

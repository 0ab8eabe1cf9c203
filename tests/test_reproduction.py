from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora_analysis import open_base
from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.errors import InputError
from lora_analysis.reproduction import table_7, write_reproduction
from lora_analysis.storage.source_names import bundled_data
from lora_analysis.studies import Study, study
from lora_analysis.text import number

MODULES = [f"blocks.{n}.attention.{kind}_proj" for n in range(4) for kind in "qv"]


@pytest.fixture(scope="module")
def demo() -> Study:
    """Adapters named as those of the demo, of random factors, against its base."""
    rng = np.random.default_rng(5)
    made = []
    for rank, seed in ((4, 0), (8, 0), (64, 0), (64, 1)):
        label = f"rotate-r{rank}-s{seed}"
        updates = {
            name: LowRankUpdate(
                name=name,
                A=rng.standard_normal((rank, 192)),
                B=rng.standard_normal((192, rank)),
                scale=1.0,
                label=label,
            )
            for name in MODULES
        }
        known = Provenance(rank=rank, seed=seed, task="rotate", metrics={"accuracy": 0.5})
        made.append(Adapter(updates, label=label, provenance=known))
    return study(made, base=bundled_data("digits-vit"), draws=0)


@pytest.mark.slow
def test_every_figure_of_section_7_and_appendix_h_is_drawn(demo: Study, tmp_path: Path) -> None:
    path = write_reproduction(demo, tmp_path, formats=("svg",))
    names = {one.name for one in (tmp_path / "section7").iterdir()}
    assert names == {f"figure_{n}.svg" for n in (3, 4, 6, 7, 8)}
    text = path.read_text()
    # The paper's values, and whose they are.
    for value in ("0.404", "0.213", "0.060", "21.67", "61.95"):
        assert value in text
    assert "layer 48 of 96" in text
    grid = demo.grid("rotate-r8-s0", "rotate-r64-s1", MODULES[4], of="A")
    assert f"φ(8, 64) {grid.at(8, 64):.2f}" in text


def test_table_7_holds_the_dense_numbers(demo: Study) -> None:
    rows = table_7(demo).rows
    assert [row[:2] for row in rows] == [
        ("here", "4"), ("here", "8"), ("here", "64"), ("paper", "4"), ("paper", "64"),
    ]  # fmt: skip
    W = open_base(bundled_data("digits-vit")).weight(MODULES[4]).array().astype(float)
    u, s, vt = np.linalg.svd(demo.adapters["rotate-r4-s0"][MODULES[4]].delta_weight())
    projected = np.linalg.norm(u[:, :4].T @ W @ vt[:4].T)
    top = np.linalg.norm(np.linalg.svd(W, compute_uv=False)[:4])
    norm = np.linalg.norm(s[:4])
    values = (projected, top, np.linalg.norm(W) * 4 / 192, np.linalg.norm(W), norm)
    assert rows[0][2:7] == tuple(map(number, values))
    assert rows[0][7] == number(norm / projected)


def test_another_study_is_refused_with_what_is_missing(demo: Study, tmp_path: Path) -> None:
    other = study([demo.adapters["rotate-r4-s0"]], base=bundled_data("digits-vit"), draws=0)
    with pytest.raises(InputError, match="rotate-r64-s1"):
        write_reproduction(other, tmp_path)

"""Names as a stranger may choose them, and adapters that carry them everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from factories import low_rank_update

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.formats import write_adapter

# Each is the start of a label, a module, a task or a base.
NAMES = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=document.title='owned'>",
    "'\"><svg onload=document.title='owned'>",
    "]]>--><!--{{ 7*7 }}{% raw %}",
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred",
    "nul\x00line\nend\r\tback\x08",
    "../../../etc/passwd",
    "$\\frac{",
    "=cmd|'/C calc'!A0",
    "\u202egnp.exe\u2066\u200f",
    "[link](javascript:alert(1)) `code` | cell ![x](http://x.test/y)",
    "\x9b31m\ufeff\u2028[red]rich[/red]",
    "@SUM(1+1)*cmd",
)
# Few, since every one is drawn; one without a layer.
MODULES = (
    "".join(NAMES[8:11]),
    *(f"layers.{at}.{''.join(NAMES[at::4])}" for at in range(4)),
)
# What none of the texts that are written may hold raw.
ACTIVE = "\x00\x07\x08\x1b\x7f\x9b\u200f\u2028\u202e\u2066\ufeff"


def hostile_updates(rng: np.random.Generator, rank: int) -> dict[str, LowRankUpdate]:
    return {name: low_rank_update(rng, 12, 10, rank, name=name) for name in MODULES}


def hostile_adapters(rng: np.random.Generator) -> list[Adapter]:
    """Two seeds of one task; everything that a name can be is hostile."""
    return [
        Adapter(
            hostile_updates(rng, 3),
            label="".join(NAMES[start::2]),
            provenance=Provenance(
                rank=3,
                seed=start,
                task="".join(NAMES),
                base_model="/home/somebody/" + "".join(NAMES).replace("/", "|"),
                findings=("".join(NAMES),),
            ),
        )
        for start in (8, 4)
    ]


def hostile_files(rng: np.random.Generator, folder: Path) -> list[Path]:
    """Two adapters as files, in folders whose names hold what a file name can hold."""
    paths = []
    for at, name in enumerate(("a\x1b[2J\x1b]0;owned\x07", "b\u202e<img src=x>\n=cmd()")):
        config = {"base_model_name_or_path": f"/home/somebody/{NAMES[4]}{NAMES[9]}"}
        adapter = Adapter(hostile_updates(rng, 2 + at), label=name, config=config)
        paths.append(write_adapter(adapter, folder / name))
    return paths

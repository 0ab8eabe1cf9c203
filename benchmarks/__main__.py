"""Time what users would write by hand, and what peers do, against the package.

All sides of a row run in turn in one process, and ratios are what is printed; the accuracy stands
beside them, since a fast wrong number is no gain. One BLAS thread unless a row says otherwise.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from benchmarks import comparisons, overlaps, processes, spectra, training, weights
from benchmarks.floors import machine, memory_rate, product_rate
from benchmarks.harness import Row, markdown

RESULTS = Path(__file__).with_name("RESULTS.md")

Group = Callable[[int, Path], Iterator[Row]]
GROUPS: dict[str, Group] = {
    "processes": processes.rows,
    "spectra": spectra.rows,
    "comparisons": comparisons.rows,
    "overlaps": lambda rounds, _: overlaps.rows(rounds),
    "many": lambda rounds, _: overlaps.many(rounds),
    "amplification": weights.amplification_rows,
    "directions": lambda rounds, _: weights.own_directions(rounds),
    "intruders": lambda *_: weights.intruders(),
    "training": lambda rounds, _: training.rows(rounds),
}


def main() -> None:
    """Print the table; write it to RESULTS.md if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} too")
    options = parser.parse_args()
    chosen = options.groups or list(GROUPS)
    unknown = sorted(set(chosen) - set(GROUPS))
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    torch.set_num_threads(1)
    sections = _written() if options.write else {}
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1, user_api="blas"):
        floors = (
            f"one thread reads {memory_rate() / 1e9:.1f} GB/s from memory and multiplies at "
            f"{product_rate(1024, 1024, 4096) / 1e9:.0f} (float64) and "
            f"{product_rate(1024, 1024, 4096, 'float32') / 1e9:.0f} (float32) GFLOP/s"
        )
        print(f"{machine()}; {floors}\n")
        for name in chosen:
            found: list[Row] = []
            for row in GROUPS[name](options.rounds, Path(folder)):
                print(" | ".join(row.cells()), flush=True)
                found.append(row)
            sections[name] = f"{machine()}; {floors}.\n\n{markdown(found)}"
    if options.write:
        RESULTS.write_text(document(sections), encoding="utf-8")


def document(sections: dict[str, str]) -> str:
    """Return the page of results, group by group."""
    text = (
        "# Benchmark results\n\nMade by `make bench`; every group in one run, its sides in turn.\n"
    )
    for name in GROUPS:
        if name in sections:
            text += f"\n## {name}\n\n{sections[name].strip()}\n"
    return text


def _written() -> dict[str, str]:
    """Return the sections of the page as it is, to be replaced one by one."""
    if not RESULTS.exists():
        return {}
    parts = RESULTS.read_text(encoding="utf-8").split("\n## ")[1:]
    return dict(part.split("\n", 1) for part in parts)


if __name__ == "__main__":
    main()

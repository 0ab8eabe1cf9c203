"""Time what users would write by hand, and what peers do, against the package.

All sides of a row run in turn in one process, and ratios are what is printed; the accuracy stands
next to them, since a fast wrong number is no gain. One BLAS thread unless a row says otherwise.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from benchmarks import comparisons, gpu, overlaps, processes, spectra, training, weights
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
    "gpu": gpu.rows,
}

# Where the time goes, for the rows that miss their target.
NOTES = {
    "comparisons": """\
`compare` of Llama-8B adapters: a third of the CPU time goes into importing
numpy, pandas (with pyarrow if it is installed) and scipy.special, a tenth
into the products, a tenth into reading; the rest is Python code per module
and per row of the tables. `report` of two: three quarters go into matplotlib,
which renders 18 figures 36 times (24 SVG, 6 PNG, 6 PDF) after one layout
each; the font subsets of the PDF files alone take a tenth. `merge-check`
reads the merged weight twice (a sample decides on the recipe, every entry
confirms it), and the replay takes a float32 product, a sum, five passes of
rounding and a comparison over blocks in the cache.""",
    "amplification": """\
Against its thin products (1), one pass takes 0.8 for reading and widening to
float32, 0.14 for the norms of W's rows and 0.08 for looking for damage: 2.0
in all on one thread. Where W is weaker than 0.3 times random along some
leading directions, which W and updates made at random are in one of four
modules at k = 1 alone, these are taken again in float64: a second pass, which
costs as much as the first.""",
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
            if found:  # a machine without a GPU leaves what is written about one
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
            text += f"\n{NOTES[name]}\n" if name in NOTES else ""
    return text


def _written() -> dict[str, str]:
    """Return the sections of the page as it is, to be replaced one by one."""
    if not RESULTS.exists():
        return {}
    parts = RESULTS.read_text(encoding="utf-8").split("\n## ")[1:]
    sections = dict(part.split("\n", 1) for part in parts)
    return {name: text.replace(NOTES.get(name, "\n"), "\n") for name, text in sections.items()}


if __name__ == "__main__":
    main()

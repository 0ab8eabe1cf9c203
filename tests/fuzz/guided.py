"""Fuzzing guided by coverage, one format at a time; needs atheris, which is installed by hand.

``pip install atheris``, then in ``tests/``: ``python -m fuzz.guided SEED -max_total_time=60``, with
a seed's name of `fuzz.seeds`. The file of that seed is what is grown and changed; an exception that
is no refusal ends the run, and leaves the input that raised it.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lora_analysis"]):
    from lora_analysis.errors import LoraAnalysisError
    from lora_analysis.formats import find_adapters, read_adapter
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.formats.registry import formats_for
    from lora_analysis.formats.sanity_checks import check_updates
    from lora_analysis.spectra import singular_values

    list(formats_for(Path(), ReadOptions()))  # all of them, while they are instrumented

from fuzz.seeds import SEEDS


def main() -> None:
    """Fuzz the seed that is named first."""
    name, *options = sys.argv[1:]
    folder = Path(tempfile.mkdtemp())
    source = SEEDS[name](folder)
    file = max((one for one in folder.rglob("*") if one.is_file()), key=_weight)
    inputs = Path(tempfile.mkdtemp())
    (inputs / "seed").write_bytes(file.read_bytes())

    def look(data: bytes) -> None:
        file.write_bytes(data)
        try:
            for found in find_adapters(source, allow_pickle=True):
                for update in read_adapter(found, allow_pickle=True).values():
                    check_updates([update])
                    singular_values(update)
        except LoraAnalysisError:
            pass

    warnings.simplefilter("error")
    atheris.Setup([sys.argv[0], str(inputs), *options], look)
    atheris.Fuzz()


def _weight(path: Path) -> tuple[bool, int]:
    return path.suffix not in (".json", ".yaml"), path.stat().st_size


if __name__ == "__main__":
    main()

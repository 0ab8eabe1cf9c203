"""Damage adapters at random and inspect them: ``python -m fuzz`` in ``tests/``; see ``--help``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fuzz.bases import BASES, adapter_of
from fuzz.mutations import mutated
from fuzz.seeds import SEEDS, real_adapters
from lora_analysis.cli import run

_ALWAYS = ("--format", "json", "--allow-pickle", "--debug")
SECONDS_EACH = 5
MEGABYTES_MORE = 700


class _TooLongError(BaseException):
    """A file took more than its time; no handler of errors may swallow it."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise _TooLongError


# What files of bare pairs need besides.
_PAIRS = ("--pair", "w_a_{name},w_b_{name}")


@dataclass(frozen=True)
class Seed:
    """What is damaged: a source, its files, and the command that is pointed at it."""

    name: str
    source: Path
    files: list[Path]
    before: tuple[str, ...] = ("inspect",)
    after: tuple[str, ...] = ()


def ran(seed: Seed, target: Path) -> tuple[int, str]:
    """Run the command; return its code and what is wrong with how it went, empty if nothing."""
    out, err = io.StringIO(), io.StringIO()
    signal.setitimer(signal.ITIMER_REAL, SECONDS_EACH)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            arguments = [*seed.before, str(target), *seed.after, *_ALWAYS]
            code = run(arguments)
    except _TooLongError:
        return -1, f"more than {SECONDS_EACH} s:\n{traceback.format_exc()[-1500:]}"
    except Exception as error:  # noqa: BLE001 - --debug raises what it would print
        from lora_analysis.errors import InputError

        return (3, "") if isinstance(error, InputError) else (1, traceback.format_exc()[-1500:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if code not in (0, 3, 4):
        return code, f"exit {code}: {err.getvalue()[-500:]}"
    if err.getvalue() and "Left out" not in err.getvalue():
        return code, f"said on stderr: {err.getvalue()[-500:]}"
    return code, _wrong_in(out.getvalue(), code)


def _wrong_in(text: str, code: int) -> str:
    def refuse(name: str) -> None:
        message = f"{name} in the document"
        raise ValueError(message)

    try:
        document = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        return f"no JSON: {error}"
    for one in document.get("modules", ()):
        if one["at_rank"] and one["amplification_factor"] is None:
            return "no factor and no reason"
    for one in document.get("adapters", ()):
        sizes = [abs(value) for fact in one["modules"] for value in fact["singular_values"]]
        if max(sizes, default=0) > 1e6 and not one["findings"]:
            return f"sigma of {max(sizes):g} without a finding (exit {code})"
    return ""


def _seeds(folder: Path, real: Path | None, only: str) -> Iterator[Seed]:
    """Yield each seed, written once."""
    against = folder / "adapter"
    against.mkdir()
    adapter_of(against)
    for name, make in {**SEEDS, **BASES}.items():
        if only in name:
            own = folder / name.replace(" ", "-")
            own.mkdir()
            source = make(own)
            files = sorted(one for one in own.rglob("*") if one.is_file())
            if name in BASES:
                before = ("amplify", str(against), "--base")
                yield Seed(name, source, files, before, ("--scale", "1", "--draws", "0"))
            else:
                yield Seed(name, source, files)
    for name, files in real_adapters(real) if real else ():
        if only in name:
            after = _PAIRS if "sam-ring" in name else ()
            yield Seed(f"real {name}", files[0].parent, files, after=after)


def main() -> int:
    """Run; return 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="formats whose name holds this")
    parser.add_argument("--real", type=Path, help="folder of real adapters")
    parser.add_argument("--keep", type=Path, default=Path("/tmp/fuzz-found"))
    given = parser.parse_args()
    signal.signal(signal.SIGALRM, _stop)
    draw = random.Random(given.seed)
    codes: Counter[int] = Counter()
    found: dict[str, str] = {}
    end = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        seeds = list(_seeds(folder, given.real, given.only))
        for seed in seeds:
            code, wrong = ran(seed, seed.source)
            print(f"{seed.name}: {code} {wrong}")
            if code or wrong:  # before any damage
                found[seed.name] = wrong or f"exit code {code}"
        while time.monotonic() < end:
            seed = draw.choice(seeds)
            damaged = folder / "damaged"
            target = _damaged(damaged, seed, draw)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            code, wrong = ran(seed, target)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            if grown > MEGABYTES_MORE:
                wrong = f"{grown} MB more memory"
            codes[code] += 1
            last = wrong.strip().splitlines()[-1] if wrong else ""
            resolve_source = next(
                (x for x in reversed(wrong.splitlines()) if x.startswith("  File")), ""
            )
            if wrong and (key := f"{resolve_source} {last}"[:200]) not in found:
                found[key] = wrong
                given.keep.mkdir(parents=True, exist_ok=True)
                kept = Path(tempfile.mkdtemp(dir=given.keep)) / seed.name.replace("/", "_")
                shutil.copytree(damaged, kept)
                print(f"\n{seed.name}: kept in {kept}\n{wrong}", flush=True)
            shutil.rmtree(damaged)
    print(f"{sum(codes.values())} files; exit codes {dict(codes)}; {len(found)} kinds of failure")
    return 1 if found else 0


def _damaged(place: Path, seed: Seed, draw: random.Random) -> Path:
    """Write a copy of an adapter with one or two of its files damaged; return what to point at."""
    source, files = seed.source, seed.files
    root = source if source.is_dir() else source.parent
    hit = set(draw.sample(files, min(len(files), draw.choice((1, 1, 1, 2)))))
    for file in files:
        copy = place / file.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        raw = file.read_bytes()
        copy.write_bytes(mutated(raw, draw) if file in hit else raw)
    return place / source.relative_to(root)


if __name__ == "__main__":
    sys.exit(main())

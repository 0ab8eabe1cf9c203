"""Bare pairs of matrices under any naming, which the caller describes with two patterns.

``pair=("w_a_{name}", "w_b_{name}")`` names the tensor of A first, that of B second; ``{name}``
stands for the module's name. Nothing in such a file states a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import InputError, MalformedFileError, UnknownFormatError
from lora_analysis.finding import Finding
from lora_analysis.formats.build import AdapterParts, build_adapter
from lora_analysis.formats.factors import FactorRole, StoredPair, complete_pairs
from lora_analysis.formats.side_tensors import side_findings
from lora_analysis.formats.sources import AdapterFiles, AdapterRef, Format, tensors_at

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

# Names seen in files that others wrote by hand; such a file is listed, and read with pair=.
KNOWN_PATTERNS: Final = (
    ("w_a_{name}", "w_b_{name}"),
    ("w_A_{name}", "w_B_{name}"),
    ("weights.{name}.w_lora_A", "weights.{name}.w_lora_B"),  # CLIP-LoRA
)


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A tensor name with one ``{name}`` in it."""

    before: str
    after: str

    @classmethod
    def parse(cls, text: str) -> NamePattern:
        """Return the pattern that ``text`` spells; refuse one without exactly one ``{name}``."""
        before, mark, after = text.partition("{name}")
        if not mark or "{name}" in after:
            message = (
                f"Pair pattern '{text}' must hold '{{name}}' exactly once, where the module's name "
                "stands: 'w_a_{name},w_b_{name}', A first."
            )
            raise InputError(message)
        return cls(before, after)

    def module(self, key: str) -> str | None:
        """Return the module's name in ``key``, or None if the pattern does not match."""
        fixed = len(self.before) + len(self.after)
        if len(key) > fixed and key.startswith(self.before) and key.endswith(self.after):
            return key[len(self.before) : len(key) - len(self.after)]
        return None


def known_pair(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the known pair of patterns that names tensors of a file, if one does."""
    names = list(keys)
    for first, second in KNOWN_PATTERNS:
        patterns = NamePattern.parse(first), NamePattern.parse(second)
        if any(pattern.module(name) for name in names for pattern in patterns):
            return first, second
    return None


class _Pairs(Format):
    """Bare pairs; with the caller's patterns any file is located, so that reading explains it."""

    name = "pairs"

    def locate(self, path: Path, options: ReadOptions) -> AdapterFiles | None:
        is_located = (
            path.is_file() if options.pair is not None else has_matching_names(path, options)
        )
        return AdapterFiles(path, path) if is_located else None

    def recognizes(self, tensors: NamedTensors, options: ReadOptions) -> bool:
        return options.pair is not None or _match_names(tensors, options)

    def find(self, files: AdapterFiles, options: ReadOptions) -> list[AdapterRef]:
        return super().find(files, options) if has_matching_names(files.path, options) else []

    def read(self, files: AdapterFiles, name: str | None, options: ReadOptions) -> Adapter:  # noqa: ARG002
        """Read the pairs of a file that match ``options.pair``.

        Raises
        ------
        MalformedFileError
            A module has one factor only, or its factors do not fit together.
        UnknownFormatError
            No tensor matches the patterns, or no patterns are given.
        """
        path = files.path
        tensors = files.open(options)
        if options.pair is None:
            raise missing_pair_error(path, tensors)
        factors, unmatched = _match(path, tensors, options.pair)
        pairs = complete_pairs(path, factors, options.pair)
        flipped = {pair.module for pair in pairs if is_stored_flipped(tensors, pair)}
        findings = [Finding("factors-stored-transposed", {})] if flipped else []
        findings += side_findings("they match neither pattern and are not analyzed", unmatched)
        parts = AdapterParts(
            pairs=[
                StoredPair.of(pair.module, pair.a.name, pair.b.name, flipped=pair.module in flipped)
                for pair in pairs
            ],
            reason="bare pairs state none",
            findings=findings,
            metadata=tensors.metadata,
            harmless=unmatched,
        )
        return build_adapter(path, self.name, tensors, options, parts)


FORMAT: Final = _Pairs()


def has_matching_names(path: Path, options: ReadOptions) -> bool:
    """Return True if a file's names match the caller's patterns, or a known naming without any."""
    tensors = tensors_at(path, options)
    return tensors is not None and _match_names(tensors, options)


def _match_names(tensors: NamedTensors, options: ReadOptions) -> bool:
    if options.pair is None:
        return known_pair(tensors.infos) is not None
    patterns = parse_pair(options.pair)
    return all(any(pattern.module(key) for key in tensors.infos) for pattern in patterns)


def parse_pair(pair: tuple[str, str]) -> tuple[NamePattern, NamePattern]:
    """Return the two patterns of ``pair``, checked.

    Raises
    ------
    InputError
        There are not two, one lacks its ``{name}``, or they are equal.
    """
    if isinstance(pair, str) or len(pair) != 2 or pair[0] == pair[1]:
        message = (
            f"pair= needs two different patterns, that of A first, found {pair!r}. "
            "Example: ('w_a_{name}', 'w_b_{name}')."
        )
        raise InputError(message)
    return NamePattern.parse(pair[0]), NamePattern.parse(pair[1])


def is_stored_flipped(tensors: NamedTensors, pair: StoredPair) -> bool:
    """Return True if both factors are stored transposed, by their shapes: A as ``(d_in, r)``.

    A is ``(r, d_in)`` unless that cannot be; if both readings fit (``d_in == d_out``), the
    rank is the smaller dimension.
    """
    a, b = (factor.shape(tensors) for factor in (pair.a, pair.b))
    if len(a) != 2 or len(b) != 2:
        return False  # refused by the check of shapes that follows
    plain, flipped = a[0] == b[1], a[1] == b[0]
    return flipped and (not plain or a[1] < a[0])


def missing_pair_error(path: Path, tensors: NamedTensors) -> UnknownFormatError:
    """Return the error that shows how a file of bare pairs is read."""
    first, second = pair = known_pair(tensors.infos) or KNOWN_PATTERNS[0]
    for role, name, pattern in zip("AB", pair, parse_pair(pair), strict=True):
        if not any(pattern.module(key) for key in tensors.infos):
            other = next(iter(tensors.infos))
            return UnknownFormatError(
                f"{path}: it holds factors of bare pairs ('{other}'), but no {role} among them "
                f"('{name}'): half of an adapter, whose update is not known."
            )
    return UnknownFormatError(
        f"{path}: it looks like bare pairs of matrices, which state neither their pairing nor "
        f"their scale. Pass pair=('{first}', '{second}'), A first, and scale= or alpha= "
        f"(command line: --pair '{first},{second}' --scale 1)."
    )


def _match(
    path: Path, tensors: NamedTensors, pair: tuple[str, str]
) -> tuple[dict[str, dict[FactorRole, str]], list[str]]:
    """Return the matching tensors by module and role, and the names that match nothing."""
    first, second = parse_pair(pair)
    factors: dict[str, dict[FactorRole, str]] = {}
    unmatched = []
    for key in tensors.infos:
        a, b = first.module(key), second.module(key)
        if a and b:
            message = f"{path}: tensor '{key}' matches both '{pair[0]}' and '{pair[1]}'."
            raise MalformedFileError(message)
        if a:
            factors.setdefault(a, {})["A"] = key
        elif b:
            factors.setdefault(b, {})["B"] = key
        else:
            unmatched.append(key)
    if not factors:
        names = ", ".join(list(tensors.infos)[:3]) or "none"
        message = (
            f"{path}: no tensor matches '{pair[0]}' or '{pair[1]}'. First of its "
            f"{len(tensors.infos)} tensors: {names}."
        )
        raise UnknownFormatError(message)
    return factors, unmatched

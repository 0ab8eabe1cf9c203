"""From the pairs that a format has found to the adapter: ranks, scales, provenance, findings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_analysis.adapter import Adapter, Provenance
from lora_analysis.finding import Finding, as_findings
from lora_analysis.formats.factors import (
    UNKNOWN_SCALE,
    FactorRole,
    StatedScale,
    StoredPair,
    callers_scale,
    common_rank,
    scale_finding,
    scale_from_alpha,
    stored_rank,
    update_loaders,
)
from lora_analysis.formats.side_tensors import harmless_keys, side_finding, side_tensors
from lora_analysis.formats.sources import ReadOptions, label_of, run_facts
from lora_analysis.storage.tensors import LazyTensors

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from lora_analysis.storage.tensors import NamedTensors


def assembled(
    path: Path,
    name: str,
    tensors: NamedTensors,
    pairs: Sequence[StoredPair],
    scale_of: Callable[[StoredPair, int], StatedScale],
    *,
    options: ReadOptions,
    missing: str,
    findings: Iterable[Finding | str] = (),
    files: tuple[Path, ...] = (),
    base_model: str | None = None,
    config: Mapping[str, Any] | None = None,
    divisors: Mapping[str, int] | None = None,
    saved: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Adapter:
    """Return the adapter that pairs of stored tensors make.

    Parameters
    ----------
    path, name
        What the adapter goes by, and the format's name.
    tensors, pairs
        Where the factors lie, module by module.
    scale_of
        Gives the multiplier that the files state, from a pair and its rank; the caller's goes
        before it.
    options
        The caller's.
    missing
        Why the files state no scale, for the finding where one is not known.
    findings
        What the reader noticed besides.
    files
        Files read beside those of the tensors, say a configuration.
    base_model, config
        As in :class:`~lora_analysis.adapter.Adapter` and its provenance.
    divisors
        Modules whose alpha is divided by another rank than that of their two factors.
    saved
        Tensors trained in full: name in the base model → name in the file.
    metadata
        Strings of the file that a writer of the format carries over.
    """
    ranks = {pair.module: stored_rank(tensors, pair) for pair in pairs}
    over = {**ranks, **(divisors or {})}
    scales = {
        pair.module: callers_scale(options, over[pair.module]) or scale_of(pair, over[pair.module])
        for pair in pairs
    }
    noticed = list(findings)
    side_keys = _side_keys(noticed)
    label = options.label or label_of(path)
    folder = path if path.is_dir() else path.parent
    return Adapter(
        update_loaders(tensors, pairs, scales, label=label),
        label=label,
        provenance=Provenance(
            path=path,
            format=name,
            files=(*tensors.files, *files),
            scale_origin={module: stated.origin for module, stated in scales.items()},
            base_model=base_model,
            rank=common_rank(ranks),
            metadata=metadata or {},
            findings=as_findings((*scale_finding(scales, missing), *noticed)),
            **run_facts(folder),
        ),
        saved_modules=LazyTensors(tensors, saved or {}),
        config=config,
        side_tensors=side_tensors(tensors, side_keys, harmless=harmless_keys(side_keys)),
    )


def stated_alpha(alpha: float | None) -> Callable[[StoredPair, int], StatedScale]:
    """Return what gives ``alpha/r`` as a configuration states it; without one it is unknown."""

    def scale(_pair: StoredPair, rank: int) -> StatedScale:
        return UNKNOWN_SCALE if alpha is None else scale_from_alpha(alpha, rank, "config")

    return scale


def factors_named(
    tensors: NamedTensors, key: re.Pattern[str], first: str
) -> tuple[dict[str, dict[FactorRole, str]], list[str]]:
    """Return the factors' names by module and role, and the names that are none.

    ``key`` matches a factor's whole name, with groups ``module`` and ``role``; the role ``first``
    is A.
    """
    factors: dict[str, dict[FactorRole, str]] = {}
    others = []
    for name in tensors.infos:
        if match := key.fullmatch(name):
            role: FactorRole = "A" if match["role"] == first else "B"
            factors.setdefault(match["module"], {})[role] = name
        else:
            others.append(name)
    return factors, others


def _side_keys(findings: Iterable[Finding | str]) -> list[str]:
    """Return the keys of the tensors that findings say lie next to the factors."""
    found = [one for one in findings if isinstance(one, Finding) and one.code == "side-tensors"]
    return [key for finding in found for key in finding.fields["keys"]]


def beside_finding(what: str, names: Sequence[str]) -> list[Finding]:
    """Return the finding on tensors that are there and not analyzed, if there are any.

    They become the adapter's side tensors.
    """
    return side_finding(what, names)

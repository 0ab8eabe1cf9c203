"""From the stored pairs of a format to the adapter: ranks, scales, provenance, findings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_analysis.adapter import Adapter, Provenance
from lora_analysis.finding import Finding, as_findings
from lora_analysis.formats.factors import (
    UNKNOWN_SCALE,
    StatedScale,
    StoredPair,
    callers_scale,
    common_rank,
    scale_findings,
    scale_from_alpha,
    stored_rank,
    update_loaders,
)
from lora_analysis.formats.side_tensors import side_tensors
from lora_analysis.formats.sources import RunFacts, label_of, run_facts
from lora_analysis.storage.tensors import LazyTensors

if TYPE_CHECKING:
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

ScaleRule = Callable[[StoredPair, int], StatedScale]


def unknown_scale(_pair: StoredPair, _rank: int) -> StatedScale:
    """Return the scale of a module for which a format states none."""
    return UNKNOWN_SCALE


def stated_alpha(alpha: float | None) -> ScaleRule:
    """Return the rule ``alpha/r`` of a configuration; the scale is unknown without an alpha."""

    def scale(_pair: StoredPair, rank: int) -> StatedScale:
        return UNKNOWN_SCALE if alpha is None else scale_from_alpha(alpha, rank, "config")

    return scale


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterParts:
    """The content of a file in terms of an adapter.

    Parameters
    ----------
    pairs
        The stored factors, module by module.
    scale
        Gives the multiplier that the files state, for a pair and its rank; ``scale=`` and
        ``alpha=`` of the caller go before it.
    reason
        Why the files state no scale, for the finding about modules without one.
    findings
        Findings of the reader.
    scale_findings
        Findings about the scales, if those of an unknown scale and of alpha 0 are not enough.
    files
        Files read besides those of the tensors, for example a configuration.
    base_model, seed, config, metadata
        As in :class:`~lora_analysis.adapter.Adapter` and its provenance.
    divisors
        Modules whose alpha is divided by another rank than that of their two factors.
    saved
        Tensors trained in full: name in the base model → name in the file.
    harmless
        Side tensors without which a model computes the same; None: judged by their names.
    """

    pairs: Sequence[StoredPair]
    scale: ScaleRule = unknown_scale
    reason: str = "the format states none"
    findings: Sequence[Finding | str] = ()
    scale_findings: Callable[[Mapping[str, StatedScale]], Sequence[Finding | str]] | None = None
    files: tuple[Path, ...] = ()
    base_model: str | None = None
    seed: int | None = None
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    divisors: Mapping[str, int] = field(default_factory=dict)
    saved: Mapping[str, str] = field(default_factory=dict)
    harmless: Collection[str] | None = None


def build_adapter(
    path: Path, format: str, tensors: NamedTensors, options: ReadOptions, parts: AdapterParts
) -> Adapter:
    """Return the adapter with given parts, all checked from headers; no factor is read.

    Raises
    ------
    MalformedFileError
        Factors do not fit together, or exceed the limits.
    """
    pairs = parts.pairs
    ranks = {pair.module: stored_rank(tensors, pair) for pair in pairs}
    divisors = {**ranks, **parts.divisors}
    scales = {
        pair.module: callers_scale(options, divisors[pair.module])
        or parts.scale(pair, divisors[pair.module])
        for pair in pairs
    }
    if parts.scale_findings is None:
        of_scales: Sequence[Finding | str] = scale_findings(scales, parts.reason)
    else:
        of_scales = parts.scale_findings(scales)
    side_keys = [
        key
        for finding in parts.findings
        if isinstance(finding, Finding) and finding.code == "side-tensors"
        for key in finding.fields["keys"]
    ]
    harmless = parts.harmless
    if harmless is None:
        # Weights and biases that a state dictionary may hold without having trained them; biases
        # without any weights are trained (loralib's bias="lora_only").
        whole_model = any(key.endswith(".weight") for key in side_keys)
        harmless = [key for key in side_keys if whole_model or not key.endswith(".bias")]
    label = options.label or label_of(path)
    facts: RunFacts = {}
    if tensors.files:
        facts = run_facts(path if path.is_dir() else path.parent)
    if parts.seed is not None:
        facts.setdefault("seed", parts.seed)
    return Adapter(
        update_loaders(tensors, pairs, scales, label=label),
        label=label,
        provenance=Provenance(
            path=path if tensors.files else None,
            format=format,
            files=(*tensors.files, *parts.files),
            scale_origin={module: scale.origin for module, scale in scales.items()},
            base_model=parts.base_model,
            rank=common_rank(ranks),
            metadata=parts.metadata,
            findings=as_findings((*of_scales, *parts.findings)),
            **facts,
        ),
        saved_modules=LazyTensors(tensors, parts.saved),
        config=parts.config,
        side_tensors=side_tensors(tensors, side_keys, harmless=harmless),
    )

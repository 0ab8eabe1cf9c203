"""Adapters that PEFT saved: ``adapter_config.json`` and ``adapter_model.safetensors``.

If the caller allows pickles, ``adapter_model.bin`` as well.

Reference: PEFT 0.21, ``tuners/lora/layer.py`` (scale) and ``utils/save_and_load.py`` (keys).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.adapter import Adapter, Provenance
from lora_analysis.errors import (
    InputError,
    MalformedFileError,
    SourceError,
    UnknownFormatError,
    UnsupportedMethodError,
)
from lora_analysis.finding import Finding, as_findings
from lora_analysis.formats.factors import (
    UNKNOWN_SCALE,
    StatedScale,
    callers_scale,
    common_rank,
    scale_finding,
    stored_rank,
    update_loaders,
)
from lora_analysis.formats.fused_parts import FUSED_PARTS, split_parts
from lora_analysis.formats.initial import StoredStart, check_start, less_starts, offset_finding
from lora_analysis.formats.peft.adapter_config import (
    CONFIG_NAME,
    PeftConfig,
    method_of,
    read_peft_config,
)
from lora_analysis.formats.peft.config_checks import (
    StoredModules,
    config_gaps,
    rank_finding,
    saves,
)
from lora_analysis.formats.peft.files import check_weights, locate_peft_files, side_files
from lora_analysis.formats.peft.merged_linear import NAME as MERGED
from lora_analysis.formats.peft.merged_linear import read_merged_linear
from lora_analysis.formats.peft.module_pairs import (
    ModulePairs,
    divided_scale,
    module_pairs,
    no_tensors,
)
from lora_analysis.formats.peft.product_reader import PRODUCT_METHODS, read_products
from lora_analysis.formats.peft.tensor_keys import (
    ALTERING,
    BASE_BIASES,
    SortedKeys,
    has_factors,
    sort_keys,
)
from lora_analysis.formats.side_tensors import side_tensors
from lora_analysis.formats.sources import (
    AdapterFiles,
    AdapterRef,
    Format,
    label_of,
    resolve_source,
    run_facts,
)
from lora_analysis.storage.records import config_findings
from lora_analysis.storage.source_names import shown_errors
from lora_analysis.storage.tensors import LazyTensors, NamedTensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_analysis.adapter import SideTensor
    from lora_analysis.formats.factors import StoredPair
    from lora_analysis.formats.options import InitialFactorsSource, ReadOptions

_IN_FULL: Final = "stored in full"
_UNNAMED: Final = "stored in full without being in modules_to_save"


class _PEFT(Format):
    name = "peft"

    def locate(self, path: Path, options: ReadOptions) -> AdapterFiles | None:
        """Return the adapter's files; the caller's names go first if no config is PEFT's."""
        files = locate_peft_files(path, options)
        return None if files and options.pair and files.config_path is None else files

    def recognizes(self, tensors: NamedTensors, options: ReadOptions) -> bool:  # noqa: ARG002
        """Return True if a tensor has the name of a factor."""
        return has_factors(tensors.infos)

    def find(self, files: AdapterFiles, options: ReadOptions) -> list[AdapterRef]:
        """Return the adapter, or one for each name in the keys."""
        if files.config and files.config.get("enable_lora"):
            return [AdapterRef(files.path, MERGED, label_of(files.path))]
        names: list[str | None]
        try:
            tensors = files.open(options)
            names = sorted(sort_keys(files.weights, tensors.infos).factors, key=str)
        except InputError:
            names = []  # listed all the same: reading it reports what is wrong
        several = len(names) > 1 and None not in names
        return [
            AdapterRef(files.path, self.name, label_of(files.path, name), name)
            for name in (names if several else [None])
        ]

    def read(self, files: AdapterFiles, name: str | None, options: ReadOptions) -> Adapter:
        """Read the adapter in the files, or the one called ``name`` if there are several.

        Raises
        ------
        MalformedFileError
            The files are damaged or contradict each other.
        SourceError
            Weights are missing, or the file holds several adapters and none, or no such one, is
            named.
        UnsupportedMethodError
            The update is not ``s·B·A`` on matrices.
        """
        if files.config and files.config.get("enable_lora"):
            return read_merged_linear(files, options)
        if files.config and str(method_of(files.config)) in PRODUCT_METHODS:
            check_weights(files, options)
            return read_products(files, options)
        config = PeftConfig()
        if files.config_path is not None:
            config = read_peft_config(files.config_path, files.config)
        stored = _open(files, name, config, options)
        tensors, pairs = stored.tensors, stored.content.pairs
        start = _start(files, stored, config, options)
        ranks = {pair.module: stored_rank(tensors, pair) for pair in pairs}
        scales = {
            module: _stated_scale(stored, module, rank, config, options)
            for module, rank in ranks.items()
        }
        if files.scales and options.scale is None and options.alpha is None:
            scales = {pair.module: _applied_scale(pair, files, scales) for pair in pairs}
        saved, others, empty = _saved_tensors(stored, config)
        findings = [
            *_config_findings(files, stored, config, ranks=ranks, scales=scales, others=others),
            *_tensor_findings(files, others, empty),
            *_start_findings(config, start),
            *config_findings(tensors.metadata, config.raw, files.weights, files.config_path),
        ]
        parts: dict[str, Any] = {}
        if start is None:  # the initial factors are those of the whole weight
            pairs, scales, parts = split_parts(
                tensors, pairs, scales, options, rslora=config.use_rslora
            )
        if parts:
            ranks = {pair.module: stored_rank(tensors, pair) for pair in pairs}
        rank = common_rank(ranks)
        label = options.label or label_of(files.path, name)
        config_ranks = {
            rank for rank in (config.rank, *config.rank_pattern.values()) if rank is not None
        }
        loaders = update_loaders(tensors, pairs, scales, label=label, stated_ranks=config_ranks)
        return Adapter(
            loaders if start is None else less_starts(loaders, start, config.start),
            label=label,
            provenance=Provenance(
                path=files.path if tensors.files else None,
                format=self.name,
                files=(*tensors.files, *_config_files(files)),
                scale_origin={module: scale.origin for module, scale in scales.items()},
                base_model=config.base_model,
                rank=rank if start is None or rank is None else 2 * rank,
                findings=as_findings(tuple(findings)),
                metadata=tensors.metadata,
                **(run_facts(files.weights.parent) if tensors.files else {}),
            ),
            saved_modules=LazyTensors(tensors, saved),
            config={**config.raw, FUSED_PARTS: parts} if parts else config.raw,
            side_tensors=_side_tensors(tensors, others) if others else {},
        )


FORMAT: Final = _PEFT()


def _config_files(files: AdapterFiles) -> list[Path]:
    return [files.config_path] if files.config_path and files.tensors is None else []


def _applied_scale(
    pair: StoredPair, files: AdapterFiles, scales: Mapping[str, StatedScale]
) -> StatedScale:
    """Return the scale of a module, that of its live layer if it is not the config's."""
    scale, applied = scales[pair.module], files.scales.get(pair.a.name)
    if applied is None or (
        scale.scale is not None and math.isclose(scale.scale, applied, rel_tol=1e-9)
    ):
        return scale
    return StatedScale(applied, None, "model")


@dataclass(frozen=True, slots=True)
class _Stored:
    """The weights of one adapter."""

    tensors: NamedTensors
    keys: SortedKeys
    chosen: str | None
    content: ModulePairs


def _open(
    files: AdapterFiles, name: str | None, config: PeftConfig, options: ReadOptions
) -> _Stored:
    if files.tensors is None:
        check_weights(files, options)
    tensors = files.open(options)
    keys = sort_keys(files.weights, tensors.infos)
    chosen = _choose(files, keys, name)
    content = module_pairs(files.weights, tensors, keys, chosen, config=config, options=options)
    return _Stored(tensors, keys, chosen, content)


def _start(
    files: AdapterFiles, stored: _Stored, config: PeftConfig, options: ReadOptions
) -> InitialFactorsSource | None:
    """Return the source of the initial factors, if they have to be subtracted.

    Raises
    ------
    UnsupportedMethodError
        They have to be, and the caller gives none.
    """
    if options.initial is None:
        if config.subtracted:
            raise _start_needed(config)
        return None
    if callable(options.initial):
        return options.initial
    source = resolve_source(options.initial)
    with shown_errors(source.snapshot):
        initial = locate_peft_files(source.path, options)
        if initial is None:
            message = (
                f"{source.path}: no adapter in PEFT's layout lies here, to be the initial one."
            )
            raise UnknownFormatError(message)
        before = _open(initial, source.name, config, options)
        pairs = {pair.module: pair for pair in before.content.pairs}
        start = StoredStart(before.tensors, pairs, source.snapshot)
        check_start(files.weights, stored.tensors, stored.content.pairs, start)
    return start


def _start_needed(config: PeftConfig) -> UnsupportedMethodError:
    recomputed = (
        " For PiSSA and OLoRA, initial=initial_factors_from_base(base) computes them from the base "
        "weights (command line: --trained-on BASE)."
        if config.subtracted in ("PiSSA", "OLoRA")
        else ""
    )
    return UnsupportedMethodError(
        f"{config.path}: init_lora_weights is '{config.start}': {config.subtracted} starts from "
        "W - s·B0·A0, so B·A is not the update of the original weight. Pass initial= (command "
        "line: --initial), the adapter as saved before training; or save it again with PEFT's "
        f"path_initial_model_for_weight_conversion.{recomputed}"
    )


def _start_findings(config: PeftConfig, start: InitialFactorsSource | None) -> list[Finding | str]:
    if start is not None:
        name = config.subtracted or "an initialization the caller names"
        return [offset_finding(name)]
    if config.start == "mica":
        return [Finding("mica")]
    return []


def _stated_scale(
    stored: _Stored, module: str, rank: int, config: PeftConfig, options: ReadOptions
) -> StatedScale:
    """Return the multiplier of one module: the caller's, else the config's."""
    if not config.adalora or options.scale is not None:
        name = stored.content.config_names.get(module, module)
        return callers_scale(options, rank, rslora=config.use_rslora) or config.stated_scale(
            name, rank
        )
    alpha = config.alpha if options.alpha is None else options.alpha
    if alpha is None:
        return UNKNOWN_SCALE
    divisor = stored.content.divisors.get(module)
    scale = divided_scale(stored.tensors, divisor, alpha, rank, config.rank)
    return scale if options.alpha is None else replace(scale, origin="caller")


def _choose(files: AdapterFiles, keys: SortedKeys, name: str | None) -> str | None:
    """Return the adapter name of the factors that are read, None if keys state none."""
    names = list(keys.factors)
    if not names and not keys.saved and not keys.notes:
        raise no_tensors(files.weights)
    if not names:
        first = ", ".join(list(keys.saved.get(None, {}))[:3]) or "none"
        message = f"{files.weights}: no LoRA factors found. First tensors: {first}."
        raise MalformedFileError(message)
    if len(names) > 1 and None in names:
        message = f"{files.weights}: some factors carry an adapter's name and others do not."
        raise MalformedFileError(message)
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        return name
    listed = ", ".join(f"'{files.path}#{each}'" for each in names if each) or "one without a name"
    problem = "Several adapters are" if name is None else f"There is no adapter '{name}'"
    message = f"{files.weights}: {problem} in this file. Read one of: {listed}."
    raise SourceError(message)


def _saved_tensors(
    stored: _Stored, config: PeftConfig
) -> tuple[dict[str, str], dict[str, list[str]], list[str]]:
    """Return the tensors trained in full, all others by their kind, and the empty ones."""
    keys = stored.keys
    others = {what: list(names) for what, names in keys.notes.items()}
    adapters = keys.saved if len(keys.factors) == 1 else (None, stored.chosen)
    saved: dict[str, str] = {}
    for adapter in adapters:
        saved |= keys.saved.get(adapter, {})
    empty = [name for name, key in saved.items() if 0 in stored.tensors.infos[key].shape]
    saved = {name: key for name, key in saved.items() if name not in empty}
    if config.path is None and saved:
        others[_IN_FULL] = list(saved)
    for name in list(saved) if config.path else []:
        if saves(config, name):
            continue
        if name.endswith(".bias") and config.raw.get("bias", "none") != "none":
            others.setdefault(BASE_BIASES, []).append(saved.pop(name))
        else:
            others.setdefault(_UNNAMED, []).append(name)
    return saved, others, empty


def _side_tensors(tensors: NamedTensors, others: Mapping[str, list[str]]) -> dict[str, SideTensor]:
    """Return the tensors besides factors and modules trained in full."""
    keys = {what: names for what, names in others.items() if what not in (_IN_FULL, _UNNAMED)}
    harmless = {key for what, names in keys.items() if what not in ALTERING for key in names}
    return side_tensors(
        tensors, (key for names in keys.values() for key in names), harmless=harmless
    )


def _config_findings(
    files: AdapterFiles,
    stored: _Stored,
    config: PeftConfig,
    *,
    ranks: Mapping[str, int],
    scales: Mapping[str, StatedScale],
    others: Mapping[str, list[str]],
) -> list[Finding | str]:
    """Return the findings about the config and how the factors differ from it."""
    pairs = stored.content
    findings: list[Finding | str] = []
    if files.config_path is None:
        findings.append(Finding("config-missing", {"config": CONFIG_NAME}))
    elif config.assumed:
        findings.append(Finding("config-type-missing", {"config": CONFIG_NAME}))
    findings += scale_finding(scales, f"{CONFIG_NAME} states no lora_alpha")
    findings += rank_finding(config, pairs.config_names, ranks)
    if config.raw.get("alora_invocation_tokens"):
        findings.append(Finding("alora"))
    findings += pairs.findings
    saved = {name for names in stored.keys.saved.values() for name in names}
    modules = StoredModules(
        adapted=[pairs.config_names.get(module, module) for module in ranks],
        pruned=pairs.pruned,
        saved=[*saved, *stored.keys.full],
        biases=sum(name.endswith(".bias") for name in (*saved, *others.get(BASE_BIASES, ()))),
    )
    return [*findings, *config_gaps(config, modules)]


def _tensor_findings(
    files: AdapterFiles, others: Mapping[str, list[str]], empty: Sequence[str]
) -> list[Finding]:
    """Return the findings about tensors and files next to the factors."""
    findings = []
    if empty:
        findings.append(Finding("empty-saved-tensors", {"count": len(empty), "first": empty[0]}))
    for what, names in others.items():
        code = "tensors-in-full" if what in (_IN_FULL, _UNNAMED) else "tensors-beside"
        findings.append(Finding(code, {"count": len(names), "what": what, "first": names[0]}))
    if files.tensors is not None:
        return findings
    folder = files.weights.parent
    return [*findings, *(Finding("side-file", {"file": path.name}) for path in side_files(folder))]

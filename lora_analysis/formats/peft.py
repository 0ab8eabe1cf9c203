"""Adapters that PEFT saved: ``adapter_config.json`` beside ``adapter_model.safetensors``.

Where the caller allows pickles, beside ``adapter_model.bin`` as well.

Reference: PEFT 0.21, ``tuners/lora/layer.py`` (scale) and ``utils/save_and_load.py`` (keys).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Final

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
from lora_analysis.formats.initial import StoredStart, check_start, less_starts, subtracted_note
from lora_analysis.formats.peft_checks import (
    StoredModules,
    config_gaps,
    rank_finding,
    saves,
)
from lora_analysis.formats.peft_config import CONFIG_NAME, PeftConfig, read_peft_config
from lora_analysis.formats.peft_incomplete import no_tensors
from lora_analysis.formats.peft_keys import ALTERING, BASE_BIASES, SortedKeys, sort_keys
from lora_analysis.formats.peft_pairs import ModulePairs, divided_scale, module_pairs
from lora_analysis.formats.peft_places import (
    PeftPlace,
    check_weights,
    locate_peft_files,
    side_files,
)
from lora_analysis.formats.side_tensors import side_tensors
from lora_analysis.formats.sources import (
    AdapterRef,
    ReadOptions,
    label_of,
    resolve_source,
    run_facts,
)
from lora_analysis.storage.hub_names import shown_errors
from lora_analysis.storage.marks import config_findings
from lora_analysis.storage.tensors import LazyTensors, NamedTensors, open_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_analysis.adapter import SideTensor
    from lora_analysis.formats.initial import InitialFactorsSource

NAME: Final = "peft"
_IN_FULL: Final = "stored in full"
_UNNAMED: Final = "stored in full without being in modules_to_save"


def recognizes(path: Path, options: ReadOptions) -> bool:
    """Say whether an adapter in PEFT's layout lies at exactly this path."""
    return _place(path, options) is not None


def _place(path: Path, options: ReadOptions) -> PeftPlace | None:
    """Return the adapter's files; names given by the caller hold where no config says PEFT."""
    place = locate_peft_files(path, options)
    return None if place is None or (options.pair and place.config is None) else place


def find(path: Path, options: ReadOptions) -> list[AdapterRef]:
    """Return the adapters that lie at exactly this path: one, or one per name in its keys."""
    place = _place(path, options)
    if place is None:
        return []
    names: list[str | None]
    try:
        tensors = open_tensors(place.weights, allow_pickle=options.allow_pickle)
        names = sorted(sort_keys(place.weights, tensors.infos).factors, key=str)
    except InputError:
        names = []  # found all the same: reading it says what is wrong
    several = len(names) > 1 and None not in names
    return [
        AdapterRef(place.shown, NAME, label_of(place.shown, name), name)
        for name in (names if several else [None])
    ]


def read(path: Path, name: str | None, options: ReadOptions) -> Adapter:
    """Read the adapter at ``path``, or the one called ``name`` where its file holds several.

    Raises
    ------
    MalformedFileError
        The files are damaged or contradict each other.
    SourceError
        Weights are missing, or the file holds several adapters and none, or no such one, is named.
    UnsupportedMethodError
        The update is not ``s·B·A`` on matrices.
    """
    place = locate_peft_files(path, options)
    if place is None:
        message = f"{path}: no adapter in PEFT's layout lies here."
        raise UnknownFormatError(message)
    config = PeftConfig() if place.config is None else read_peft_config(place.config)
    stored = _open(place, name, config, options)
    start = _start(place, stored, config, options)
    ranks = {pair.module: stored_rank(stored.tensors, pair) for pair in stored.found.pairs}
    scales = {
        module: _stated_scale(stored, module, rank, config, options)
        for module, rank in ranks.items()
    }
    saved, others, empty = _saved_tensors(stored, config)
    label = options.label or label_of(place.shown, name)
    pairs, applied, parts = (
        split_parts(stored.tensors, stored.found.pairs, scales, options, rslora=config.use_rslora)
        if start is None  # which is of the weight as a whole
        else (stored.found.pairs, scales, {})
    )
    stated = {rank for rank in (config.rank, *config.rank_pattern.values()) if rank is not None}
    loaders = update_loaders(stored.tensors, pairs, applied, label=label, stated_ranks=stated)
    own = {pair.module: stored_rank(stored.tensors, pair) for pair in pairs} if parts else ranks
    return Adapter(
        loaders if start is None else less_starts(loaders, start, config.start),
        label=label,
        provenance=Provenance(
            path=place.shown,
            format=NAME,
            files=(*stored.tensors.files, *([] if place.config is None else [place.config])),
            scale_origin={module: stated.origin for module, stated in applied.items()},
            base_model=config.base_model,
            rank=common_rank({m: r if start is None else 2 * r for m, r in own.items()}),
            findings=as_findings(
                (
                    *_findings(
                        place,
                        config,
                        stored,
                        ranks=ranks,
                        scales=scales,
                        others=others,
                        empty=empty,
                    ),
                    *_start_findings(config, start),
                    *config_findings(
                        stored.tensors.metadata, config.raw, place.weights, place.config
                    ),
                )
            ),
            **run_facts(place.weights.parent),
        ),
        saved_modules=LazyTensors(stored.tensors, saved),
        config={**config.raw, FUSED_PARTS: parts} if parts else config.raw,
        side_tensors=_side_tensors(stored, others),
    )


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the weights of one adapter hold."""

    tensors: NamedTensors
    keys: SortedKeys
    chosen: str | None
    found: ModulePairs


def _open(place: PeftPlace, name: str | None, config: PeftConfig, options: ReadOptions) -> _Stored:
    check_weights(place, options)
    tensors = open_tensors(place.weights, allow_pickle=options.allow_pickle)
    keys = sort_keys(place.weights, tensors.infos)
    chosen = _choose(place, keys, name)
    return _Stored(
        tensors,
        keys,
        chosen,
        module_pairs(place.weights, tensors, keys, chosen, config=config, options=options),
    )


def _start(
    place: PeftPlace, stored: _Stored, config: PeftConfig, options: ReadOptions
) -> InitialFactorsSource | None:
    """Return what gives the initial factors, where they have to be subtracted.

    Raises
    ------
    UnsupportedMethodError
        They have to be, and nothing gives them.
    """
    if options.initial is None:
        if config.subtracted:
            raise _start_needed(config)
        return None
    if callable(options.initial):
        return options.initial
    path, name, snapshot = resolve_source(options.initial)
    with shown_errors(snapshot):
        initial = locate_peft_files(path, options)
        if initial is None:
            message = f"{path}: no adapter in PEFT's layout lies here, to be the initial one."
            raise UnknownFormatError(message)
        before = _open(initial, name, config, options)
        pairs = {pair.module: pair for pair in before.found.pairs}
        start = StoredStart(before.tensors, pairs, snapshot)
        check_start(place.weights, stored.tensors, stored.found.pairs, start)
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
        return [subtracted_note(name)]
    if config.start == "mica":
        return [Finding("mica")]
    return []


def _stated_scale(
    stored: _Stored, module: str, rank: int, config: PeftConfig, options: ReadOptions
) -> StatedScale:
    """Return the multiplier of one module: the caller's, else the config's."""
    if not config.adalora or options.scale is not None:
        name = stored.found.config_names.get(module, module)
        return callers_scale(options, rank, rslora=config.use_rslora) or config.stated_scale(
            name, rank
        )
    alpha = config.alpha if options.alpha is None else options.alpha
    if alpha is None:
        return UNKNOWN_SCALE
    divisor = stored.found.divisors.get(module)
    stated = divided_scale(stored.tensors, divisor, alpha, rank, config.rank)
    return stated if options.alpha is None else replace(stated, origin="caller")


def _choose(place: PeftPlace, keys: SortedKeys, name: str | None) -> str | None:
    """Return the adapter name under which the wanted factors are filed."""
    names = list(keys.factors)
    if not names and not keys.saved and not keys.notes:
        raise no_tensors(place.weights)
    if not names:
        first = ", ".join(list(keys.saved.get(None, {}))[:3]) or "none"
        message = f"{place.weights}: no LoRA factors found. First tensors: {first}."
        raise MalformedFileError(message)
    if len(names) > 1 and None in names:
        message = f"{place.weights}: some factors carry an adapter's name and others do not."
        raise MalformedFileError(message)
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        return name
    listed = ", ".join(f"'{place.shown}#{each}'" for each in names if each) or "one without a name"
    wanted = "Several adapters are" if name is None else f"There is no adapter '{name}'"
    message = f"{place.weights}: {wanted} in this file. Read one of: {listed}."
    raise SourceError(message)


def _saved_tensors(
    stored: _Stored, config: PeftConfig
) -> tuple[dict[str, str], dict[str, list[str]], list[str]]:
    """Return the tensors trained in full, all others by what they are, and the empty ones."""
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


def _side_tensors(stored: _Stored, others: Mapping[str, list[str]]) -> dict[str, SideTensor]:
    """Return what the file holds besides factors and modules trained in full."""
    keys = {what: others[what] for what in others if what not in (_IN_FULL, _UNNAMED)}
    harmless = {key for what in keys if what not in ALTERING for key in keys[what]}
    return side_tensors(stored.tensors, chain.from_iterable(keys.values()), harmless=harmless)


def _findings(
    place: PeftPlace,
    config: PeftConfig,
    stored: _Stored,
    *,
    ranks: Mapping[str, int],
    scales: Mapping[str, StatedScale],
    others: Mapping[str, list[str]],
    empty: Sequence[str],
) -> list[Finding | str]:
    """Return what the reader noticed."""
    pairs = stored.found
    findings: list[Finding | str] = []
    if place.config is None:
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
    findings += config_gaps(config, modules)
    if empty:
        findings.append(Finding("empty-saved-tensors", {"count": len(empty), "first": empty[0]}))
    findings += [
        Finding(
            "tensors-in-full" if what in (_IN_FULL, _UNNAMED) else "tensors-beside",
            {"count": len(names), "what": what, "first": names[0]},
        )
        for what, names in others.items()
    ]
    findings += [
        Finding("side-file", {"file": path.name}) for path in side_files(place.weights.parent)
    ]
    return findings

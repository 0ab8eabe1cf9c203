"""Adapters that PEFT saved: ``adapter_config.json`` and ``adapter_model.safetensors``.

If the caller allows pickles, ``adapter_model.bin`` as well. The files are found from any path that
names them.

Reference: PEFT 0.21, ``tuners/lora/layer.py`` (scale) and ``utils/save_and_load.py`` (keys).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import chain
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
    scale_findings,
    stored_rank,
    update_loaders,
)
from lora_analysis.formats.fused_parts import FUSED_PARTS, split_parts
from lora_analysis.formats.fused_parts import METADATA as FUSED_METADATA
from lora_analysis.formats.initial import (
    StoredInitialFactors,
    check_initial_factors,
    offset_finding,
    subtract_init_offset,
)
from lora_analysis.formats.merged import PEFT_MERGED, read_merged_linear
from lora_analysis.formats.peft.adapter_config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    PeftConfig,
    method_of,
    names_a_method,
    read_peft_config,
)
from lora_analysis.formats.peft.config_checks import ModuleInventory, config_gaps, saves_in_full
from lora_analysis.formats.peft.module_pairs import GATHER, PeftPairs, read_pairs
from lora_analysis.formats.peft.tensor_keys import (
    ALTERING,
    BASE_BIASES,
    SortedKeys,
    has_factors,
    sort_keys,
)
from lora_analysis.formats.products import PRODUCT_METHODS, read_products
from lora_analysis.formats.side_tensors import side_tensors
from lora_analysis.formats.sources import (
    CONTAINER_SUFFIXES,
    AdapterFiles,
    AdapterRef,
    Format,
    label_of,
    resolve_source,
    run_facts,
    tensors_at,
)
from lora_analysis.storage.documents import pickle_error, read_json_object, regular_file_size
from lora_analysis.storage.records import config_findings
from lora_analysis.storage.source_names import addresses_in_errors
from lora_analysis.storage.tensors import LazyTensors, NamedTensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from lora_analysis.adapter import LowRankUpdate, ScaleOrigin, SideTensor
    from lora_analysis.formats.factors import StoredPair
    from lora_analysis.formats.options import InitialFactorsSource, ReadOptions

_INDEX_NAME: Final = "adapter_model.safetensors.index.json"
_PICKLE_NAME: Final = "adapter_model.bin"
_STORED: Final = (WEIGHTS_NAME, _INDEX_NAME, _PICKLE_NAME)
# The projector and other modules that LLaVA and others train in full: non_lora_trainables.bin,
# non_lora_state_dict.bin.
_SIDE_FILES: Final = "non_lora_*"
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
            return [AdapterRef(files.path, PEFT_MERGED, label_of(files.path))]
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
            _check_weights(files, options)
            return read_merged_linear(files, options)
        if files.config and str(method_of(files.config)) in PRODUCT_METHODS:
            _check_weights(files, options)
            return read_products(files, options)
        return self._read_low_rank(files, name, options)

    def _read_low_rank(
        self, files: AdapterFiles, name: str | None, options: ReadOptions
    ) -> Adapter:
        """Read an adapter whose updates are s·B·A."""
        config = PeftConfig()
        if files.config_path is not None:
            config = read_peft_config(files.config_path, files.config)
        stored = _open(files, name, config, options)
        tensors, pairs = stored.tensors, stored.content.pairs
        initial = _initial_factors(files, stored, config, options)
        ranks = {pair.module: stored_rank(tensors, pair) for pair in pairs}
        scales = {
            pair.module: _stated_scale(
                files, stored, pair, ranks[pair.module], config=config, options=options
            )
            for pair in pairs
        }
        saved, others, empty = _saved_tensors(stored, config)
        findings = _findings(
            files, stored, config, ranks, scales=scales, others=others, empty=empty, initial=initial
        )
        parts: dict[str, Any] = {}
        # Initial factors are those of the whole weight.
        if initial is None and FUSED_METADATA in tensors.metadata:
            pairs, scales, parts = split_parts(
                tensors, pairs, scales, options, rslora=config.use_rslora
            )
            ranks = {pair.module: stored_rank(tensors, pair) for pair in pairs}
        rank = common_rank(ranks)
        label = options.label or label_of(files.path, name)
        loaders = _loaders(tensors, pairs, scales, label=label, config=config, initial=initial)
        config_files = [files.config_path] if files.config_path and files.tensors is None else []
        return Adapter(
            loaders,
            label=label,
            provenance=Provenance(
                path=files.path if tensors.files else None,
                format=self.name,
                files=(*tensors.files, *config_files),
                scale_origin={module: scale.origin for module, scale in scales.items()},
                base_model=config.base_model,
                rank=rank if initial is None or rank is None else 2 * rank,
                findings=findings,
                metadata=tensors.metadata,
                **(run_facts(files.weights.parent) if tensors.files else {}),
            ),
            saved_modules=LazyTensors(tensors, saved),
            config={**config.raw, FUSED_PARTS: parts} if parts else config.raw,
            side_tensors=_side_tensors(tensors, others) if others else {},
        )


FORMAT: Final = _PEFT()


def locate_peft_files(path: Path, options: ReadOptions) -> AdapterFiles | None:
    """Return the files of the adapter at ``path``: a folder, its config, weights or index.

    Weights that ``path`` names are taken, else safetensors first, as PEFT does. Files of any other
    name, and folders without a config of PEFT's, must hold factors. A broken config is taken for
    PEFT's, so that reading the adapter reports what is wrong.
    """
    is_named = path.name in _STORED and path.is_file()
    is_shard = (
        path.match("adapter_model-*-of-*.safetensors") and path.with_name(_INDEX_NAME).is_file()
    )
    is_other = not (path.is_dir() or is_shard or path.name in (CONFIG_NAME, *_STORED))
    if is_other and not (path.is_file() and _holds_factors(path, options)):
        return None
    folder = path if path.is_dir() else path.parent
    stored = [folder / name for name in _STORED if (folder / name).is_file()]
    first = stored[0] if stored else folder / WEIGHTS_NAME
    weights = path if is_named or is_other else first
    adapter_path = folder if weights == first else weights
    config_path = folder / CONFIG_NAME
    if config_path.exists():
        try:
            config = read_json_object(config_path)
        except (MalformedFileError, SourceError):  # a pipe is not opened
            return AdapterFiles(adapter_path, weights, config_path)
        if names_a_method(config):
            return AdapterFiles(adapter_path, weights, config_path, config)
    if is_other:
        return AdapterFiles(path, path)
    if stored and _holds_factors(weights, options):
        return AdapterFiles(adapter_path, weights, config_path if config_path.is_file() else None)
    return None


def _holds_factors(weights: Path, options: ReadOptions) -> bool:
    tensors = tensors_at(weights, options)
    return tensors is not None and has_factors(tensors.infos)


def _check_weights(files: AdapterFiles, options: ReadOptions) -> None:
    """Raise if the weights are missing, or are a pickle that the caller has not allowed."""
    if files.weights.is_file():
        if files.weights.name == _PICKLE_NAME and not options.allow_pickle:
            regular_file_size(files.weights)  # a Git LFS pointer is not a pickle
            raise pickle_error(files.weights)
        return
    folder = files.weights.parent
    if files.weights.is_symlink():
        link = files.weights.readlink()
        message = f"{files.weights} is a link to '{link}', which does not exist."
        raise SourceError(message)
    names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6])
    message = (
        f"{folder}: {CONFIG_NAME} has no {WEIGHTS_NAME} next to it. The folder holds: {names}. If "
        "one of these holds the adapter, name the file itself."
    )
    raise SourceError(message)


@dataclass(frozen=True, slots=True)
class _Stored:
    """The weights of one adapter."""

    tensors: NamedTensors
    keys: SortedKeys
    chosen: str | None
    content: PeftPairs


def _open(
    files: AdapterFiles, name: str | None, config: PeftConfig, options: ReadOptions
) -> _Stored:
    """Open the weights of the adapter called ``name``, or of the only one."""
    if files.tensors is None:
        _check_weights(files, options)
    tensors = files.open(options)
    keys = sort_keys(files.weights, tensors.infos)
    names = list(keys.factors)
    if not names:
        if keys.saved or keys.notes:
            first = ", ".join(list(keys.saved.get(None, {}))[:3]) or "none"
            message = f"{files.weights}: no LoRA factors found. First tensors: {first}."
        else:
            message = (
                f"{files.weights}: the file holds no tensors. DeepSpeed ZeRO-3 leaves such a file "
                f"if the parts of the model were not gathered when it was saved. {GATHER}"
            )
        raise MalformedFileError(message)
    if len(names) > 1 and None in names:
        message = f"{files.weights}: some factors carry an adapter's name and others do not."
        raise MalformedFileError(message)
    chosen = names[0] if name is None and len(names) == 1 else name
    if chosen not in names:
        listed = ", ".join(f"'{files.path}#{n}'" for n in names if n) or "one without a name"
        problem = "Several adapters are" if name is None else f"There is no adapter '{name}'"
        message = f"{files.weights}: {problem} in this file. Read one of: {listed}."
        raise SourceError(message)
    content = read_pairs(files.weights, tensors, keys, chosen, config=config, options=options)
    return _Stored(tensors, keys, chosen, content)


def _initial_factors(
    files: AdapterFiles, stored: _Stored, config: PeftConfig, options: ReadOptions
) -> InitialFactorsSource | None:
    """Return the source of the initial factors, if they have to be subtracted.

    Raises
    ------
    UnsupportedMethodError
        They have to be, and the caller gives none.
    """
    if options.initial is None:
        if not config.subtracted:
            return None
        recomputed = (
            " For PiSSA and OLoRA, initial=initial_factors_from_base(base) computes them from the "
            "base weights (command line: --trained-on BASE)."
            if config.subtracted in ("PiSSA", "OLoRA")
            else ""
        )
        message = (
            f"{config.path}: init_lora_weights is '{config.start}': {config.subtracted} starts "
            "from W - s·B0·A0, so B·A is not the update of the original weight. Pass initial= "
            "(command line: --initial), the adapter as saved before training; or save it again "
            f"with PEFT's path_initial_model_for_weight_conversion.{recomputed}"
        )
        raise UnsupportedMethodError(message)
    if callable(options.initial):
        return options.initial
    source = resolve_source(options.initial)
    with addresses_in_errors(source.snapshot):
        initial_files = locate_peft_files(source.path, options)
        if initial_files is None:
            message = f"{source.path}: no PEFT adapter found here to read the initial factors from."
            raise UnknownFormatError(message)
        before = _open(initial_files, source.name, config, options)
        pairs = {pair.module: pair for pair in before.content.pairs}
        initial = StoredInitialFactors(before.tensors, pairs, source.snapshot)
        check_initial_factors(files.weights, stored.tensors, stored.content.pairs, initial)
    return initial


def _stated_scale(
    files: AdapterFiles,
    stored: _Stored,
    pair: StoredPair,
    rank: int,
    *,
    config: PeftConfig,
    options: ReadOptions,
) -> StatedScale:
    """Return the multiplier of one module: the caller's, else its live layer's or the config's.

    AdaLoRA's is alpha over the rank before pruning: ``alpha/(ranknum + 1e-5)``, with ranknum as
    stored (old files), else the rank that training started from; an alpha that is not positive
    stands for the rank (PEFT, ``adalora/layer.py``).
    """
    if config.adalora and options.scale is None:
        alpha = config.alpha if options.alpha is None else options.alpha
        if alpha is None:
            return UNKNOWN_SCALE
        divisor = stored.content.divisors.get(pair.module)
        ranknum = float(stored.tensors.read(divisor).reshape(-1)[0]) if divisor else 0.0
        before = ranknum or float(config.rank or rank)
        origin: ScaleOrigin = "config" if options.alpha is None else "caller"
        return StatedScale((alpha if alpha > 0 else rank) / (before + 1e-5), alpha, origin)
    if given := callers_scale(options, rank, rslora=config.use_rslora):
        return given
    name = stored.content.config_names.get(pair.module, pair.module)
    scale, applied = config.stated_scale(name, rank), files.scales.get(pair.a.name)
    if applied is None or (
        scale.scale is not None and math.isclose(scale.scale, applied, rel_tol=1e-9)
    ):
        return scale
    return StatedScale(applied, None, "model")


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
        if saves_in_full(config, name):
            continue
        if name.endswith(".bias") and config.raw.get("bias", "none") != "none":
            others.setdefault(BASE_BIASES, []).append(saved.pop(name))
        else:
            others.setdefault(_UNNAMED, []).append(name)
    return saved, others, empty


def _side_tensors(tensors: NamedTensors, others: Mapping[str, list[str]]) -> dict[str, SideTensor]:
    """Return the tensors next to the factors and the modules trained in full."""
    side = {what: keys for what, keys in others.items() if what not in (_IN_FULL, _UNNAMED)}
    harmless = {key for what, keys in side.items() if what not in ALTERING for key in keys}
    return side_tensors(tensors, chain(*side.values()), harmless=harmless)


def _loaders(
    tensors: NamedTensors,
    pairs: Sequence[StoredPair],
    scales: Mapping[str, StatedScale],
    *,
    label: str,
    config: PeftConfig,
    initial: InitialFactorsSource | None,
) -> dict[str, Callable[[], LowRankUpdate]]:
    """Return a function per module that reads its update and subtracts the initial factors."""
    config_ranks = {
        rank for rank in (config.rank, *config.rank_pattern.values()) if rank is not None
    }
    loaders = update_loaders(tensors, pairs, scales, label=label, stated_ranks=config_ranks)
    if initial is None:
        return loaders
    return {
        module: partial(subtract_init_offset, load, initial, config.start)
        for module, load in loaders.items()
    }


def _findings(
    files: AdapterFiles,
    stored: _Stored,
    config: PeftConfig,
    ranks: Mapping[str, int],
    *,
    scales: Mapping[str, StatedScale],
    others: Mapping[str, list[str]],
    empty: Sequence[str],
    initial: InitialFactorsSource | None,
) -> tuple[Finding, ...]:
    """Return all findings about an adapter's files."""
    findings = _config_findings(files, stored, config, ranks, scales=scales, others=others)
    findings += _tensor_findings(files, others, empty)
    if initial is not None:
        findings.append(offset_finding(config.subtracted or "the given initialization"))
    elif config.start == "mica":
        findings.append(Finding("mica"))
    metadata = stored.tensors.metadata
    findings += config_findings(metadata, config.raw, files.weights, files.config_path)
    return as_findings(tuple(findings))


def _config_findings(
    files: AdapterFiles,
    stored: _Stored,
    config: PeftConfig,
    ranks: Mapping[str, int],
    *,
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
    findings += scale_findings(scales, f"{CONFIG_NAME} states no lora_alpha")
    names = {module: pairs.config_names.get(module, module) for module in ranks}
    config_ranks = {module: config.stated_rank(name) for module, name in names.items()}
    differing = [module for module in ranks if config_ranks[module] not in (None, ranks[module])]
    if differing and not config.adalora:  # which cuts its ranks itself
        first = differing[0]
        fields = {"modules": len(differing), "of": len(ranks), "first": first}
        fields |= {"stated": config_ranks[first], "rank": ranks[first]}
        findings.append(Finding("config-rank-differs", fields))
    if config.raw.get("alora_invocation_tokens"):
        findings.append(Finding("alora"))
    findings += pairs.findings
    saved = {name for names in stored.keys.saved.values() for name in names}
    modules = ModuleInventory(
        adapted=list(names.values()),
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
    for what, keys in others.items():
        code = "tensors-in-full" if what in (_IN_FULL, _UNNAMED) else "tensors-beside"
        findings.append(Finding(code, {"count": len(keys), "what": what, "first": keys[0]}))
    if files.tensors is None:
        paths = sorted(files.weights.parent.glob(_SIDE_FILES))
        side_files = [path.name for path in paths if path.suffix in CONTAINER_SUFFIXES]
        findings += [Finding("side-file", {"file": name}) for name in side_files]
    return findings

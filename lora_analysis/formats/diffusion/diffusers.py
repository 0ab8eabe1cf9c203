"""Files of diffusers' ``save_lora_weights``, ``save_lora_adapter`` and ``save_attn_procs``.

Three eras of keys, which one file may mix: attention processors (``attn1.processor.to_q_lora.
down.weight``), ``attn1.to_q.lora.down.weight`` (text encoders: ``lora_linear_layer``), and PEFT's
``lora_A.weight``. A module's name is its path in the base, after the component where the file
names it: ``unet.``, ``text_encoder.``, ``transformer.`` keep alike paths of two models apart.

The scale is stated by an ``alpha`` tensor or by the metadata ``lora_adapter_metadata`` (PEFT's
config per component, as JSON) of newer files. Without them the alpha of the training is lost;
loaders then multiply by 1, whatever it was. Reference: diffusers 0.42 ``loaders/lora_base.py``,
``loaders/lora_conversion_utils.py``, ``utils/state_dict_utils.py``.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.adapter import Adapter, LazyUpdate, LowRankUpdate
from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.formats.diffusion import kohya
from lora_analysis.formats.diffusion.image_scheme import complete_image
from lora_analysis.formats.factors import StatedScale, scale_from_alpha
from lora_analysis.formats.initial import AdapterStart, adapter_less_start
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, StoredModules, has_factors
from lora_analysis.formats.peft.adapter_config import SUBTRACTED
from lora_analysis.formats.side_tensors import source_format
from lora_analysis.formats.sources import AdapterFiles, resolve_source
from lora_analysis.patterns import ModulePatterns
from lora_analysis.storage.documents import parse_json_text
from lora_analysis.storage.source_names import shown_errors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_analysis.adapter import Update
    from lora_analysis.formats.build import AdapterParts
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

NAME: Final = "diffusers"
METADATA_KEY: Final = "lora_adapter_metadata"

# Models of a pipeline, by the attribute that holds them.
COMPONENT: Final = re.compile(r"(unet|transformer(_2)?|text_encoder(_[234])?|prior)(?=\.)")

_LOST: Final = (
    "the file has neither alphas nor metadata, and diffusers' own loaders then take a scale of 1, "
    "whatever the training's was"
)
_CLIP: Final = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def _of_processor(module: str) -> str:
    """Return ``attn1.to_out.0`` for ``attn1.processor.to_out``: the layer beside the processor."""
    plain = module.replace(".processor.", ".")
    return f"{plain}.0" if plain.endswith(".to_out") else plain


def _of_text_encoder(module: str) -> str:
    path, _, projection = module.rpartition(".")
    return f"{path}.{_CLIP[projection]}" if projection in _CLIP else module


_PROCESSORS: Final = KeyPattern(
    re.compile(
        r"(?P<module>.+\.processor\.(to_[qkv]|to_out|add_[qkv]_proj|to_add_out))_lora"
        r"\.(?P<role>down|up)\.weight"
    ),
    reason=_LOST,
    rename=_of_processor,
)
_OLD_TEXT_ENCODER: Final = KeyPattern(
    re.compile(
        r"(?P<module>text_encoder.*\.self_attn\.to_(q|k|v|out))_lora\.(?P<role>down|up)\.weight"
    ),
    reason=_LOST,
    rename=_of_text_encoder,
)
_LAYERS: Final = KeyPattern(
    re.compile(r"(?P<module>.+)\.lora(_linear_layer)?\.(?P<role>down|up)\.weight"),
    reason=_LOST,
)
_PEFT: Final = KeyPattern(
    re.compile(r"(?P<module>.+)\.lora_(?P<role>[AB])(\.[^.]+)?\.weight"),
    reason=_LOST,
)
# PEFT's keys are diffusers' where a component comes first. Language models of the GPT family are
# called "transformer" as well: there the projections must have diffusers' names.
_PEFT_OF_COMPONENT: Final = (
    KeyPattern(
        re.compile(
            r"(?P<module>(unet|transformer_2|text_encoder(_[234])?|prior)\..+)"
            r"\.lora_(?P<role>[AB])(\.[^.]+)?\.weight"
        ),
        reason=_LOST,
    ),
    KeyPattern(
        re.compile(
            r"(?P<module>transformer\.(.+\.)?"
            r"((single_)?transformer_blocks\..+|to_[qkv]|to_out\.0|add_[qkv]_proj))"
            r"\.lora_(?P<role>[AB])(\.[^.]+)?\.weight"
        ),
        reason=_LOST,
    ),
)
# Prefixes of PEFT's own files and of those under the names of FLUX's authors.
_OF_OTHERS: Final = re.compile(
    r"(base_model|diffusion_model|text_encoders|(double|single)_blocks)\."
)
KEYS: Final = (_PROCESSORS, _OLD_TEXT_ENCODER, _LAYERS, _PEFT, *kohya.KEYS)
_MARKS: Final = (_PROCESSORS, _OLD_TEXT_ENCODER, _LAYERS, *_PEFT_OF_COMPONENT)


def _is_marked(tensors: NamedTensors) -> bool:
    keys = tensors.infos
    # Converters of image models put alphas next to PEFT's factors.
    has_alphas = any(
        key.endswith(".alpha")
        and f"{key.removesuffix('.alpha')}.lora_A.weight" in keys
        and not _OF_OTHERS.match(key)
        for key in keys
    )
    has_marks = METADATA_KEY in tensors.metadata or has_alphas
    return has_factors(keys, _MARKS) or (has_marks and has_factors(keys, [_PEFT]))


def _complete(stored: StoredModules) -> AdapterParts:
    configs = _Metadata.of(stored.path, stored.tensors.metadata)
    return complete_image(stored, stated_scale=configs.stated_scale)


class _Diffusers(KeyScheme):
    """Diffusers' keys; the initial product that the metadata name is subtracted."""

    def read(self, files: AdapterFiles, name: str | None, options: ReadOptions) -> Adapter:
        """Read the file; the factors of all its components are one adapter.

        Raises
        ------
        MalformedFileError
            A module has one factor only, its factors do not fit, or the metadata is damaged.
        UnsupportedMethodError
            Another method's tensors are next to the factors, or the metadata names an
            initialization after which ``s·B·A`` is not the update, and the initial factors are not
            given.
        """
        adapter = super().read(files, name, options)
        configs = _Metadata.of(files.path, adapter.provenance.metadata)
        methods = {module: start for module in adapter if (start := configs.start_of(module))}
        if not methods:
            return adapter
        if options.initial is None:
            raise _start_needed(files.path, next(iter(methods.values())))
        if callable(options.initial):
            return adapter_less_start(adapter, options.initial, methods)
        source = resolve_source(options.initial, allow_pickle=options.allow_pickle)
        with shown_errors(source.snapshot):
            before = KeyScheme(NAME, KEYS, complete_image).read(
                AdapterFiles(source.path, source.path),
                None,
                replace(options, initial=None, scale=1.0, alpha=None),
            )
        return adapter_less_start(adapter, AdapterStart(before), methods)


FORMAT: Final = _Diffusers(NAME, KEYS, _complete, is_marked=_is_marked)


def _start_needed(path: Path, start: str) -> UnsupportedMethodError:
    method = next(name for key, name in SUBTRACTED.items() if start.startswith(key))
    return UnsupportedMethodError(
        f"{path}: init_lora_weights is '{start}': {method} starts from W - s·B0·A0, so B·A is not "
        "the update of the original weight. Pass initial= (command line: --initial), the file as "
        "saved before training; of PiSSA and OLoRA the base alone is enough (--trained-on BASE)."
    )


def with_loaders_scale(adapter: Adapter) -> Adapter:
    """Return an adapter from a diffusers file with the scale that its loaders take.

    If nothing in the file states a scale, that of the training is unknown; every program that
    loads the file multiplies by 1, and a file for such programs has to state the same.
    """
    source = adapter.provenance
    unknown = [name for name, origin in source.scale_origin.items() if origin == "unknown"]
    if source_format(adapter) != NAME or not unknown:
        return adapter
    fields = {"count": len(unknown), "total": len(adapter)}
    others = (finding for finding in source.findings if finding.code != "scale-unknown")
    updates = {}
    for name in adapter:
        outline = adapter.outline(name)
        if outline.scale is None and not outline.dense:
            outline = replace(outline, scale=1.0, alpha=float(outline.rank))
        updates[name] = LazyUpdate(outline, partial(_at_loaders_scale, adapter, name))
    return adapter.copy_with(
        updates=updates,
        provenance=replace(
            source,
            scale_origin={**source.scale_origin, **dict.fromkeys(unknown, "format")},
            findings=(*others, Finding("loaders-scale", fields)),
        ),
    )


def _at_loaders_scale(adapter: Adapter, name: str) -> Update:
    update = adapter[name]
    if not isinstance(update, LowRankUpdate) or update.scale is not None:
        return update
    return replace(update, scale=1.0, alpha=float(update.rank))


@dataclass(frozen=True, slots=True)
class _Metadata:
    """PEFT's config of each component; the config of a file for one model has the empty name."""

    path: Path
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str]) -> _Metadata:
        """Return the configs in the metadata of a file, empty if it has none."""
        if METADATA_KEY not in metadata:
            return cls(path)
        fields = parse_json_text(metadata[METADATA_KEY], path, what=f"metadata '{METADATA_KEY}'")
        configs: dict[str, dict[str, Any]] = {}
        for key, value in fields.items():
            component = COMPONENT.match(key)
            prefix = component[0] if component else ""
            configs.setdefault(prefix, {})[key.removeprefix(f"{prefix}.")] = value
        for config in configs.values():
            _check(path, config)
            config["alpha_pattern"] = ModulePatterns(config.get("alpha_pattern") or {})
        return cls(path, configs)

    def _config_of(self, module: str) -> tuple[str, Mapping[str, Any]]:
        component = COMPONENT.match(module)
        prefix = component[0] if component else ""
        return prefix, self.configs.get(prefix, {})

    def start_of(self, module: str) -> str | None:
        """Return a module's ``init_lora_weights`` if its initial product was subtracted."""
        start = str(self._config_of(module)[1].get("init_lora_weights", True)).lower()
        return start if start.startswith(tuple(SUBTRACTED)) else None

    def stated_scale(self, module: str, rank: int) -> StatedScale | None:
        """Return the scale that the component's config gives a module of a rank."""
        prefix, config = self._config_of(module)
        if not config or "lora_alpha" not in config:
            return None
        name = module.removeprefix(f"{prefix}.")
        try:
            alpha = config["alpha_pattern"].value(name, config["lora_alpha"])
        except InputError as error:
            message = f"{self.path}: alpha_pattern in '{METADATA_KEY}': {error}"
            raise MalformedFileError(message) from error
        rslora = bool(config.get("use_rslora"))
        return scale_from_alpha(float(alpha), rank, "metadata", rslora=rslora)


def _check(path: Path, config: Mapping[str, Any]) -> None:
    """Raise if a config has wrong types, or names a method that is not ``s·B·A``."""
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        message = f"{path}: alpha_pattern in '{METADATA_KEY}' must be a JSON object."
        raise MalformedFileError(message)
    for alpha in (config.get("lora_alpha", 1), *pattern.values()):
        if type(alpha) not in (int, float) or not abs(alpha) <= sys.float_info.max:
            message = f"{path}: '{METADATA_KEY}' gives {alpha!r} as an alpha."
            raise MalformedFileError(message)
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith("loftq"):
        message = (
            f"{path}: init_lora_weights is '{start}': LoftQ changes the base weight at the start, "
            "so B·A is not the update of the original weight."
        )
        raise UnsupportedMethodError(message)

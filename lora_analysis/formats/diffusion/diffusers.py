"""Files of diffusers' ``save_lora_weights``, ``save_lora_adapter`` and ``save_attn_procs``.

Three eras of keys, which one file may mix: attention processors (``attn1.processor.to_q_lora.
down.weight``), ``attn1.to_q.lora.down.weight`` (text encoders: ``lora_linear_layer``), and PEFT's
``lora_A.weight``. A module's name is its path in the base, after the component where the file
names it: ``unet.``, ``text_encoder.``, ``transformer.`` keep alike paths of two models apart.

The scale is stated by an ``alpha`` tensor or by the metadata ``lora_adapter_metadata`` (PEFT's
config per component, as JSON) of newer files. Without them the alpha of the training is lost;
loaders then multiply by 1, whatever it was. Reference: diffusers 0.42 ``loaders/lora_base.py``,
``loaders/lora_conversion_utils.py``, ``utils/state_dict_utils.py``.

A file is written as diffusers saves it now: PEFT's keys, and the config of each component as
metadata.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.adapter import Adapter, LazyUpdate, LowRankUpdate
from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.formats.diffusion import kohya
from lora_analysis.formats.diffusion.image_names import FLATTENED
from lora_analysis.formats.diffusion.image_scheme import FACTOR_KEYS, complete_image
from lora_analysis.formats.diffusion.image_writing import PlannedModule, image_file, planned_modules
from lora_analysis.formats.factors import StatedScale, scale_from_alpha
from lora_analysis.formats.initial import AdapterInitialFactors, subtract_init_offsets
from lora_analysis.formats.key_scheme import KeyPattern, KeyScheme, StoredModules, has_factors
from lora_analysis.formats.peft.adapter_config import SUBTRACTED
from lora_analysis.formats.side_tensors import side_output, source_format
from lora_analysis.formats.sources import AdapterFiles, resolve_source
from lora_analysis.formats.written import default_and_others, is_dora, json_number
from lora_analysis.patterns import ModulePatterns
from lora_analysis.storage.documents import parse_json_text
from lora_analysis.storage.source_names import addresses_in_errors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_analysis.adapter import Update
    from lora_analysis.formats.build import AdapterParts
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.atomic import Content
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
    """Return ``attn1.to_out.0`` for ``attn1.processor.to_out``: the layer next to the processor."""
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
        # Modules whose initial product was subtracted, and their init_lora_weights.
        methods = {}
        for module in adapter:
            start = str(configs.config_of(module)[1].get("init_lora_weights", True)).lower()
            if start.startswith(tuple(SUBTRACTED)):
                methods[module] = start
        if not methods:
            return adapter
        if options.initial is None:
            start = next(iter(methods.values()))
            method = next(name for key, name in SUBTRACTED.items() if start.startswith(key))
            message = (
                f"{files.path}: init_lora_weights is '{start}': {method} starts from W - s·B0·A0, "
                "so B·A is not the update of the original weight. Pass initial= (command line: "
                "--initial), the file as saved before training; of PiSSA and OLoRA the base alone "
                "is enough (--trained-on BASE)."
            )
            raise UnsupportedMethodError(message)
        if callable(options.initial):
            return subtract_init_offsets(adapter, options.initial, methods)
        source = resolve_source(options.initial, allow_pickle=options.allow_pickle)
        with addresses_in_errors(source.snapshot):
            before = KeyScheme(NAME, KEYS, complete_image).read(
                AdapterFiles(source.path, source.path),
                None,
                replace(options, initial=None, scale=1.0, alpha=None),
            )
        return subtract_init_offsets(adapter, AdapterInitialFactors(before), methods)


FORMAT: Final = _Diffusers(NAME, KEYS, _complete, is_marked=_is_marked)


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
        updates[name] = LazyUpdate(outline, partial(_set_loaders_scale, adapter, name))
    return adapter.copy_with(
        updates=updates,
        provenance=replace(
            source,
            scale_origin={**source.scale_origin, **dict.fromkeys(unknown, "format")},
            findings=(*others, Finding("loaders-scale", fields)),
        ),
    )


def _set_loaders_scale(adapter: Adapter, name: str) -> Update:
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

    def config_of(self, module: str) -> tuple[str, Mapping[str, Any]]:
        """Return the component that a module is in, and the component's config."""
        component = COMPONENT.match(module)
        prefix = component[0] if component else ""
        return prefix, self.configs.get(prefix, {})

    def stated_scale(self, module: str, rank: int) -> StatedScale | None:
        """Return the scale that the component's config gives a module of a rank."""
        prefix, config = self.config_of(module)
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


FILE_NAME: Final = "pytorch_lora_weights.safetensors"
_BIAS: Final = re.compile(r"\.lora_B(\.[^.]+)?\.bias$")


def contents(adapter: Adapter) -> dict[str, Content]:
    """Return ``adapter`` as diffusers' file, by its name; see :func:`lora_analysis.write_adapter`.

    Modules named after a component of a pipeline (``unet.``, ``transformer.``, ``text_encoder.``)
    make a file of ``save_lora_weights``; without any, one of ``save_lora_adapter`` for one model.
    """
    modules = planned_modules(adapter, NAME, input_norms=False)
    tensors = side_output(adapter, NAME)
    has_bias = any(_BIAS.search(tensor.name) for tensor in tensors)
    earlier = _keys_of_earlier_eras(adapter, modules)
    for name, plan in modules.items():
        if name in earlier:
            a, b, alpha = earlier[name]
            tensors += plan.tensors(adapter, a, b, alpha=alpha)
        else:
            if FLATTENED.fullmatch(name) or not kohya.PATH.fullmatch(name):
                message = f"'{name}' is not a path of a module, by which diffusers finds the layer."
                raise InputError(message)
            tensors += plan.tensors(
                adapter,
                f"{name}.lora_A.weight",
                f"{name}.lora_B.weight",
                norms=f"{name}.lora_magnitude_vector",
                peft_norms=True,
            )
    fields: dict[str, Any] = {}
    plain = {name: plan for name, plan in modules.items() if name not in earlier}
    for component, members in _components(plain).items():
        prefix = f"{component}." if component else ""
        config = _config(members, component) | ({"lora_bias": True} if has_bias else {})
        fields |= {f"{prefix}{key}": value for key, value in config.items()}
    text = json.dumps(fields, indent=2, sort_keys=True, allow_nan=False)
    more = {METADATA_KEY: text} if plain else {}
    return image_file(adapter, NAME, FILE_NAME, modules.values(), tensors, more=more)


def _keys_of_earlier_eras(
    adapter: Adapter, modules: Mapping[str, PlannedModule]
) -> dict[str, tuple[str, str, str | None]]:
    """Return the keys of modules that stay as their file of diffusers spelled them.

    Not all programs that load an earlier spelling load PEFT's. It has no key for DoRA's norms, and
    stores a scale only with an alpha; if a file states PEFT's config, that counts.
    """
    stored = adapter.config.get(FACTOR_KEYS, {})
    if source_format(adapter) != NAME or METADATA_KEY in adapter.provenance.metadata:
        return {}
    return {
        name: keys
        for name, keys in stored.items()
        if name in modules
        and not (outline := modules[name].outline).has_magnitude
        and (outline.scale == 1 or keys[2])
    }


def _components(modules: Mapping[str, PlannedModule]) -> dict[str, dict[str, PlannedModule]]:
    """Return the modules by component and their names in it; all or none must name one."""
    components: dict[str, dict[str, PlannedModule]] = {}
    for module, plan in modules.items():
        match = COMPONENT.match(module)
        component = match[0] if match else ""
        components.setdefault(component, {})[module.removeprefix(f"{component}.")] = plan
    if "" in components and len(components) > 1:
        inside = next(module for module in modules if COMPONENT.match(module))
        outside = next(iter(components[""]))
        message = (
            f"'{inside}' names a component of a pipeline and '{outside}' does not; a file of "
            "diffusers is for a pipeline or for one model."
        )
        raise InputError(message)
    return components


def _config(modules: Mapping[str, PlannedModule], component: str) -> dict[str, Any]:
    """Return PEFT's config of one component; a module that differs has an anchored key."""
    dora = is_dora((p.outline for p in modules.values()), f"'{component or 'the model'}'", NAME)
    rank, ranks = default_and_others({name: p.outline.rank for name, p in modules.items()})
    alpha, alphas = default_and_others({name: json_number(p.alpha) for name, p in modules.items()})
    return {
        "alpha_pattern": _anchor_patterns(alphas),
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _anchor_patterns(ranks),
        "target_modules": list(modules),
        "use_dora": dora,
        "use_rslora": False,
    }


def _anchor_patterns(values: Mapping[str, float]) -> dict[str, float]:
    """Return values under patterns that match one module each."""
    return {f"^{re.escape(name)}": value for name, value in values.items()}

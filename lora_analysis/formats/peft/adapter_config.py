"""``adapter_config.json`` of PEFT: its types checked, its scale rule, and the methods it names."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.formats.factors import UNKNOWN_SCALE, StatedScale, scale_from_alpha
from lora_analysis.patterns import ModulePatterns, pattern_value
from lora_analysis.storage.documents import read_json_object

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

T = TypeVar("T")

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"

# More layers than any model has; a range is written out, and must not cost memory.
_MAX_LAYERS: Final = 10_000
_MAX_BLOCK_NAMES: Final = 1000

# Initializations after which training starts from W + s·B₀A₀ = W: what is stored is the update.
_PLAIN_INITIALIZATIONS: Final = frozenset(
    {"gaussian", "eva", "orthogonal", "mica", "true", "false"}
)

# Those that subtract their initial product from the base weight: the update is s·(B·A - B₀·A₀).
SUBTRACTED: Final = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA"}

_REFUSED_INITIALIZATIONS: Final = {
    "loftq": "LoftQ replaces the base weight by a quantized one that B·A corrects",
}

_VARIANTS: Final = {
    "use_qalora": "QA-LoRA pools the input before A",
    "use_qa_lora": "QA-LoRA pools the input before A",
    "arrow_config": "Arrow routes each token through several adapters",
    "monteclora_config": "MonteCLoRA samples around the factors",
    "enable_lora": "MergedLinear of early PEFT stores the blocks of a fused weight in one",
}

# Content of the files of other methods, if a word makes the reason plainer than the name does.
_VIRTUAL: Final = "virtual tokens"
_OTHER_METHODS: Final = {
    "OFT": "a rotation of the weight",
    "BOFT": "a rotation of the weight",
    "HRA": "reflections of the weight",
    "VERA": "two vectors around random matrices that all modules share",
    "PVERA": "vectors around random matrices that all modules share",
    "RANDLORA": "diagonals between random matrices that all modules share",
    "VBLORA": "indices into a bank of vectors that all modules share",
    "IA3": "a factor per feature",
    "LN_TUNING": "the norms, trained in full",
    "FOURIERFT": "Fourier coefficients",
    "C3A": "circulant blocks",
    "SHIRA": "single entries of the weight",
    "HIRA": "a Hadamard product with the weight",
    "TRAINABLE_TOKENS": "rows of the embedding",
    "PROMPT_TUNING": _VIRTUAL,
    "MULTITASK_PROMPT_TUNING": _VIRTUAL,
    "P_TUNING": _VIRTUAL,
    "PREFIX_TUNING": _VIRTUAL,
    "CPT": _VIRTUAL,
    "ADAPTION_PROMPT": _VIRTUAL,
    "CARTRIDGE": _VIRTUAL,
}

# Methods that PEFT's convert_to_lora approximates by a LoRA.
_CONVERTIBLE: Final = frozenset(
    {
        "C3A", "DELORA", "FOURIERFT", "GRALORA", "MISS", "PSOFT", "RANDLORA", "SHIRA", "TINYLORA",
        "UNILORA", "VBLORA", "VERA", "WAVEFT",
    }
)  # fmt: skip

# PEFT's fields that add more to a model than factors and modules trained in full.
_FURTHER_FIELDS: Final = ("bias", "lora_bias", "alora_invocation_tokens", "trainable_token_indices")


@dataclass(frozen=True, slots=True)
class Blocks:
    """BD-LoRA's blocks: their number, and parts of the names of modules whose A or B has them."""

    count: int
    in_a: tuple[str, ...]
    in_b: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields of an ``adapter_config.json`` that decide about the update.

    ``subtracted`` names the method whose initial product was subtracted from the base weight,
    ``start`` spells it as the file does. ``replicated`` holds the ranges of layers that were
    put one after the other. ``assumed`` is True if the file names no
    method. ``raw`` is the whole document, kept for a writer to give back.
    """

    path: Path | None = None
    adalora: bool = False
    start: str = "true"
    subtracted: str = ""
    use_dora: bool = False
    target_parameters: tuple[str, ...] = ()
    replicated: tuple[tuple[int, int], ...] = ()
    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    base_model: str | None = None
    blocks: Blocks | None = None
    assumed: bool = False
    raw: Mapping[str, Any] = field(default_factory=dict)

    def stated_scale(self, module: str, rank: int) -> StatedScale:
        """Return the multiplier of one module, whose rank is the one of its tensors."""
        alpha = self._value(module, "alpha_pattern", self.alpha_pattern, self.alpha)
        if alpha is None:
            return UNKNOWN_SCALE
        return scale_from_alpha(alpha, rank, "config", rslora=self.use_rslora)

    def stated_rank(self, module: str) -> int | None:
        """Return the rank the config gives a module; the tensors have the last word."""
        return self._value(module, "rank_pattern", self.rank_pattern, self.rank)

    def _value(
        self, module: str, key: str, patterns: Mapping[str, T], default: T | None
    ) -> T | None:
        if not patterns:
            return default
        try:
            return pattern_value(module, patterns, default)
        except InputError as error:
            message = f"{self.path}: {key}: {error}"
            raise MalformedFileError(message) from error


def read_peft_config(path: Path, document: Mapping[str, Any] | None = None) -> PeftConfig:
    """Return the checked content of an ``adapter_config.json``; ``document`` if it was read.

    Raises
    ------
    MalformedFileError
        A field that decides about the update has a wrong type.
    UnsupportedMethodError
        The adapter is of a type, a variant or an initialization whose update is not ``s·B·A``.
    """
    raw = read_json_object(path) if document is None else document
    _refuse_other_methods(path, raw)
    start = str(raw.get("init_lora_weights", True)).lower()
    adalora = method_of(raw) == "ADALORA"
    return PeftConfig(
        path=path,
        adalora=adalora,
        start=start,
        subtracted=next((name for key, name in SUBTRACTED.items() if start.startswith(key)), ""),
        use_dora=bool(_optional(_flag, path, "use_dora", raw)),
        target_parameters=_optional(_names, path, "target_parameters", raw) or (),
        replicated=_optional(_ranges, path, "layer_replication", raw) or (),
        rank=_optional(_rank, path, "init_r" if adalora else "r", raw),
        alpha=_optional(_number, path, "lora_alpha", raw),
        # AdaLoRA's holds which rows were kept; those that were not are cut from the tensors.
        rank_pattern={} if adalora else _pattern(_rank, path, "rank_pattern", raw),
        alpha_pattern=_pattern(_number, path, "alpha_pattern", raw),
        use_rslora=bool(_optional(_flag, path, "use_rslora", raw)),
        fan_in_fan_out=bool(_optional(_flag, path, "fan_in_fan_out", raw)),
        modules_to_save=_optional(_names, path, "modules_to_save", raw) or (),
        base_model=_optional(_text, path, "base_model_name_or_path", raw),
        assumed=_is_bare(raw),
        blocks=_optional(_blocks, path, "use_bdlora", raw),
        raw=raw,
    )


def names_a_method(raw: Mapping[str, Any]) -> bool:
    """Return True for a configuration of PEFT, or of ms-swift, which has its fields."""
    return "peft_type" in raw or "swift_type" in raw


def _is_bare(raw: Mapping[str, Any]) -> bool:
    """Return True for a config that states rank and alpha in PEFT's words and no method."""
    return not names_a_method(raw) and ("lora_alpha" in raw or "r" in raw)


def method_of(raw: Mapping[str, Any]) -> object:
    """Return the method's name: ms-swift writes its own next to PEFT's, or in place of it."""
    return raw.get("peft_type", raw.get("swift_type"))


def _refuse_other_methods(path: Path, raw: Mapping[str, Any]) -> None:
    """Raise if the config names a method whose update is not ``s·B·A``."""
    peft_type = "LORA" if _is_bare(raw) else method_of(raw)
    if peft_type not in ("LORA", "ADALORA"):
        stored = _OTHER_METHODS.get(str(peft_type))
        hint = (
            "merge it into its base and read the merged model as a full fine-tune: "
            "`lora-analysis extract merged --base base`."
        )
        if str(peft_type) in _CONVERTIBLE:
            hint = f"Convert it with PEFT's convert_to_lora, or {hint}"
        elif stored == _VIRTUAL:
            hint = "It changes no weight of its base, so there is no update to analyze."
        else:
            hint = f"M{hint[1:]}"
        message = (
            f"{path}: peft_type is {peft_type!r}. Only 'LORA', 'ADALORA', 'LOHA' and 'LOKR' are "
            f"read: the other methods store no product that equals s·B·A"
            f"{f' (here: {stored})' if stored else ''}. {hint}"
        )
        raise UnsupportedMethodError(message)
    for key, reason in _VARIANTS.items():
        if raw.get(key):
            message = f"{path}: {key} is set: {reason}. Not read."
            raise UnsupportedMethodError(message)
    start = str(raw.get("init_lora_weights", True)).lower()
    readable = (*_PLAIN_INITIALIZATIONS, "none", *SUBTRACTED)
    if start in readable or start.startswith(tuple(SUBTRACTED)):
        return
    reason = _REFUSED_INITIALIZATIONS.get(
        start, "whether the base weight was changed with it is not known"
    )
    message = f"{path}: init_lora_weights is {start!r}: {reason}. Not read."
    raise UnsupportedMethodError(message)


def _optional(
    check: Callable[[Path, str, Any], T], path: Path, key: str, raw: Mapping[str, Any]
) -> T | None:
    """Return a field's checked value, None if it is absent or null."""
    value = raw.get(key)
    return None if value is None else check(path, key, value)


def _pattern(
    check: Callable[[Path, str, Any], T], path: Path, key: str, raw: Mapping[str, Any]
) -> ModulePatterns[T]:
    """Return a checked mapping of module patterns to numbers, empty if it is absent."""
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise _value_error(path, key, patterns, "an object of module patterns")
    return ModulePatterns(
        {name: check(path, f"{key}[{name!r}]", value) for name, value in patterns.items()}
    )


def _number(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise _value_error(path, key, value, "a finite number")
    return float(value)


def _rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise _value_error(path, key, value, "a positive integer")
    return value


def _flag(path: Path, key: str, value: Any) -> bool:
    if type(value) is not bool:
        raise _value_error(path, key, value, "true or false")
    return value


def _text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _value_error(path, key, value, "a string")
    return value


def _names(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise _value_error(path, key, value, "a list of module names")


def _ranges(path: Path, key: str, value: Any) -> tuple[tuple[int, int], ...]:
    """Return pairs of layer numbers, first and one past the last."""
    ranges = []
    for pair in value if isinstance(value, list) else [None]:
        first, stop = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if type(first) is not int or type(stop) is not int or not 0 <= first < stop <= _MAX_LAYERS:
            raise _value_error(path, key, value, "a list of [first, one past the last] layers")
        ranges.append((first, stop))
    return tuple(ranges)


def _blocks(path: Path, key: str, value: Any) -> Blocks | None:
    if not value:
        return None
    if not isinstance(value, dict):
        raise _value_error(
            path, key, value, "an object with nblocks and the modules that have blocks"
        )
    count = _optional(_rank, path, "nblocks", value)
    in_a, in_b = (
        _optional(_names, path, name, value) or ()
        for name in ("target_modules_bd_a", "target_modules_bd_b")
    )
    if len(in_a) + len(in_b) > _MAX_BLOCK_NAMES:  # each is looked for in every module's name
        raise _value_error(
            path, key, value, f"an object with at most {_MAX_BLOCK_NAMES} module names"
        )
    return Blocks(1 if count is None else count, in_a, in_b)


def _value_error(path: Path, key: str, value: Any, expected: str) -> MalformedFileError:
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return MalformedFileError(f"{path}: {key} must be {expected}, found {text}.")


def refuse_more_than_factors(config: Mapping[str, Any], label: str, consequence: str) -> None:
    """Raise if an adapter was trained with more than factors and whole modules.

    Parameters
    ----------
    config
        Fields of PEFT's ``adapter_config.json``.
    label
        Name of the adapter, for the message.
    consequence
        Consequence for the caller: the part of the message after the field and its value.

    Raises
    ------
    UnsupportedMethodError
        The config states such a field.
    """
    for key in _FURTHER_FIELDS:
        value = config.get(key)
        if value and value != "none":
            message = f"{label} was trained with {key} = {value!r}, {consequence}"
            raise UnsupportedMethodError(message)

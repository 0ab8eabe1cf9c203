"""``adapter_config.json`` of PEFT: its types checked, its scale rule, and the methods it names."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.formats.factors import UNKNOWN_SCALE, StatedScale, scale_from_alpha
from lora_analysis.patterns import pattern_value
from lora_analysis.storage.documents import read_json_object

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

T = TypeVar("T")

CONFIG_NAME: Final = "adapter_config.json"

# Initialisations after which training starts from W + s·B₀A₀ = W: what is stored is the update.
_PLAIN_INITIALISATIONS: Final = frozenset({"gaussian", "eva", "orthogonal", "true", "false"})

_OTHER_INITIALISATIONS: Final = {
    "pissa": "PiSSA starts from W - s·B0·A0, so B·A is not the update of the original weight",
    "olora": "OLoRA starts from W - s·B0·A0, so B·A is not the update of the original weight",
    "corda": "CorDA starts from W - s·B0·A0, so B·A is not the update of the original weight",
    "lora_ga": "LoRA-GA starts from W - s·B0·A0, so B·A is not the update of the original weight",
    "loftq": "LoftQ replaces the base weight by a quantised one that B·A corrects",
    "mica": "MiCA takes B from the base weight's own singular vectors and keeps it",
}

_VARIANTS: Final = {
    "use_dora": "DoRA rescales the rows of W + s·B·A by a learned magnitude",
    "use_qalora": "QA-LoRA pools the input before A",
    "use_bdlora": "BD-LoRA stores a block-diagonal factor as stacked blocks",
    "kasa_config": "KaSA puts a diagonal between B and A and truncates the base weight",
    "arrow_config": "Arrow routes each token through several adapters",
    "monteclora_config": "MonteCLoRA samples around the factors",
    "velora_config": "VeLoRA compresses the input",
    "target_parameters": "it adapts expert parameters, whose factors are interleaved per expert",
    "layer_replication": "its layers are numbered after replication, not as in the base model",
}


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What an ``adapter_config.json`` says about scale and orientation.

    ``raw`` is the whole document, kept for a writer to give back.
    """

    path: Path | None = None
    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    base_model: str | None = None
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
        try:
            return pattern_value(module, patterns, default)
        except InputError as error:
            message = f"{self.path}: {key}: {error}"
            raise MalformedFileError(message) from error


def read_peft_config(path: Path) -> PeftConfig:
    """Read an ``adapter_config.json``.

    Raises
    ------
    MalformedFileError
        A field that decides about the update has a wrong type.
    UnsupportedMethodError
        The adapter is of a type, a variant or an initialisation whose update is not ``s·B·A``.
    """
    raw = read_json_object(path)
    _refuse_other_methods(path, raw)
    return PeftConfig(
        path=path,
        rank=_optional(_rank, path, "r", raw),
        alpha=_optional(_number, path, "lora_alpha", raw),
        rank_pattern=_pattern(_rank, path, "rank_pattern", raw),
        alpha_pattern=_pattern(_number, path, "alpha_pattern", raw),
        use_rslora=bool(_optional(_flag, path, "use_rslora", raw)),
        fan_in_fan_out=bool(_optional(_flag, path, "fan_in_fan_out", raw)),
        modules_to_save=_optional(_names, path, "modules_to_save", raw) or (),
        base_model=_optional(_text, path, "base_model_name_or_path", raw),
        raw=raw,
    )


def _refuse_other_methods(path: Path, raw: Mapping[str, Any]) -> None:
    """Raise where the config names a method whose update is not ``s·B·A``."""
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        message = (
            f"{path}: peft_type is {peft_type!r}. Only 'LORA' is read: the other methods do not "
            "store a plain product s·B·A."
        )
        raise UnsupportedMethodError(message)
    for key, reason in _VARIANTS.items():
        if raw.get(key):
            message = f"{path}: {key} is set: {reason}. Not read."
            raise UnsupportedMethodError(message)
    start = str(raw.get("init_lora_weights", True)).lower()
    if start in _PLAIN_INITIALISATIONS or raw.get("init_lora_weights", True) is None:
        return
    reason = next(
        (text for name, text in _OTHER_INITIALISATIONS.items() if start.startswith(name)),
        "whether the base weight was changed with it is not known",
    )
    message = (
        f"{path}: init_lora_weights is {start!r}: {reason}. Save it again with PEFT's "
        "path_initial_model_for_weight_conversion, where the method allows that."
    )
    raise UnsupportedMethodError(message)


def _optional(
    check: Callable[[Path, str, Any], T], path: Path, key: str, raw: Mapping[str, Any]
) -> T | None:
    """Return a field's checked value, None where it is absent or null."""
    value = raw.get(key)
    return None if value is None else check(path, key, value)


def _pattern(
    check: Callable[[Path, str, Any], T], path: Path, key: str, raw: Mapping[str, Any]
) -> dict[str, T]:
    """Return a checked mapping of module patterns to numbers, empty where it is absent."""
    found = raw.get(key) or {}
    if not isinstance(found, dict):
        raise _wrong(path, key, found, "an object of module patterns")
    return {name: check(path, f"{key}[{name!r}]", value) for name, value in found.items()}


def _number(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise _wrong(path, key, value, "a finite number")
    return float(value)


def _rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise _wrong(path, key, value, "a positive integer")
    return value


def _flag(path: Path, key: str, value: Any) -> bool:
    if type(value) is not bool:
        raise _wrong(path, key, value, "true or false")
    return value


def _text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(path, key, value, "a string")
    return value


def _names(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise _wrong(path, key, value, "a list of module names")


def _wrong(path: Path, key: str, value: Any, wanted: str) -> MalformedFileError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return MalformedFileError(f"{path}: {key} must be {wanted}, found {shown}.")

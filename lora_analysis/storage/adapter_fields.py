"""Config fields of adapters that were trained with more than factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import UnsupportedMethodError

if TYPE_CHECKING:
    from collections.abc import Mapping

# PEFT's fields that add more to a model than factors and modules trained in full.
_FURTHER_FIELDS: Final = ("bias", "lora_bias", "alora_invocation_tokens", "trainable_token_indices")


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

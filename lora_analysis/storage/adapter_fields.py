"""What an adapter's config states beyond the factors, for all who would lose it in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import UnsupportedMethodError

if TYPE_CHECKING:
    from collections.abc import Mapping

# PEFT's fields under which a model computes more than factors and modules trained in full.
_BEYOND: Final = ("bias", "lora_bias", "alora_invocation_tokens", "trainable_token_indices")


def refuse_more_than_factors(config: Mapping[str, Any], label: str, consequence: str) -> None:
    """Raise where an adapter was trained with more than factors and whole modules.

    Parameters
    ----------
    config
        In the words of PEFT's ``adapter_config.json``.
    label
        The adapter's, for the message.
    consequence
        What that means to the caller: the part of the message after the field and its value.

    Raises
    ------
    UnsupportedMethodError
        A field of the config says so.
    """
    for key in _BEYOND:
        value = config.get(key)
        if value and value != "none":
            message = f"{label} was trained with {key} = {value!r}, {consequence}"
            raise UnsupportedMethodError(message)

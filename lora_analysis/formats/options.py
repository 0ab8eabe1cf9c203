"""Read options: what the caller knows about a file that the file may not state.

Each option is one field of `ReadOptions`. Its metadata describes the command-line option, from
which the command line builds its own; nothing else has to be edited to add one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from lora_analysis.errors import InputError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from lora_analysis.adapter import LowRankUpdate


@dataclass(frozen=True, slots=True)
class InitialFactorsRequest:
    """One module whose initial factors are needed.

    ``method`` is the config's ``init_lora_weights`` in lower case, ``update`` the trained update.
    """

    method: str
    update: LowRankUpdate


Factors = tuple["NDArray[Any]", "NDArray[Any]"]
InitialFactorsSource = Callable[[InitialFactorsRequest], Factors]
ExpertOrder = Literal["expert-fastest", "expert-slowest"]
EXPERT_ORDERS: Final = get_args(ExpertOrder)


@dataclass(frozen=True, slots=True)
class CommandLineOption:
    """The command-line option of a read option.

    Parameters
    ----------
    help
        Help text.
    parse
        Function that gives the value for the text, and raises `ValueError` with what is accepted;
        ``bool`` makes a flag.
    metavar
        Name of the text in the help.
    choices
        Texts that are accepted, if there are few.
    minimum
        Smallest number that is accepted.
    """

    help: str
    parse: Callable[[str], Any] = str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    minimum: int | None = None


def _option(help: str, **facts: Any) -> dict[str, CommandLineOption]:
    return {"command_line": CommandLineOption(help, **facts)}


def _pair_of(text: str) -> tuple[str, ...]:
    parts = text.split(",")
    if len(parts) != 2 or any(part.count("{name}") != 1 for part in parts):
        message = "two names separated by a comma, each with {name} once: 'w_a_{name},w_b_{name}'"
        raise ValueError(message)
    return tuple(part.strip() for part in parts)


def _flags_of(text: str) -> tuple[bool, ...]:
    parts = [part.strip() for part in text.split(",")]
    if any(part not in ("0", "1") for part in parts) or "1" not in parts:
        message = "a 1 for each block that was adapted, a 0 for each other: '1,0,1'"
        raise ValueError(message)
    return tuple(part == "1" for part in parts)


def _heads_of(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or any(not part.isdecimal() or int(part) < 1 for part in parts):
        message = "two numbers, heads of queries and of keys: '32,8'"
        raise ValueError(message)
    return tuple(int(part) for part in parts)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Options of `lora_analysis.read_adapter`, which documents them, with their checks.

    Raises
    ------
    InputError
        A value is out of its range, or two options exclude each other.
    """

    alpha: float | None = field(
        default=None,
        metadata=_option("LoRA alpha; the scale is alpha / rank of each module.", parse=float),
    )
    scale: float | None = field(
        default=None,
        metadata=_option("Scale of ΔW = scale·B·A, if the file does not state it.", parse=float),
    )
    label: str | None = None
    base: Any = None
    allow_pickle: bool = field(
        default=False,
        metadata=_option(
            "Read files of torch.save (.bin, .pt) too: only their tensors, no code is run.",
            parse=bool,
        ),
    )
    initial: str | os.PathLike[str] | InitialFactorsSource | None = field(
        default=None,
        metadata=_option(
            "The adapter before training, if its product was subtracted from the base (PiSSA, "
            "OLoRA, CorDA, LoRA-GA).",
            metavar="SOURCE",
        ),
    )
    pair: tuple[str, str] | None = field(
        default=None,
        metadata=_option(
            "Names of bare factor pairs, A first: 'w_a_{name},w_b_{name}'.",
            metavar="A,B",
            parse=_pair_of,
        ),
    )
    enable_lora: tuple[bool, ...] | None = field(
        default=None,
        metadata=_option(
            "Which blocks of fused weights were adapted (loralib's MergedLinear): q, k, v.",
            metavar="1,0,1",
            parse=_flags_of,
        ),
    )
    kernel: int | None = field(
        default=None,
        metadata=_option("Width of the kernels of loralib's ConvLoRA.", parse=int, minimum=1),
    )
    heads: tuple[int, int] | None = field(
        default=None,
        metadata=_option(
            "Attention heads and key-value heads of the base, for GGUF files that permute them.",
            metavar="Q,K",
            parse=_heads_of,
        ),
    )
    expert_order: ExpertOrder | None = field(
        default=None,
        metadata=_option(
            "Order of the columns of B if one tensor stores all experts: in PEFT the expert index "
            "varies fastest, in Unsloth's files until September 2026 slowest. By default the "
            "config decides.",
            choices=EXPERT_ORDERS,
        ),
    )
    experts: int | None = field(
        default=None,
        metadata=_option(
            "Number of experts of the base, if the rank of one expert is not the config's r.",
            parse=int,
            minimum=1,
        ),
    )

    def __post_init__(self) -> None:
        if self.alpha is not None and self.scale is not None:
            message = (
                f"Both alpha={self.alpha} and scale={self.scale} are given. The scale is the "
                "multiplier itself, alpha gives alpha/r: pass one of them."
            )
            raise InputError(message)
        for role, number in (("alpha", self.alpha), ("scale", self.scale)):
            if number is not None and not abs(number) <= sys.float_info.max:
                message = f"{role} must be a finite number, found {number!r}."
                raise InputError(message)
            if number == 0:
                message = f"{role} = 0 would make every update zero. Leave it out if it is unknown."
                raise InputError(message)
        if self.enable_lora is not None and not any(self.enable_lora):
            message = f"enable_lora={self.enable_lora!r} enables no block of the fused weight."
            raise InputError(message)
        if self.kernel is not None and self.kernel < 1:
            message = f"kernel must be the width of a kernel, found {self.kernel}."
            raise InputError(message)
        if self.heads is not None and (len(self.heads) != 2 or min(self.heads) < 1):
            message = (
                f"heads must be two numbers, heads of queries and of keys, found {self.heads!r}."
            )
            raise InputError(message)
        if self.expert_order is not None and self.expert_order not in EXPERT_ORDERS:
            orders = " or ".join(repr(order) for order in EXPERT_ORDERS)
            message = f"expert_order must be {orders}, found {self.expert_order!r}."
            raise InputError(message)
        if self.experts is not None and self.experts < 1:
            message = f"experts must be the number of experts of the base, found {self.experts}."
            raise InputError(message)

    def non_default(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, by name."""
        return {
            option.name: value
            for option in fields(self)
            if (value := getattr(self, option.name)) != option.default
        }

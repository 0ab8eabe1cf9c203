"""What tensor names of image models' files say: spellings of trainers and eras, key by key.

One file may mix them. Each spelling says how a factor's key is built, what the module is called
in the base, and which multiplier the format fixes where a module states no alpha.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from lora_analysis.errors import MalformedFileError
from lora_analysis.formats.diffusion.other_methods import refuse_other_methods
from lora_analysis.formats.factors import UNKNOWN_SCALE, StatedScale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

Part = Literal["A", "B", "mid", "alpha", "scalar", "norms"]

_ROLES: Final[dict[str, Part]] = {"down": "A", "up": "B", "mid": "mid", "A": "A", "B": "B"}
_EXTRA: Final = re.compile(
    r"(?P<module>.+?)(?:[._]lora)?\."
    r"(?P<what>alpha|scalar|dora_scale|lora_magnitude_vector(\.[^.]+)?)"
)
_EXTRAS: Final[dict[str, Part]] = {"alpha": "alpha", "scalar": "scalar"}
EMBEDDINGS: Final = "embeddings of new words"
# What trainers store beside the factors: reported and carried over, not analyzed.
_OTHERS: Final = (
    (re.compile(r".+\.(diff|diff_b|diff_m|set_weight|w_norm|b_norm)"), "trained in full"),
    (re.compile(r".+\.(lora_B|lora_up)(\.[^.]+)?\.bias"), "biases of B"),
    (re.compile(r"<.+>|bundle_emb\..+|(.+\.)?(emb_params|string_to_param\..+)"), EMBEDDINGS),
)


def _same(name: str) -> str:
    return name


@dataclass(frozen=True, slots=True)
class Spelling:
    """How one trainer, or one era of it, names the factors of a module.

    Parameters
    ----------
    pattern
        Matches the key of a factor; its groups are ``module`` and ``role`` (``down``, ``up``,
        ``mid``, ``A`` or ``B``).
    default
        Multiplier where the module states no alpha; None where it cannot be known then.
    reason
        Why it is that, or why it is not known: the end of the finding's sentence.
    renamed
        Gives the module's name in the base from that in the key.
    alpha_is_rank
        Whether the format says "alpha is r" where it is missing, and not "there is no alpha".
    """

    pattern: re.Pattern[str]
    default: float | None
    reason: str
    renamed: Callable[[str], str] = _same
    alpha_is_rank: bool = False

    def factor(self, key: str) -> tuple[str, Part] | None:
        """Return the module and the part a key names, None where it is spelled otherwise."""
        match = self.pattern.fullmatch(key)
        return None if match is None else (self.renamed(match["module"]), _ROLES[match["role"]])

    def scale(self, rank: int) -> StatedScale:
        """Return what the format says of a module without an alpha."""
        if self.default is None:
            return UNKNOWN_SCALE
        return StatedScale(self.default, float(rank) if self.alpha_is_rank else None, "format")


@dataclass(slots=True)
class SortedParts:
    """The tensor names of one file by module and part, and those that are nothing of these."""

    modules: dict[str, dict[Part, str]] = field(default_factory=dict)
    spellings: dict[str, Spelling] = field(default_factory=dict)
    rest: dict[str, list[str]] = field(default_factory=dict)


def spelled(keys: Iterable[str], spellings: Sequence[Spelling]) -> bool:
    """Say whether any key is that of a factor in one of the spellings."""
    return any(spelling.pattern.fullmatch(key) for key in keys for spelling in spellings)


def sort_parts(path: Path, keys: Iterable[str], spellings: Sequence[Spelling]) -> SortedParts:
    """Sort tensor names by module.

    Raises
    ------
    MalformedFileError
        Two tensors are the same part of a module.
    UnsupportedMethodError
        A key belongs to a method whose update is not ``s·B·A``.
    """
    names = list(keys)
    refuse_other_methods(path, names)
    found = SortedParts()
    others = []
    for key in names:
        for spelling in spellings:
            if factor := spelling.factor(key):
                _put(path, found, *factor, key)
                found.spellings.setdefault(factor[0], spelling)
                break
        else:
            others.append(key)
    for key in others:
        _sort_extra(path, found, key, spellings)
    return found


def _sort_extra(path: Path, found: SortedParts, key: str, spellings: Sequence[Spelling]) -> None:
    if match := _EXTRA.fullmatch(key):
        # The "_lora" before the dot may belong to the name, as in XLabs' "proj_lora".
        stems = match["module"], key[: match.start("what") - 1]
        names = (spelling.renamed(stem) for stem in stems for spelling in spellings)
        for name in dict.fromkeys(names):
            if name in found.modules:
                _put(path, found, name, _EXTRAS.get(match["what"], "norms"), key)
                return
    what = next((what for mark, what in _OTHERS if mark.fullmatch(key)), "no factors")
    found.rest.setdefault(what, []).append(key)


def _put(path: Path, found: SortedParts, module: str, part: Part, key: str) -> None:
    before = found.modules.setdefault(module, {}).setdefault(part, key)
    if before != key:
        message = f"{path}: '{before}' and '{key}' are both {part} of '{module}'."
        raise MalformedFileError(message)

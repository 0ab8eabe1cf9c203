"""From an adapter's module name to the base tensor that it adapts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from lora_analysis.bases.aliases import (
    FAMILIES,
    SPELLINGS,
    Family,
    Rewrite,
    flattened,
    is_flattened,
)
from lora_analysis.errors import BaseWeightError
from lora_analysis.patterns import near_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_WRAPPER: Final = "base_model.model."

# Names of parts that exist side by side in one model. A prefix that holds one of them may only be
# exchanged for a prefix that holds the same: the encoder's layer 0 is not the decoder's.
_PARTS: Final = frozenset(
    {"encoder", "decoder", "vision", "visual", "image", "audio", "speech", "text"}
)

# Where a wrapped module keeps its frozen weight, and where what is trained beside it.
_FROZEN: Final = frozenset({"base_layer", "original_module"})
_TRAINED: Final = frozenset({"lora_A", "lora_B", "modules_to_save"})
_STACKS: Final = frozenset({"gate_up_proj", "gate_proj", "up_proj", "down_proj"})

# What no reader here decodes, by a tensor that marks it. Its own library turns it into numbers.
_UNREAD: Final = {
    "W_q": "HQQ",
    "weight._data": "quanto",
    "weight.qdata": "torchao",
    "codebooks": "AQLM",
    "weight_scales": "EETQ",
    "centroids.weight": "VPTQ",
    "Qidxs": "QuIP#",
    "dense_weights": "SpQR",
    "B": "Marlin",
}


class TensorNames:
    """The tensors of a base by the module they belong to.

    Parameters
    ----------
    names
        All tensor names, as stored.
    label
        The base's name, for messages.
    shape_of
        Gives the stored shape of a tensor.
    aliases
        Tensor name → further modules that it is the weight of, where the source knows them.
    """

    def __init__(
        self,
        names: Iterable[str],
        label: str,
        shape_of: Callable[[str], tuple[int, ...]],
        aliases: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.label = label
        self._shape_of = shape_of
        self._stored = list(names)
        self._modules: dict[str, list[str]] = {}
        for name in self._stored:
            for module in (module_of(name), *(aliases or {}).get(name, ())):
                if module is not None:
                    self._modules.setdefault(module, []).append(name)
        self._direct = _Index(self._modules)
        self._families = [
            family for family in FAMILIES if any(map(family.mark.search, self._modules))
        ]
        self._rewritten: dict[Family | None, _Index] = {}

    def find(self, wanted: str) -> list[str]:
        """Return the tensors that a module's name may mean: those of the closest match.

        The name is taken as it is, then in the spelling of every family that takes part.
        """
        if is_flattened(wanted):
            return self._find_flattened(wanted)
        if found := self._direct.find(wanted):
            return found
        for family in FAMILIES:
            takes_part = family in self._families or family.mark.search(wanted)
            if takes_part and (found := self._index(family).find(family.rewrite(wanted))):
                return found
        return []

    @staticmethod
    def spellings(wanted: str) -> list[str]:
        """Return a name as it is, and in the spelling of every family that it may belong to."""
        rewritten = [f.rewrite(wanted) for f in FAMILIES if f.mark.search(wanted)]
        return list(dict.fromkeys([wanted, *rewritten]))

    def choose(
        self,
        module: str,
        candidates: Sequence[str],
        shape: tuple[int, int] | None,
        fits: Callable[[str], bool],
    ) -> str:
        """Return the one candidate that fits ``shape``, as ``fits`` says of a tensor.

        Raises
        ------
        BaseWeightError
            None or several do; the message lists them with their shapes.
        """
        fitting = [name for name in candidates if fits(name)]
        if len(fitting) == 1:
            return fitting[0]
        of_shape = f" of shape {tuple(shape)}" if shape else " that is a matrix"
        reason = "several tensors" if fitting else f"no tensor{of_shape}"
        listed = ", ".join(f"'{n}' {self._shape_of(n)}" for n in (fitting or candidates)[:6])
        message = f"{self.label}: {reason} may belong to '{module}'. By name: {listed}."
        raise BaseWeightError(message)

    def missing(self, module: str) -> BaseWeightError:
        """Return the error for a module that no tensor belongs to; it lists near names."""
        wanted = plain_name(module)
        for name in self._stored:
            for mark, storage in _UNREAD.items():
                if name == f"{wanted}.{mark}" or name.endswith(f".{wanted}.{mark}"):
                    return quantised(self.label, name, storage)
        near = ", ".join(f"'{name}'" for name in near_names(wanted, self._modules)) or "none"
        return BaseWeightError(
            f"{self.label}: no weight belongs to '{module}'. Near names among its "
            f"{len(self._modules)} modules: {near}."
        )

    def _index(self, family: Family) -> _Index:
        if family not in self._rewritten:
            self._rewritten[family] = _Index(_renamed(self._modules, family.rewrite))
        return self._rewritten[family]

    def _find_flattened(self, wanted: str) -> list[str]:
        """Return the tensors whose module, its dots made underscores, is or ends with the name."""
        end = flattened(wanted)
        for modules in (self._modules, *(_renamed(self._modules, one) for one in SPELLINGS)):
            flat = _renamed(modules, lambda name: name.replace(".", "_"))
            for matches in ([end], [name for name in flat if name.endswith(f"_{end}")]):
                if found := [tensor for name in matches for tensor in flat.get(name, ())]:
                    return list(dict.fromkeys(found))
        return []


class _Index:
    """Modules by their last segment, to find those that end like a name."""

    def __init__(self, modules: Mapping[str, list[str]]) -> None:
        self._modules = modules
        self._by_tail: dict[str, list[str]] = {}
        for module in modules:
            self._by_tail.setdefault(module.rpartition(".")[2], []).append(module)

    def find(self, wanted: str) -> list[str]:
        """Return the tensors of the closest match by name."""
        segments = wanted.split(".")
        alike = self._by_tail.get(segments[-1], ())
        for dropped in range(_most_dropped(segments) + 1):
            prefix, rest = segments[:dropped], ".".join(segments[dropped:])
            matches = [module for module in alike if _matches(module, prefix, rest)]
            exact = [module for module in matches if module == rest]
            if matches:
                found = (name for match in exact or matches for name in self._modules[match])
                return list(dict.fromkeys(found))
        return []


def _renamed(modules: Mapping[str, list[str]], rewrite: Rewrite) -> dict[str, list[str]]:
    renamed: dict[str, list[str]] = {}
    for module, tensors in modules.items():
        renamed.setdefault(rewrite(module), []).extend(tensors)
    return renamed


def plain_name(module: str) -> str:
    """Return a module's name without what a wrapper adds."""
    return module.removeprefix(_WRAPPER).replace(".base_layer", "")


def matrix_shape(name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor as a matrix: kernels are flattened, one row per output."""
    if len(stored) > 2 and name.endswith(".weight"):
        return stored[0], math.prod(stored[1:])
    return stored


def module_of(tensor: str) -> str | None:
    """Return the module whose weight a tensor is, None for biases, adapter factors and others.

    A stack of experts is a parameter of its own and bears its module's name alone.
    """
    path, _, last = tensor.removeprefix(_WRAPPER).rpartition(".")
    segments = path.split(".")
    if last in ("in_proj_weight", "weight") and path:
        if not _TRAINED.isdisjoint(segments):
            return None
        return ".".join(segment for segment in segments if segment not in _FROZEN)
    return f"{path}.{last}" if segments[-1] == "experts" and last in _STACKS else None


def quantised(label: str, tensor: str, storage: str) -> BaseWeightError:
    """Return the error for a weight that is not stored in a way that is read."""
    return BaseWeightError(
        f"{label}: '{tensor}' belongs to a quantised weight ({storage}), which is not read. "
        "Dequantise the model first, or use the unquantised one."
    )


def _most_dropped(segments: Sequence[str]) -> int:
    """Return how many leading segments may go: all before the one in front of the first number.

    Beyond it, the name no longer says which layer is meant.
    """
    first = next((i for i, segment in enumerate(segments) if segment.isdecimal()), len(segments))
    return max(0, min(first, len(segments)) - 1)


def _matches(module: str, prefix: Sequence[str], rest: str) -> bool:
    """Say whether a base's module is ``rest`` with a prefix that may stand for ``prefix``."""
    if module != rest and not module.endswith(f".{rest}"):
        return False
    return not prefix or _parts(module.removesuffix(rest).split(".")) == _parts(prefix)


def _parts(segments: Iterable[str]) -> frozenset[str]:
    words = {word for segment in segments for word in segment.split("_")}
    return _PARTS.intersection(words)

"""From an adapter's module name to the base tensor that it adapts."""

from __future__ import annotations

import copy
import math
from functools import cached_property
from typing import TYPE_CHECKING, Final

from lora_analysis.bases.aliases import (
    FAMILIES,
    SPELLINGS,
    Family,
    Rewrite,
)
from lora_analysis.bases.fused import parts_inside
from lora_analysis.errors import BaseWeightError
from lora_analysis.names import (
    ModuleName,
    Prefixes,
    identify,
    identify_all,
    is_flattened,
    match_names,
    rename_prefix,
    split_component,
    strip_wrappers,
)
from lora_analysis.patterns import near_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

# Names of parts that exist side by side in one model. A prefix that holds one of them may only be
# exchanged for a prefix that holds the same: the encoder's layer 0 is not the decoder's.
_PARTS: Final = frozenset(
    {"encoder", "decoder", "vision", "visual", "image", "audio", "speech", "text"}
)

# Where a wrapped module keeps its frozen weight, and where what is trained beside it.
_FROZEN: Final = frozenset({"original_module"})
_TRAINED: Final = frozenset({"lora_A", "lora_B", "modules_to_save"})
_STACKS: Final = frozenset({"gate_up_proj", "gate_proj", "up_proj", "down_proj"})

# What no reader here decodes, by a tensor that marks it. Its own library turns it into numbers.
_UNREAD: Final = {
    "W_q": "HQQ",
    "weight._data": "quanto",
    "weight.qdata": "torchao",
    "_weight_qdata": "torchao",
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
        self._prefix: Prefixes = {}
        self._pairs: dict[str, str] = {}
        self._heads: dict[tuple[str, str], None] = {}
        self._ambiguous: tuple[str, ...] = ()

    @property
    def modules(self) -> list[str]:
        """Names of the modules that have a weight."""
        return list(self._modules)

    def matched(
        self,
        sets: Iterable[Iterable[str]],
        fits: Callable[[str, Sequence[str]], bool],
        prefix: Prefixes | None = None,
    ) -> TensorNames:
        """Return the same tensors, with the prefixes of adapters decided for each as a whole.

        Parameters
        ----------
        sets
            Names of the modules of each adapter.
        fits
            Returns True if the update of a module may be one of a weight among tensors.
        prefix
            What the caller says of prefixes, by `names.parse_prefixes`.
        """
        matched = copy.copy(self)
        matched._pairs, matched._heads = dict(self._pairs), dict(self._heads)
        matched._prefix = dict(prefix or {})
        for indexed in ("_identities", "_flat", "_flat_parts"):
            matched.__dict__.pop(indexed, None)
        for names in sets:
            strange = [name for name in names if strip_wrappers(name) not in self._modules]
            if not strange and not prefix:
                continue
            match = match_names(
                names,
                self._modules,
                fits=lambda name, module: fits(name, self._modules[module]),
                prefix=prefix,
            )
            matched._ambiguous += match.ambiguous
            for name, module in match.pairs.items():
                if name != module:
                    matched._pairs.setdefault(strip_wrappers(name), module)
                    matched._heads[_different_heads(strip_wrappers(name), module)] = None
        return matched

    def find(self, wanted: str) -> list[str]:
        """Return the tensors that a module's name may mean: those of the closest match.

        The name is taken as it is, then in the spelling of every family that takes part.
        """
        if module := self._pairs.get(wanted):
            return self._modules[module]
        if wanted in self._modules and not self._prefix:
            return self._modules[wanted]
        if module := self._identities.get(identify(rename_prefix(wanted, self._prefix))):
            return self._modules[module]
        for old, new in self._heads:  # parts and stacks beside the modules that were matched
            if wanted.startswith(old) and (name := new + wanted.removeprefix(old)) in self._modules:
                return self._modules[name]
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
        if self._ambiguous:
            message = (
                f"{self.label}: '{module}' may stand behind several prefixes "
                f"({', '.join(self._ambiguous)}), which names and shapes do not decide. Pass "
                "prefix= to name one (command line: --prefix OLD=NEW)."
            )
            raise BaseWeightError(message)
        of_shape = f" of shape {tuple(shape)}" if shape else " that is a matrix"
        reason = "several tensors" if fitting else f"no tensor{of_shape}"
        listed = ", ".join(f"'{n}' {self._shape_of(n)}" for n in (fitting or candidates)[:6])
        message = f"{self.label}: {reason} may belong to '{module}'. By name: {listed}."
        raise BaseWeightError(message)

    def missing(self, module: str) -> BaseWeightError:
        """Return the error for a module that no tensor belongs to; it lists near names."""
        wanted = strip_wrappers(module)
        for name in self._stored:
            for mark, storage in _UNREAD.items():
                if name == f"{wanted}.{mark}" or name.endswith(f".{wanted}.{mark}"):
                    return quantized(self.label, name, storage)
        near = ", ".join(f"'{name}'" for name in near_names(wanted, self._modules)) or "none"
        return BaseWeightError(
            f"{self.label}: no weight belongs to '{module}'. Near names among its "
            f"{len(self._modules)} modules: {near}."
        )

    def flat_homes(self, wanted: str) -> list[tuple[str, str]]:
        """Return the fused modules that hold a module whose name has no dots, and which part."""
        if not is_flattened(wanted):
            return []
        goal = identify(rename_prefix(wanted, self._prefix), flat=True)
        return self._flat_parts.get(goal, [])

    @cached_property
    def _identities(self) -> dict[ModuleName, str]:
        identities = identify_all(self._modules, prefix=self._prefix)
        return {identity: module for module, identity in identities.items()}

    @cached_property
    def _flat(self) -> dict[ModuleName, str]:
        identities = identify_all(self._modules, flat=True, prefix=self._prefix)
        return {identity: module for module, identity in identities.items()}

    @cached_property
    def _flat_parts(self) -> dict[ModuleName, list[tuple[str, str]]]:
        homes: dict[ModuleName, list[tuple[str, str]]] = {}
        rewrites: list[Rewrite] = [str, *(family.rewrite for family in self._families)]
        for module in self._modules:
            for home in dict.fromkeys(rewrite(module) for rewrite in rewrites):
                for name, part in parts_inside(home):
                    key = identify(rename_prefix(name, self._prefix), flat=True)
                    homes.setdefault(key, []).append((home, part))
        return homes

    def _index(self, family: Family) -> _Index:
        if family not in self._rewritten:
            self._rewritten[family] = _Index(_renamed(self._modules, family.rewrite))
        return self._rewritten[family]

    def _find_flattened(self, wanted: str) -> list[str]:
        """Return the tensors whose module, its dots made underscores, is or ends with the name."""
        if module := self._flat.get(identify(rename_prefix(wanted, self._prefix), flat=True)):
            return self._modules[module]
        end = split_component(wanted).name
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


def matrix_shape(name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor as a matrix: kernels are flattened, one row per output."""
    if len(stored) > 2 and name.endswith(".weight"):
        return stored[0], math.prod(stored[1:])
    return stored


def module_of(tensor: str) -> str | None:
    """Return the module whose weight a tensor is, None for biases, adapter factors and others.

    A stack of experts is a parameter of its own and bears its module's name alone.
    """
    path, _, last = strip_wrappers(tensor).rpartition(".")
    segments = path.split(".")
    if last in ("in_proj_weight", "weight") and path:
        if not _TRAINED.isdisjoint(segments):
            return None
        return ".".join(segment for segment in segments if segment not in _FROZEN)
    return f"{path}.{last}" if segments[-1] == "experts" and last in _STACKS else None


def quantized(label: str, tensor: str, storage: str) -> BaseWeightError:
    """Return the error for a weight that is not stored in a way that is read."""
    return BaseWeightError(
        f"{label}: '{tensor}' belongs to a quantized weight ({storage}), which is not read. "
        "Dequantize the model first, or use the unquantized one."
    )


def _different_heads(name: str, other: str) -> tuple[str, str]:
    """Return what stands in front of the segments that two names share at their end."""
    first, second = name.split("."), other.split(".")
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    end = ".".join(first[len(first) - count :])
    return name.removesuffix(end), other.removesuffix(end)


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
    added = module.removesuffix(rest).split(".")
    if "mtp" in added and "mtp" not in prefix:
        return False
    return not prefix or _parts(added) == _parts(prefix)


def _parts(segments: Iterable[str]) -> frozenset[str]:
    words = {word for segment in segments for word in segment.split("_")}
    return _PARTS.intersection(words)

"""Tensors of a base by the module they belong to, looked up by an adapter's module names."""

from __future__ import annotations

import copy
import math
from functools import cached_property
from typing import TYPE_CHECKING, Final

from lora_analysis.bases.fused import fused_with_part, parts_inside
from lora_analysis.errors import BaseWeightError
from lora_analysis.family_names import FAMILIES, SPELLINGS, Family, Rewrite
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

# Names of parallel parts of one model. A prefix with one of them may only be replaced by a prefix
# with the same: the encoder's layer 0 is not the decoder's.
_PARTS: Final = frozenset(
    {"encoder", "decoder", "vision", "visual", "image", "audio", "speech", "text"}
)

# Segments of a wrapped module's frozen weight, and of the parameters trained next to it.
_FROZEN: Final = frozenset({"original_module"})
_TRAINED: Final = frozenset({"lora_A", "lora_B", "modules_to_save"})
_STACKS: Final = frozenset({"gate_up_proj", "gate_proj", "up_proj", "down_proj"})

# Storages that are not supported, by the tensor that marks them. Their own libraries decode them.
_UNSUPPORTED: Final = {
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
        Function that returns the stored shape of a tensor.
    aliases
        Tensor name → further modules that it is the weight of, if the source knows them.
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

    def match_adapter(
        self,
        names: Iterable[str],
        fits: Callable[[str, Sequence[str]], bool],
        prefix: Prefixes | None,
    ) -> TensorNames:
        """Return a copy whose prefixes are decided for all modules of an adapter together.

        Parameters
        ----------
        names
            Names of the adapter's modules.
        fits
            Function that returns True if a module's update fits one of the given tensors.
        prefix
            Prefixes given by the caller, from `names.parse_prefixes`.
        """
        matched = copy.copy(self)
        matched._pairs, matched._heads = dict(self._pairs), dict(self._heads)
        matched._prefix = dict(prefix or {})
        for indexed in ("_identities", "_flat_modules", "_flat_parts", "_flat_wholes"):
            matched.__dict__.pop(indexed, None)
        unresolved = [name for name in names if strip_wrappers(name) not in self._modules]
        if not unresolved and not prefix:
            return matched
        match = match_names(
            names,
            self._modules,
            fits=lambda name, module: fits(name, self._modules[module]),
            prefix=prefix,
        )
        matched._ambiguous += match.ambiguous
        for name, module in match.pairs.items():
            if name != module:
                stripped = strip_wrappers(name)
                matched._pairs.setdefault(stripped, module)
                # Both names without the segments that they share at the end.
                first, second = stripped.split("."), module.split(".")
                while first and second and first[-1] == second[-1]:
                    del first[-1], second[-1]
                end = ".".join(module.split(".")[len(second) :])
                matched._heads[stripped.removesuffix(end), module.removesuffix(end)] = None
        return matched

    def find(self, name: str) -> list[str]:
        """Return the tensors that a module's name may mean: those of the closest match.

        The name is tried unchanged, then in the spelling of every family that may apply.
        """
        if module := self._pairs.get(name):
            return self._modules[module]
        if name in self._modules and not self._prefix:
            return self._modules[name]
        if module := self._identities.get(identify(rename_prefix(name, self._prefix))):
            return self._modules[module]
        for old, new in self._heads:  # parts and stacks next to the modules that were matched
            renamed = new + name.removeprefix(old)
            if name.startswith(old) and renamed in self._modules:
                return self._modules[renamed]
        if is_flattened(name):
            return self._find_flattened(name)
        if tensors := self._direct.find(name):
            return tensors
        for family in FAMILIES:
            applies = family in self._families or family.mark.search(name)
            if not applies:
                continue
            if family not in self._rewritten:
                self._rewritten[family] = _Index(self._modules, family.rewrite)
            if tensors := self._rewritten[family].find(family.rewrite(name)):
                return tensors
        return []

    @staticmethod
    def spellings(name: str) -> list[str]:
        """Return a name unchanged, and in the spelling of every family that it may belong to."""
        rewritten = [family.rewrite(name) for family in FAMILIES if family.has_mark(name)]
        return list(dict.fromkeys([name, *rewritten]))

    def choose(
        self,
        module: str,
        candidates: Sequence[str],
        shape: tuple[int, int] | None,
        fits: Callable[[str], bool],
    ) -> str:
        """Return the one candidate for which ``fits`` is True; ``shape`` is for the message.

        Raises
        ------
        BaseWeightError
            None or several fit; the message lists them with their shapes.
        """
        fitting = [name for name in candidates if fits(name)]
        if len(fitting) == 1:
            return fitting[0]
        if self._ambiguous:
            message = (
                f"{self.label}: '{module}' may belong to several prefixes "
                f"({', '.join(self._ambiguous)}); names and shapes do not decide. Pass "
                "prefix= to name one (command line: --prefix OLD=NEW)."
            )
            raise BaseWeightError(message)
        of_shape = f" of shape {tuple(shape)}" if shape else " that is a matrix"
        reason = "several tensors" if fitting else f"no tensor{of_shape}"
        listed = ", ".join(f"'{n}' {self._shape_of(n)}" for n in (fitting or candidates)[:6])
        message = f"{self.label}: {reason} may belong to '{module}'. By name: {listed}."
        raise BaseWeightError(message)

    def missing_error(self, module: str) -> BaseWeightError:
        """Return the error for a module without a tensor; it lists near names."""
        stripped = strip_wrappers(module)
        for name, mark in self._unsupported:
            if f".{name}".endswith(f".{stripped}.{mark}"):
                return quantized_error(self.label, name, _UNSUPPORTED[mark])
        near = ", ".join(f"'{name}'" for name in near_names(stripped, self._modules)) or "none"
        return BaseWeightError(
            f"{self.label}: no weight belongs to '{module}'. Near names among its "
            f"{len(self._modules)} modules: {near}."
        )

    def flat_fused(self, name: str) -> list[tuple[str, str]]:
        """Return fused modules and the part that a module without dots in its name is of them."""
        if not is_flattened(name):
            return []
        identity = identify(rename_prefix(name, self._prefix), flat=True)
        return self._flat_parts.get(identity, [])

    def flat_joined(self, name: str) -> list[str]:
        """Return fused modules that a module without dots in its name may be; the base has parts.

        A name of FLUX's authors is rewritten to that of diffusers first.
        """
        if not is_flattened(name):
            return []
        identities = [
            identify(rename_prefix(spelling, self._prefix), flat=True)
            for spelling in self.spellings(name)
        ]
        return [self._flat_wholes[i] for i in identities if i in self._flat_wholes]

    @cached_property
    def _unsupported(self) -> list[tuple[str, str]]:
        """Tensors of storages that are not read, with the mark of each."""
        return [
            (name, mark)
            for name in self._stored
            for mark in _UNSUPPORTED
            if name.endswith(f".{mark}")
        ]

    @cached_property
    def _identities(self) -> dict[ModuleName, str]:
        identities = identify_all(self._modules, prefix=self._prefix)
        return {identity: module for module, identity in identities.items()}

    @cached_property
    def _flat_modules(self) -> dict[ModuleName, str]:
        identities = identify_all(self._modules, flat=True, prefix=self._prefix)
        return {identity: module for module, identity in identities.items()}

    @cached_property
    def _flat_parts(self) -> dict[ModuleName, list[tuple[str, str]]]:
        parts: dict[ModuleName, list[tuple[str, str]]] = {}
        rewrites: list[Rewrite] = [str, *(family.rewrite for family in self._families)]
        for module in self._modules:
            for fused in dict.fromkeys(rewrite(module) for rewrite in rewrites):
                for name, part in parts_inside(fused):
                    identity = identify(rename_prefix(name, self._prefix), flat=True)
                    parts.setdefault(identity, []).append((fused, part))
        return parts

    @cached_property
    def _flat_wholes(self) -> dict[ModuleName, str]:
        return {
            identify(rename_prefix(fused, self._prefix), flat=True): fused
            for module in self._modules
            for fused, _ in fused_with_part(module)
        }

    def _find_flattened(self, name: str) -> list[str]:
        """Return the tensors whose module, with underscores for dots, is or ends with the name."""
        for spelling in self.spellings(name):
            identity = identify(rename_prefix(spelling, self._prefix), flat=True)
            if module := self._flat_modules.get(identity):
                return self._modules[module]
        end = split_component(name).name
        rewrites: list[Rewrite] = [str, *SPELLINGS]
        for rewrite in rewrites:
            flat: dict[str, list[str]] = {}
            for module, stored in self._modules.items():
                flat.setdefault(rewrite(module).replace(".", "_"), []).extend(stored)
            for matches in ([end], [module for module in flat if module.endswith(f"_{end}")]):
                if tensors := [tensor for match in matches for tensor in flat.get(match, ())]:
                    return list(dict.fromkeys(tensors))
        return []


class _Index:
    """Rewritten modules by their last segment, to find those with the end of a name."""

    def __init__(self, modules: Mapping[str, list[str]], rewrite: Rewrite = str) -> None:
        self._modules: dict[str, list[str]] = {}
        for module, tensors in modules.items():
            self._modules.setdefault(rewrite(module), []).extend(tensors)
        self._by_tail: dict[str, list[str]] = {}
        for module in self._modules:
            self._by_tail.setdefault(module.rpartition(".")[2], []).append(module)

    def find(self, name: str) -> list[str]:
        """Return the tensors of the closest match by name."""
        segments = name.split(".")
        candidates = self._by_tail.get(segments[-1], ())
        # All segments may be dropped that precede the one before the first number: beyond it, the
        # name no longer determines the layer.
        numbers = [i for i, segment in enumerate(segments) if segment.isdecimal()]
        most_dropped = max(0, (numbers[0] if numbers else len(segments)) - 1)
        for dropped in range(most_dropped + 1):
            prefix, rest = segments[:dropped], ".".join(segments[dropped:])
            matches = [module for module in candidates if _matches(module, prefix, rest)]
            exact = [module for module in matches if module == rest]
            if matches:
                tensors = (tensor for match in exact or matches for tensor in self._modules[match])
                return list(dict.fromkeys(tensors))
        return []


def matrix_shape(name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor as a matrix: kernels are flattened, one row per output."""
    if len(stored) > 2 and name.endswith(".weight"):
        return stored[0], math.prod(stored[1:])
    return stored


def module_of(tensor: str) -> str | None:
    """Return the module of a weight tensor, None for biases, adapter factors and other tensors.

    A stack of experts is a parameter itself and has the name of its module, without ".weight".
    """
    path, _, last = strip_wrappers(tensor).rpartition(".")
    segments = path.split(".")
    if last in ("in_proj_weight", "weight") and path:
        if not _TRAINED.isdisjoint(segments):
            return None
        return ".".join(segment for segment in segments if segment not in _FROZEN)
    return f"{path}.{last}" if segments[-1] == "experts" and last in _STACKS else None


def quantized_error(label: str, tensor: str, storage: str) -> BaseWeightError:
    """Return the error for a weight in a quantized storage that is not supported."""
    return BaseWeightError(
        f"{label}: '{tensor}' belongs to a quantized weight ({storage}), which is not read. "
        "Dequantize the model first, or use the unquantized one."
    )


def _matches(module: str, prefix: Sequence[str], rest: str) -> bool:
    """Return True if a base's module is ``rest`` with a prefix that may replace ``prefix``."""
    if module != rest and not module.endswith(f".{rest}"):
        return False
    added = module.removesuffix(rest).split(".")
    if "mtp" in added and "mtp" not in prefix:
        return False
    return not prefix or _parts(added) == _parts(prefix)


def _parts(segments: Iterable[str]) -> frozenset[str]:
    words = {word for segment in segments for word in segment.split("_")}
    return _PARTS.intersection(words)

"""From an adapter's module name to the base tensor that it adapts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lora_analysis.errors import BaseWeightError
from lora_analysis.patterns import near_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_WRAPPER: Final = "base_model.model."

# Names of parts that exist side by side in one model. A prefix that holds one of them may only be
# exchanged for a prefix that holds the same: the encoder's layer 0 is not the decoder's.
_PARTS: Final = frozenset(
    {"encoder", "decoder", "vision", "visual", "image", "audio", "speech", "text"}
)

# Where a wrapped module keeps its frozen weight, and where what is trained beside it.
_FROZEN: Final = frozenset({"base_layer", "original_module"})
_TRAINED: Final = frozenset({"lora_A", "lora_B", "modules_to_save"})

# Tensors that a quantised weight is made of, beside or instead of "<module>.weight".
_QUANTISED: Final = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight.absmax": "bitsandbytes 4-bit",
    "SCB": "bitsandbytes 8-bit",
    "weight_scale_inv": "block-scaled fp8",
    "weight_scale": "scaled fp8 or compressed-tensors",
    "weight_blocks": "MXFP4",
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
    """

    def __init__(
        self, names: Iterable[str], label: str, shape_of: Callable[[str], tuple[int, ...]]
    ) -> None:
        self._label = label
        self._shape_of = shape_of
        self._stored = list(names)
        self._tensors: dict[str, list[str]] = {}
        for name in self._stored:
            if (module := module_of(name)) is not None:
                self._tensors.setdefault(module, []).append(name)
        self._by_tail: dict[str, list[str]] = {}
        for module in self._tensors:
            self._by_tail.setdefault(module.rpartition(".")[2], []).append(module)

    def candidates(self, module: str) -> list[str]:
        """Return the tensors that a module's name may mean: those of the closest match.

        Raises
        ------
        BaseWeightError
            There are none; the message lists near names.
        """
        wanted = module.removeprefix(_WRAPPER).replace(".base_layer", "")
        found = self._candidates(wanted)
        if not found:
            raise self._missing(module, wanted)
        return found

    def choose(self, module: str, candidates: list[str], shape: tuple[int, int] | None) -> str:
        """Return the one candidate that holds a matrix of ``shape``, either way round.

        Raises
        ------
        BaseWeightError
            None or several do; the message lists them with their shapes.
        """
        fitting = [name for name in candidates if self._fits(name, shape)]
        if len(fitting) == 1:
            return fitting[0]
        of_shape = f" of shape {tuple(shape)}" if shape else " that is a matrix"
        reason = "several tensors" if fitting else f"no tensor{of_shape}"
        listed = ", ".join(f"'{n}' {self._shape_of(n)}" for n in (fitting or candidates)[:6])
        message = f"{self._label}: {reason} may belong to '{module}'. By name: {listed}."
        raise BaseWeightError(message)

    def _fits(self, name: str, shape: tuple[int, int] | None) -> bool:
        stored = self._shape_of(name)
        return len(stored) == 2 if shape is None else stored in (tuple(shape), tuple(shape)[::-1])

    def _candidates(self, wanted: str) -> list[str]:
        """Return the tensors of the closest match by name."""
        segments = wanted.split(".")
        alike = self._by_tail.get(segments[-1], ())
        for dropped in range(_most_dropped(segments) + 1):
            prefix, rest = segments[:dropped], ".".join(segments[dropped:])
            matches = [module for module in alike if _matches(module, prefix, rest)]
            exact = [module for module in matches if module == rest]
            if matches:
                return [name for match in exact or matches for name in self._tensors[match]]
        return []

    def _missing(self, module: str, wanted: str) -> BaseWeightError:
        for name in self._stored:
            for mark, storage in _QUANTISED.items():
                if name.endswith(f"{wanted}.{mark}"):
                    return quantised(self._label, name, storage)
        near = ", ".join(f"'{name}'" for name in near_names(wanted, self._tensors)) or "none"
        return BaseWeightError(
            f"{self._label}: no weight belongs to '{module}'. Near names among its "
            f"{len(self._tensors)} modules: {near}."
        )


def module_of(tensor: str) -> str | None:
    """Return the module whose weight a tensor is, None for biases, adapter factors and others."""
    path, _, last = tensor.removeprefix(_WRAPPER).rpartition(".")
    if last == "in_proj_weight" and path:
        return path
    if last != "weight" or not path:
        return None
    segments = path.split(".")
    if not _TRAINED.isdisjoint(segments):
        return None
    return ".".join(segment for segment in segments if segment not in _FROZEN)


def quantised(label: str, tensor: str, storage: str) -> BaseWeightError:
    """Return the error for a weight that is not stored as plain numbers."""
    return BaseWeightError(
        f"{label}: '{tensor}' belongs to a quantised weight ({storage}), which is not read. "
        "Use the unquantised base model."
    )


def quantised_storage(tensor: str, names: frozenset[str]) -> tuple[str, str] | None:
    """Return a companion tensor that marks ``tensor`` as quantised, and the storage, or None."""
    path, _, last = tensor.rpartition(".")
    for mark, storage in _QUANTISED.items():
        companion = f"{path}.{mark}" if last == "weight" else ""
        if companion in names:
            return companion, storage
    return None


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

"""Tensors that no module of the adapter adapts: equal in both models, or trained in full."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.bases.base_weights import BaseWeights
from lora_analysis.bases.tensor_names import module_of
from lora_analysis.errors import BaseWeightError, InputError
from lora_analysis.merging.replay import HALF_TYPES
from lora_analysis.names import strip_wrappers
from lora_analysis.storage.dtypes import round_to, to_float32

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter
    from lora_analysis.bases import Weight
    from lora_analysis.progress import Progress

ROUNDED_TYPES: Final = ("bfloat16", "float16", "float32")
_MARK: Final = re.compile(r"(^|\.)modules_to_save\.[^.]+\.")
_FACTOR_BIAS: Final = re.compile(r"(?P<module>.+)\.lora_B(\.default)?\.bias")
# Differences that LyCORIS stores for weights and biases of layers without factors.
_DIFFERENCE: Final = re.compile(r"(?P<module>.+)\.(?P<kind>w_norm|b_norm|diff|diff_b)")
_TOKENS: Final = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")


class TensorState(StrEnum):
    """What was found about a tensor that is not an adapted weight."""

    SAVED = "stored in full in the adapter, and applied"
    SAVED_ABSENT = "stored in full in the adapter, and not applied"
    CHANGED = "changed, and not by the adapter"
    OTHER_ROWS = "changed in rows that the adapter does not adapt"
    RESIZED = "of another shape than in the base"
    ONLY_BASE = "only in the base"
    ONLY_MERGED = "only in the merged model"
    BASES_EMBEDDING = "the head apart from the embedding, without the update of the embedding"
    UNMATCHED = "stored in the adapter, and in neither model"
    UNREADABLE = "not comparable"


BAD_STATES: Final = (
    TensorState.SAVED_ABSENT, TensorState.CHANGED, TensorState.OTHER_ROWS, TensorState.RESIZED,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that is not an adapted weight and differs between the models."""

    name: str
    state: TensorState
    reason: str = ""


@dataclass(slots=True, eq=False)
class ModelTensors:
    """The tensors of a model, and which of them modules of the adapter adapt.

    Attributes
    ----------
    model
        The model.
    adapted
        Tensor → the weights of modules that are in it.
    """

    model: BaseWeights
    adapted: dict[str, list[Weight]] = field(default_factory=dict)

    def add(self, weight: Weight) -> None:
        """Note that a module adapts a weight."""
        for tensor in {piece.tensor for piece in weight.pieces}:
            self.adapted.setdefault(tensor, []).append(weight)

    def is_covered(self, tensor: str) -> bool:
        """Return True if modules adapt every entry of a tensor."""
        entries = sum(
            piece.height * weight.shape[1]
            for weight in self.adapted.get(tensor, ())
            for piece in weight.pieces
            if piece.tensor == tensor
        )
        return tensor in self.adapted and entries >= math.prod(self.model.stored_shape(tensor))

    def leave_out(self, differing: NDArray[np.bool_], tensor: str) -> None:
        """Set the entries of a tensor that modules adapt to False."""
        for weight in self.adapted.get(tensor, ()):
            for piece in weight.pieces:
                if piece.tensor != tensor:
                    continue
                part = differing if piece.index is None else differing[piece.index]
                for run in piece.runs:
                    if weight.transposed:
                        part[..., run] = False
                    else:
                        part[run] = False


class TensorComparison:
    """Comparison of all tensors, or rest of tensors, that no module adapts.

    Parameters
    ----------
    adapter
        The adapter, with what it stores besides factors.
    old, new
        The models before and after a merge.
    transposed
        As for `merge_check`.
    """

    def __init__(
        self, adapter: Adapter, old: ModelTensors, new: ModelTensors, transposed: bool | None
    ) -> None:
        self._old, self._new = old, new
        self._transposed = transposed
        self._expected = _expected_tensors(adapter, new.model)

    def differences(self, progress: Progress | None) -> Iterator[TensorDifference | None]:
        """Yield what is found about each tensor; None if it is equal in both models."""
        old, new = self._old.model, self._new.model
        pairs, before_only, after_only = _partners(old.names, new.names)
        total = len(pairs) + len(before_only) + len(after_only)
        for done, (before, after) in enumerate(pairs, start=1):
            if not self._new.is_covered(after):
                yield self._compare(before, after)
            if progress:
                progress("other tensors", done, total)
        # Files of two programs: other names, fused and split weights, another order of rows.
        compared: set[str] = set()
        for name in before_only:
            if self._old.is_covered(name):
                continue
            parts = self._counterparts(name)
            compared |= parts.keys()
            if not parts:
                yield TensorDifference(name, TensorState.ONLY_BASE)
            for part, difference in parts.items():
                yield difference and TensorDifference(part, *difference)
        for name in after_only:
            if name not in compared and not self._new.is_covered(name):
                yield self._compare_added(name)
        for key, (base_name, _) in self._expected.items():
            if base_name is None:
                yield TensorDifference(key, TensorState.UNMATCHED)
        if progress:
            progress("other tensors", total, total)

    def _compare(self, before: str, after: str) -> TensorDifference | None:
        """Compare one tensor, or the rows of it that no module adapts; None if they are equal."""
        old, new = self._old.model, self._new.model
        shape, dtype = new.stored_shape(after), new.stored_dtype(after)
        if not (old.is_plain(before) and new.is_plain(after)):
            if after in self._new.adapted:
                reason = f"{dtype}, of which modules adapt a part"
                return TensorDifference(after, TensorState.UNREADABLE, reason)
            difference = self._compare_weights(before, module_of(after) or after)
            return difference and TensorDifference(after, *difference)
        if old.stored_shape(before) != shape:
            reason = f"{old.stored_shape(before)} in the base, {shape} in the merged model"
            return TensorDifference(after, TensorState.RESIZED, reason)
        try:
            first, second = old.stored_tensor(before), new.stored_tensor(after)
        except InputError as error:
            return TensorDifference(after, TensorState.UNREADABLE, str(error))
        expected = [make for name, make in self._expected.values() if name == after]
        if expected:
            target = reduce(lambda values, make: make(values), expected, first)
            is_applied = _is_rounded(target, second, dtype)
            state = TensorState.SAVED if is_applied else TensorState.SAVED_ABSENT
            return TensorDifference(after, state)
        if _is_rounded(first, second, dtype):
            return None
        if after not in self._new.adapted:
            return TensorDifference(after, TensorState.CHANGED)
        differing = np.asarray(_round_values(first, dtype) != np.asarray(second))
        self._new.leave_out(differing, after)
        return TensorDifference(after, TensorState.OTHER_ROWS) if differing.any() else None

    def _counterparts(self, before: str) -> dict[str, tuple[TensorState, str] | None]:
        """Return the tensors of the merged model that a base's tensor became, compared with it."""
        module = module_of(before)
        if module is None:
            return self._compare_vectors(before, before.removesuffix(".bias"))
        try:
            after = self._new.model.weight(module, transposed=self._transposed)
        except BaseWeightError:
            return self._compare_vectors(before, module)
        names = {piece.tensor for piece in after.pieces}
        if any(name in self._new.adapted for name in names):
            return {}
        return dict.fromkeys(names, self._compare_weights(before, module))

    def _compare_vectors(
        self, before: str, module: str
    ) -> dict[str, tuple[TensorState, str] | None]:
        """Compare a vector, as of a norm, with the one of another program's name."""
        old, new = self._old.model, self._new.model
        names = new.tensors_of(module)
        if module_of(before) is None:
            biases = [name.removesuffix("weight") + "bias" for name in names]
            names = [name for name in biases if name in new.names]
        if len(names) != 1 or new.stored_shape(names[0]) != old.stored_shape(before):
            return {}
        first, second = old.stored_tensor(before), new.stored_tensor(names[0])
        if _is_rounded(first, second, new.stored_dtype(names[0])):
            return {names[0]: None}
        reason = "the programs of the two files may store this vector differently"
        return {names[0]: (TensorState.UNREADABLE, reason)}

    def _compare_weights(self, before: str, module: str) -> tuple[TensorState, str] | None:
        """Compare two matrices however they are stored; None if they are equal."""
        try:
            first = self._old.model.weight(module_of(before) or before, transposed=self._transposed)
            second = self._new.model.weight(module, shape=first.shape, transposed=self._transposed)
            W = first.array()
            # A quantized weight may have been loaded in half precision.
            loadings = ["", *HALF_TYPES] if first.storage else [""]
            dtype = second.stored_dtype
            for rows, columns, tile in second.blocks(check=False):
                values = {loaded: _round_values(W[rows, columns], loaded) for loaded in loadings}
                loadings = [
                    loaded
                    for loaded in loadings
                    if np.array_equal(_round_values(values[loaded], dtype), tile, equal_nan=True)
                ]
        except InputError as error:
            return TensorState.UNREADABLE, str(error)
        if loadings:
            return None
        if second.storage:
            return TensorState.UNREADABLE, f"{second.storage} in the merged model"
        return TensorState.CHANGED, ""

    def _compare_added(self, name: str) -> TensorDifference | None:
        """Compare a tensor that only the merged model has; None if it is a tied head."""
        new, shape = self._new.model, self._new.model.stored_shape(name)
        try:
            if len(shape) != 2 or (module := module_of(name)) is None:
                return TensorDifference(name, TensorState.ONLY_MERGED)
            embedding = self._old.model.weight(module, shape=(shape[0], shape[1]))
            tied_to = module_of(embedding.pieces[0].tensor) or ""
            if tied_to.rpartition(".")[2] == module.rpartition(".")[2]:
                return TensorDifference(name, TensorState.ONLY_MERGED)
            head, tied = new.weight(module, shape=embedding.shape), new.weight(tied_to)
        except BaseWeightError:
            return TensorDifference(name, TensorState.ONLY_MERGED)
        values = head.array()
        if np.array_equal(tied.array(), values):
            return None
        if _is_rounded(embedding.array(), values, head.stored_dtype):
            return TensorDifference(name, TensorState.BASES_EMBEDDING)
        return TensorDifference(name, TensorState.CHANGED, "differs from both embeddings")


def _partners(
    before: Sequence[str], after: Sequence[str]
) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Return the tensors of two models in pairs, by name, then without wrappers; and the rest."""
    shared = set(before) & set(after)
    pairs = [(name, name) for name in after if name in shared]
    left = dict.fromkeys(name for name in before if name not in shared)
    short: dict[str, list[str]] = {}
    for name in left:
        short.setdefault(_without_model(name), []).append(name)
    after_only = []
    for name in (name for name in after if name not in shared):
        candidates = short.get(_without_model(name), [])
        if len(candidates) == 1 and candidates[0] in left:
            pairs.append((candidates[0], name))
            del left[candidates[0]]
        else:
            after_only.append(name)
    return pairs, list(left), after_only


def _without_model(name: str) -> str:
    return strip_wrappers(name).removeprefix("model.")


Make = Callable[["NDArray[Any]"], "NDArray[Any]"]


def _expected_tensors(adapter: Adapter, model: BaseWeights) -> dict[str, tuple[str | None, Make]]:
    """Return tensors that the adapter stores besides factors: where they belong, and their value.

    The value is a function of the base's tensor. The tensor is None if the model has none.
    """
    by_end: dict[str, list[str]] = {}
    for name in model.names:
        segments = _plain_name(name).split(".")
        for start in range(len(segments)):
            by_end.setdefault(".".join(segments[start:]), []).append(name)

    def tensor(key: str) -> str | None:
        """Return the model's tensor; its name may have leading segments that the key lacks."""
        exact = [name for name in by_end.get(key, ()) if _plain_name(name) == key]
        segments = key.split(".")
        ends = (by_end.get(".".join(segments[start:]), []) for start in range(len(segments) - 1))
        candidates = exact or next((names for names in ends if names), [])
        return candidates[0] if len(candidates) == 1 else None

    expected: dict[str, tuple[str | None, Make]] = {}
    for key in adapter.saved_modules:
        expected[key] = tensor(_plain_name(key)), partial(_saved_values, adapter, key)
    for key, stored in adapter.side_tensors.items():
        plain = _plain_name(key)
        if not stored.alters_model:
            continue
        if match := _FACTOR_BIAS.fullmatch(plain):
            module = match["module"]
            scale = adapter.outline(module).known_scale() if module in adapter else 1.0
            make: Make = partial(_add_difference, adapter, key, scale)
            expected[key] = tensor(f"{module}.bias"), make
        elif match := _DIFFERENCE.fullmatch(plain):
            weights = model.tensors_of(match["module"])
            if match["kind"] in ("b_norm", "diff_b"):
                weights = [name.removesuffix("weight") + "bias" for name in weights]
            target = weights[0] if len(weights) == 1 and weights[0] in model.names else None
            expected[key] = target, partial(_add_difference, adapter, key, 1.0)
        elif match := _TOKENS.fullmatch(plain):
            make = partial(_replace_tokens, adapter, key, match["module"])
            expected[key] = tensor(f"{match['module']}.weight"), make
        elif plain not in {_plain_name(name) for name in adapter.saved_modules}:
            expected[key] = tensor(plain), partial(_saved_values, adapter, key)
    return expected


def _plain_name(name: str) -> str:
    return strip_wrappers(_MARK.sub(r"\1", name))


def _side_values(adapter: Adapter, key: str) -> NDArray[Any]:
    if key in adapter.saved_modules:
        return np.asarray(adapter.saved_modules[key])
    tensor = adapter.side_tensors[key]
    return to_float32(tensor.read(), tensor.dtype).reshape(tensor.shape)


def _saved_values(adapter: Adapter, key: str, _: NDArray[Any]) -> NDArray[Any]:
    return _side_values(adapter, key)


def _add_difference(
    adapter: Adapter, key: str, scale: float, tensor: NDArray[Any]
) -> NDArray[np.float32]:
    """Return a tensor with a stored difference added; the scale multiplies a factor's bias."""
    added = np.float32(scale) * _side_values(adapter, key).astype(np.float32)
    return np.asarray(tensor.astype(np.float32) + added.reshape(tensor.shape))


def _replace_tokens(
    adapter: Adapter, key: str, module: str, table: NDArray[Any]
) -> NDArray[np.float32]:
    """Return an embedding with the rows of the trained tokens replaced."""
    indices: Any = adapter.config.get("trainable_token_indices") or []
    if isinstance(indices, Mapping):
        ends = [end for end in indices if module == end or module.endswith(f".{end}")]
        indices = indices[ends[0]] if ends else []
    table = table.astype(np.float32)
    table[list(indices)] = _side_values(adapter, key)
    return table


def _is_rounded(first: Any, second: Any, dtype: str) -> bool:
    """Return True if a tensor is another one, as a type stores it, perhaps loaded in half first."""
    values = np.asarray(first)
    return any(
        np.array_equal(_round_values(_round_values(values, loaded), dtype), second, equal_nan=True)
        for loaded in ("float32", *HALF_TYPES)
        if loaded == "float32" or np.issubdtype(values.dtype, np.floating)
    )


def _round_values(values: Any, dtype: str) -> Any:
    """Return a tensor as a type stores it; as it is if it is not of floating-point numbers."""
    array = np.asarray(values)
    if dtype not in ROUNDED_TYPES or not np.issubdtype(array.dtype, np.floating):
        return array
    return round_to(array.astype(np.float64), dtype)

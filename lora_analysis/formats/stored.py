"""A factor as a file stores it: tensors, and the operations that turn them into A or B.

Formats store factors transposed, fused, sliced, stacked, flattened or scaled. A reader states
this once, as a value; the shape follows from the headers alone, and the numbers are read when a
module is asked for::

    tensor("layers.0.lora_a").transpose()          # MLX: A stored as (d_in, r)
    tensor("qkv.lora_A").rows(slice(0, 8))          # the q block of a fused A
    tensor("experts.lora_B").columns(slice(3, None, 8))   # expert 3 of 8
    tensor("conv.lora_down").flatten()            # (r, c_in, k, k) to (r, c_in·k·k)
    stack([tensor("a"), tensor("b")])               # two factors of one update
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.adapter import FilePosition
from lora_analysis.storage.safetensors import TensorInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_analysis.storage.tensors import NamedTensors

Shape = tuple[int, ...]


class StoredFactor(ABC):
    """One factor of an update, not yet read.

    Build one with :func:`tensor` and add operations with the methods; each returns a new value.
    ``shape`` costs nothing, ``read`` reads.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that are read, the first one naming the factor in messages."""

    @abstractmethod
    def shape(self, tensors: NamedTensors) -> Shape:
        """Return the shape after all operations, from the headers.

        Raises
        ------
        ValueError
            The stored shape does not allow an operation; callers name the tensor.
        """

    @abstractmethod
    def read(self, tensors: NamedTensors) -> NDArray[Any]:
        """Read the numbers and apply all operations."""

    @abstractmethod
    def position(self, tensors: NamedTensors) -> FilePosition | None:
        """Return the position in the file; None unless it is one block there, in this order."""

    @property
    def name(self) -> str:
        """Name of the first tensor."""
        return self.names[0]

    def transpose(self, *axes: int) -> StoredFactor:
        """Return the factor with its axes in the given order, reversed by default."""
        return _Operation(self, "transpose", axes)

    def reshape(self, *shape: int) -> StoredFactor:
        """Return the factor in a shape of as many elements; a ``-1`` is inferred."""
        return _Operation(self, "reshape", shape)

    def flatten(self) -> StoredFactor:
        """Return the factor as a matrix: all axes but the first, as of a kernel, become one."""
        return _Operation(self, "flatten", ())

    def at(self, index: int) -> StoredFactor:
        """Return one item along the first axis, for example one expert of a stack."""
        return _Operation(self, "at", (index,))

    def rows(self, part: slice) -> StoredFactor:
        """Return some rows of the factor."""
        return _Operation(self, "rows", (part,))

    def columns(self, part: slice) -> StoredFactor:
        """Return some columns of the factor; a step takes every n-th."""
        return _Operation(self, "columns", (part,))

    def spread_blocks(self, count: int) -> StoredFactor:
        """Return the block-diagonal matrix of the factor's ``count`` blocks of rows."""
        return _Operation(self, "spread_blocks", (count,))

    def times(self, number: float) -> StoredFactor:
        """Return the factor multiplied by a number, in float64."""
        return _Operation(self, "times", (number,))

    def scale_rows(self, diagonal: StoredFactor) -> StoredFactor:
        """Return the factor with row k times entry k of a vector, ``diag(v)·M``, in float64."""
        return _Combination((self, diagonal), "scale_rows")


def tensor(name: str, *, shared: bool = False) -> StoredFactor:
    """Return the factor that is a stored tensor as it is.

    ``shared``: many modules take their parts of it, one after the other. The last few such tensors
    stay in memory, and are not read again for every part.
    """
    return _Tensor(name, shared)


def stack(factors: Sequence[StoredFactor], *, axis: int = 0) -> StoredFactor:
    """Return factors one below the other, or (``axis=1``) next to each other."""
    return _Combination(tuple(factors), "stack", (axis,))


def block_diagonal(blocks: Sequence[StoredFactor]) -> StoredFactor:
    """Return matrices along the diagonal of a larger one that is zero elsewhere."""
    return _Combination(tuple(blocks), "block_diagonal")


def contract(core: StoredFactor, matrix: StoredFactor) -> StoredFactor:
    """Return a core ``(i, j, …)`` times a matrix ``(j, c)`` along j, ``(i, c, …)`` in float64."""
    return _Combination((matrix, core), "contract")


def kronecker(first: StoredFactor, second: StoredFactor) -> StoredFactor:
    """Return the Kronecker product of two matrices, in float64."""
    return _Combination((first, second), "kronecker")


def kronecker_operands(factor: StoredFactor) -> tuple[StoredFactor, ...]:
    """Return the two operands of a Kronecker product; none of another factor."""
    is_product = isinstance(factor, _Combination) and factor.operation == "kronecker"
    return factor.operands if is_product else ()  # type: ignore[attr-defined]


def khatri_rao(first: StoredFactor, second: StoredFactor) -> StoredFactor:
    """Return the Kronecker products of the rows of two matrices, ``(n, r₁·r₂)`` in float64."""
    return _Combination((first, second), "khatri_rao")


def identity_like(matrix: StoredFactor, size: int) -> StoredFactor:
    """Return the identity of a size, which counts as made of another factor's tensor."""
    return _Operation(matrix, "identity", (size,))


def deinterleave_heads(factor: StoredFactor, shape: Sequence[int], heads: int) -> StoredFactor:
    """Return B, or one number per row, with each head's interleaved rows reordered as two halves.

    Meta's rotary embedding turns neighboring rows of a head together, Hugging Face's row i of its
    first half with row i of its second. Weights that went from one to the other have their rows
    permuted, and so has B of an update.

    Parameters
    ----------
    factor, shape
        The factor and its shape, whose rows divide by ``2·heads``.
    heads
        Number of heads that the rows are of.
    """
    rows, *rest = shape
    in_pairs = factor.reshape(heads, rows // heads // 2, 2, *rest)
    return in_pairs.transpose(0, 2, 1, *range(3, 3 + len(rest))).reshape(*shape)


@dataclass(frozen=True, slots=True)
class _Tensor(StoredFactor):
    key: str
    shared: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.key,)

    def shape(self, tensors: NamedTensors) -> Shape:
        return tensors.infos[self.key].shape

    def read(self, tensors: NamedTensors) -> NDArray[Any]:
        return _read_shared(tensors, self.key) if self.shared else tensors.read(self.key)

    def position(self, tensors: NamedTensors) -> FilePosition | None:
        info = tensors.infos[self.key]
        if not isinstance(info, TensorInfo) or info.strides is not None or not info.elements:
            return None
        return FilePosition(info.start, (info.stop - info.start) // info.elements, info.shape)


@lru_cache(maxsize=6)
def _read_shared(tensors: NamedTensors, name: str) -> NDArray[Any]:
    whole = tensors.read(name)
    whole.flags.writeable = False
    return whole


@dataclass(frozen=True, slots=True)
class _Operation(StoredFactor):
    """One operation of `_OPERATIONS` on a factor, by name: a value that can be pickled."""

    operand: StoredFactor
    operation: str
    arguments: tuple[Any, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.operand.names

    def shape(self, tensors: NamedTensors) -> Shape:
        return _OPERATIONS[self.operation][0](self.operand.shape(tensors), *self.arguments)

    def read(self, tensors: NamedTensors) -> NDArray[Any]:
        return _OPERATIONS[self.operation][1](self.operand.read(tensors), *self.arguments)

    def position(self, tensors: NamedTensors) -> FilePosition | None:
        """Return the position of a part that is one block; None for a part of a transposed one.

        A transposed matrix is a view in the file's order; a part of it is a copy.
        """
        source = self.operand.position(tensors)
        operand = self.operand
        if source is None or (isinstance(operand, _Operation) and operand.operation == "transpose"):
            return None
        first = 0
        if self.operation in ("columns", "identity") or (
            self.operation == "transpose" and len(source.shape) > 2
        ):
            return None
        if self.operation == "at":
            first = self.arguments[0] % source.shape[0]
        elif self.operation == "rows":
            first, _, step = self.arguments[0].indices(source.shape[0])
            if step != 1:
                return None
        skipped = first * math.prod(source.shape[1:]) * source.itemsize
        return FilePosition(source.offset + skipped, source.itemsize, self.shape(tensors))


@dataclass(frozen=True, slots=True)
class _Combination(StoredFactor):
    """One operation of `_COMBINATIONS` on several factors, by name; never one block of a file."""

    operands: tuple[StoredFactor, ...]
    operation: str
    arguments: tuple[Any, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for operand in self.operands for name in operand.names)

    def shape(self, tensors: NamedTensors) -> Shape:
        shapes = [operand.shape(tensors) for operand in self.operands]
        return _COMBINATIONS[self.operation][0](shapes, *self.arguments)

    def read(self, tensors: NamedTensors) -> NDArray[Any]:
        arrays = [operand.read(tensors) for operand in self.operands]
        return _COMBINATIONS[self.operation][1](arrays, *self.arguments)

    def position(self, tensors: NamedTensors) -> None:  # noqa: ARG002
        return None


def _transposed_shape(shape: Shape, *axes: int) -> Shape:
    order = axes or tuple(reversed(range(len(shape))))
    if sorted(order) != list(range(len(shape))):
        message = f"axes {axes} of a tensor of shape {shape}"
        raise ValueError(message)
    return tuple(shape[axis] for axis in order)


def _new_shape(stored: Shape, *shape: int) -> Shape:
    size, given = math.prod(stored), math.prod(n for n in shape if n != -1)
    open_axes = shape.count(-1)
    if open_axes > 1 or given == 0 or size % given or (not open_axes and size != given):
        message = f"shape {stored} as {shape}"
        raise ValueError(message)
    return tuple(size // given if n == -1 else n for n in shape)


def _item_shape(shape: Shape, index: int) -> Shape:
    if not shape or not -shape[0] <= index < shape[0]:
        message = f"item {index} of a tensor of shape {shape}"
        raise ValueError(message)
    return shape[1:]


def _sliced_shape(shape: Shape, axis: int, part: slice) -> Shape:
    if len(shape) <= axis:
        message = f"part of axis {axis} of a tensor of shape {shape}"
        raise ValueError(message)
    return (*shape[:axis], len(range(*part.indices(shape[axis]))), *shape[axis + 1 :])


def _spread_shape(shape: Shape, count: int) -> Shape:
    if len(shape) != 2 or shape[0] % count:
        message = f"{count} blocks one below the other, of shape {shape} together"
        raise ValueError(message)
    return shape[0], shape[1] * count


def _spread_blocks(blocks: NDArray[Any], count: int) -> NDArray[Any]:
    rows, columns = blocks.shape
    whole = np.zeros((count, rows // count, count, columns), blocks.dtype)
    diagonal = np.arange(count)
    whole[diagonal, :, diagonal] = blocks.reshape(count, -1, columns)
    return whole.reshape(rows, -1)


# Shape and numbers of each operation. A part is a copy: a view would keep the whole tensor in
# memory.
_OPERATIONS: Final[dict[str, tuple[Callable[..., Shape], Callable[..., NDArray[Any]]]]] = {
    "transpose": (_transposed_shape, lambda array, *axes: np.transpose(array, axes or None)),
    "reshape": (_new_shape, lambda array, *shape: array.reshape(shape)),
    "flatten": (
        lambda shape: (*shape[:1], math.prod(shape[1:])),
        lambda array: array.reshape(len(array), -1),
    ),
    "at": (_item_shape, lambda array, index: array[index].copy()),
    "rows": (
        lambda shape, part: _sliced_shape(shape, 0, part),
        lambda array, part: array[part].copy(),
    ),
    "columns": (
        lambda shape, part: _sliced_shape(shape, 1, part),
        lambda array, part: array[:, part].copy(),
    ),
    "spread_blocks": (_spread_shape, _spread_blocks),
    "identity": (lambda _, size: (size, size), lambda _, size: np.eye(size)),
    "times": (lambda shape, _: shape, lambda array, number: array * np.float64(number)),
}


def _scaled_shape(shapes: Sequence[Shape]) -> Shape:
    shape, entries = shapes
    if not shape or math.prod(entries) != shape[0]:
        message = f"a diagonal of shape {entries} for a factor of shape {shape}"
        raise ValueError(message)
    return shape


def _scale_rows(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    factor, diagonal = arrays
    return factor * diagonal.astype(np.float64).reshape(-1, 1)


def _stack_shape(shapes: Sequence[Shape], axis: int) -> Shape:
    alike = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
    if len(alike) != 1 or any(len(shape) <= axis for shape in shapes):
        message = f"parts of shapes {shapes} side by side"
        raise ValueError(message)
    first = shapes[0]
    return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])


def _block_diagonal_shape(shapes: Sequence[Shape]) -> Shape:
    if any(len(shape) != 2 for shape in shapes):
        message = f"blocks of shapes {shapes}"
        raise ValueError(message)
    return sum(shape[0] for shape in shapes), sum(shape[1] for shape in shapes)


def _block_diagonal(blocks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    whole = np.zeros(
        _block_diagonal_shape([block.shape for block in blocks]), np.result_type(*blocks)
    )
    top = left = 0
    for block in blocks:
        bottom, right = top + block.shape[0], left + block.shape[1]
        whole[top:bottom, left:right] = block
        top, left = bottom, right
    return whole


def _contracted_shape(shapes: Sequence[Shape]) -> Shape:
    matrix, core = shapes
    if len(core) < 2 or len(matrix) != 2 or core[1] != matrix[0]:
        message = f"a core of shape {core} with a matrix of shape {matrix}"
        raise ValueError(message)
    return (core[0], matrix[1], *core[2:])


def _contract(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    matrix, core = (array.astype(np.float64) for array in arrays)
    return np.moveaxis(np.tensordot(core, matrix, axes=(1, 0)), -1, 1)


def _kronecker_shape(shapes: Sequence[Shape]) -> Shape:
    if any(len(shape) != 2 for shape in shapes):
        message = f"a Kronecker product of shapes {shapes}"
        raise ValueError(message)
    (rows, columns), (rows_2, columns_2) = shapes
    return rows * rows_2, columns * columns_2


def _khatri_rao_shape(shapes: Sequence[Shape]) -> Shape:
    if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][0]:
        message = f"products of the rows of shapes {shapes}"
        raise ValueError(message)
    return shapes[0][0], shapes[0][1] * shapes[1][1]


def _khatri_rao(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    first, second = (array.astype(np.float64) for array in arrays)
    return (first[:, :, None] * second[:, None, :]).reshape(len(first), -1)


_COMBINATIONS: Final[dict[str, tuple[Callable[..., Shape], Callable[..., NDArray[Any]]]]] = {
    "scale_rows": (_scaled_shape, _scale_rows),
    "stack": (_stack_shape, lambda arrays, axis: np.concatenate(arrays, axis=axis)),
    "block_diagonal": (_block_diagonal_shape, _block_diagonal),
    "contract": (_contracted_shape, _contract),
    "khatri_rao": (_khatri_rao_shape, _khatri_rao),
    "kronecker": (
        _kronecker_shape,
        lambda arrays: np.kron(*(array.astype(np.float64) for array in arrays)),
    ),
}

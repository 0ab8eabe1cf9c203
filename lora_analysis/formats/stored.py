"""A factor as it lies in a file: stored tensors, and what is done to them when they are read.

Formats store factors transposed, fused, sliced, stacked, flattened or scaled. A reader says so
once, as a value; the shape follows from the headers alone, and the numbers are read when a
module is asked for::

    tensor("layers.0.lora_a").transposed()          # MLX: A stored as (d_in, r)
    tensor("qkv.lora_A").rows(slice(0, 8))          # the q block of a fused A
    tensor("experts.lora_B").columns(slice(3, None, 8))   # expert 3 of 8
    tensor("conv.lora_down").flattened()            # (r, c_in, k, k) to (r, c_in·k·k)
    stacked([tensor("a"), tensor("b")])             # two factors of one update
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from lora_analysis.adapter import FilePosition
from lora_analysis.storage.safetensors import TensorInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_analysis.storage.tensors import NamedTensors

Shape = tuple[int, ...]


class _Part(Protocol):
    """What a factor is made of: a stored tensor, one thing done to another part, or several."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def shape(self, tensors: NamedTensors) -> Shape: ...

    def read(self, tensors: NamedTensors) -> NDArray[Any]: ...

    def position(self, tensors: NamedTensors) -> FilePosition | None: ...


class _Computed:
    """A part whose entries are not one block of a file."""

    __slots__ = ()

    def position(self, tensors: NamedTensors) -> FilePosition | None:  # noqa: ARG002
        return None


@dataclass(frozen=True, slots=True)
class StoredFactor:
    """One factor of an update, not yet read.

    Build one with :func:`tensor` and say with the methods what has to be done to it; each
    returns a new value. ``shape`` costs nothing, ``read`` reads.
    """

    part: _Part

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that are read, the first one naming the factor in messages."""
        return self.part.names

    @property
    def name(self) -> str:
        """Name of the first tensor."""
        return self.part.names[0]

    @property
    def is_transposed(self) -> bool:
        """Whether the last thing done to it was to transpose it."""
        return isinstance(self.part, _Done) and self.part.operation == "transposed"

    def shape(self, tensors: NamedTensors) -> Shape:
        """Return the shape after everything is done, from the headers.

        Raises
        ------
        ValueError
            The stored shape does not allow what is to be done; callers name the tensor.
        """
        return self.part.shape(tensors)

    def read(self, tensors: NamedTensors) -> NDArray[Any]:
        """Return the numbers."""
        return self.part.read(tensors)

    def position(self, tensors: NamedTensors) -> FilePosition | None:
        """Return where it lies in its file; None unless it is one block there, in this order."""
        return self.part.position(tensors)

    def transposed(self, *axes: int) -> StoredFactor:
        """Return it with its axes in the given order, reversed by default."""
        return StoredFactor(_Done(self, "transposed", axes))

    def reshaped(self, *shape: int) -> StoredFactor:
        """Return it in another shape of as many elements; one ``-1`` is worked out."""
        return StoredFactor(_Done(self, "reshaped", shape))

    def flattened(self) -> StoredFactor:
        """Return it as a matrix: all axes but the first become one, as of a kernel."""
        return StoredFactor(_Done(self, "flattened", ()))

    def at(self, index: int) -> StoredFactor:
        """Return one member along the first axis, say one expert of a stack."""
        return StoredFactor(_Done(self, "at", (index,)))

    def rows(self, part: slice) -> StoredFactor:
        """Return some of its rows."""
        return StoredFactor(_Done(self, "rows", (part,)))

    def columns(self, part: slice) -> StoredFactor:
        """Return some of its columns; a step takes every n-th."""
        return StoredFactor(_Done(self, "columns", (part,)))

    def spread(self, count: int) -> StoredFactor:
        """Return the block-diagonal matrix of which it is the blocks, one below the other."""
        return StoredFactor(_Done(self, "spread", (count,)))

    def times(self, number: float) -> StoredFactor:
        """Return it multiplied by a number, in float64."""
        return StoredFactor(_Done(self, "times", (number,)))

    def scaled_rows(self, diagonal: StoredFactor) -> StoredFactor:
        """Return it with row k multiplied by entry k of a vector, ``diag(v)·M``, in float64."""
        return StoredFactor(_ScaledRows(self, diagonal))


def tensor(name: str, *, shared: bool = False) -> StoredFactor:
    """Return the factor that is a stored tensor as it lies.

    ``shared`` says that many modules take their parts of it, one after the other: the last few
    such tensors are kept, and not read anew for every part.
    """
    return StoredFactor(_Tensor(name, shared))


def stacked(factors: Sequence[StoredFactor], *, axis: int = 0) -> StoredFactor:
    """Return factors one below the other, or (``axis=1``) beside each other."""
    return StoredFactor(_Joined(tuple(factors), axis))


def block_diagonal(blocks: Sequence[StoredFactor]) -> StoredFactor:
    """Return matrices along the diagonal of a larger one that is zero elsewhere."""
    return StoredFactor(_Blocks(tuple(blocks)))


def contracted(core: StoredFactor, matrix: StoredFactor) -> StoredFactor:
    """Return a core ``(i, j, …)`` times a matrix ``(j, c)`` along j, ``(i, c, …)`` in float64."""
    return StoredFactor(_Contracted(core, matrix))


@dataclass(frozen=True, slots=True)
class _Contracted(_Computed):
    core: StoredFactor
    matrix: StoredFactor

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.matrix.names, *self.core.names)

    def shape(self, tensors: NamedTensors) -> Shape:
        core, matrix = self.core.shape(tensors), self.matrix.shape(tensors)
        if len(core) < 2 or len(matrix) != 2 or core[1] != matrix[0]:
            message = f"a core of shape {core} with a matrix of shape {matrix}"
            raise ValueError(message)
        return (core[0], matrix[1], *core[2:])

    def read(self, tensors: NamedTensors) -> NDArray[Any]:
        core, matrix = (part.read(tensors).astype(np.float64) for part in (self.core, self.matrix))
        return np.moveaxis(np.tensordot(core, matrix, axes=(1, 0)), -1, 1)


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shared: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def shape(self, tensors: NamedTensors) -> Shape:
        return tensors.infos[self.name].shape

    def read(self, tensors: NamedTensors) -> NDArray[Any]:
        return _read_shared(tensors, self.name) if self.shared else tensors.read(self.name)

    def position(self, tensors: NamedTensors) -> FilePosition | None:
        info = tensors.infos[self.name]
        if not isinstance(info, TensorInfo) or info.strides is not None or not info.elements:
            return None
        return FilePosition(info.start, (info.stop - info.start) // info.elements, info.shape)


@lru_cache(maxsize=6)
def _read_shared(tensors: NamedTensors, name: str) -> NDArray[Any]:
    whole = tensors.read(name)
    whole.flags.writeable = False
    return whole


@dataclass(frozen=True, slots=True)
class _Done:
    """One operation of the table below, by name: a value that can be shown and sent elsewhere."""

    of: StoredFactor
    operation: str
    arguments: tuple[Any, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.of.names

    def shape(self, tensors: NamedTensors) -> Shape:
        return _OPERATIONS[self.operation][0](self.of.shape(tensors), *self.arguments)

    def read(self, tensors: NamedTensors) -> NDArray[Any]:
        return _OPERATIONS[self.operation][1](self.of.read(tensors), *self.arguments)

    def position(self, tensors: NamedTensors) -> FilePosition | None:
        """Return the position of a part that is one block; nothing is done after a transposition.

        A transposed matrix is a view in the file's order; what is done to it makes a copy.
        """
        source = self.of.position(tensors)
        if source is None or self.of.is_transposed:
            return None
        first = 0
        turned = self.operation == "transposed" and len(source.shape) > 2
        if turned or self.operation == "columns":
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
class _ScaledRows(_Computed):
    of: StoredFactor
    diagonal: StoredFactor

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.of.names, *self.diagonal.names)

    def shape(self, tensors: NamedTensors) -> Shape:
        shape, entries = self.of.shape(tensors), self.diagonal.shape(tensors)
        if not shape or math.prod(entries) != shape[0]:
            message = f"a diagonal of shape {entries} for a factor of shape {shape}"
            raise ValueError(message)
        return shape

    def read(self, tensors: NamedTensors) -> NDArray[Any]:
        diagonal = self.diagonal.read(tensors).astype(np.float64).reshape(-1, 1)
        return self.of.read(tensors) * diagonal


@dataclass(frozen=True, slots=True)
class _Joined(_Computed):
    parts: tuple[StoredFactor, ...]
    axis: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.names)

    def shape(self, tensors: NamedTensors) -> Shape:
        shapes = [part.shape(tensors) for part in self.parts]
        alike = {(*shape[: self.axis], *shape[self.axis + 1 :]) for shape in shapes}
        if len(alike) != 1 or any(len(shape) <= self.axis for shape in shapes):
            message = f"parts of shapes {shapes} side by side"
            raise ValueError(message)
        first, *others = shapes
        along = first[self.axis] + sum(shape[self.axis] for shape in others)
        return (*first[: self.axis], along, *first[self.axis + 1 :])

    def read(self, tensors: NamedTensors) -> NDArray[Any]:
        return np.concatenate([part.read(tensors) for part in self.parts], axis=self.axis)


@dataclass(frozen=True, slots=True)
class _Blocks(_Computed):
    parts: tuple[StoredFactor, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.names)

    def shape(self, tensors: NamedTensors) -> Shape:
        shapes = [part.shape(tensors) for part in self.parts]
        if any(len(shape) != 2 for shape in shapes):
            message = f"blocks of shapes {shapes}"
            raise ValueError(message)
        return sum(shape[0] for shape in shapes), sum(shape[1] for shape in shapes)

    def read(self, tensors: NamedTensors) -> NDArray[Any]:
        blocks = [part.read(tensors) for part in self.parts]
        whole = np.zeros(self.shape(tensors), np.result_type(*blocks))
        top = left = 0
        for block in blocks:
            bottom, right = top + block.shape[0], left + block.shape[1]
            whole[top:bottom, left:right] = block
            top, left = bottom, right
        return whole


def _turned(shape: Shape, *axes: int) -> Shape:
    order = axes or tuple(reversed(range(len(shape))))
    if sorted(order) != list(range(len(shape))):
        message = f"axes {axes} of a tensor of shape {shape}"
        raise ValueError(message)
    return tuple(shape[axis] for axis in order)


def _reshaped(stored: Shape, *wanted: int) -> Shape:
    size, known = math.prod(stored), math.prod(n for n in wanted if n != -1)
    open_axes = wanted.count(-1)
    if open_axes > 1 or known == 0 or size % known or (not open_axes and size != known):
        message = f"shape {stored} as {wanted}"
        raise ValueError(message)
    return tuple(size // known if n == -1 else n for n in wanted)


def _member(shape: Shape, index: int) -> Shape:
    if not shape or not -shape[0] <= index < shape[0]:
        message = f"member {index} of a tensor of shape {shape}"
        raise ValueError(message)
    return shape[1:]


def _cut(shape: Shape, axis: int, part: slice) -> Shape:
    if len(shape) <= axis:
        message = f"part of axis {axis} of a tensor of shape {shape}"
        raise ValueError(message)
    return (*shape[:axis], len(range(*part.indices(shape[axis]))), *shape[axis + 1 :])


def _spread_shape(shape: Shape, count: int) -> Shape:
    if len(shape) != 2 or shape[0] % count:
        message = f"{count} blocks one below the other, of shape {shape} together"
        raise ValueError(message)
    return shape[0], shape[1] * count


def _spread(blocks: NDArray[Any], count: int) -> NDArray[Any]:
    rows, columns = blocks.shape
    whole = np.zeros((count, rows // count, count, columns), blocks.dtype)
    diagonal = np.arange(count)
    whole[diagonal, :, diagonal] = blocks.reshape(count, -1, columns)
    return whole.reshape(rows, -1)


# Per operation what it does to a shape, and what to the numbers. A part is a copy: a view would
# keep the whole tensor in memory.
_OPERATIONS: Final[dict[str, tuple[Callable[..., Shape], Callable[..., NDArray[Any]]]]] = {
    "transposed": (_turned, lambda array, *axes: np.transpose(array, axes or None)),
    "reshaped": (_reshaped, lambda array, *shape: array.reshape(shape)),
    "flattened": (
        lambda shape: (*shape[:1], math.prod(shape[1:])),
        lambda array: array.reshape(len(array), -1),
    ),
    "at": (_member, lambda array, index: array[index].copy()),
    "rows": (lambda shape, part: _cut(shape, 0, part), lambda array, part: array[part].copy()),
    "columns": (
        lambda shape, part: _cut(shape, 1, part),
        lambda array, part: array[:, part].copy(),
    ),
    "spread": (_spread_shape, _spread),
    "times": (lambda shape, _: shape, lambda array, number: array * np.float64(number)),
}

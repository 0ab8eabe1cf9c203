"""``BaseWeights`` and ``Weight``: one base tensor at a time, in the orientation of ΔW."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora_analysis.bases.naming import TensorNames
from lora_analysis.bases.orientation import is_transposed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from lora_analysis.storage.hub_names import Snapshot

    Tiles = Iterator[tuple[slice, slice, NDArray[np.float32]]]


class TensorSource(Protocol):
    """Where the tensors of a base lie: files, a live model, arrays."""

    @property
    def names(self) -> Sequence[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the stored shape."""

    def dtype(self, name: str) -> str:
        """Return the stored type, as ``"bfloat16"``."""

    def transposed(self, name: str) -> bool | None:
        """Say whether the matrix is stored as ``[in, out]``; None where that is not known."""

    def tiles(self, name: str) -> Tiles:
        """Yield a matrix in stored orientation, tile by tile, in a reused float32 buffer."""

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor of any shape, as stored."""

    def refuse_unreadable(self, name: str) -> None:
        """Raise BaseWeightError where the tensor does not hold the weight's own numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One frozen weight ``W``, shape ``(d_out, d_in)``, read when its blocks are asked for.

    ``name`` is the tensor's, ``transposed`` says that it is stored as ``[in, out]``.
    """

    name: str
    shape: tuple[int, int]
    stored_dtype: str
    transposed: bool
    _tiles: Callable[[], Tiles] = field(repr=False)

    def blocks(self) -> Tiles:
        """Yield row slice, column slice and that tile of ``W``, covering it once.

        A tile is float32 and about a million elements. Its memory is reused: the values last
        until the next step. What is open for reading is closed at the end.
        """
        for rows, columns, tile in self._tiles():
            if self.transposed:
                yield columns, rows, tile.T
            else:
                yield rows, columns, tile

    def array(self) -> NDArray[np.float32]:
        """Return ``W`` whole, shape ``(d_out, d_in)``."""
        whole = np.empty(self.shape, dtype=np.float32)
        for rows, columns, tile in self.blocks():
            whole[rows, columns] = tile
        return whole


class BaseWeights:
    """The weights of one base model by module name.

    Parameters
    ----------
    source
        Where the tensors lie.
    label
        Short name for messages and tables.
    model_type
        Family of the model, as its ``config.json`` states it, or None.

    Attributes
    ----------
    snapshot
        The repository and commit it was fetched from, if it was.
    """

    snapshot: Snapshot | None = None

    def __init__(self, source: TensorSource, *, label: str, model_type: str | None = None) -> None:
        self.label = label
        self.model_type = model_type
        self._source = source
        self._names = TensorNames(source.names, label, source.shape)

    @property
    def address(self) -> str | None:
        """``hf://owner/name@commit`` and the path inside, of a model from a hub; else None."""
        return None if self.snapshot is None else self.snapshot.address(self.snapshot.path)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, as stored."""
        return list(self._source.names)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, as stored."""
        return self._source.shape(name)

    def stored_tensor(self, name: str) -> NDArray[Any]:
        """Return a tensor of any shape, as stored; :meth:`weight` is the way to a matrix."""
        return self._source.read(name)

    def weight(
        self,
        module: str,
        *,
        shape: tuple[int, int] | None = None,
        transposed: bool | None = None,
    ) -> Weight:
        """Return the frozen weight of a module.

        Names are matched exactly, then with leading segments taken away or added (a file may
        lack the ``bert.`` or ``model.`` that the running model has); only a unique match of
        fitting shape is accepted.

        Parameters
        ----------
        module
            Name as an adapter gives it.
        shape
            Shape ``(d_out, d_in)`` of the update the weight is for; it must fit.
        transposed
            True where the file stores ``[in, out]``, False for ``[out, in]``; None decides by
            the model's family (or the live module's class), then by ``shape``.

        Raises
        ------
        BaseWeightError
            No tensor, several, or none of fitting shape belongs to the module; it is stored
            quantised; or its orientation cannot be known (a square matrix of unknown family).
        """
        candidates = self._names.candidates(module)
        for candidate in candidates:  # before shapes: those of packed weights mislead
            self._source.refuse_unreadable(candidate)
        name = self._names.choose(module, candidates, shape)
        stored = self._source.shape(name)
        turned = is_transposed(
            name,
            stored,
            asked=transposed,
            known=self._source.transposed(name),
            model_type=self.model_type,
            shape=shape,
            label=self.label,
        )
        d_out, d_in = stored[::-1] if turned else stored
        return Weight(
            name, (d_out, d_in), self._source.dtype(name), turned, lambda: self._source.tiles(name)
        )

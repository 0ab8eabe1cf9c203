"""``BaseWeights`` and ``Weight``: one base tensor at a time, in the orientation of ΔW."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora_analysis.bases.expert_count import count_experts
from lora_analysis.bases.fused import Family, is_interleaved, rows_of_part
from lora_analysis.bases.locating import Located, Locator
from lora_analysis.bases.naming import TensorNames, matrix_shape
from lora_analysis.bases.orientation import (
    Evidence,
    evidence_of,
    family_orientation,
    is_conv1d,
    is_table,
    is_transposed,
)
from lora_analysis.bases.pieces import Piece, Tiles, tiles_of
from lora_analysis.errors import BaseWeightError, InputError
from lora_analysis.finding import Finding
from lora_analysis.storage.hub_names import shown_errors
from lora_analysis.storage.limits import MAX_VALUE
from lora_analysis.storage.paths import source_paths

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter
    from lora_analysis.names import Prefixes
    from lora_analysis.storage.hub_names import Snapshot


class TensorSource(Protocol):
    """Where the tensors of a base lie: files, a live model, arrays."""

    @property
    def names(self) -> Sequence[str]:
        """Names of all tensors, one for each weight however it is stored."""

    @property
    def aliases(self) -> Mapping[str, Sequence[str]]:
        """Tensor name → further modules that it is the weight of, where the source knows them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the plain numbers."""

    def dtype(self, name: str) -> str:
        """Return the stored type, as ``"bfloat16"``."""

    def storage(self, name: str) -> str:
        """Return how a quantized weight is stored ("bitsandbytes nf4"), nothing for others."""

    def is_plain(self, name: str) -> bool:
        """Return True if the tensor is stored as plain numbers; tells without reading."""

    def transposed(self, name: str) -> bool | None:
        """Say whether the matrix is stored as ``[in, out]``; None where that is not known."""

    def tiles(self, name: str, index: int | None) -> Tiles:
        """Yield a matrix in stored orientation, tile by tile, as float32."""

    def squared_errors(self, name: str, index: int | None) -> Tiles | None:
        """Yield what rounding is expected to have done to it; None where that is not known."""

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor of any shape, as stored."""

    def refuse_unreadable(self, name: str) -> None:
        """Raise BaseWeightError where the tensor does not hold the weight's own numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One frozen weight ``W``, shape ``(d_out, d_in)``, read when its blocks are asked for.

    Attributes
    ----------
    name
        The tensor's; of several, or of a part, what they are.
    shape
        ``(d_out, d_in)``.
    stored_dtype
        Type of the stored numbers.
    transposed
        Whether it is stored as ``[in, out]``.
    storage
        How it is quantized, as "bitsandbytes nf4"; empty where it is stored as plain numbers.
    """

    name: str
    shape: tuple[int, int]
    stored_dtype: str
    transposed: bool
    _tiles: Callable[[], Tiles] = field(repr=False)
    storage: str = ""
    _errors: Callable[[], Tiles | None] = field(repr=False, default=lambda: None)
    _check: Callable[[NDArray[np.float32]], None] = field(repr=False, default=lambda _: None)

    def blocks(self, *, check: bool = True) -> Tiles:
        """Yield row slice, column slice and that tile of ``W``, covering it once.

        A tile is float32 and about a million elements. Its memory is reused: the values last
        until the next step. What is open for reading is closed at the end.

        Parameters
        ----------
        check
            Whether to raise at the first tile that holds numbers that nothing can be computed
            with. False is for whoever takes W's norm on the way, which shows them too.

        Raises
        ------
        BaseWeightError
            The tensor holds numbers that are not finite, or beyond all reason.
        """
        for rows, columns, tile in self._tiles():
            if check:
                self._check(tile)
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

    def noise(self) -> float | None:
        """Return the expected ‖error of rounding‖_F/‖W‖_F of a quantized weight.

        From the scales and levels it is stored with: a value that rounds to a level is taken as
        uniform over the values that do. True where each value was rounded to the nearest level;
        methods that compensate (GPTQ) or rescale (AWQ) differ from the unquantized weight by more.
        None where the weight is not quantized, or its storage does not tell.

        Notes
        -----
        Takes two passes over the weight.
        """
        errors = self._errors()
        if not self.storage or errors is None:
            return None
        square = 0.0
        for _, _, tile in errors:
            self._check(tile)
            square += float(np.sum(tile, dtype=np.float64))
        tiles = (tile for _, _, tile in self.blocks())
        norm = sum(float(np.sum(np.square(tile, dtype=np.float64))) for tile in tiles)
        return math.sqrt(square / norm) if norm else 0.0


class BaseWeights:
    """The weights of one base model by module name.

    Parameters
    ----------
    source
        Where the tensors lie.
    label
        Short name for messages and tables.
    config
        The model's ``config.json``; its ``model_type`` names the family.
    blocks
        Whether the writer has put interleaved fused rows into blocks (GGUF).
    name
        What the model is called, where that is not ``label``; None where nothing says so.
    findings
        What was noticed when its files were opened.

    Attributes
    ----------
    snapshot
        The repository and commit it was fetched from, if it was.
    path
        The file or folder it was opened from; None for a live model or arrays.
    """

    snapshot: Snapshot | None = None
    path: Path | None = None

    def __init__(
        self,
        source: TensorSource,
        *,
        label: str,
        config: Mapping[str, Any] | None = None,
        blocks: bool = False,
        name: str | None = "",
        findings: tuple[Finding, ...] = (),
    ) -> None:
        self.label = label
        self.name = label if name == "" else name
        stated = (config or {}).get("model_type")
        self.model_type = stated if isinstance(stated, str) else None
        self._config = config or {}
        self._blocks = blocks
        self.findings = findings
        self._evidence: dict[bool, Evidence] = {}
        self._source = source
        self._names = TensorNames(source.names, label, source.shape, source.aliases)
        self._locator = Locator(self._names, source.shape, config or {})

    @property
    def _family(self) -> Family:
        return Family(self.model_type, self._config, self._blocks)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders it was opened from, which no output may touch."""
        return () if self.path is None else source_paths(self.path)

    @property
    def modules(self) -> list[str]:
        """Names of the modules that have a weight, as the tensors name them."""
        return self._names.modules

    def matched_to(
        self, adapters: Iterable[Adapter], *, prefix: Prefixes | None = None
    ) -> BaseWeights:
        """Return the same weights, with the names of adapters matched for each as a whole.

        What wrappers, model classes and components put into a name is known without that. Where
        a base holds alike modules behind several other prefixes, counts and shapes of all modules
        of an adapter decide which of them it means.

        Parameters
        ----------
        adapters
            Adapters whose modules will be asked for, under the names of their files.
        prefix
            Beginning of names → what stands for it in the comparison (`names.parse_prefixes`),
            for those of the adapters and of the base alike.
        """
        first = {frozenset(adapter): adapter for adapter in adapters}
        names = self._names
        for adapter in first.values():
            names = names.matched([list(adapter)], partial(self._may_be, adapter), prefix)
        matched = copy.copy(self)
        matched._names = names
        matched._locator = Locator(names, self._source.shape, self._config)
        return matched

    def _may_be(self, adapter: Adapter, name: str, tensors: Sequence[str]) -> bool:
        """Return True if an update has the shape of one of the tensors, or cannot be read."""
        try:
            shape = adapter[name].shape
        except InputError:
            return True
        stored = [matrix_shape(tensor, self._source.shape(tensor)) for tensor in tensors]
        return any(len(sizes) != 2 or sizes in (shape, shape[::-1]) for sizes in stored)

    @property
    def address(self) -> str | None:
        """``hf://owner/name@commit`` and the path inside, of a model from a hub; else None."""
        return None if self.snapshot is None else self.snapshot.address(self.snapshot.path)

    @property
    def experts(self) -> int | None:
        """Experts of a layer, None where there are none, or layers differ.

        By the first axis of the stacks, else the numbers in names, else the config.
        """
        return count_experts(self._source.names, self._source.shape, self._config)

    @property
    def names(self) -> list[str]:
        """Names of all tensors; a quantized weight has the name its plain numbers would have."""
        return list(self._source.names)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, as stored."""
        return self._source.shape(name)

    def stored_tensor(self, name: str) -> NDArray[Any]:
        """Return a tensor of any shape, as stored; :meth:`weight` is the way to a matrix."""
        with shown_errors(self.snapshot):
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
        lack the ``bert.`` or ``model.`` that the running model has), then as the family's files
        spell them. A module that is part of a fused tensor, or of a stack of experts, is cut out;
        one that the file splits is put together; a head tied to its embedding is that. Only a
        unique match of fitting shape is accepted.

        Parameters
        ----------
        module
            Name as an adapter gives it.
        shape
            Shape ``(d_out, d_in)`` of the update the weight is for; it must fit. A kernel counts
            as ``(c_out, c_in·k·k)``, an embedding also as ``(dimension, entries)``.
        transposed
            True where the file stores ``[in, out]``, False for ``[out, in]``; None decides by
            the model's family (or the live module's class), then by ``shape``.

        Raises
        ------
        BaseWeightError
            No tensor, several, or none of fitting shape belongs to the module; it is stored
            quantized in a way that is not read, or fused in one that is not known; or its
            orientation cannot be known (a square matrix of unknown family).
        """
        located = self._locator.locate(module)
        found = [self._piece(module, one, shape, transposed, len(located)) for one in located]
        pieces = [piece for piece, _, _ in found]
        turned, width = found[0][1], found[0][2]
        height = sum(piece.height for piece in pieces)
        for _, other, columns in found:
            if (other, columns) != (turned, width):
                message = f"{self.label}: the tensors that make '{module}' differ in orientation."
                raise BaseWeightError(message)
        if shape is not None and (height, width) != tuple(shape):
            names = ", ".join(f"'{piece.tensor}'" for piece in pieces)
            message = (
                f"{self.label}: {names} give '{module}' the shape {(height, width)}; the update "
                f"has {tuple(shape)}. Is it from another base model?"
            )
            raise BaseWeightError(message)
        return self._weight(pieces, (height, width), turned, located)

    def _weight(
        self,
        pieces: Sequence[Piece],
        shape: tuple[int, int],
        transposed: bool,
        located: Sequence[Located],
    ) -> Weight:
        source = self._source
        names = [_shown(piece, one) for piece, one in zip(pieces, located, strict=True)]
        name = " + ".join(names)
        storages = dict.fromkeys(source.storage(piece.tensor) for piece in pieces)
        known = all(source.storage(piece.tensor) for piece in pieces)

        def errors() -> Tiles | None:
            if not known or any(source.squared_errors(p.tensor, p.index) is None for p in pieces):
                return None
            return self._addressed(
                tiles_of(pieces, source.squared_errors, transposed=transposed)  # type: ignore[arg-type]
            )

        return Weight(
            name,
            shape,
            source.dtype(pieces[0].tensor),
            transposed,
            lambda: self._addressed(tiles_of(pieces, source.tiles, transposed=transposed)),
            " + ".join(storage for storage in storages if storage),
            errors,
            lambda tile: self._refuse_damaged(name, tile),
        )

    def _addressed(self, tiles: Tiles) -> Tiles:
        """Yield tiles; an error names the address of a model from a hub, not its cache."""
        with shown_errors(self.snapshot):
            yield from tiles

    def _refuse_damaged(self, name: str, tile: NDArray[np.float32]) -> None:
        values = tile.ravel(order="K")
        with np.errstate(over="ignore", invalid="ignore"):
            square = float(np.vdot(values, values))  # one pass, where a look at each takes two
        if square <= MAX_VALUE**2:
            return
        lost = int(values.size - np.count_nonzero(np.isfinite(values)))
        largest = float(np.abs(values).max())
        if not lost and largest <= MAX_VALUE:
            return
        what = f"{lost:,} numbers that are not finite" if lost else f"a number of {largest:.3g}"
        message = f"{self.label}: '{name}' holds {what}; nothing can be computed with it. Damaged?"
        raise BaseWeightError(message)

    def _piece(
        self,
        module: str,
        located: Located,
        shape: tuple[int, int] | None,
        asked: bool | None,
        of: int,
    ) -> tuple[Piece, bool, int]:
        """Return the rows, whether they are stored as ``[in, out]``, and the width of W."""
        for candidate in located.tensors:  # before shapes: those of packed weights mislead
            self._source.refuse_unreadable(candidate)
        alone = located.part is None and of == 1

        def matrix(name: str) -> tuple[int, ...]:
            stored = self._source.shape(name)
            return matrix_shape(name, stored) if located.index is None else stored[1:]

        def fits(name: str) -> bool:
            stored = matrix(name)
            if shape is None or len(stored) != 2:
                return len(stored) == 2
            return stored in (shape, shape[::-1]) if alone else shape[1] in stored

        shape = None if shape is None else (shape[0], shape[1])
        name = self._names.choose(module, located.tensors, shape, fits)
        stored = matrix(name)
        turned = is_transposed(
            name,
            stored,
            asked=asked,
            known=self._known_orientation(name, located),
            model_type=self.model_type,
            shape=shape if alone else _shape_of_home(stored, shape),
            label=self.label,
            evidence=self._orientation_evidence(name) if located.index is None else None,
        )
        d_out, d_in = stored[::-1] if turned else stored
        runs = self._runs(module, located, (d_out, d_in), shape)
        return Piece(name, located.index, runs), turned, d_in

    def _orientation_evidence(self, name: str) -> Evidence | None:
        """Return what the other matrices of the file tell; nothing of live models and GGUF."""
        source = self._source
        if not source.is_plain(name) or len(source.shape(name)) != 2:
            return None
        if source.transposed(name) is not None:
            return None
        kind = is_conv1d(name)
        if kind not in self._evidence:
            names = [one for one in source.names if source.is_plain(one)]
            found = evidence_of(names, source.shape, self._config, conv1d=kind)
            self._evidence[kind] = found
        return self._evidence[kind]

    def orientation_findings(self, shapes: Mapping[str, tuple[int, int]]) -> tuple[Finding, ...]:
        """Return a finding if the shapes of updates say that every matrix is transposed.

        The shape of an update decides how its own weight is stored unless it is square; what the
        others of a file say jointly holds for square ones too.

        Parameters
        ----------
        shapes
            Shape ``(d_out, d_in)`` of the update of each module.
        """
        fitting, turned = 0, []
        for module, shape in shapes.items():
            if shape[0] == shape[1]:
                continue
            with suppress(BaseWeightError):
                located = self._locator.locate(module)
                name = located[0].tensors[0]
                if len(located) > 1 or located[0].part or not self._source.is_plain(name):
                    continue
                stored, family = self._source.shape(name), family_orientation(self.model_type, name)
                if family is None or is_table(name) or self._source.transposed(name) is not None:
                    continue
                expected = shape[::-1] if family else shape
                fitting += stored == expected
                turned += [name] if stored == expected[::-1] else []
        if fitting or not turned or len(turned) == len(shapes):
            return ()
        fields = {"base": self.label, "weights": turned, "count": len(turned)}
        return (
            Finding("base-transposed", {**fields, "family": self.model_type or "of such names"}),
        )

    def _known_orientation(self, name: str, located: Located) -> bool | None:
        """Return what the source says; kernels lie output by output in every framework here."""
        kernels = located.index is None and len(self._source.shape(name)) > 2
        return False if kernels else self._source.transposed(name)

    def _runs(
        self,
        module: str,
        located: Located,
        whole: tuple[int, int],
        shape: tuple[int, int] | None,
    ) -> tuple[slice, ...]:
        """Return which rows of a tensor the module is."""
        home, part = located.home, located.part
        if part is None:
            # The writer's blocks go back to the order in which the running model has the rows.
            if not self._family.blocks or not is_interleaved(module, self._family):
                return (slice(0, whole[0]),)
            home, part = module, "all"
        height = None if shape is None else shape[0]
        runs = rows_of_part(home, part, whole, height, self._family)
        if isinstance(runs, str):
            message = f"{self.label}: '{module}' is part of '{located.tensors[0]}' {whole}; {runs}."
            raise BaseWeightError(message)
        return runs


def _shown(piece: Piece, located: Located) -> str:
    index = "" if piece.index is None else f"[{piece.index}]"
    return f"{piece.tensor}{index}" + (f" ({located.part})" if located.part else "")


def _shape_of_home(
    stored: tuple[int, ...], shape: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return what a larger tensor is as ``(d_out, d_in)``, where its sides tell, by the inputs."""
    if shape is None or stored.count(shape[1]) != 1:
        return None
    return (stored[0], stored[1]) if stored[1] == shape[1] else (stored[1], stored[0])

"""``BaseWeights``: the frozen weights of one base model by module name."""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.bases.fused import ModelLayout, rows_of_part
from lora_analysis.bases.locating import Located, Locator
from lora_analysis.bases.orientation import (
    Evidence,
    evidence_of,
    family_orientation,
    is_conv1d,
    is_table,
    is_transposed,
)
from lora_analysis.bases.tensor_names import TensorNames, matrix_shape
from lora_analysis.bases.weight import Piece, Tiles, Weight, tiles_of
from lora_analysis.errors import BaseWeightError, InputError
from lora_analysis.finding import Finding
from lora_analysis.storage.limits import MAX_VALUE
from lora_analysis.storage.source_names import addresses_in_errors, source_paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter
    from lora_analysis.bases.weight import TensorSource
    from lora_analysis.names import Prefixes
    from lora_analysis.storage.source_names import Snapshot


class BaseWeights:
    """The weights of one base model by module name.

    Parameters
    ----------
    source
        The tensors.
    label
        Short name for messages and tables.
    config
        The model's ``config.json``; its ``model_type`` names the family.
    blocks
        True if the writer has reordered interleaved fused rows into blocks (GGUF).
    name
        Name of the model, if it is not ``label``; None if it is not known.
    findings
        Findings on its files.

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
        self.config = config or {}
        model_type = self.config.get("model_type")
        self.model_type = model_type if isinstance(model_type, str) else None
        self._blocks = blocks
        self.findings = findings
        self._evidence: dict[bool, Evidence] = {}
        self._source = source
        self._names = TensorNames(source.names, label, source.shape, source.aliases)
        self._locator = Locator(self._names, source.shape, self.config)

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

        Parts of a name that come from wrappers, model classes and components are known without
        this. If a base has similar modules under several prefixes, counts and shapes of all modules
        of an adapter decide which prefix it means.

        Parameters
        ----------
        adapters
            Adapters whose modules will be looked up, by the names in their files.
        prefix
            Beginning of names → its replacement in the comparison (`names.parse_prefixes`), for
            names of the adapters and of the base.
        """
        first = {frozenset(adapter): adapter for adapter in adapters}
        names = self._names
        for adapter in first.values():
            names = names.match_adapter(list(adapter), partial(self._may_fit, adapter), prefix)
        matched = copy.copy(self)
        matched._names = names
        matched._locator = Locator(names, self._source.shape, self.config)
        return matched

    def _may_fit(self, adapter: Adapter, name: str, tensors: Sequence[str]) -> bool:
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
    def names(self) -> list[str]:
        """Names of all tensors; a quantized weight has the name its plain numbers would have."""
        return list(self._source.names)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, as stored."""
        return self._source.shape(name)

    def stored_dtype(self, name: str) -> str:
        """Return the stored type of a tensor, as ``"bfloat16"``."""
        return self._source.dtype(name)

    def is_plain(self, name: str) -> bool:
        """Return True if a tensor is stored as plain numbers, False if it is quantized."""
        return self._source.is_plain(name)

    def tensors_of(self, module: str) -> list[str]:
        """Return the tensors whose names fit a module's, those of the closest match."""
        return self._names.find(module)

    def stored_tensor(self, name: str) -> NDArray[Any]:
        """Return a tensor of any shape, as stored; for matrices use :meth:`weight`."""
        with addresses_in_errors(self.snapshot):
            return self._source.read(name)

    def weight(
        self,
        module: str,
        *,
        shape: tuple[int, int] | None = None,
        transposed: bool | None = None,
    ) -> Weight:
        """Return the frozen weight of a module.

        Names are matched exactly, then with leading segments removed or added (a file may lack the
        ``bert.`` or ``model.`` that the running model has), then in the spelling of the family's
        files. A module that is part of a fused tensor, or of a stack of experts, is cut out; one
        that the file splits is joined; a tied LM head resolves to the embedding. Only a unique
        match of fitting shape is accepted.

        Parameters
        ----------
        module
            Module name as in an adapter.
        shape
            Shape ``(d_out, d_in)`` of the update, which must fit. A kernel counts as
            ``(c_out, c_in·k·k)``, an embedding also as ``(dimension, entries)``.
        transposed
            True if the file stores ``[in, out]``, False for ``[out, in]``; None decides by the
            model's family (or the live module's class), then by ``shape``.

        Raises
        ------
        BaseWeightError
            No tensor, several tensors, or none of fitting shape belong to the module; its
            quantized storage or the layout of its fused tensor is not supported; or its orientation
            cannot be determined (a square matrix of unknown family).
        """
        located = self._locator.locate(module)
        oriented = [self._piece(module, part, shape, transposed, len(located)) for part in located]
        pieces = [piece for piece, _, _ in oriented]
        _, turned, width = oriented[0]
        height = sum(piece.height for piece in pieces)
        if any((other, columns) != (turned, width) for _, other, columns in oriented):
            message = f"{self.label}: the tensors that make '{module}' differ in orientation."
            raise BaseWeightError(message)
        if shape is not None and (height, width) != tuple(shape):
            names = ", ".join(f"'{piece.tensor}'" for piece in pieces)
            message = (
                f"{self.label}: {names} give '{module}' the shape {(height, width)}; the update "
                f"has {tuple(shape)}. Is it from another base model?"
            )
            raise BaseWeightError(message)
        source = self._source
        name = " + ".join(
            piece.tensor
            + ("" if piece.index is None else f"[{piece.index}]")
            + (f" ({part.part})" if part.part else "")
            for piece, part in zip(pieces, located, strict=True)
        )
        storages = dict.fromkeys(source.storage(piece.tensor) for piece in pieces)

        def errors() -> Tiles | None:
            if "" in storages:
                return None
            if any(source.squared_errors(piece.tensor, piece.index) is None for piece in pieces):
                return None
            return self._with_addresses(
                tiles_of(pieces, source.squared_errors, transposed=turned)  # type: ignore[arg-type]
            )

        return Weight(
            name,
            (height, width),
            source.dtype(pieces[0].tensor),
            turned,
            lambda: self._with_addresses(tiles_of(pieces, source.tiles, transposed=turned)),
            " + ".join(storage for storage in storages if storage),
            errors,
            lambda tile: self._refuse_damaged(name, tile),
            tuple(pieces),
        )

    def _with_addresses(self, tiles: Tiles) -> Tiles:
        """Yield tiles; errors name the address of a model from a hub, not its cache."""
        with addresses_in_errors(self.snapshot):
            yield from tiles

    def _refuse_damaged(self, name: str, tile: NDArray[np.float32]) -> None:
        values = tile.ravel(order="K")
        with np.errstate(over="ignore", invalid="ignore"):
            square = float(np.vdot(values, values))  # one pass; comparing each value takes two
        if square <= MAX_VALUE**2:
            return
        non_finite = int(values.size - np.count_nonzero(np.isfinite(values)))
        largest = float(np.abs(values).max())
        if not non_finite and largest <= MAX_VALUE:
            return
        damage = (
            f"{non_finite:,} numbers that are not finite"
            if non_finite
            else f"a number of {largest:.3g}"
        )
        message = (
            f"{self.label}: '{name}' holds {damage}; nothing can be computed with it. Damaged?"
        )
        raise BaseWeightError(message)

    def _piece(
        self,
        module: str,
        located: Located,
        shape: tuple[int, int] | None,
        requested: bool | None,
        count: int,
    ) -> tuple[Piece, bool, int]:
        """Return one of ``count`` pieces, True if it is stored as ``[in, out]``, and W's width."""
        for candidate in located.tensors:  # before shapes: those of packed weights mislead
            self._source.refuse_unreadable(candidate)
        alone = located.part is None and count == 1

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
        expected = shape
        if shape is not None and not alone:
            # The shape (d_out, d_in) of the larger tensor, if one side equals the inputs.
            larger = stored if stored[1] == shape[1] else stored[::-1]
            expected = (larger[0], larger[1]) if stored.count(shape[1]) == 1 else None
        turned = is_transposed(
            name,
            stored,
            requested=requested,
            source=(
                # Kernels are stored output by output in every supported framework.
                False
                if located.index is None and len(self._source.shape(name)) > 2
                else self._source.transposed(name)
            ),
            model_type=self.model_type,
            shape=expected,
            label=self.label,
            evidence=self._orientation_evidence(name) if located.index is None else None,
        )
        d_out, d_in = stored[::-1] if turned else stored
        height = None if shape is None else shape[0]
        runs = self._runs(module, located, (d_out, d_in), height)
        return Piece(name, located.index, runs), turned, d_in

    def _orientation_evidence(self, name: str) -> Evidence | None:
        """Return evidence from the other matrices of the file; None for live models and GGUF."""
        source = self._source
        if not source.is_plain(name) or len(source.shape(name)) != 2:
            return None
        if source.transposed(name) is not None:
            return None
        kind = is_conv1d(name)
        if kind not in self._evidence:
            names = [name for name in source.names if source.is_plain(name)]
            self._evidence[kind] = evidence_of(names, source.shape, self.config, conv1d=kind)
        return self._evidence[kind]

    def orientation_findings(self, shapes: Mapping[str, tuple[int, int]]) -> tuple[Finding, ...]:
        """Return a finding if the shapes of updates imply that every matrix is transposed.

        The shape of an update decides how its weight is stored unless it is square; the other
        weights of a file jointly decide for square ones too.

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

    def _runs(
        self, module: str, located: Located, whole: tuple[int, int], height: int | None
    ) -> tuple[slice, ...]:
        """Return the rows of a tensor that belong to the module."""
        layout = ModelLayout(self.model_type, self.config, self._blocks)
        fused, part = located.fused, located.part
        if part is None:
            # Blocks of the writer are reordered to the rows of the running model.
            if not self._blocks:
                return (slice(0, whole[0]),)
            fused, part = module, "all"
        runs = rows_of_part(fused, part, whole, height, layout)
        if isinstance(runs, str):
            message = f"{self.label}: '{module}' is part of '{located.tensors[0]}' {whole}; {runs}."
            raise BaseWeightError(message)
        return runs

"""The shared values: updates of one weight, adapters (a set of updates), and their provenance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np

from lora_analysis import linalg
from lora_analysis.errors import IncompatibleError, InputError, ScaleError
from lora_analysis.finding import Finding, as_findings
from lora_analysis.patterns import natural_key, near_names
from lora_analysis.results import short_repr
from lora_analysis.text import html_facts

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Layout = Literal["linear", "conv1d", "embedding", "conv"]
ScaleOrigin = Literal["config", "tensor", "metadata", "format", "model", "caller", "unknown"]


def _frozen_matrix(value: ArrayLike, *, role: str, name: str) -> NDArray[np.floating[Any]]:
    """Return ``value`` as a read-only float32 or float64 matrix; raise if it is not one."""
    array = linalg.to_numpy(value, f"{role} of '{name}'")
    if array.ndim != 2 or 0 in array.shape:
        message = f"{role} of '{name}' must be a non-empty matrix, found shape {array.shape}."
        raise InputError(message)
    if not np.issubdtype(array.dtype, np.floating):
        message = f"{role} of '{name}' must hold floating-point numbers, found {array.dtype}."
        raise InputError(message)
    # Half precision is a storage type: arithmetic starts from its exact float32 value.
    array = array.astype(np.float64 if array.dtype.itemsize >= 8 else np.float32, copy=False)
    flat = array.ravel(order="K")  # in the order of memory, to copy nothing
    # One sum of squares is enough, unless it overflows; checking each value costs twice as much.
    if not (np.isfinite(np.vdot(flat, flat)) or np.isfinite(array).all()):
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        message = (
            f"{role} of '{name}' holds {bad} non-finite of {array.size} values. "
            "The training diverged or the file is damaged; no number can be computed from it."
        )
        raise InputError(message)
    view = array.view()
    view.flags.writeable = False
    return view


def _type_name(value: Any) -> str:
    """Return the name of an array's or tensor's type, as "bfloat16"."""
    if linalg.is_tensor(value):
        return str(value.dtype).removeprefix("torch.")
    return np.asarray(value).dtype.name


def _finite_or_none(value: float | None, *, role: str, name: str) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not np.isfinite(number):
        message = f"{role} of '{name}' must be a finite number, found {value!r}."
        raise InputError(message)
    return number


class FilePosition(NamedTuple):
    """Position of a factor in its file, in bytes, if it is stored there as one block.

    ``itemsize`` is that of the stored type; ``shape`` that of the factor, whose order in memory
    is the file's.
    """

    offset: int
    itemsize: int
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Length of the block."""
        return self.itemsize * math.prod(self.shape)


class KroneckerParts(NamedTuple):
    """The parts of factors that are Kronecker products: ``B·A = (B₁·A₁) ⊗ (B₂·A₂)``.

    ``first`` and ``second`` hold ``(B₁, A₁)`` and ``(B₂, A₂)``; ``A`` and ``B`` are the factors.
    """

    first: tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]
    second: tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]
    A: NDArray[np.floating[Any]]
    B: NDArray[np.floating[Any]]


def _is_same_array(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Return True if two arrays are the same part of memory in the same order."""
    return a.ctypes.data == b.ctypes.data and a.shape == b.shape and a.strides == b.strides


# Format of the difference of two models, in `Provenance.format`.
FULL_FINE_TUNE: Final = "full fine-tune"
# Variants whose update is whole, its rows permuted by heads that are not known.
LLAMA_CPP_ROWS: Final = "rows in llama.cpp's order"
TORCHTUNE_ROWS: Final = "rows in torchtune's order"
ROW_ORDERS: Final = frozenset({LLAMA_CPP_ROWS, TORCHTUNE_ROWS})
# For factors that were computed: no file stores them as they are.
NOT_STORED: Final[tuple[FilePosition | None, FilePosition | None]] = (None, None)


@dataclass(frozen=True, slots=True, eq=False)
class _Metadata:
    """Metadata of every update and of its outline.

    A field that is added here or in `_LowRankMetadata` is a field of all of them.
    """

    name: str
    _: KW_ONLY
    stored_dtype: str = ""
    label: str = ""
    layout: Layout = "linear"
    kernel: tuple[int, ...] = ()

    def _check_kernel(self, d_in: int) -> None:
        fits = (self.layout == "conv") == bool(self.kernel)
        if not fits or (self.kernel and d_in % max(math.prod(self.kernel), 1)):
            message = (
                f"The kernel of '{self.name}' must be given with layout 'conv' alone, and divide "
                f"its {d_in} inputs; found {self.kernel} with layout '{self.layout}'."
            )
            raise InputError(message)


@dataclass(frozen=True, slots=True, eq=False)
class _LowRankMetadata(_Metadata):
    """Metadata of low-rank updates and of every outline."""

    _: KW_ONLY
    alpha: float | None = None
    variant: str = ""
    base_name: str = ""
    magnitude_side: Literal["output", "input"] = "output"


@dataclass(frozen=True, slots=True, eq=False)
class LowRankUpdate(_LowRankMetadata):
    """The update ``ΔW = scale·B·A`` of one weight, stored as its factors.

    Parameters
    ----------
    name
        Module name in the base model, wrapper prefixes stripped.
    A
        Down-projection, shape ``(r, d_in)``: a numpy array, or a tensor, which is copied.
    B
        Up-projection, shape ``(d_out, r)``.
    scale
        The scale that the model applies (``alpha/r``, ``alpha/sqrt(r)`` with rsLoRA); None if it
        is unknown: then ΔW is known in units of the scale only.
    alpha
        The hyper-parameter behind ``scale``, if it is known.
    stored_dtype
        Type in the file, for example ``"bfloat16"``; the type of ``A`` by default.
    layout
        How the base stores the weight; A and B have the same orientation in every layout.
        ``"linear"`` is ``[out, in]``; ``"conv1d"`` (GPT-2's ``Conv1D``) ``[in, out]``;
        ``"embedding"`` ``[entries, features]``, where ``d_in`` counts the entries and ``d_out``
        the features; ``"conv"`` ``[channels out, channels in, *kernel]``, for which ΔW is the
        matrix ``(channels out, channels in · kernel)``, all axes but the first flattened.
    label
        Name of the adapter this update belongs to, for messages.
    kernel
        Shape of a convolution's kernel, ``(3, 3)``; empty in other layouts.
    variant
        Empty if ``scale·B·A`` is the whole update. Otherwise the method of which it is a part,
        ``"DoRA"``: ΔW is then the low-rank part only, and the whole update depends on the base
        weight (:func:`lora_analysis.effective.effective_update`).
    base_name
        Name of the base's module or tensor if it is not ``name``: for a replicated layer the
        original one, for an expert ``"experts.down_proj[3]"``, the member along the first axis.
    magnitude
        DoRA's learned norms of the rows of ``W + ΔW``, shape ``(d_out,)``; None without them.
    magnitude_side
        ``"output"`` for norms of rows. ``"input"`` for those of input channels, which OneTrainer
        and LyCORIS can learn too: of columns, or of a convolution's input channels over all
        outputs and the kernel; ``magnitude`` then has one entry per channel.
    stored_at
        Positions of A and B in their file; None for a factor that is computed or cut from others.
    kronecker
        The parts of A and B if both are Kronecker products (LoKr): the spectrum of ΔW is then
        computed from these. An update with other factors, as `dataclasses.replace` makes it, has
        none.

    Raises
    ------
    InputError
        A factor is not a finite floating-point matrix, the ranks of A and B differ, or the
        kernel does not divide the inputs or belongs to another layout.
    """

    A: NDArray[np.floating[Any]]
    B: NDArray[np.floating[Any]]
    scale: float | None
    _: KW_ONLY
    magnitude: NDArray[np.floating[Any]] | None = None
    stored_at: tuple[FilePosition | None, FilePosition | None] = NOT_STORED
    kronecker: KroneckerParts | None = None

    def __post_init__(self) -> None:
        dtype = _type_name(self.A)
        a = _frozen_matrix(self.A, role="A", name=self.name)
        b = _frozen_matrix(self.B, role="B", name=self.name)
        if a.shape[0] != b.shape[1]:
            message = (
                f"A and B of '{self.name}' have different ranks: A is {a.shape}, B is {b.shape}. "
                "A must be (r, d_in) and B (d_out, r); is one of them transposed?"
            )
            raise InputError(message)
        self._check_kernel(a.shape[1])
        put = object.__setattr__
        put(self, "A", a)
        put(self, "B", b)
        parts = self.kronecker
        if parts and not (_is_same_array(parts.A, a) and _is_same_array(parts.B, b)):
            put(self, "kronecker", None)
        put(self, "scale", _finite_or_none(self.scale, role="scale", name=self.name))
        put(self, "alpha", _finite_or_none(self.alpha, role="alpha", name=self.name))
        put(self, "stored_dtype", self.stored_dtype or dtype)
        if self.magnitude is not None:
            norms = linalg.to_numpy(self.magnitude).reshape(1, -1)
            by_rows = self.magnitude_side == "output"
            count = b.shape[0] if by_rows else a.shape[1] // math.prod(self.kernel)
            if norms.size != count:
                message = (
                    f"The magnitude of '{self.name}' has {norms.size} entries for {count} "
                    f"{'rows' if by_rows else 'inputs'}."
                )
                raise InputError(message)
            put(self, "magnitude", _frozen_matrix(norms, role="magnitude", name=self.name)[0])

    __repr__ = short_repr

    @property
    def rank(self) -> int:
        """Columns of B: the rank of the factors, not that of the matrix ΔW."""
        return int(self.B.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(d_out, d_in)`` of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    def known_scale(self) -> float:
        """Return the scale; raise ScaleError if it is unknown."""
        return _known_scale(self)

    def delta_weight(self) -> NDArray[np.float64]:
        """Return ΔW as a dense float64 matrix ``(d_out, d_in)``; costs ``d_out·d_in·r``.

        It is a matrix from inputs to outputs in every layout: for an embedding the transpose
        of what is added to its table, for a convolution the kernels flattened row by row.
        """
        return self.known_scale() * (self.B.astype(np.float64) @ self.A.astype(np.float64))


@dataclass(frozen=True, slots=True, eq=False)
class DenseUpdate(_Metadata):
    """The update of one weight as a dense matrix, for example from a full fine-tune.

    Parameters
    ----------
    name
        Module name in the base model.
    delta
        ΔW, shape ``(d_out, d_in)``.
    stored_dtype, label, layout, kernel
        As for a low-rank update; ΔW has the same orientation in every layout.

    Raises
    ------
    InputError
        ``delta`` is not a finite floating-point matrix, or the kernel does not fit the layout.
    """

    delta: NDArray[np.floating[Any]]

    def __post_init__(self) -> None:
        delta = _frozen_matrix(self.delta, role="delta", name=self.name)
        self._check_kernel(delta.shape[1])
        dtype = self.stored_dtype or _type_name(self.delta)
        object.__setattr__(self, "delta", delta)
        object.__setattr__(self, "stored_dtype", dtype)

    __repr__ = short_repr

    @property
    def rank(self) -> int:
        """The largest rank a matrix of this shape can have."""
        return min(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(d_out, d_in)`` of ΔW."""
        return self.delta.shape[0], self.delta.shape[1]

    def delta_weight(self) -> NDArray[np.float64]:
        """Return ΔW as a dense float64 matrix ``(d_out, d_in)``."""
        return self.delta.astype(np.float64)


Update = LowRankUpdate | DenseUpdate


def check_weight_shape(update: Update, W: Any) -> None:
    """Raise IncompatibleError unless a base weight has the shape of an update."""
    if tuple(W.shape) != update.shape:
        message = (
            f"'{update.name}' in {update.label or 'this adapter'} updates a weight of shape "
            f"{update.shape}, but '{getattr(W, 'name', 'the weight')}' is {tuple(W.shape)} as "
            "(d_out, d_in). Is it another base model, or stored transposed?"
        )
        raise IncompatibleError(message)


@dataclass(frozen=True, slots=True)
class UpdateOutline(_LowRankMetadata):
    """An update without its numbers: everything that the header of a file states about it.

    It has the metadata of the update; ``dense`` is True for a `DenseUpdate`, whose ``scale`` is 1,
    and ``has_magnitude`` if there are DoRA's norms.
    """

    shape: tuple[int, int]
    rank: int
    scale: float | None
    _: KW_ONLY
    has_magnitude: bool = False
    dense: bool = False

    @classmethod
    def of(cls, update: Update) -> UpdateOutline:
        """Return the outline of an update, without references to its numbers."""
        dense = isinstance(update, DenseUpdate)
        names = [item.name for item in fields(_Metadata if dense else _LowRankMetadata)]
        return cls(
            shape=update.shape,
            rank=update.rank,
            scale=1.0 if isinstance(update, DenseUpdate) else update.scale,
            has_magnitude=getattr(update, "magnitude", None) is not None,
            dense=dense,
            **{name: getattr(update, name) for name in names},
        )

    def known_scale(self) -> float:
        """Return the scale; raise ScaleError if it is unknown."""
        return _known_scale(self)


def _known_scale(update: LowRankUpdate | UpdateOutline) -> float:
    if update.scale is None:
        message = (
            f"The scale of '{update.name}' in {update.label or 'this adapter'} is not known. "
            "Pass scale= or alpha= (command line: --scale, --alpha)."
        )
        raise ScaleError(message)
    return update.scale


@dataclass(frozen=True, slots=True)
class LazyUpdate:
    """An update that is computed on access, with an outline that is available before."""

    outline: UpdateOutline
    load: Callable[[], Update]

    def __call__(self) -> Update:
        """Compute the update."""
        return self.load()


@dataclass(frozen=True, slots=True, eq=False)
class SideTensor:
    """A tensor that a file stores next to the factors: copied by writers, not analyzed.

    Parameters
    ----------
    dtype
        Type in the file, for example ``"bfloat16"``.
    shape
        Shape in the file.
    read
        Returns its numbers as stored, in this shape; types that numpy does not have as their bits
        (bfloat16 as ``uint16``, 8-bit floats as ``uint8``).
    alters_model
        True if a model without it computes other numbers: for biases, norms and differences
        of whole weights, not for the embedding of a new word.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]
    alters_model: bool = True


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin of an adapter, and what its reader noticed.

    Parameters
    ----------
    path, files
        File or folder that was read, and the adapter's files in it. For an adapter from a hub they
        are in the hub's cache and not shown.
    format
        Name of the file format; ``"memory"`` for adapters that were computed.
    scale_origin
        Per module the source of its scale; ``"format"`` if the format itself fixes it, so that no
        file could state another; ``"model"`` if the layer of a live model has another scale than
        its configuration gives.
    base_model, rank, seed, task, step
        Facts about the training that the file, its config or its name states.
    metrics
        Final metrics of its training (accuracy, loss), if the trainer left them next to the file.
    findings
        Findings about the file itself; a string becomes one with the code ``"file-note"``.
    address, revision
        ``hf://owner/name@commit/…`` and the commit, for an adapter from a hub.
    metadata, source_format
        Strings that its file states about itself (kohya's ``ss_*``, ``modelspec.*``), and the
        format of these and of the side tensors, also after an edit, which sets ``format`` to
        ``"memory"``.
    also_read
        Further files and folders that values come from: initial factors, base weights, the adapter
        before an edit.
    source, read_options
        Source that reads exactly this adapter, and the keyword arguments of `read_adapter` for it.
    file_names
        Name in the file of each module that was renamed.
    """

    path: Path | None = None
    format: str = "memory"
    files: tuple[Path, ...] = ()
    scale_origin: Mapping[str, ScaleOrigin] = field(default_factory=dict)
    base_model: str | None = None
    rank: int | None = None
    seed: int | None = None
    task: str | None = None
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    address: str | None = None
    revision: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    source_format: str = ""
    also_read: tuple[Path, ...] = ()
    source: str | None = None
    read_options: Mapping[str, Any] = field(default_factory=dict)
    file_names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "findings", as_findings(self.findings))

    @property
    def location(self) -> str | None:
        """The address on a hub, else the path; None in memory."""
        return self.address or (str(self.path) if self.path is not None else None)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders it was read from, which no output may touch."""
        path = () if self.path is None else (self.path,)
        return (*path, *self.files, *self.also_read)

    @property
    def sha256(self) -> str | None:
        """Hash over the adapter's files in their order, computed now; None for one in memory."""
        if not self.files:
            return None
        import hashlib  # reading an adapter needs no hash

        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()


class _ReadOnly(Mapping[str, "NDArray[Any]"]):
    """A read-only view of a mapping of tensors, which loads none of them and pickles."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read_stored(self, name: str) -> SideTensor:
        """Return a tensor as its file stores it, bit for bit, or as it is in memory."""
        read = getattr(self._tensors, "read_stored", None)
        if read is not None:
            return SideTensor(*read(name))
        array = np.asarray(self._tensors[name])
        return SideTensor(array.dtype.name, array.shape, partial(self._tensors.__getitem__, name))


class Adapter(Mapping[str, Update]):
    """A set of updates by module name, in natural order, each loaded on access.

    Parameters
    ----------
    updates
        Per module either an update, or a function that returns one (called on every access, so
        that a walk over many adapters has at most one module of each in memory).
    label
        Short name used in tables, figures and messages.
    provenance
        Its origin.
    saved_modules
        Tensors trained in full next to the low-rank factors (a classification head), by tensor
        name in the base model, for example ``"classifier.weight"``.
    config
        What a writer needs to write the adapter: task type, targets, base model, in the
        words of PEFT's ``adapter_config.json``.
    side_tensors
        Everything else that the file stores (biases, norms, embeddings of new words), by key in
        the file: a writer of ``provenance.source_format`` copies it.
    """

    __slots__ = (
        "_outlines",
        "_updates",
        "config",
        "label",
        "provenance",
        "saved_modules",
        "side_tensors",
    )

    def __init__(
        self,
        updates: Mapping[str, Update | Callable[[], Update]],
        *,
        label: str,
        provenance: Provenance | None = None,
        saved_modules: Mapping[str, NDArray[Any]] | None = None,
        config: Mapping[str, Any] | None = None,
        side_tensors: Mapping[str, SideTensor] | None = None,
    ) -> None:
        self._updates = {name: updates[name] for name in sorted(updates, key=natural_key)}
        self._outlines: dict[str, UpdateOutline] = {}
        self.label = label
        self.provenance = provenance or Provenance()
        # A reader's mapping loads a head on access: copying it would load all of them.
        saved = dict(saved_modules) if isinstance(saved_modules, dict) else saved_modules
        self.saved_modules = saved if isinstance(saved, _ReadOnly) else _ReadOnly(saved or {})
        self.config = MappingProxyType(dict(config or {}))
        self.side_tensors = MappingProxyType(dict(side_tensors or {}))

    def __getitem__(self, name: str) -> Update:
        try:
            update = self._updates[name]
        except KeyError:
            near = ", ".join(near_names(name, self._updates)) or "none"
            message = f"{self.label} adapts no module '{name}'. Near names: {near}."
            raise KeyError(message) from None
        value = update() if callable(update) else update
        return value if value.label == self.label else replace(value, label=self.label)

    def outline(self, name: str) -> UpdateOutline:
        """Return the outline of a module, which is loaded for it, once, unless it is lazy."""
        if name not in self._outlines:
            update = self._updates.get(name)
            self._outlines[name] = (
                replace(update.outline, label=self.label)
                if isinstance(update, LazyUpdate)
                else UpdateOutline.of(self[name])
            )
        return self._outlines[name]

    def lazy(self, name: str) -> LazyUpdate:
        """Return a module with its outline, for another adapter, without loading its numbers."""
        return LazyUpdate(self.outline(name), partial(self.__getitem__, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._updates)

    def __len__(self) -> int:
        return len(self._updates)

    def __contains__(self, name: object) -> bool:
        return name in self._updates  # membership must not load the module

    def __reduce__(self) -> tuple[Any, ...]:
        # A MappingProxyType does not pickle.
        build = partial(
            Adapter,
            label=self.label,
            provenance=self.provenance,
            saved_modules=self.saved_modules,
            config=dict(self.config),
            side_tensors=dict(self.side_tensors),
        )
        return build, (self._updates,)

    # Adapters are compared by identity: comparing values would load every module.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders it was read from, which no output may touch."""
        return self.provenance.inputs

    def copy_with(self, **changes: Any) -> Adapter:
        """Return a copy with some arguments of the constructor replaced; nothing is loaded."""
        arguments: dict[str, Any] = {
            "updates": self._updates,
            "label": self.label,
            "provenance": self.provenance,
            "saved_modules": self.saved_modules,
            "config": self.config,
            "side_tensors": self.side_tensors,
        }
        return Adapter(**(arguments | changes))

    def with_label(self, label: str) -> Adapter:
        """Return the same adapter under another label; nothing is loaded."""
        return self.copy_with(label=label)

    def with_provenance(self, **fields: Any) -> Adapter:
        """Return the same adapter with fields of its provenance replaced; nothing is loaded."""
        return self.copy_with(provenance=replace(self.provenance, **fields))

    def _repr_html_(self) -> str:
        source = self.provenance
        optional = (("task", source.task), ("rank", source.rank), ("seed", source.seed),
                    ("step", source.step), ("base model", source.base_model))  # fmt: skip
        rows = [("format", source.format), ("modules", len(self))]
        rows += [(name, str(value)) for name, value in optional if value is not None]
        return html_facts(self.label, rows, " ".join(finding.text for finding in source.findings))

    def __repr__(self) -> str:
        return f"<Adapter {self.label!r}: {len(self)} modules, {self.provenance.format}>"


def is_fine_tune(adapter: Adapter) -> bool:
    """Return True for a full fine-tune, whose zero updates are unchanged weights."""
    return adapter.provenance.format == FULL_FINE_TUNE

"""The values every level speaks of: updates of one weight, adapters, and where they came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np

from lora_analysis.errors import InputError, ScaleError
from lora_analysis.finding import Finding, as_findings
from lora_analysis.patterns import natural_key, near_names
from lora_analysis.text import html_facts

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Layout = Literal["linear", "conv1d", "embedding", "conv"]
ScaleOrigin = Literal["config", "tensor", "metadata", "format", "caller", "unknown"]


def _frozen_matrix(value: ArrayLike, *, role: str, name: str) -> NDArray[np.floating[Any]]:
    """Return ``value`` as a read-only float32 or float64 matrix; refuse what is not one."""
    array = np.asarray(value)
    if array.ndim != 2 or 0 in array.shape:
        message = f"{role} of '{name}' must be a non-empty matrix, found shape {array.shape}."
        raise InputError(message)
    if not np.issubdtype(array.dtype, np.floating):
        message = f"{role} of '{name}' must hold floating-point numbers, found {array.dtype}."
        raise InputError(message)
    # Half precision is a storage type: arithmetic starts from its exact float32 value.
    array = array.astype(np.float64 if array.dtype.itemsize >= 8 else np.float32, copy=False)
    if not _all_finite(array):
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        message = (
            f"{role} of '{name}' holds {bad} non-finite of {array.size} values. "
            "The training diverged or the file is damaged; no number can be computed from it."
        )
        raise InputError(message)
    view = array.view()
    view.flags.writeable = False
    return view


def _all_finite(array: NDArray[np.floating[Any]]) -> bool:
    flat = array.ravel(order="K")  # in the order of memory, to copy nothing
    # One sum of squares tells, unless it overflows; to look at each value costs twice as much.
    return bool(np.isfinite(np.vdot(flat, flat))) or bool(np.isfinite(array).all())


def _finite_or_none(value: float | None, *, role: str, name: str) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not np.isfinite(number):
        message = f"{role} of '{name}' must be a finite number, found {value!r}."
        raise InputError(message)
    return number


def _check_kernel(name: str, layout: Layout, kernel: tuple[int, ...], d_in: int) -> None:
    fits = (layout == "conv") == bool(kernel)
    if not fits or (kernel and d_in % max(math.prod(kernel), 1)):
        message = (
            f"The kernel of '{name}' must be given with layout 'conv' alone, and divide its {d_in} "
            f"inputs; found {kernel} with layout '{layout}'."
        )
        raise InputError(message)


class FilePosition(NamedTuple):
    """Where a factor lies in its file, in bytes, if it is stored there as one block.

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


# Of factors that were computed, and are in no file as they are.
NOT_STORED: Final[tuple[FilePosition | None, FilePosition | None]] = (None, None)


@dataclass(frozen=True, slots=True, eq=False)
class LowRankUpdate:
    """The update ``ΔW = scale·B·A`` of one weight, kept as its factors.

    Parameters
    ----------
    name
        Module name in the base model, wrapper prefixes stripped.
    A
        Down-projection, shape ``(r, d_in)``.
    B
        Up-projection, shape ``(d_out, r)``.
    scale
        The multiplier really applied (``alpha/r``, ``alpha/sqrt(r)`` with rsLoRA); None where it
        is not known, and then ΔW is known in units of the scale only.
    alpha
        The hyper-parameter behind ``scale``, where it is known.
    stored_dtype
        Type in the file, for example ``"bfloat16"``; the type of ``A`` by default.
    layout
        How the base stores the weight; A and B have the same orientation in every layout.
        ``"linear"`` is ``[out, in]``; ``"conv1d"`` (GPT-2's ``Conv1D``) ``[in, out]``;
        ``"embedding"`` ``[entries, features]``, where ``d_in`` counts the entries and ``d_out``
        the features; ``"conv"`` ``[channels out, channels in, *kernel]``, of which ΔW is the
        matrix ``(channels out, channels in · kernel)``, all axes but the first flattened.
    label
        Name of the adapter this update belongs to, for messages.
    kernel
        Shape of a convolution's kernel, ``(3, 3)``; empty in other layouts.
    variant
        Empty where ``scale·B·A`` is the whole update. Otherwise the method of which it is a part,
        ``"DoRA"``: ΔW is then the low-rank part only, and what the method makes of it depends
        on the base weight (:func:`lora_analysis.effective.effective_update`).
    base_name
        Name of the base's module or tensor where it is not ``name``: of a replicated layer the
        original one, of an expert ``"experts.down_proj[3]"``, the member along the first axis.
    magnitude
        DoRA's learned norms of the rows of ``W + ΔW``, shape ``(d_out,)``; None without them.
    magnitude_side
        ``"output"`` for norms of rows. ``"input"`` for those of input channels, as OneTrainer and
        LyCORIS learn them too: of columns, or of a convolution's input channels over all outputs
        and the kernel; ``magnitude`` then has one entry per channel.
    stored_at
        Positions of A and B in their file; None for a factor that is computed or cut from others.

    Raises
    ------
    InputError
        A factor is not a finite floating-point matrix, the ranks of A and B differ, or the
        kernel does not divide the inputs or belongs to another layout.
    """

    name: str
    A: NDArray[np.floating[Any]]
    B: NDArray[np.floating[Any]]
    scale: float | None
    alpha: float | None = None
    stored_dtype: str = ""
    layout: Layout = "linear"
    label: str = ""
    kernel: tuple[int, ...] = ()
    variant: str = ""
    base_name: str = ""
    magnitude: NDArray[np.floating[Any]] | None = None
    magnitude_side: Literal["output", "input"] = "output"
    stored_at: tuple[FilePosition | None, FilePosition | None] = NOT_STORED

    def __post_init__(self) -> None:
        given = self.A
        a = _frozen_matrix(given, role="A", name=self.name)
        b = _frozen_matrix(self.B, role="B", name=self.name)
        if a.shape[0] != b.shape[1]:
            message = (
                f"A and B of '{self.name}' have different ranks: A is {a.shape}, B is {b.shape}. "
                "A must be (r, d_in) and B (d_out, r); is one of them transposed?"
            )
            raise InputError(message)
        _check_kernel(self.name, self.layout, self.kernel, a.shape[1])
        put = object.__setattr__
        put(self, "A", a)
        put(self, "B", b)
        put(self, "scale", _finite_or_none(self.scale, role="scale", name=self.name))
        put(self, "alpha", _finite_or_none(self.alpha, role="alpha", name=self.name))
        put(self, "stored_dtype", self.stored_dtype or np.asarray(given).dtype.name)
        if self.magnitude is not None:
            rows, channels = b.shape[0], a.shape[1] // math.prod(self.kernel)
            expected = (rows, "rows") if self.magnitude_side == "output" else (channels, "inputs")
            put(self, "magnitude", self._checked_magnitude(*expected))

    def _checked_magnitude(self, count: int, what: str) -> NDArray[np.floating[Any]]:
        norms = np.asarray(self.magnitude).reshape(1, -1)
        if norms.size != count:
            message = f"The magnitude of '{self.name}' has {norms.size} entries for {count} {what}."
            raise InputError(message)
        row: NDArray[np.floating[Any]] = _frozen_matrix(norms, role="magnitude", name=self.name)[0]
        return row

    @property
    def rank(self) -> int:
        """Columns of B: the rank the adapter was given, not the one it uses."""
        return int(self.B.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(d_out, d_in)`` of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    def known_scale(self) -> float:
        """Return the scale; raise ScaleError where it is not known."""
        return _known_scale(self)

    def delta_weight(self) -> NDArray[np.float64]:
        """Return ΔW as a dense float64 matrix ``(d_out, d_in)``; costs ``d_out·d_in·r``.

        Always a matrix from inputs to outputs, whatever the layout: of an embedding the transpose
        of what is added to its table, of a convolution the kernels flattened row by row.
        """
        return self.known_scale() * (self.B.astype(np.float64) @ self.A.astype(np.float64))


@dataclass(frozen=True, slots=True, eq=False)
class DenseUpdate:
    """The update of one weight as a dense matrix, for example from a full fine-tune.

    Parameters
    ----------
    name
        Module name in the base model.
    delta
        ΔW, shape ``(d_out, d_in)``.
    label
        Name of the model it belongs to, for messages.
    layout, kernel
        How the base stores the weight, as for a low-rank update; ΔW has one orientation in all.

    Raises
    ------
    InputError
        ``delta`` is not a finite floating-point matrix, or the kernel is not one of its layout.
    """

    name: str
    delta: NDArray[np.floating[Any]]
    stored_dtype: str = ""
    label: str = ""
    layout: Layout = "linear"
    kernel: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        delta = _frozen_matrix(self.delta, role="delta", name=self.name)
        _check_kernel(self.name, self.layout, self.kernel, delta.shape[1])
        stored = self.stored_dtype or np.asarray(self.delta).dtype.name
        object.__setattr__(self, "delta", delta)
        object.__setattr__(self, "stored_dtype", stored)

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


@dataclass(frozen=True, slots=True, eq=False)
class SideTensor:
    """A tensor that a file stores next to the factors: carried over by writers, not analyzed.

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
        Whether a model without it computes other numbers: True for biases, norms and differences
        of whole weights, False for the embedding of a new word.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]
    alters_model: bool = True


@dataclass(frozen=True, slots=True)
class UpdateOutline:
    """An update without its numbers: everything that the header of a file states about it.

    The fields are those of the update; ``dense`` is True for a `DenseUpdate`, whose ``scale`` is 1,
    and ``has_magnitude`` if there are DoRA's norms.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scale: float | None
    alpha: float | None = None
    stored_dtype: str = ""
    layout: Layout = "linear"
    label: str = ""
    kernel: tuple[int, ...] = ()
    variant: str = ""
    base_name: str = ""
    has_magnitude: bool = False
    magnitude_side: Literal["output", "input"] = "output"
    dense: bool = False

    @classmethod
    def of(cls, update: Update) -> UpdateOutline:
        """Return the outline of an update; nothing of its numbers is kept."""
        shared = {name: getattr(update, name) for name in _OUTLINED_ALWAYS}
        if isinstance(update, DenseUpdate):
            return cls(**shared, scale=1.0, dense=True)
        more = {name: getattr(update, name) for name in _OUTLINED_LOW_RANK}
        return cls(**shared, **more, has_magnitude=update.magnitude is not None)

    def known_scale(self) -> float:
        """Return the scale; raise ScaleError where it is not known."""
        return _known_scale(self)


_OUTLINED_ALWAYS = ("name", "shape", "rank", "stored_dtype", "layout", "label", "kernel")
_OUTLINED_LOW_RANK = ("scale", "alpha", "variant", "base_name", "magnitude_side")


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
    """An update that is computed when it is asked for, and whose outline is known before."""

    outline: UpdateOutline
    load: Callable[[], Update]

    def __call__(self) -> Update:
        """Compute the update."""
        return self.load()


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an adapter came from, and what its reader noticed.

    ``scale_origin`` says per module where the multiplier was found; ``"format"`` where the format
    itself fixes it and no file could say another. ``findings`` are about the file itself; a
    sentence given as a string becomes one with the code ``"file-note"``. ``metrics`` are the final
    figures of its training (accuracy, loss), where the trainer left them beside the file; ``step``
    is how far the training had come, where it says so. Of an
    adapter from a hub, ``address`` is ``hf://owner/name@commit/…`` and ``revision`` the commit;
    ``path`` and ``files`` then lie in the hub's cache, which is nobody's business.
    ``metadata`` are the strings that its file states about itself (kohya's ``ss_*``,
    ``modelspec.*``); ``source_format`` is the format that they and an adapter's side tensors
    belong to, also after an edit, which sets ``format`` to ``"memory"``. ``also_read`` are further
    files and folders that values come from: initial factors, base weights, the adapter before an
    edit. ``source`` reads exactly this adapter, with ``read_options`` as keyword arguments of
    `read_adapter`; ``file_names`` has the name in the file of each module that was renamed.
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
    def place(self) -> str | None:
        """What to call where it lies: the address on a hub, else the path; None in memory."""
        return self.address or (str(self.path) if self.path is not None else None)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders it was read from, which no output may touch."""
        path = () if self.path is None else (self.path,)
        return (*path, *self.files, *self.also_read)

    @property
    def sha256(self) -> str | None:
        """Hash over the adapter's files in their order, read now; None for one in memory."""
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


class Adapter(Mapping[str, Update]):
    """A set of updates by module name, in natural order, each loaded when it is asked for.

    Parameters
    ----------
    updates
        Per module either an update, or a function that returns one (called on every access, so
        that a walk over many adapters never holds more than one module of each).
    label
        Short name used in tables, figures and messages.
    provenance
        Where it came from.
    saved_modules
        Tensors trained in full beside the low-rank factors (a classification head), by tensor
        name in the base model, for example ``"classifier.weight"``.
    config
        What a writer needs to give the adapter back: task type, targets, base model, in the
        words of PEFT's ``adapter_config.json``.
    side_tensors
        Everything else that the file stores (biases, norms, embeddings of new words), by key in
        the file: a writer of ``provenance.source_format`` carries it over.
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
        # A reader's mapping loads a head only when it is asked for: copying it would load all.
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
        """Return what is known of a module besides its numbers.

        The module is loaded for it, once, unless it is a `LazyUpdate`.
        """
        if name not in self._outlines:
            update = self._updates.get(name)
            self._outlines[name] = (
                replace(update.outline, label=self.label)
                if isinstance(update, LazyUpdate)
                else UpdateOutline.of(self[name])
            )
        return self._outlines[name]

    def lazy(self, name: str) -> LazyUpdate:
        """Return a module with its outline, to be put into another adapter without loading it."""
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

    # Two adapters are the same only if they are one: comparing values would load every module.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders it was read from, which no output may touch."""
        return self.provenance.inputs

    def relabeled(self, label: str) -> Adapter:
        """Return the same adapter under another label; nothing is loaded."""
        return Adapter(
            self._updates,
            label=label,
            provenance=self.provenance,
            saved_modules=self.saved_modules,
            config=self.config,
            side_tensors=self.side_tensors,
        )

    def described(self, **facts: Any) -> Adapter:
        """Return the same adapter with fields of its provenance replaced; nothing is loaded."""
        return Adapter(
            self._updates,
            label=self.label,
            provenance=replace(self.provenance, **facts),
            saved_modules=self.saved_modules,
            config=self.config,
            side_tensors=self.side_tensors,
        )

    def _repr_html_(self) -> str:
        source = self.provenance
        known = (("task", source.task), ("rank", source.rank), ("seed", source.seed),
                 ("step", source.step), ("base model", source.base_model))  # fmt: skip
        facts = [("format", source.format), ("modules", len(self))]
        facts += [(name, str(value)) for name, value in known if value is not None]
        return html_facts(self.label, facts, " ".join(finding.text for finding in source.findings))

    def __repr__(self) -> str:
        return f"<Adapter {self.label!r}: {len(self)} modules, {self.provenance.format}>"

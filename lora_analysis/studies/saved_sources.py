"""Adapters and base of a saved study, read again from their sources when they are needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.bases import BaseWeights, open_base
from lora_analysis.errors import InputError, SourceError
from lora_analysis.formats import read_adapter
from lora_analysis.spectra import spectrum
from lora_analysis.studies.module_walk import rename_update

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from lora_analysis.adapter import Update
    from lora_analysis.finding import Finding

# Options of `read_adapter` that a file must not set.
_CALLERS = ("allow_pickle", "label")
_AGAIN = "The tables need no adapter; for everything else"


class _Expected(NamedTuple):
    """What the saved table of spectra states about one module."""

    rank: int
    scale: float | None
    norm: float


class SavedAdapter:
    """An adapter of a saved study, opened from its source when a module is read.

    Parameters
    ----------
    label
        Its label in the study.
    provenance
        Where it was read from, and with which options.
    expected
        Rank, scale and norm of each module in the study: what is read must agree.
    allow_pickle
        Whether files of ``torch.save`` are read.
    """

    def __init__(
        self,
        label: str,
        provenance: Provenance,
        expected: Mapping[str, _Expected],
        *,
        allow_pickle: bool,
    ) -> None:
        self.label = label
        self._provenance = provenance
        self._expected = expected
        self._allow_pickle = allow_pickle
        self._opened: Adapter | None = None

    @property
    def opened(self) -> Adapter:
        """The adapter with the names in its files, opened once.

        Raises
        ------
        SourceError
            It was in memory, or its source cannot be read.
        """
        if self._opened is None:
            source = self._provenance.source
            if source is None:
                message = (
                    f"'{self.label}' was in memory when the study was saved, so it cannot be read "
                    f"again. {_AGAIN} run study() with it."
                )
                raise SourceError(message)
            options: dict[str, Any] = dict(self._provenance.read_options)
            for name in _CALLERS:
                options.pop(name, None)
            try:
                self._opened = read_adapter(source, allow_pickle=self._allow_pickle, **options)
            except (InputError, TypeError) as error:
                message = (
                    f"'{self.label}' of the saved study cannot be read from {source}: {error} "
                    f"{_AGAIN} put it back, or run study() again."
                )
                raise SourceError(message) from error
        return self._opened

    def read(self, name: str) -> Update:
        """Return the update of a module under its name in the study.

        Raises
        ------
        SourceError
            It cannot be read, or differs from the update that was analyzed.
        """
        stored_name = self._provenance.file_names.get(name, name)
        if stored_name not in self.opened:
            raise self._changed_error(stored_name, "exists", now=False, saved=True)
        update = (
            self.opened[name]
            if name == stored_name
            else rename_update(self.opened, stored_name, name)
        )
        if (expected := self._expected.get(name)) is not None:
            scale = update.scale if isinstance(update, LowRankUpdate) else 1.0
            values = _Expected(update.rank, scale, spectrum(update).norm)
            for field, now, saved in zip(_Expected._fields, values, expected, strict=True):
                if not _is_equal(now, saved):
                    raise self._changed_error(name, field, now=now, saved=saved)
        return update

    def _changed_error(self, module: str, field: str, *, now: object, saved: object) -> SourceError:
        message = (
            f"'{self.label}' at {self._provenance.source} is not the adapter that the saved study "
            f"analyzed: '{field}' of '{module}' is {now}, it was {saved}. {_AGAIN} restore its "
            "files, or run study() again."
        )
        return SourceError(message)


def saved_adapter(
    label: str,
    provenance: Provenance,
    modules: Iterable[str],
    spectra: pd.DataFrame,
    *,
    allow_pickle: bool,
) -> Adapter:
    """Return an adapter of a saved study, whose updates are read when they are needed."""
    rows = spectra[spectra["adapter"] == label]
    columns = (rows[name] for name in ("module", "rank", "scale", "norm"))
    expected = {
        str(module): _Expected(int(rank), _number_or_none(scale), float(norm))
        for module, rank, scale, norm in zip(*columns, strict=True)
    }
    source = SavedAdapter(label, provenance, expected, allow_pickle=allow_pickle)
    updates = {str(name): partial(source.read, str(name)) for name in modules}
    return Adapter(updates, label=label, provenance=provenance)


def _is_equal(a: float | None, b: float | None) -> bool:
    return a is b if a is None or b is None else math.isclose(a, b, rel_tol=1e-6)


def _number_or_none(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def base_document(base: BaseWeights, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Return name, source and findings of a base as values for a file, for `SavedBase`.

    Parameters
    ----------
    base
        The base of the study.
    shapes
        Shape ``(d_out, d_in)`` of the update of each module.
    """
    path = None if base.path is None else str(base.path.absolute())
    return {
        "label": base.label,
        "name": base.name,
        "path": base.path,
        "source": base.saved_source if isinstance(base, SavedBase) else base.address or path,
        "findings": base.findings,
        "orientation_findings": base.orientation_findings(shapes),
    }


class SavedBase(BaseWeights):
    """The base of a saved study: its name and findings, and its weights once one is needed.

    Parameters
    ----------
    document
        What `base_document` returned.
    adapters
        The adapters of the study, whose names are matched with those of the base.
    prefix
        Prefixes for matching, see `study`.
    allow_pickle
        Whether files of ``torch.save`` are read.
    """

    def __init__(
        self,
        document: Mapping[str, Any],
        adapters: Iterable[Adapter],
        prefix: Mapping[str, str] | None,
        *,
        allow_pickle: bool,
    ) -> None:
        self.label: str = document["label"]
        self.name: str | None = document["name"]
        self.findings: tuple[Finding, ...] = tuple(document["findings"])
        self.path: Path | None = document["path"]
        self.saved_source: str | None = document["source"]
        self.saved_orientation: tuple[Finding, ...] = tuple(document["orientation_findings"])
        self._saved_adapters = tuple(adapters)
        self._saved_prefix = dict(prefix or {})
        self._allow_pickle = allow_pickle

    def orientation_findings(self, _shapes: Mapping[str, tuple[int, int]]) -> tuple[Finding, ...]:
        """Return the saved findings."""
        return self.saved_orientation

    def __getattr__(self, name: str) -> Any:
        """Open the weights if an attribute of an open base is needed."""
        if name.startswith("__") or "saved_source" not in vars(self):
            raise AttributeError(name)
        if self.saved_source is None:
            message = (
                f"The base {self.label} was in memory when the study was saved. {_AGAIN} run "
                "study() with it."
            )
            raise SourceError(message)
        try:
            base = open_base(self.saved_source, allow_pickle=self._allow_pickle)
        except InputError as error:
            message = (
                f"The base {self.label} of the saved study cannot be opened at "
                f"{self.saved_source}: {error} {_AGAIN} put it back, or run study() again."
            )
            raise SourceError(message) from error
        opened = []
        for adapter in self._saved_adapters:
            names = adapter.provenance.file_names
            try:
                next(iter(adapter.values()), None)
            except InputError:
                continue
            updates = {
                names.get(name, name): partial(adapter.__getitem__, name) for name in adapter
            }
            opened.append(Adapter(updates, label=adapter.label))
        matched = base.matched_to(opened, prefix=self._saved_prefix)
        vars(self).update({**vars(matched), **vars(self)})
        return getattr(matched, name)

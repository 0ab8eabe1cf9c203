"""A study as two files: a JSON document, and a safetensors file with all of its numbers.

Nothing in the files is executed: only the classes in `_CLASSES` are restored, from their fields.
Arrays are stored end to end, one tensor per type; the document refers to them by offset and shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lora_analysis.adapter import Provenance
from lora_analysis.amplify import Amplification, CrossedEnrichment, RandomDirections
from lora_analysis.bases.sanity_checks import WeightStatistics
from lora_analysis.errors import InputError, MalformedFileError, SourceError, UnfinishedError
from lora_analysis.finding import Failure, Finding
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.records import read_record
from lora_analysis.storage.tensor_writer import output_array, safetensors_content
from lora_analysis.storage.tensors import open_tensors
from lora_analysis.studies.reference_levels import ReferenceLevel
from lora_analysis.studies.similarity_matrix import SimilarityMatrix

KIND: Final = "study"
DOCUMENT: Final = "study.json"
ARRAYS: Final = "study.safetensors"
VERSION: Final = 1
# Some 100,000 amplifications fit in it.
MAX_DOCUMENT_BYTES: Final = 2**27

_TAG: Final = "#"
_CLASSES: Final[dict[str, type]] = {
    kind.__name__: kind
    for kind in (
        Amplification,
        CrossedEnrichment,
        Failure,
        Finding,
        Provenance,
        RandomDirections,
        ReferenceLevel,
        SimilarityMatrix,
        WeightStatistics,
    )
}


class StudyWriter:
    """Encodes values as JSON and collects their arrays."""

    def __init__(self) -> None:
        self._arrays: dict[str, list[NDArray[Any]]] = {}
        self._sizes: dict[str, int] = {}

    def encode(self, value: object) -> Any:
        """Return a value as JSON.

        Raises
        ------
        TypeError
            The value is of a class that cannot be saved.
        """
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, pd.DataFrame):
            columns = [[str(name), self._column(value[name])] for name in value.columns]
            return {_TAG: "table", "rows": len(value), "columns": columns}
        if isinstance(value, list):
            return [self.encode(item) for item in value]
        if isinstance(value, tuple):
            return {_TAG: "tuple", "items": [self.encode(item) for item in value]}
        if isinstance(value, Mapping):
            items = [[self.encode(key), self.encode(item)] for key, item in value.items()]
            return {_TAG: "mapping", "items": items}
        if isinstance(value, Path):
            return {_TAG: "path", "path": str(value.absolute())}
        if value is ...:
            return {_TAG: "in memory"}
        if is_dataclass(value) and type(value).__name__ in _CLASSES:
            parts = {f.name: self.encode(getattr(value, f.name)) for f in fields(value)}
            return {_TAG: type(value).__name__, "fields": parts}
        message = f"values of type {type(value).__name__} are not saved"
        raise TypeError(message)

    def _array(self, array: NDArray[Any]) -> dict[str, Any]:
        dtype = array.dtype.name
        start = self._sizes.get(dtype, 0)
        self._arrays.setdefault(dtype, []).append(array.ravel())
        self._sizes[dtype] = start + array.size
        return {_TAG: "array", "dtype": dtype, "start": start, "shape": list(array.shape)}

    def _column(self, column: pd.Series) -> dict[str, Any]:
        """Return a column as an array, text as codes and distinct values."""
        if column.dtype.kind in "biuf":
            return self._array(column.to_numpy())
        distinct: dict[tuple[type, object], Any] = {}
        keys = []
        for value in column.tolist():
            missing = isinstance(value, float) and math.isnan(value)  # NaN differs from itself
            key = type(value), None if missing else value
            distinct.setdefault(key, value)
            keys.append(key)
        order = {key: code for code, key in enumerate(distinct)}
        return {
            _TAG: "values",
            "dtype": str(column.dtype),
            "codes": self._array(np.array([order[key] for key in keys], dtype=np.int32)),
            "values": [self.encode(value) for value in distinct.values()],
        }

    def write(self, folder: Path, content: Mapping[str, object]) -> None:
        """Write both files.

        Raises
        ------
        InputError
            The document is too large to be read back.
        """
        encoded = {name: self.encode(value) for name, value in content.items()}
        document = {"format": "lora_analysis study", "version": VERSION, "content": encoded}
        text = json.dumps(document, separators=(",", ":"), ensure_ascii=True).encode()
        if len(text) > MAX_DOCUMENT_BYTES:
            message = (
                f"The study needs a document of {len(text):,} bytes (limit "
                f"{MAX_DOCUMENT_BYTES:,}). Study fewer adapters or modules at a time."
            )
            raise InputError(message)
        tensors = [
            output_array(dtype, np.concatenate(parts)) for dtype, parts in self._arrays.items()
        ]
        write_atomic(folder / ARRAYS, safetensors_content(tensors, {}))
        write_atomic(folder / DOCUMENT, text)


class StudyReader:
    """Restores the values that a `StudyWriter` encoded."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = arrays

    def decode(self, value: Any) -> Any:
        """Return the value that was encoded as JSON.

        Raises
        ------
        ValueError, TypeError, KeyError
            It is not what the writer writes.
        """
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        tag = value[_TAG]
        if tag == "array":
            return self._array(value)
        if tag == "values":
            distinct = np.empty(len(value["values"]), dtype=object)
            for code, item in enumerate(value["values"]):
                distinct[code] = self.decode(item)
            return pd.Series(distinct[self._array(value["codes"])], dtype=value["dtype"])
        if tag == "table":
            columns = {str(name): self.decode(column) for name, column in value["columns"]}
            rows = value["rows"]
            if any(
                len(column) != rows for column in columns.values()
            ):  # a scalar would be repeated
                message = f"a table of {rows} rows has a column of another length"
                raise ValueError(message)
            return pd.DataFrame(columns, index=pd.RangeIndex(rows))
        if tag == "tuple":
            return tuple(self.decode(item) for item in value["items"])
        if tag == "mapping":
            return {self.decode(key): self.decode(item) for key, item in value["items"]}
        if tag == "path":
            return Path(value["path"])
        if tag == "in memory":
            return ...
        parts = {name: self.decode(item) for name, item in value["fields"].items()}
        return _CLASSES[tag](**parts)

    def _array(self, value: Mapping[str, Any]) -> NDArray[Any]:
        flat, start, shape = self._arrays[value["dtype"]], value["start"], tuple(value["shape"])
        size = math.prod(shape)
        if type(start) is not int or not 0 <= start <= start + size <= flat.size:
            message = f"an array ends at {start + size:,} of {flat.size:,} numbers"
            raise ValueError(message)
        return flat[start : start + size].reshape(shape).copy()


def read_study_files(folder: Path) -> dict[str, Any]:
    """Return the values in a folder that `StudyWriter.write` wrote, by name.

    Raises
    ------
    SourceError
        The folder has no saved study.
    UnfinishedError
        A study is being written there, or writing it was interrupted.
    MalformedFileError
        A file is damaged, or not from this version.
    """
    path = folder / DOCUMENT
    record = read_record(folder, KIND)
    if record is not None and record.state != "finished":
        message = f"{folder} is not complete: saving the study was interrupted. Save it again."
        raise UnfinishedError(message)
    if not path.is_file():
        message = f"{folder} holds no saved study: there is no {DOCUMENT}."
        raise SourceError(message)
    document = read_json_object(path, max_bytes=MAX_DOCUMENT_BYTES)
    if document.get("version") != VERSION or not isinstance(document.get("content"), dict):
        message = (
            f"{path} is not a study that this version reads: its version is "
            f"{document.get('version')!r}, expected {VERSION}."
        )
        raise MalformedFileError(message)
    tensors = open_tensors(folder / ARRAYS)
    arrays = {dtype: tensors.read(dtype) for dtype in tensors.infos}
    reader = StudyReader(arrays)
    try:
        return {name: reader.decode(value) for name, value in document["content"].items()}
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        message = f"{path} is damaged: {type(error).__name__}: {error}."
        raise MalformedFileError(message) from error

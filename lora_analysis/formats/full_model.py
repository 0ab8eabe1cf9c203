"""Whole models: a full fine-tune is read as its difference to a base."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from lora_analysis.adapter import FULL_FINE_TUNE
from lora_analysis.errors import InputError
from lora_analysis.formats.registry import formats_for
from lora_analysis.formats.sources import AdapterFiles, Format, label_of, run_facts, tensors_at
from lora_analysis.storage.documents import read_json_object

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.options import ReadOptions

_INDEX: Final = ".index.json"


class FullModel(Format):
    """Models in the files that `open_base` opens; asked last, and only if a base is given."""

    __slots__ = ()

    name = FULL_FINE_TUNE

    def locate(self, path: Path, options: ReadOptions) -> AdapterFiles | None:
        """Return the files of a model whose tensors no other format recognizes."""
        weights = _weights_of(path)
        if weights is None or not _holds_model(weights, options):
            return None
        others = replace(options, base=None)
        if any(format.locate(weights, others) for format in formats_for(weights, others)):
            return None
        return AdapterFiles(path, weights)

    def read(self, files: AdapterFiles, name: str | None, options: ReadOptions) -> Adapter:
        """Read the difference of the model and the base."""
        from lora_analysis.bases import open_base, read_fine_tune

        if name is not None:
            message = f"{files.path} is a whole model and holds no adapter '{name}'."
            raise InputError(message)
        source = files.path if files.snapshot is None else files.snapshot.address(files.path)
        adapter = read_fine_tune(
            open_base(source, allow_pickle=options.allow_pickle),
            options.base,
            label=options.label or label_of(files.path),
            allow_pickle=options.allow_pickle,
        )
        folder = files.path if files.path.is_dir() else files.path.parent
        return adapter.with_provenance(**run_facts(folder))


FORMAT: Final = FullModel()


def _weights_of(path: Path) -> Path | None:
    """Return the file or the index of the model at a path; None without one."""
    from lora_analysis.bases.opening import model_file

    if not path.is_dir():
        return path
    try:
        return model_file(path)
    except InputError:
        return None


def _holds_model(weights: Path, options: ReadOptions) -> bool:
    """Return True if a file has a weight matrix, or cannot be opened although it is a model's."""
    if weights.name.endswith(_INDEX):
        try:
            names = read_json_object(weights).get("weight_map")
        except InputError:
            return True  # reading the model reports why
        return isinstance(names, dict) and any(str(name).endswith(".weight") for name in names)
    tensors = tensors_at(weights, options)
    if tensors is None:
        return False
    return any(
        info.name.endswith(".weight") and len(info.shape) > 1 for info in tensors.infos.values()
    )


def fine_tune_hint(path: Path, options: ReadOptions) -> str:
    """Return the next step for a model without a base to compare it with, empty for others."""
    if FORMAT.locate(path, options) is None:
        return ""
    return (
        " A full fine-tune is read as its difference to the model that it was trained from: give "
        "that with base= (command line: --base)."
    )

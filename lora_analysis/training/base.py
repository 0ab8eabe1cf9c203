"""The demo's base model on disk: ``config.json``, ``model.safetensors`` and a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lora_analysis.errors import MalformedFileError
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.safetensors import read_header
from lora_analysis.storage.tensor_reader import read_tensor
from lora_analysis.training.files import (
    CONFIG_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    base_folder,
    file_sha256,
    write_json,
)
from lora_analysis.training.vit import DigitsViT, VitConfig


def read_base(folder: Path | None = None) -> DigitsViT:
    """Return the base model in float32, all of it trainable.

    Parameters
    ----------
    folder
        Where its files lie; the shipped model by default.

    Raises
    ------
    MalformedFileError
        A file is damaged, the weights do not fit the architecture, or their SHA-256 is not the
        one in the manifest that lies beside them.
    InputError
        ``config.json`` describes another kind of model.
    """
    folder = folder or base_folder()
    config = VitConfig.from_dict(read_json_object(folder / CONFIG_NAME))
    weights = folder / WEIGHTS_NAME
    _check_sha256(folder, weights)
    with torch.random.fork_rng(devices=[]):  # its random start is replaced at once
        model = DigitsViT(config)
    header = read_header(weights)
    found = {
        name: torch.from_numpy(read_tensor(weights, header.tensors[name]))
        for name in header.tensors
    }
    _check_fit(weights, model, found)
    model.load_state_dict({name: tensor.float() for name, tensor in found.items()}, assign=True)
    return model


def write_base(model: DigitsViT, folder: Path, manifest: dict[str, Any]) -> Path:
    """Write a base model, its weights in bfloat16, and return its folder.

    Parameters
    ----------
    model
        The model; it is not changed.
    folder
        Made where it does not exist.
    manifest
        How it came about; the SHA-256 of the weights is added.
    """
    write_weights(model, folder, dtype=torch.bfloat16)
    digest = file_sha256(folder / WEIGHTS_NAME)
    write_json(folder / MANIFEST_NAME, {**manifest, "weights_sha256": digest})
    return folder


def write_weights(model: DigitsViT, folder: Path, *, dtype: torch.dtype) -> list[str]:
    """Write a model's weights and configuration, and return the names of the two files."""
    tensors = {name: t.detach().to("cpu", dtype) for name, t in model.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomic(folder / WEIGHTS_NAME, content)
    write_json(folder / CONFIG_NAME, model.config.to_dict())
    return [CONFIG_NAME, WEIGHTS_NAME]


def _check_sha256(folder: Path, weights: Path) -> None:
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        return
    stated = read_json_object(manifest).get("weights_sha256")
    found = file_sha256(weights)
    if stated != found:
        message = (
            f"{weights}: its SHA-256 is {found}, {MANIFEST_NAME} states {stated}. "
            "The file was changed or damaged; install the package again, or run `make data`."
        )
        raise MalformedFileError(message)


def _check_fit(path: Path, model: DigitsViT, found: dict[str, torch.Tensor]) -> None:
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    shapes = {name: tuple(t.shape) for name, t in found.items()}
    wrong = sorted(n for n in wanted.keys() | shapes.keys() if wanted.get(n) != shapes.get(n))
    if wrong:
        name = wrong[0]
        message = (
            f"{path}: {len(wrong)} tensors do not fit {CONFIG_NAME}; '{name}' should be "
            f"{wanted.get(name, 'absent')} and is {shapes.get(name, 'absent')}."
        )
        raise MalformedFileError(message)

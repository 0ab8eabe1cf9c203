"""The demo's base model: a small vision transformer with separate projections, and its files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_analysis.errors import InputError, MalformedFileError
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.safetensors import read_header
from lora_analysis.storage.tensor_reader import read_tensor
from lora_analysis.training.inputs import (
    CONFIG_NAME,
    MANIFEST_NAME,
    MODEL_TYPE,
    WEIGHTS_NAME,
    base_folder,
    file_sha256,
    write_json,
)


@dataclass(frozen=True, slots=True)
class VitConfig:
    """Architecture of :class:`DigitsViT`, the fields of its ``config.json``.

    ``image_size`` and ``patch_size`` are in pixels, ``width`` and ``mlp_width`` in features;
    ``depth`` counts blocks. With a width of 192 the random baseline of φ(·, 64) is 1/3.
    """

    image_size: int = 8
    patch_size: int = 2
    width: int = 192
    depth: int = 4
    heads: int = 6
    mlp_width: int = 384
    classes: int = 10

    def __post_init__(self) -> None:
        small = [name for name in self.__slots__ if getattr(self, name) < 1]
        if small:
            message = f"{small[0]} of a {MODEL_TYPE} must be at least 1."
            raise InputError(message)
        if self.image_size % self.patch_size or self.width % self.heads:
            message = (
                f"A {MODEL_TYPE} needs image_size divisible by patch_size and width by heads, "
                f"found {self.image_size} / {self.patch_size} and {self.width} / {self.heads}."
            )
            raise InputError(message)

    @property
    def tokens(self) -> int:
        """Number of patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of ``config.json``, model type first."""
        return {"model_type": MODEL_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> VitConfig:
        """Return the architecture described by the fields of a ``config.json``.

        Raises
        ------
        InputError
            The model type is wrong, or a field is missing, unknown or not an integer.
        """
        model_type = fields.get("model_type")
        if model_type != MODEL_TYPE:
            message = f"config.json has model_type {model_type!r}, expected {MODEL_TYPE!r}."
            raise InputError(message)
        values = {key: value for key, value in fields.items() if key != "model_type"}
        expected = list(cls.__dataclass_fields__)
        if sorted(values) != sorted(expected) or not all(type(v) is int for v in values.values()):
            message = (
                f"config.json of a {MODEL_TYPE} must give an integer for each of "
                f"{', '.join(expected)}; found {values}."
            )
            raise InputError(message)
        return cls(**values)


class Attention(nn.Module):
    """Multi-head self-attention with separate q, k, v and o projections."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.o_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return attended features, ``(batch, tokens, width)`` as ``x``."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, heads, tokens, width / heads)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.width, config.mlp_width)
        self.down_proj = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return transformed features, ``(batch, tokens, width)`` as ``x``."""
        output: Tensor = self.down_proj(functional.gelu(self.up_proj(x)))
        return output


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next residual stream, ``(batch, tokens, width)`` as ``x``."""
        x = x + self.attention(self.attention_norm(x))
        output: Tensor = x + self.mlp(self.mlp_norm(x))
        return output


class DigitsViT(nn.Module):
    """Vision transformer for small gray images.

    Patches are embedded linearly, learned positions are added, and ``head`` classifies the mean
    token after the last block.

    Parameters
    ----------
    config
        The architecture; the demo's by default.
    """

    def __init__(self, config: VitConfig | None = None) -> None:
        super().__init__()
        self.config = config or VitConfig()
        self.embed = nn.Linear(self.config.patch_size**2, self.config.width)
        self.position = nn.Parameter(0.02 * torch.randn(self.config.tokens, self.config.width))
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(self.config.depth))
        self.norm = nn.LayerNorm(self.config.width)
        self.head = nn.Linear(self.config.width, self.config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits ``(batch, classes)`` of images ``(batch, size, size)``."""
        side = self.config.patch_size
        patches = images.unfold(1, side, side).unfold(2, side, side)  # (batch, n, n, side, side)
        x = self.embed(patches.flatten(3).flatten(1, 2)) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits


def read_base(folder: Path | None = None) -> DigitsViT:
    """Read a base model in float32, with all its parameters trainable.

    Parameters
    ----------
    folder
        Folder of its files; the bundled model by default.

    Raises
    ------
    MalformedFileError
        A file is damaged, the weights do not fit the architecture, or their SHA-256 is not the
        one in the manifest next to them.
    InputError
        ``config.json`` describes another kind of model.
    """
    folder = folder or base_folder()
    config = VitConfig.from_dict(read_json_object(folder / CONFIG_NAME))
    weights = folder / WEIGHTS_NAME
    manifest = folder / MANIFEST_NAME
    if manifest.is_file():
        expected = read_json_object(manifest).get("weights_sha256")
        actual = file_sha256(weights)
        if actual != expected:
            message = (
                f"{weights}: its SHA-256 is {actual}, {MANIFEST_NAME} states {expected}. The file "
                "was changed or damaged; install the package again, or run `make data`."
            )
            raise MalformedFileError(message)
    with torch.random.fork_rng(devices=[]):  # its random weights are replaced at once
        model = DigitsViT(config)
    header = read_header(weights)
    tensors = {
        name: torch.from_numpy(read_tensor(weights, header.tensors[name]))
        for name in header.tensors
    }
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = sorted(n for n in expected.keys() | shapes.keys() if expected.get(n) != shapes.get(n))
    if wrong:
        name = wrong[0]
        message = (
            f"{weights}: {len(wrong)} tensors do not fit {CONFIG_NAME}; '{name}' should be "
            f"{expected.get(name, 'absent')} and is {shapes.get(name, 'absent')}."
        )
        raise MalformedFileError(message)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model


def write_base(model: DigitsViT, folder: Path, manifest: dict[str, Any]) -> Path:
    """Write a base model, its weights in bfloat16, and return its folder.

    Parameters
    ----------
    model
        The model; it is not changed.
    folder
        Created if it does not exist.
    manifest
        How the model was made; the SHA-256 of the weights is added.
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

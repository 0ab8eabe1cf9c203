"""The demo's base model: a small vision transformer with every projection a linear of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_analysis.errors import InputError
from lora_analysis.training.files import MODEL_TYPE


@dataclass(frozen=True, slots=True)
class VitConfig:
    """Architecture of :class:`DigitsViT`, the fields of its ``config.json``.

    ``image_size`` and ``patch_size`` are in pixels, ``width`` and ``mlp_width`` in features;
    ``depth`` counts blocks. A width of 192 keeps chance φ(·, 64) at a third.
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
        """Return what ``config.json`` holds, model type first."""
        return {"model_type": MODEL_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> VitConfig:
        """Return the architecture in the fields of a ``config.json``.

        Raises
        ------
        InputError
            The model type is another one, or a field is missing, unknown or no integer.
        """
        found = fields.get("model_type")
        if found != MODEL_TYPE:
            message = f"config.json has model_type {found!r}, expected {MODEL_TYPE!r}."
            raise InputError(message)
        values = {key: value for key, value in fields.items() if key != "model_type"}
        wanted = list(cls.__dataclass_fields__)
        if sorted(values) != sorted(wanted) or not all(type(v) is int for v in values.values()):
            message = (
                f"config.json of a {MODEL_TYPE} must give an integer for each of "
                f"{', '.join(wanted)}; found {values}."
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
    """Two linears with a GELU between."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.width, config.mlp_width)
        self.down_proj = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return transformed features, ``(batch, tokens, width)`` as ``x``."""
        output: Tensor = self.down_proj(functional.gelu(self.up_proj(x)))
        return output


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the stream."""

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
    """Vision transformer on gray images of a few pixels a side.

    Patches are embedded linearly, a learned position is added, and the mean token after the last
    block is classified by ``head``.

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

"""A small model with every kind of layer that LoRA meets, for the tests of the core."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_analysis.lora import LoraLayer, add_lora


class Conv1D(nn.Module):
    """GPT-2's layer, written anew: a linear one that stores its weight as (d_in, d_out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width + 2)
        self.mixer = nn.MultiheadAttention(width, 2, batch_first=True)
        self.c_proj = Conv1D(width, width + 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(x, x, x, need_weights=False)[0]
        return x + self.c_proj(torch.tanh(self.q_proj(self.norm(x + mixed))))


class TinyModel(nn.Module):
    """Eleven blocks, so that natural order and suffixes of numbers matter."""

    def __init__(self, width: int = 8, blocks: int = 11, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


TOKENS = torch.arange(24).reshape(4, 6) % 13


def tiny_model(seed: int = 0, **shape: int) -> TinyModel:
    torch.manual_seed(seed)
    return TinyModel(**shape)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def fill(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Give B and the trained copies random values, as if the adapter had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if f".adapters.{name}." in key and not key.endswith(".A"):
                value.add_(torch.randn(value.shape, generator=generator).to(value) / 3)


def adapted(
    seed: int = 0, *, rank: int = 2, trained: bool = True, dtype: torch.dtype = torch.float32
) -> TinyModel:
    """A model with a (by default) trained adapter on both kinds of layer, and a trained head."""
    model = tiny_model(seed).to(dtype)
    add_lora(model, rank=rank, alpha=4, targets=["q_proj", "c_proj"], seed=7, trainable=["head"])
    if trained:
        fill(model)
    return model


def output(model: nn.Module) -> Tensor:
    """Return the output for `TOKENS` while no parameter needs a gradient.

    torch chooses the kernel of a linear layer by whether its bias needs a gradient, and some
    processors' kernels round differently: two outputs are equal to the last bit only where both
    came from the same ones.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    result: Tensor = model(TOKENS)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return result

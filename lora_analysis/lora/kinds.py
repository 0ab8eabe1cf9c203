"""LoRA on layers where x does not meet A as a vector: embeddings and convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_analysis.errors import UnsupportedMethodError
from lora_analysis.lora.layers import Conv1DLoraLayer, Factors, LoraLayer, generator_of

if TYPE_CHECKING:
    from lora_analysis.adapter import Layout

_QUANTIZED = ("Linear4bit", "Linear8bitLt", "LinearNF4", "LinearFP4")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class EmbeddingLoraLayer(LoraLayer):
    """An embedding with low-rank adapters: the row of entry t becomes ``W[t] + s·B·A[:, t]``.

    A ``(r, entries)`` starts at zero and B ``(features, r)`` normal, as in PEFT. The factors know
    no dropout. Where the base scales its rows when they are read (Gemma), the update is too.
    """

    layout: ClassVar[Layout] = "embedding"

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Return whether the layer is an embedding with a table that reading does not change."""
        plain = layer._parameters.get("weight") is not None
        return isinstance(layer, nn.Embedding) and plain and layer.max_norm is None

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """Transpose: from entries to features."""
        return weight.T

    @staticmethod
    def stored(matrix: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG004
        """Transpose."""
        return matrix.T

    @classmethod
    def start(cls, layer: nn.Module, name: str, rank: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return A of zeros and a normal B."""
        d_out, d_in = cls.shape(layer)
        B = torch.empty(d_out, rank).normal_(generator=generator_of(name, rank, seed))
        return torch.zeros(rank, d_in), B

    def update(self, x: Tensor, factors: Factors) -> Tensor:
        """Return ``s·B·A[:, x]``, features last; nothing for the padding entry's gradient."""
        base = cast("nn.Embedding", self.base_layer)
        rows = functional.embedding(x, factors.A.T, base.padding_idx)  # (…, r)
        update = functional.linear(rows * factors.scale, factors.B)  # (…, d_out)
        scale = getattr(base, "embed_scale", None)
        return update if scale is None else update * scale


class ConvLoraLayer(LoraLayer):
    """A convolution with low-rank adapters: one with r channels and its kernel, then one of 1.

    A is held flattened, ``(r, channels in · kernel)``, B ``(channels out, r)``: ΔW is their
    product in the kernels' shape. Grouped convolutions are not adapted.
    """

    layout: ClassVar[Layout] = "conv"

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Return whether the layer is a convolution over all channels with a plain kernel."""
        plain = layer._parameters.get("weight") is not None
        return isinstance(layer, _CONVOLUTIONS) and plain and layer.groups == 1

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """Flatten the kernels."""
        return weight.flatten(1)

    @staticmethod
    def stored(matrix: Tensor, weight: Tensor) -> Tensor:
        """Give the rows the kernels' shape."""
        return matrix.reshape(weight.shape)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return tuple(cast("Tensor", self.base_layer.weight).shape[2:])

    def update(self, x: Tensor, factors: Factors) -> Tensor:
        """Return the convolution with A at the base's stride and padding, mixed by B."""
        base = cast("Any", self.base_layer)
        x = x.to(factors.A.dtype)
        if factors.dropout:
            x = functional.dropout(x, factors.dropout, self.training)
        kernels = factors.A.view(len(factors.A), -1, *self.kernel)
        down = base._conv_forward(x, kernels, None) * factors.scale  # (n, r, …)
        mixed = torch.tensordot(factors.B, down, dims=([1], [-1 - len(self.kernel)]))
        result: Tensor = mixed.movedim(0, -1 - len(self.kernel))
        return result


class QuantisedLoraLayer(LoraLayer):
    """A linear layer whose frozen weight bitsandbytes holds in 4 or 8 bits (QLoRA).

    The base decodes its weight as it computes; the factors are float32 as elsewhere. There is
    nothing to merge into: a sum would be rounded to codes again.
    """

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Return whether the layer is one of bitsandbytes'; told by name, to import nothing."""
        kind = type(layer)
        return kind.__name__ in _QUANTIZED and kind.__module__.startswith("bitsandbytes.")

    @classmethod
    def shape(cls, layer: nn.Module) -> tuple[int, int]:
        """Return ``(d_out, d_in)``, which the codes' own shape does not tell."""
        return int(cast("Any", layer).out_features), int(cast("Any", layer).in_features)

    @classmethod
    def keep_gradients(cls, model: nn.Module) -> None:
        """Keep the 4-bit layers of a model from bitsandbytes' packed form, which has no gradient.

        On a CPU with AVX-512 BF16 an evaluation packs the codes for a kernel of inference, and
        leaves them so: what is trained afterwards would get no gradient through the layer.
        """
        for layer in model.modules():
            if cls.accepts(layer) and hasattr(layer, "support_avx512bf16_for_cpu"):
                cast("Any", layer).support_avx512bf16_for_cpu = False
                layer.state_dict()  # whose making puts packed codes back

    def merged_weight(self) -> nn.Parameter:
        """Raise: the sum of codes and an update is no code."""
        message = (
            "The base is quantized, so nothing can be merged into it. Load the adapter into the "
            "base in full precision, and merge there."
        )
        raise UnsupportedMethodError(message)


KINDS: tuple[type[LoraLayer], ...] = (
    LoraLayer,
    Conv1DLoraLayer,
    EmbeddingLoraLayer,
    ConvLoraLayer,
    QuantisedLoraLayer,
)

"""LoRA on layers other than ``nn.Linear``: GPT-2's Conv1D, embeddings, convolutions, QLoRA's bases.

Each kind is a `LoraLayer` that accepts other layers, stores W differently or updates h differently;
`LAYER_KINDS` lists them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_analysis.errors import UnsupportedMethodError
from lora_analysis.lora.core import LoraFactors, LoraLayer, module_generator

if TYPE_CHECKING:
    from lora_analysis.adapter import Layout

_QUANTIZED = ("Linear4bit", "Linear8bitLt", "LinearNF4", "LinearFP4")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _TransposedLoraLayer(LoraLayer):
    """A layer that stores W as ``(d_in, d_out)``."""

    @staticmethod
    def to_matrix(W: Tensor) -> Tensor:
        """Transpose."""
        return W.T

    @staticmethod
    def from_matrix(matrix: Tensor, W: Tensor) -> Tensor:  # noqa: ARG004
        """Transpose."""
        return matrix.T


class Conv1DLoraLayer(_TransposedLoraLayer):
    """LoRA on the ``Conv1D`` of GPT-2, a linear layer that stores W as ``(d_in, d_out)``."""

    layout: ClassVar[Layout] = "conv1d"

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Return True if the layer has ``nf`` output features, the second axis of its weight."""
        weight = layer._parameters.get("weight")
        return (
            not isinstance(layer, nn.Linear)
            and weight is not None
            and weight.ndim == 2
            and weight.is_floating_point()
            and getattr(layer, "nf", None) == weight.shape[1]
        )


class EmbeddingLoraLayer(_TransposedLoraLayer):
    """An embedding with low-rank adapters: the row of entry t becomes ``W[t] + s·B·A[:, t]``.

    A ``(r, entries)`` starts at zero and B ``(features, r)`` normal, as in PEFT. There is no
    dropout. If the base scales the rows that it returns (Gemma), the update is scaled too.
    """

    layout: ClassVar[Layout] = "embedding"

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Return True if the layer is an embedding whose table does not change when it is read."""
        plain = layer._parameters.get("weight") is not None
        return isinstance(layer, nn.Embedding) and plain and layer.max_norm is None

    @classmethod
    def initial_factors(
        cls, shape: tuple[int, int], name: str, r: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Return A of zeros and a normal B."""
        d_out, d_in = shape
        B = torch.empty(d_out, r).normal_(generator=module_generator(name, r, seed))
        return torch.zeros(r, d_in), B

    def update(self, x: Tensor, factors: LoraFactors) -> Tensor:
        """Return ``s·B·A[:, x]``, features last; the padding entry gets no gradient."""
        base = cast("nn.Embedding", self.base_layer)
        down = functional.embedding(x, factors.A.T, base.padding_idx)  # (…, r)
        update = functional.linear(down * factors.scale, factors.B)  # (…, d_out)
        scale = getattr(base, "embed_scale", None)
        return update if scale is None else update * scale


class ConvLoraLayer(LoraLayer):
    """A convolution with low-rank adapters: one with r channels and its kernel, then one of size 1.

    A is stored flattened, ``(r, channels in · kernel)``, B ``(channels out, r)``: ΔW is their
    product in the kernels' shape. Grouped convolutions are not supported.
    """

    layout: ClassVar[Layout] = "conv"

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Return True if the layer is a convolution over all channels with a plain kernel."""
        plain = layer._parameters.get("weight") is not None
        return isinstance(layer, _CONVOLUTIONS) and plain and layer.groups == 1

    @staticmethod
    def to_matrix(W: Tensor) -> Tensor:
        """Flatten the kernels."""
        return W.flatten(1)

    @staticmethod
    def from_matrix(matrix: Tensor, W: Tensor) -> Tensor:
        """Reshape the rows to the kernels' shape."""
        return matrix.reshape(W.shape)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return tuple(cast("Tensor", self.base_layer.weight).shape[2:])

    def update(self, x: Tensor, factors: LoraFactors) -> Tensor:
        """Return the convolution with A at the base's stride and padding, multiplied by B."""
        base = cast("Any", self.base_layer)
        kernels = factors.A.view(len(factors.A), -1, *self.kernel)
        down = base._conv_forward(self.factor_input(x, factors), kernels, None)  # (n, r, …)
        channels = -1 - len(self.kernel)
        up = torch.tensordot(factors.B, down * factors.scale, dims=([1], [channels]))
        result: Tensor = up.movedim(0, channels)
        return result


class QuantizedLoraLayer(LoraLayer):
    """A linear layer whose frozen weight bitsandbytes stores in 4 or 8 bits (QLoRA).

    The base decodes its weight in its forward pass (Dettmers et al., arXiv 2305.14314, section 3);
    the factors are float32 as elsewhere. Merging is not possible: the sum would be quantized again.
    """

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Return True if the layer is one of bitsandbytes', by name: nothing is imported."""
        kind = type(layer)
        return kind.__name__ in _QUANTIZED and kind.__module__.startswith("bitsandbytes.")

    @classmethod
    def shape(cls, layer: nn.Module) -> tuple[int, int]:
        """Return ``(d_out, d_in)``, which the shape of the stored codes does not show."""
        return int(cast("Any", layer).out_features), int(cast("Any", layer).in_features)

    def merged_parameters(self) -> dict[str, nn.Parameter]:
        """Raise: the sum of codes and an update is not a code."""
        message = (
            "The base is quantized, so nothing can be merged into it. Load the adapter into the "
            "base in full precision, and merge there."
        )
        raise UnsupportedMethodError(message)


def keep_gradients(model: nn.Module) -> None:
    """Prevent bitsandbytes from packing the model's 4-bit layers, which stops gradients.

    On a CPU with AVX-512 BF16 the evaluation mode packs the codes for an inference kernel, and
    they stay packed: layers trained afterwards would get no gradient through them.
    """
    for layer in model.modules():
        if QuantizedLoraLayer.accepts(layer) and hasattr(layer, "support_avx512bf16_for_cpu"):
            cast("Any", layer).support_avx512bf16_for_cpu = False
            layer.state_dict()  # unpacks codes that are packed already


LAYER_KINDS: Final[tuple[type[LoraLayer], ...]] = (
    LoraLayer,
    Conv1DLoraLayer,
    EmbeddingLoraLayer,
    ConvLoraLayer,
    QuantizedLoraLayer,
)

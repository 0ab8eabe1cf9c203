"""Kinds of layers that LoRA adapts, and which modules of a model it adapts.

Besides ``nn.Linear``, these are GPT-2's Conv1D, embeddings, convolutions and QLoRA's bases. Each
kind is a `LoraLayer` that accepts other layers, stores W differently or updates h differently;
`LAYER_KINDS` lists them all. Modules are targeted by the names they have in the base model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_analysis.errors import TargetError, UnsupportedMethodError
from lora_analysis.lora.core import (
    AdaptedModule,
    LoraFactors,
    LoraLayer,
    base_modules,
    module_generator,
)
from lora_analysis.patterns import (
    NO_TYPE,
    matches_target,
    module_type,
    natural_key,
    near_names,
    pattern_budget,
)

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
        """Return s·B·conv(x, A) with the base layer's stride and padding."""
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


def trained_modules(modules: Mapping[str, nn.Module], trainable: Collection[str]) -> list[str]:
    """Return the modules whose names end in an entry of ``trainable``, the outermost ones.

    PEFT's rule for ``modules_to_save``: the end of the name, not of a segment.
    """
    names: list[str] = []
    for entry in trainable:
        matches = [
            name
            for name, module in modules.items()
            if entry and name.endswith(entry) and next(module.parameters(), None) is not None
        ]
        if not matches:
            message = f"No module to train ends in {entry!r}. {_hint(entry, modules)}"
            raise TargetError(message)
        names += matches
    outermost = sorted({name for name in names if not is_inside(name, names)}, key=natural_key)
    for name in outermost:
        if twin := _other_name(name, modules):
            message = f"Cannot train '{name}' alone: it is the same module as '{twin}'."
            raise TargetError(message)
    return outermost


def target_modules(
    modules: Mapping[str, nn.Module], targets: str | Sequence[str], trained: Collection[str]
) -> dict[str, type[LoraLayer]]:
    """Return the targeted modules in natural order, each with its kind of LoRA layer.

    Modules trained in full, and modules inside them, are not targets.
    """
    names = [n for n in modules if n and n not in trained and not is_inside(n, trained)]
    if not targets:
        message = f"No targets were given. {_hint('', modules)}"
        raise TargetError(message)
    targeted: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        rule = targets if isinstance(targets, str) else [target]
        with pattern_budget():
            matches = {name for name in names if matches_target(name, rule)}
        if not matches:
            message = f"No module is named by the target {target!r}. {_hint(target, modules)} " + (
                "A string is a regular expression for the whole name; pass a list for endings."
                if isinstance(targets, str)
                else "An entry is a module's name, or its last segments."
            )
            raise TargetError(message)
        targeted |= matches
    return {name: kind_of(name, modules) for name in sorted(targeted, key=natural_key)}


def linear_layers_of_blocks(model: nn.Module, trainable: Collection[str]) -> list[str]:
    """Return every linear layer inside a repeated block, MLP included, in natural order.

    A block is a member of a list of modules, which excludes embeddings and heads. Layers inside
    a module to be ``trainable`` in full are excluded too.

    Raises
    ------
    TargetError
        The model has none.
    """
    modules = base_modules(model)
    trained = trained_modules(modules, trainable)
    names = [
        name
        for name, module in modules.items()
        if _kind(module) in (LoraLayer, Conv1DLoraLayer, QuantizedLoraLayer)
        and any(segment.isdecimal() for segment in name.split("."))
        and name not in trained
        and not is_inside(name, trained)
        and not _obstacle(name, modules)
    ]
    if not names:
        message = f"The model has no linear layer inside of a block. {_hint('', modules)}"
        raise TargetError(message)
    return sorted(names, key=natural_key)


def kind_of(name: str, modules: Mapping[str, nn.Module]) -> type[LoraLayer]:
    """Return the kind of LoRA layer that fits the module; raise TargetError if there is none."""
    if name not in modules:
        message = f"The model has no module '{name}'. {_hint(name, modules)}"
        raise TargetError(message)
    kind = _kind(modules[name])
    reason = _obstacle(name, modules)
    if kind is None or reason:
        message = f"Cannot adapt '{name}': {reason}. {_hint(name, modules)}"
        raise TargetError(message)
    return kind


def is_inside(name: str, owners: Collection[str]) -> bool:
    """Return True if the module is inside one of the owners."""
    return any(name.startswith(f"{owner}.") for owner in owners)


def _obstacle(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the reason why a LoRA layer would not fit, or never be called; None without one."""
    layer, parent = modules[name], modules[name.rpartition(".")[0]]
    if isinstance(layer, nn.MultiheadAttention):
        return (
            "MultiheadAttention keeps q, k and v in one parameter and calls no layer for them; "
            "use an attention with a Linear for each"
        )
    if getattr(layer, "groups", 1) != 1:
        return f"a {type(layer).__name__} in {layer.groups} groups has no matrix to factor"
    if _kind(layer) is None:
        return (
            f"a {type(layer).__name__} is not a Linear, Conv1D, Embedding or convolution with a "
            "plain weight"
        )
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads its weight and never calls it, so LoRA would do nothing"
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "TransformerEncoderLayer's fast path reads its weight and does not call it; turn that "
            "off with torch.backends.mha.set_fastpath_enabled(False)"
        )
    if twin := _other_name(name, modules):
        return f"it is the same module as '{twin}', and both names would have to change"
    return None


def _kind(layer: nn.Module) -> type[LoraLayer] | None:
    if isinstance(layer, AdaptedModule):
        return type(layer) if isinstance(layer, LoraLayer) else None
    return next((kind for kind in LAYER_KINDS if kind.accepts(layer)), None)


def _other_name(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return another name of the same module."""
    return next((n for n, other in modules.items() if other is modules[name] and n != name), None)


def _hint(target: str, modules: Mapping[str, nn.Module]) -> str:
    """Return a sentence with near names, or without any the endings that can be adapted."""
    near = [name for name in near_names(target, modules) if name != target]
    if near:
        return f"Near names: {', '.join(near)}."
    types = {name: module_type(name) for name in modules if not _obstacle(name, modules)}
    endings = dict.fromkeys(name if kind == NO_TYPE else kind for name, kind in types.items())
    return f"Modules that can be adapted end in: {', '.join(list(endings)[:8]) or 'none found'}."

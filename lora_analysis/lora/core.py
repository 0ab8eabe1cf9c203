"""Low-rank adaptation of a torch model: the whole method, on linear layers.

LoRA (Hu et al., arXiv 2106.09685) freezes a pretrained weight W and trains a low-rank update of it
(section 4.1, equation 3)::

    h = Wx + ΔW x = Wx + s·B(Ax)        A (r, d_in), B (d_out, r), W (d_out, d_in), s = α/r

- **Initialization** (section 4.1): A is random and B zero, so ΔW = s·BA is zero and training
  starts at the pretrained model. The distribution of A is that of the authors' code (loralib),
  uniform; the paper's text has a Gaussian.
- **Scale** (section 4.1): s = α/r; rsLoRA (Kalajdzievski, arXiv 2312.03732) has s = α/√r.
- **Training** (section 4.2): only A and B take gradients and optimizer states, ``r·(d_in + d_out)``
  numbers per weight in place of ``d_in·d_out``.
- **Merging** (section 4.1, "No additional inference latency"): W + s·BA replaces W. The paper
  recovers W by subtraction; here the original tensors are put back, bit for bit.
- **Several adapters** (same paragraph): tasks are switched by exchanging A and B; here each
  adapter has a name, and at most one is active.

A model is adapted in place: every adapted module is replaced by a wrapper, an `AdaptedModule`,
that holds the frozen module and its factors by adapter name. Which modules get factors is decided
in `layer_kinds`, with the layers that are not ``nn.Linear``; `composite_weights` has factors of the
parts of a weight, and `new_adapter` builds an adapter from the user's settings.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_analysis.errors import IncompatibleError, InputError, TargetError

if TYPE_CHECKING:
    from lora_analysis.adapter import Layout


def initial_factor(module_name: str, rank: int, seed: int, d_in: int) -> Tensor:
    """Return the A from which training starts, shape ``(rank, d_in)``, float32, on the CPU.

    Uniform within ±1/√d_in (Kaiming-uniform with a = √5, as loralib and PEFT). Each module and
    rank draws from its own generator, seeded by a hash of (module name, rank, seed): with
    one generator for all, rank 8 and rank 64 would share their first rows under the same seed,
    and their overlap would be 1 before any training. The global generator is not used.
    """
    generator = module_generator(module_name, rank, seed)
    return nn.init.kaiming_uniform_(torch.empty(rank, d_in), a=math.sqrt(5), generator=generator)


def module_generator(module_name: str, rank: int, seed: int) -> torch.Generator:
    """Return the random generator of one module's initial factors."""
    digest = hashlib.blake2b(f"{module_name}\n{rank}\n{seed}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class LoraFactors(nn.Module):
    """A ``(r, d_in)``, B ``(d_out, r)`` and scale s of one adapter on one layer.

    ``config`` is shared by all factors of the adapter: its settings, in PEFT's words.
    ``dropout`` is the probability with which an input is hidden from the factors in training.
    """

    A: nn.Parameter
    B: nn.Parameter

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        *,
        scale: float,
        alpha: float | None,
        seed: int | None = None,
        dropout: float = 0.0,
        config: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = scale
        self.alpha = alpha
        self.seed = seed
        self.dropout = dropout
        self.config = config

    def extra_repr(self) -> str:
        """Return rank and scale, for ``print(model)``."""
        return f"rank={len(self.A)}, scale={self.scale:g}"


class AdaptedModule(nn.Module):
    """A frozen module at ``base_layer`` and, by adapter name, what is trained in its place."""

    base_layer: nn.Module
    adapters: nn.ModuleDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.train(base_layer.training)

    @property
    def merged_module(self) -> nn.Module:
        """The module that replaces this one once adapters are merged, of the base's type."""
        return self.base_layer

    def merged_parameters(self) -> dict[str, nn.Parameter]:
        """Return the base layer's parameters that merging replaces, with the update added."""
        return {}

    def __getattr__(self, name: str) -> Any:
        # Models ask their layers for more than a forward: `self.wo.weight.dtype`, `.in_features`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "base_layer" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.merged_module, name)


class LoraLayer(AdaptedModule):
    """A linear layer with low-rank adapters: ``h = Wx + s·B(Ax)``.

    W ``(d_out, d_in)`` is frozen at ``base_layer`` with its bias; the update of the adapter named
    ``active`` is added, if there is one. x ``(…, d_in)``, h ``(…, d_out)``.
    A and B are float32 also on a base in half precision (float64 on float64): x is cast to their
    type, h back to the type of Wx. Except for dropout, training and evaluation mode compute the
    same.

    Another kind of layer is a subclass: which layers it accepts, how they store W and, if x is not
    a vector that A multiplies (an embedding, a convolution), how the update of h is computed.

    Raises
    ------
    IncompatibleError
        From :meth:`make_factors`: A or B does not fit the layer.
    """

    layout: ClassVar[Layout] = "linear"

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Return True if the layer is of this kind and has a plain matrix to merge into."""
        weight = layer._parameters.get("weight")
        return (
            isinstance(layer, nn.Linear)
            and weight is not None
            and weight.is_floating_point()
            and weight.shape == (layer.out_features, layer.in_features)
        )

    @staticmethod
    def to_matrix(W: Tensor) -> Tensor:
        """Return a weight as stored by the layer as a matrix ``(d_out, d_in)``."""
        return W

    @staticmethod
    def from_matrix(matrix: Tensor, W: Tensor) -> Tensor:  # noqa: ARG004 - a kernel's shape
        """Return a matrix ``(d_out, d_in)`` in the shape in which the layer stores W."""
        return matrix

    @classmethod
    def shape(cls, layer: nn.Module) -> tuple[int, int]:
        """Return ``(d_out, d_in)``."""
        d_out, d_in = cls.to_matrix(cast("Tensor", layer.weight)).shape
        return d_out, d_in

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape of a convolution's kernel, empty for other layers."""
        return ()

    @classmethod
    def initial_factors(
        cls, shape: tuple[int, int], name: str, r: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Return the A and B from which training starts; their product is zero."""
        d_out, d_in = shape
        return initial_factor(name, r, seed, d_in), torch.zeros(d_out, r)

    @classmethod
    def make_factors(
        cls,
        layer: nn.Module,
        A: Tensor,
        B: Tensor,
        name: str,
        *,
        factors_type: type[LoraFactors] = LoraFactors,
        **fields: Any,
    ) -> LoraFactors:
        """Return factors for the layer called ``name``, on its device and in their type."""
        W = cast("Tensor", layer.weight)
        if (B.shape[0], A.shape[1]) != cls.shape(layer):
            message = (
                f"'{name}' is a layer of shape (d_out, d_in) = {cls.shape(layer)}, but A is "
                f"{tuple(A.shape)} and B {tuple(B.shape)}. Was the adapter made for another base?"
            )
            raise IncompatibleError(message)
        dtype = factor_dtype(W)
        return factors_type(A.to(W.device, dtype), B.to(W.device, dtype), **fields)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return h."""
        h = cast("Tensor", self.base_layer(x, *args, **kwargs))
        if self.active is None:
            return h
        return (h + self.update(x, cast("LoraFactors", self.adapters[self.active]))).to(h.dtype)

    def update(self, x: Tensor, factors: LoraFactors) -> Tensor:
        """Return ``s·B(Ax)``; s multiplies Ax, which has the fewest features."""
        down = functional.linear(self.factor_input(x, factors), factors.A)  # (…, r)
        return functional.linear(down * factors.scale, factors.B)  # (…, d_out)

    def factor_input(self, x: Tensor, factors: LoraFactors) -> Tensor:
        """Return x in the type of A, after the adapter's dropout."""
        return functional.dropout(x.to(factors.A.dtype), factors.dropout, self.training)

    @torch.no_grad()
    def merged_parameters(self) -> dict[str, nn.Parameter]:
        """Return W + s·BA of the active adapter as the layer stores it; W itself without one.

        The sum is computed in the factors' precision, and rounded once to that of W.
        """
        W = cast("nn.Parameter", self.base_layer.weight)
        if self.active is None:
            return {"weight": W}
        factors = cast("LoraFactors", self.adapters[self.active])
        delta = self.from_matrix(factors.scale * (factors.B @ factors.A), W)
        merged = (W.to(delta.dtype) + delta).to(W.dtype)
        return {"weight": nn.Parameter(merged, requires_grad=False)}


def factor_dtype(W: Tensor) -> torch.dtype:
    """Return the type of the factors of a weight: at least float32."""
    return torch.float64 if W.dtype == torch.float64 else torch.float32


class TrainedModule(AdaptedModule):
    """A module trained in full, for example a classification head: each adapter has a copy."""

    @property
    def merged_module(self) -> nn.Module:
        """The active adapter's copy, or the base model's module."""
        return self.base_layer if self.active is None else self.adapters[self.active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward through the active adapter's copy."""
        return self.merged_module(*args, **kwargs)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by its name in the base model, the model itself as ``""``.

    An adapted module stands for its base layer; the modules inside it are not listed.
    """

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for leaf, child in module._modules.items():
            if child is not None:
                yield prefix + leaf, child
                if not isinstance(child, AdaptedModule):
                    yield from walk(child, f"{prefix}{leaf}.")

    return {"": model, **dict(walk(model, ""))}


def adapted_modules(model: nn.Module) -> dict[str, AdaptedModule]:
    """Return the adapted modules by their name in the base model."""
    modules = base_modules(model)
    return {name: layer for name, layer in modules.items() if isinstance(layer, AdaptedModule)}


def unwrap(module: nn.Module) -> Any:
    """Return the module of the base model that an adapted one replaced, or the module itself."""
    return module.base_layer if isinstance(module, AdaptedModule) else module


# The class that wraps a module, and what it trains: factors, or a copy of the module.
Adapted = tuple[type[AdaptedModule], nn.Module]


def add_adapter(model: nn.Module, name: str, adapted: Mapping[str, Adapted]) -> None:
    """Add a named adapter to a model, in place, active and the only one to train.

    Parameters
    ----------
    adapted
        By module name in the base model, the class that wraps the module, and what it trains.

    Raises
    ------
    TargetError
        A module to be trained in full has LoRA factors of another adapter.
    InputError
        The name is taken, or torch does not allow it.
    """
    modules = base_modules(model)
    for module, (wrapper_type, _) in adapted.items():
        is_lora = isinstance(modules[module], AdaptedModule) and not isinstance(
            modules[module], TrainedModule
        )
        if wrapper_type is TrainedModule and is_lora:
            message = (
                f"'{module}' has LoRA factors of another adapter; it cannot be trained in full."
            )
            raise TargetError(message)
    if any(name in wrapper.adapters for wrapper in adapted_modules(model).values()):
        message = f"The model has an adapter '{name}' already; give the new one another name."
        raise InputError(message)
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        message = f"An adapter cannot be called {name!r}: torch allows no dot and no method's name."
        raise InputError(message)
    model.requires_grad_(False)
    for module, (wrapper_type, trained) in adapted.items():
        wrapper = modules[module]
        if not isinstance(wrapper, AdaptedModule):
            wrapper = wrapper_type(wrapper)
            model.set_submodule(module, wrapper)
        wrapper.adapters[name] = trained.requires_grad_(True)
    set_active(model, name)


def set_active(model: nn.Module, name: str | None) -> None:
    """Activate one adapter by name, or with None the base model alone; nothing else changes.

    Modules trained in full are switched with their adapter. Which parameters take gradients does
    not change: those of the adapter added last.

    Raises
    ------
    InputError
        The model has no adapter of this name, or no LoRA layers at all.
    """
    wrappers = adapted_modules(model).values()
    names = dict.fromkeys(key for wrapper in wrappers for key in wrapper.adapters)
    if name not in (None, *names) or not wrappers:
        message = (
            f"The model has no adapter {name!r}; it has {', '.join(map(repr, names)) or 'none'}. "
            "Add one with add_lora, or unmerge the one that is merged."
        )
        raise InputError(message)
    for wrapper in wrappers:
        wrapper.active = name if name and name in wrapper.adapters else None


@dataclass(frozen=True, slots=True, eq=False)
class MergeHandle:
    """The original weights, which :func:`unmerge_lora` puts back, and the types of the merge."""

    model: nn.Module
    layers: Mapping[str, AdaptedModule]
    weights: Mapping[str, Mapping[str, nn.Parameter]]
    dtypes: Mapping[str, torch.dtype]


def merge_lora(model: nn.Module) -> MergeHandle:
    """Add the active adapter to the frozen weights and remove the LoRA layers, in place.

    The model then has the modules, the parameter names and the forward cost of its base. Only
    this call merges: ``eval()`` and ``train()`` change nothing. The handle keeps the original W,
    which unmerging puts back bit for bit: until the handle is deleted, the adapted weights
    take twice their memory. A weight tied to another is merged alone, the other does not change.

    Raises
    ------
    InputError
        The model has no LoRA layers: none were added, or it is merged already.
    """
    layers = adapted_modules(model)
    if not layers:
        message = "The model has no LoRA layers: none were added, or they are merged already."
        raise InputError(message)
    merged = {name: layer.merged_parameters() for name, layer in layers.items()}
    weights = {
        name: _replace_parameters(layers[name].base_layer, values, merged=True)
        for name, values in merged.items()
        if values
    }
    for name, layer in layers.items():
        model.set_submodule(name, layer.merged_module)
    dtypes = {name: _first_parameter(layer.merged_module).dtype for name, layer in layers.items()}
    return MergeHandle(model, layers, weights, dtypes)


def unmerge_lora(handle: MergeHandle) -> None:
    """Put the LoRA layers and the original weights, the same tensors, back into the model.

    Raises
    ------
    InputError
        The model is unmerged already, its layers were replaced since, or it was converted to
        another type: the tensors put back would not have it.
    """
    modules = base_modules(handle.model)
    layers = handle.layers
    changed = [name for name in layers if modules.get(name) is not layers[name].merged_module]
    if changed:
        message = (
            f"'{changed[0]}' (of {len(changed)} modules) is not the layer that was merged. "
            "Is the model unmerged already, or was an adapter added to the merged one?"
        )
        raise InputError(message)
    for name, layer in layers.items():
        dtypes = _first_parameter(layer.merged_module).dtype, handle.dtypes[name]
        now, merged = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        if now != merged:
            message = (
                f"'{name}' is {now} now and was merged as {merged}, the type of what unmerging "
                f"puts back. Convert the model to {merged} first (what was rounded in between "
                "stays rounded), or unmerge before converting it."
            )
            raise InputError(message)
    for name, layer in layers.items():
        device = _first_parameter(layer.merged_module).device
        if name in handle.weights:
            _replace_parameters(layer.base_layer, handle.weights[name], merged=False)
        handle.model.set_submodule(name, layer.train(layer.merged_module.training).to(device))


def _replace_parameters(
    layer: Any, values: Mapping[str, nn.Parameter], *, merged: bool
) -> dict[str, nn.Parameter]:
    """Replace parameters of a layer, mark it as merged or not, and return the old ones."""
    old = {name: getattr(layer, name) for name in values}
    for name, value in values.items():
        setattr(layer, name, value)
    layer.merged = merged
    return old


def _first_parameter(module: nn.Module) -> nn.Parameter:
    """Return a module's first parameter, whose type and device stand for the module's."""
    return next(module.parameters())


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and value of every parameter that takes gradients."""
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return the number of trained values, and that of the base model without adapters."""
    adapters = (layer.adapters for layer in adapted_modules(model).values())
    added = {id(value) for adapter in adapters for value in adapter.parameters()}
    base = sum(value.numel() for value in model.parameters() if id(value) not in added)
    return sum(value.numel() for _, value in trainable_parameters(model)), base

"""The adapted layer: a frozen one and trainable factors beside it, ``h = Wx + s·B(Ax)``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_analysis.errors import IncompatibleError

if TYPE_CHECKING:
    from lora_analysis.adapter import Layout


def initial_factor(module_name: str, rank: int, seed: int, d_in: int) -> Tensor:
    """Return the A from which training starts, shape ``(rank, d_in)``, float32, on the CPU.

    Uniform within ±1/√d_in (Kaiming-uniform with a = √5, as loralib and PEFT). Each module and
    rank draws from a generator of its own, seeded by a hash of (module name, rank, seed): with
    one generator for all, rank 8 and rank 64 would share their first rows under the same seed,
    and their overlap would be 1 before any training. The global generator is left alone.
    """
    generator = generator_of(module_name, rank, seed)
    return nn.init.kaiming_uniform_(torch.empty(rank, d_in), a=math.sqrt(5), generator=generator)


def generator_of(module_name: str, rank: int, seed: int) -> torch.Generator:
    """Return the generator of one module's initial factors."""
    digest = hashlib.blake2b(f"{module_name}\n{rank}\n{seed}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Factors(nn.Module):
    """A ``(r, d_in)``, B ``(d_out, r)`` and multiplier of one adapter on one layer.

    ``config`` is shared by all factors of the adapter: what it was made with, in PEFT's words.
    ``dropout`` is the share of the inputs that the factors do not see at a training step.
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


class Wrapper(nn.Module):
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
    def bare(self) -> nn.Module:
        """The module of the base model's type that stands here once adapters are merged."""
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        # Models ask their layers for more than a forward: `self.wo.weight.dtype`, `.in_features`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "base_layer" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.bare, name)


class LoraLayer(Wrapper):
    """A linear layer with low-rank adapters: ``h = Wx + s·B(Ax)``.

    W ``(d_out, d_in)`` is frozen at ``base_layer`` with its bias; of the adapters, those in
    ``adapters`` by name, ``active`` is added, or none. x ``(…, d_in)``, h ``(…, d_out)``.
    A and B are float32 also on a base in half precision (float64 on float64): x is cast to their
    type, h back to the type of Wx. But for dropout, training and evaluation mode compute the same.

    A kind of layer is a subclass: which layers it accepts, how their weight lies, and where x does
    not meet A as a vector (an embedding, a convolution) what the update of the output is.

    Raises
    ------
    IncompatibleError
        From :meth:`factors`: A or B does not fit the layer.
    """

    layout: ClassVar[Layout] = "linear"

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Return whether the layer is of this kind and owns a plain matrix to merge into."""
        weight = layer._parameters.get("weight")
        return (
            isinstance(layer, nn.Linear)
            and weight is not None
            and weight.is_floating_point()
            and weight.shape == (layer.out_features, layer.in_features)
        )

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """Return a stored weight as ``(d_out, d_in)``."""
        return weight

    @staticmethod
    def stored(matrix: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG004 - a kernel's shape
        """Return a matrix ``(d_out, d_in)`` in the shape in which the layer stores ``weight``."""
        return matrix

    @classmethod
    def shape(cls, layer: nn.Module) -> tuple[int, int]:
        """Return ``(d_out, d_in)``."""
        d_out, d_in = cls.matrix(cast("Tensor", layer.weight)).shape
        return d_out, d_in

    @classmethod
    def start(cls, layer: nn.Module, name: str, rank: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the A and B from which training starts; their product is zero."""
        d_out, d_in = cls.shape(layer)
        return initial_factor(name, rank, seed, d_in), torch.zeros(d_out, rank)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The shape of a convolution's kernel, none for other layers."""
        return ()

    @classmethod
    def factors(cls, layer: nn.Module, A: Tensor, B: Tensor, name: str, **kept: Any) -> Factors:
        """Return ``Factors`` for the layer called ``name``, on its device and in their type."""
        weight = cast("Tensor", layer.weight)
        if (B.shape[0], A.shape[1]) != cls.shape(layer):
            message = (
                f"'{name}' is a layer of shape (d_out, d_in) = {cls.shape(layer)}, but A is "
                f"{tuple(A.shape)} and B {tuple(B.shape)}. Was the adapter made for another base?"
            )
            raise IncompatibleError(message)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if "parts" in kept:
            from lora_analysis.lora.parts import PartFactors  # which is made of what is here

            return PartFactors(A.to(weight.device, dtype), B.to(weight.device, dtype), **kept)
        return Factors(A.to(weight.device, dtype), B.to(weight.device, dtype), **kept)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return h."""
        h = cast("Tensor", self.base_layer(x, *args, **kwargs))
        if self.active is None:
            return h
        return (h + self.update(x, cast("Factors", self.adapters[self.active]))).to(h.dtype)

    def update(self, x: Tensor, factors: Factors) -> Tensor:
        """Return ``s·B(Ax)``; s multiplies the r features in the middle, which are the fewest."""
        x = x.to(factors.A.dtype)
        if factors.dropout:
            x = functional.dropout(x, factors.dropout, self.training)
        down = functional.linear(x, factors.A)  # (…, r)
        return functional.linear(down * factors.scale, factors.B)  # (…, d_out)

    @torch.no_grad()
    def merged_weight(self) -> nn.Parameter:
        """Return W with the active adapter's ``s·BA`` added, as the layer stores it; W itself else.

        The sum is taken in the factors' precision, and rounded once to that of W.
        """
        weight = cast("nn.Parameter", self.base_layer.weight)
        if self.active is None:
            return weight
        factors = cast("Factors", self.adapters[self.active])
        delta = self.stored(factors.scale * (factors.B @ factors.A), weight)
        return nn.Parameter((weight.to(delta.dtype) + delta).to(weight.dtype), requires_grad=False)

    def merged_parameters(self) -> dict[str, nn.Parameter]:
        """Return what merging puts into the layer, by name."""
        return {"weight": self.merged_weight()}


class Conv1DLoraLayer(LoraLayer):
    """The same on the ``Conv1D`` of GPT-2, a linear layer that stores W as ``(d_in, d_out)``."""

    layout: ClassVar[Layout] = "conv1d"

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Return whether the layer says so: ``nf`` output features, the second axis of W."""
        weight = layer._parameters.get("weight")
        return (
            not isinstance(layer, nn.Linear)
            and weight is not None
            and weight.ndim == 2
            and weight.is_floating_point()
            and getattr(layer, "nf", None) == weight.shape[1]
        )

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """Transpose."""
        return weight.T

    @staticmethod
    def stored(matrix: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG004
        """Transpose."""
        return matrix.T


class TrainedModule(Wrapper):
    """A module trained in full, a classification head say: per adapter a copy of its own."""

    @property
    def bare(self) -> nn.Module:
        """The active adapter's copy, or the base model's own module."""
        return self.base_layer if self.active is None else self.adapters[self.active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module in charge."""
        return self.bare(*args, **kwargs)

"""Methods that subtract their initial product from the base weight: ΔW is the difference.

PiSSA, OLoRA, CorDA and LoRA-GA start from ``W - s·B₀A₀`` and train B and A from B₀ and A₀, so
that ``ΔW = s·(B·A - B₀·A₀)``, a product of rank 2r: ``[B, -B₀]·[A; A₀]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.errors import MalformedFileError
from lora_analysis.finding import Finding
from lora_analysis.formats.options import Factors, InitialFactorsRequest, InitialFactorsSource
from lora_analysis.storage.source_names import addresses_in_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_analysis.adapter import Update
    from lora_analysis.formats.factors import StoredPair
    from lora_analysis.storage.source_names import Snapshot
    from lora_analysis.storage.tensors import NamedTensors


# Methods whose initial factors are directions of W.
_FROM_WEIGHT: Final = ("pissa", "olora", "corda")


def subtract_init_offset(
    load: Callable[[], LowRankUpdate], initial: InitialFactorsSource, method: str
) -> LowRankUpdate:
    """Subtract the initial product: s(BA − B₀A₀), represented with rank 2r."""
    update = load()
    a0, b0 = initial(InitialFactorsRequest(method, update))
    return replace(
        update,
        A=np.vstack([update.A, a0]),
        B=np.hstack([update.B, -b0]),
        alpha=None,  # alpha/2r is not the scale
    )


def offset_finding(method: str) -> Finding:
    """Return the finding on updates whose initial product is subtracted."""
    from_weight = method.lower().startswith(_FROM_WEIGHT)
    return Finding("init-offset-in-weight" if from_weight else "init-offset", {"method": method})


@dataclass(frozen=True, slots=True)
class StoredInitialFactors:
    """The factors of an adapter saved before training, read one module at a time."""

    tensors: NamedTensors
    pairs: Mapping[str, StoredPair]
    snapshot: Snapshot | None = None

    def __call__(self, request: InitialFactorsRequest) -> Factors:
        """Return A₀ and B₀ of one module."""
        pair = self.pairs[request.update.name]
        with addresses_in_errors(self.snapshot):
            return pair.a.read(self.tensors), pair.b.read(self.tensors)


@dataclass(frozen=True, slots=True)
class AdapterInitialFactors:
    """The factors of an adapter that was read in its state before training."""

    adapter: Adapter

    def __call__(self, request: InitialFactorsRequest) -> Factors:
        """Return A₀ and B₀ of one module; raise if they do not fit the trained ones."""
        name, update = request.update.name, request.update
        initial = self.adapter.get(name)
        expected = (update.rank, update.shape)
        if not isinstance(initial, LowRankUpdate) or (initial.rank, initial.shape) != expected:
            actual = "none"
            if initial is not None:
                actual = f"rank {initial.rank} and shape {initial.shape}"
            message = (
                f"{self.adapter.provenance.location}: the initial factors of '{name}' must have "
                f"rank {update.rank} and shape {update.shape}, found {actual}. Are they "
                "from the same run?"
            )
            raise MalformedFileError(message)
        return initial.A, initial.B


def subtract_init_offsets(
    adapter: Adapter, initial: InitialFactorsSource, methods: Mapping[str, str]
) -> Adapter:
    """Return an adapter with the initial products of the modules in ``methods`` subtracted.

    ``methods`` gives the config's ``init_lora_weights`` of each such module, in lower case.
    """
    loaders: dict[str, Callable[[], Update]] = {}
    for name in adapter:
        load: Callable[[], Update] = partial(adapter.__getitem__, name)
        if (method := methods.get(name)) is not None:
            load = partial(subtract_init_offset, load, initial, method)  # type: ignore[arg-type]
        loaders[name] = load
    offset = offset_finding(next(iter(methods.values()), "training"))
    source = adapter.provenance
    return Adapter(
        loaders,
        label=adapter.label,
        provenance=replace(source, rank=None, findings=(*source.findings, offset)),
        saved_modules=adapter.saved_modules,
        config=adapter.config,
        side_tensors=adapter.side_tensors,
    )


def check_initial_factors(
    path: object, tensors: NamedTensors, pairs: list[StoredPair], initial: StoredInitialFactors
) -> None:
    """Raise if the initial factors are not those of the trained modules, by their shapes.

    A file that PEFT converted holds both already, and has twice the rank.
    """
    for pair in pairs:
        if pair.module not in initial.pairs:
            message = f"{initial.tensors.path}: it holds no initial factors of '{pair.module}'."
            raise MalformedFileError(message)
        factors = (pair.a.shape(tensors), pair.b.shape(tensors))
        before = initial.pairs[pair.module]
        shapes = (before.a.shape(initial.tensors), before.b.shape(initial.tensors))
        if factors != shapes:
            message = (
                f"{path}: '{pair.module}' has factors {factors[0]} and {factors[1]}, the initial "
                f"ones in {initial.tensors.path} are {shapes[0]} and {shapes[1]}. They must be "
                "from the same run; a file with twice the rank was converted, and its product is "
                "the update."
            )
            raise MalformedFileError(message)

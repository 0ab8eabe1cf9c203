"""How adapters are read, as options of a command, and what becomes of those that cannot be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from lora_analysis.cli.options import Command
from lora_analysis.errors import InputError, SourceError
from lora_analysis.progress import Progress
from lora_analysis.text import printable

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter
    from lora_analysis.bases import BaseWeights
    from lora_analysis.formats import AdapterRef
    from lora_analysis.formats.initial import InitialFactorsSource
    from lora_analysis.formats.sources import ExpertOrder
    from lora_analysis.studies import ReadLater


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An adapter that cannot be used, and the error that says why."""

    source: str
    error: InputError

    def __str__(self) -> str:
        reason = str(self.error)
        return reason if self.source in reason else f"{self.source}: {reason}"

    def to_dict(self) -> dict[str, str]:
        """Return source and reason, as JSON output has them."""
        return {"source": self.source, "reason": str(self.error)}


@dataclass(frozen=True, slots=True)
class Reading:
    """How adapters are read: what the caller says that a file itself may not."""

    pair: tuple[str, str] | None = None
    scale: float | None = None
    alpha: float | None = None
    allow_pickle: bool = False
    initial: str | None = None
    enable_lora: tuple[bool, ...] | None = None
    kernel: int | None = None
    heads: tuple[int, int] | None = None
    expert_order: ExpertOrder | None = None
    experts: int | None = None
    trained_on: str | None = None
    _opened: dict[str, BaseWeights] = field(default_factory=dict, repr=False, compare=False)

    def read(self, source: str | AdapterRef) -> Adapter:
        """Read the one adapter at ``source``, with the change it makes where the base is named."""
        from lora_analysis.errors import UnsupportedMethodError

        base = self.open_base(self.trained_on)
        if base is None:
            return self._read(source, self.initial)
        from lora_analysis.effective import effective_adapter, initial_factors_from_base

        try:
            adapter = self._read(source, self.initial)
        except UnsupportedMethodError:
            if self.initial is not None:
                raise
            adapter = self._read(source, initial_factors_from_base(base))
        return effective_adapter(adapter, base)

    def _read(
        self, source: str | AdapterRef, initial: str | InitialFactorsSource | None
    ) -> Adapter:
        from lora_analysis.formats import read_adapter

        return read_adapter(
            source,
            pair=self.pair,
            scale=self.scale,
            alpha=self.alpha,
            allow_pickle=self.allow_pickle,
            initial=initial,
            enable_lora=self.enable_lora,
            kernel=self.kernel,
            heads=self.heads,
            expert_order=self.expert_order,
            experts=self.experts,
        )

    def open_base(self, source: str | None) -> BaseWeights | None:
        """Open the base at ``source``, once for all adapters; None without one.

        Pickles are read where they are allowed.
        """
        from lora_analysis.bases import open_base

        if source is None:
            return None
        if source not in self._opened:
            self._opened[source] = open_base(source, allow_pickle=self.allow_pickle)
        return self._opened[source]

    def find(self, sources: Iterable[str], left_out: list[LeftOut]) -> list[AdapterRef]:
        """Return every adapter found at the sources, once; a source without one is left out."""
        from lora_analysis.formats import each_once, expanded, find_adapters

        found: list[AdapterRef] = []
        known: set[tuple[str, str | None]] = set()
        for source in sources:
            try:
                for place in expanded(source):
                    here = find_adapters(place, pair=self.pair, allow_pickle=self.allow_pickle)
                    found += each_once(here, known)
            except InputError as error:
                left_out.append(LeftOut(source, error))
        return found

    def read_each(
        self, sources: Iterable[str], left_out: list[LeftOut], progress: Progress
    ) -> Iterator[Adapter]:
        """Yield every adapter found at the sources; what cannot be read is left out."""
        found = self.find(sources, left_out)
        for done, one in enumerate(found, start=1):
            try:
                adapter = self.read(one)
            except InputError as error:
                left_out.append(LeftOut(one.source, error))
            else:
                yield adapter
            progress("adapters", done, len(found))

    def read_all(
        self, sources: Iterable[str], progress: Progress
    ) -> tuple[list[Adapter], list[LeftOut]]:
        """Return the adapters at the sources by natural order of label, and what was left out.

        Raises
        ------
        InputError
            None of them can be read.
        """
        from lora_analysis.patterns import natural_key

        left_out: list[LeftOut] = []
        adapters = list(self.read_each(sources, left_out, progress))
        say_left_out(left_out, some=bool(adapters))
        return sorted(adapters, key=lambda one: natural_key(one.label)), left_out

    def to_read(
        self, sources: Iterable[str], _progress: Progress
    ) -> tuple[list[ReadLater], list[LeftOut]]:
        """Return what `read_all` would read, for workers that read for themselves.

        Raises
        ------
        InputError
            None of the sources leads to an adapter.
        """
        from lora_analysis.patterns import natural_key
        from lora_analysis.studies import ReadLater

        left_out: list[LeftOut] = []
        found = self.find(sources, left_out)
        say_left_out(left_out, some=bool(found))
        found.sort(key=lambda ref: natural_key(ref.label))
        return [ReadLater(ref, self.read) for ref in found], left_out


def say_left_out(left_out: list[LeftOut], *, some: bool) -> None:
    """Name on stderr what was left out; raise where there is not ``some`` left.

    Raises
    ------
    InputError
        The one error, or where there are several, that nothing is left.
    """
    if len(left_out) == 1 and not some:
        raise left_out[0].error
    for one in left_out:
        click.echo(printable(f"Left out: {one}"), err=True)
    if not some:
        message = f"None of the {len(left_out)} adapters and sources can be used."
        raise SourceError(message)


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what says how adapters are read, given to the command as ``reading``."""

    @functools.wraps(command)
    def with_reading(
        *args: Any,
        pair: Any,
        scale: Any,
        alpha: Any,
        allow_pickle: bool,
        initial: Any,
        enable_lora: Any,
        kernel: Any,
        heads: Any,
        expert_order: Any,
        experts: Any,
        trained_on: Any,
        **others: Any,
    ) -> Any:
        if scale is not None and alpha is not None:
            message = "--scale is the multiplier itself, --alpha gives alpha / rank: pass one."
            raise click.UsageError(message)
        reading = Reading(
            pair,
            scale,
            alpha,
            allow_pickle,
            initial,
            enable_lora=enable_lora,
            kernel=kernel,
            heads=heads,
            expert_order=expert_order,
            experts=experts,
            trained_on=trained_on,
        )
        return command(*args, reading=reading, **others)

    wrapped = click.option(
        "--trained-on",
        metavar="BASE",
        help="The base weights that training started from: the update is then the whole change of "
        "the weight (DoRA, KaSA), and a start that was taken out of them is known (PiSSA, OLoRA).",
    )(_structure_options(with_reading))
    wrapped = click.option(
        "--initial",
        metavar="SOURCE",
        help="The adapter before training, where its product was taken out of the base (PiSSA, "
        "OLoRA, CorDA, LoRA-GA).",
    )(wrapped)
    wrapped = click.option(
        "--allow-pickle",
        is_flag=True,
        help="Read files of torch.save (.bin, .pt) too: their tensors alone, nothing is run.",
    )(wrapped)
    wrapped = click.option(
        "--alpha", type=float, help="LoRA alpha; the scale is alpha / rank of each module."
    )(wrapped)
    wrapped = click.option(
        "--scale", type=float, help="The multiplier of B·A, where the file does not give it."
    )(wrapped)
    return click.option(
        "--pair",
        metavar="A,B",
        callback=_pair,
        help="Names of bare factor pairs, A first: 'w_a_{name},w_b_{name}'.",
    )(wrapped)


def _structure_options(command: Command) -> Command:
    """Add what says how factors are made up, where a file stores several together."""
    command = click.option(
        "--experts",
        type=click.IntRange(min=1),
        help="Number of experts of the base, if the rank of one expert is not the config's r.",
    )(command)
    command = click.option(
        "--expert-order",
        type=click.Choice(["expert-fastest", "expert-slowest"]),
        help="Order of the columns of B if one tensor stores all experts: in PEFT the expert "
        "index varies fastest, in Unsloth's files until September 2026 slowest. By default the "
        "config decides.",
    )(command)
    command = click.option(
        "--heads",
        metavar="Q,K",
        callback=_heads,
        help="Attention heads and key-value heads of the base, for GGUF files that permute them.",
    )(command)
    command = click.option(
        "--kernel",
        type=click.IntRange(min=1),
        help="Width of the kernels of loralib's ConvLoRA.",
    )(command)
    return click.option(
        "--enable-lora",
        metavar="1,0,1",
        callback=_flags,
        help="Which blocks of fused weights were adapted (loralib's MergedLinear): q, k, v.",
    )(command)


def _pair(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    parts = value.split(",")
    if len(parts) != 2 or any(part.count("{name}") != 1 for part in parts):
        message = "two names separated by a comma, each with {name} once: 'w_a_{name},w_b_{name}'"
        raise click.BadParameter(message)
    return tuple(part.strip() for part in parts)


def _flags(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if any(part not in ("0", "1") for part in parts) or "1" not in parts:
        message = "a 1 for each block that was adapted, a 0 for each other: '1,0,1'"
        raise click.BadParameter(message)
    return tuple(part == "1" for part in parts)


def _heads(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if len(parts) != 2 or any(not part.isdecimal() or int(part) < 1 for part in parts):
        message = "two numbers, heads of queries and of keys: '32,8'"
        raise click.BadParameter(message)
    return tuple(int(part) for part in parts)

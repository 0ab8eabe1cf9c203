"""Cells dealt to jobs that know nothing of each other, as the tasks of a Slurm array do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_analysis.errors import InputError
from lora_analysis.execution.protocol import Cell


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``index`` of ``count``, counted from 1.

    Raises
    ------
    InputError
        The index is not from 1 to the count.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            message = (
                f"There is no shard {self.index}/{self.count}: shards are counted from 1. "
                f"In a Slurm array, use --array=1-{max(self.count, 1)}."
            )
            raise InputError(message)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that ``"k/n"`` names.

        Raises
        ------
        InputError
            The text is not two whole numbers with a slash between.
        """
        index, slash, count = text.partition("/")
        if not slash or not (index.strip().isdecimal() and count.strip().isdecimal()):
            message = f"A shard is k/n, as 3/8 for the third of eight; found {text!r}."
            raise InputError(message)
        return cls(int(index), int(count))

    def of(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return this shard's cells: every ``count``-th, so that neighbors are spread.

        Dealt from all cells and not from those that are left, or two shards would take one cell
        where a third has finished some meanwhile.
        """
        return list(cells[self.index - 1 :: self.count])

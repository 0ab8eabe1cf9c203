"""The progress callback that every long operation of the package takes."""

from __future__ import annotations

from collections.abc import Callable

# Called with what is counted ("modules"), how many are done, and how many there are.
Progress = Callable[[str, int, int], None]

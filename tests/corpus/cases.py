"""Every case of the corpus."""

from __future__ import annotations

from corpus import configs, containers, headers, places, values
from corpus.files import Case

CASES: list[Case] = [
    *headers.CASES,
    *values.CASES,
    *configs.CASES,
    *places.CASES,
    *containers.CASES,
]

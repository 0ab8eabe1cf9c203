"""Damage to what the tensors say: shapes that do not belong together, numbers that are none."""

from __future__ import annotations

import numpy as np

from corpus.files import A, B, Case, edited, entries_of, factors, holding, packed, peft


def _with(at: float, *, name: str = "A", dtype: type = np.float32) -> object:
    value = factors(rank=8, dtype=dtype)[A if name == "A" else B]
    value[0, 0] = at
    other = {"A": B, "B": A}[name]
    return holding(**{name: value, ("B" if name == "A" else "A"): factors(rank=8)[other]})


SHAPES = [
    Case("A alone", edited(lambda h: h.pop(B)), 3, ""),
    Case("B alone", lambda f: peft(f, packed(*entries_of({B: factors()[B]}))), 3, "has"),
    Case("A alone, whole", lambda f: peft(f, packed(*entries_of({A: factors()[A]}))), 3, "no '"),
    Case("ranks that differ", holding(A=np.ones((3, 6), np.float32)), 3, "different ranks"),
    Case("A transposed", holding(A=np.ones((6, 2), np.float32)), 3, "different ranks"),
    Case("a scalar", holding(A=np.ones((), np.float32)), 3, "non-empty matrix"),
    Case("a vector", holding(A=np.ones(12, np.float32)), 3, "non-empty matrix"),
    Case("nothing", holding(A=np.ones((2, 0), np.float32)), 3, "non-empty matrix"),
    Case("no rank", holding(A=np.ones((0, 6), np.float32), B=np.ones((5, 0), np.float32)), 3, ""),
    Case("five axes", holding(A=np.ones((2, 6, 1, 1, 1, 1), np.float32)), 3, ""),
    Case(
        "a rank of 5000",
        holding(A=np.ones((5000, 1), np.float32), B=np.ones((1, 5000), np.float32)),
        3,
        "limits",
    ),
    Case(
        "2^20 + 1 features",
        holding(A=np.ones((1, 2**20 + 1), np.float16), B=np.ones((1, 1), np.float16)),
        3,
        "limits",
    ),
]
NUMBERS = [
    Case("NaN", _with(float("nan")), 3, "non-finite"),
    Case("infinity", _with(float("inf")), 3, "non-finite"),
    Case("infinity in B", _with(float("-inf"), name="B"), 3, "non-finite"),
    Case("half-precision infinity", _with(float("inf"), dtype=np.float16), 3, "non-finite"),
    Case("the largest float", _with(3e38), 3, "damaged"),
    Case("the largest double", _with(1e308, dtype=np.float64), 3, "damaged"),
    Case("one number too large", _with(5000.0, dtype=np.float16), 0, "times the rms of its other"),
    Case("only denormal numbers", holding(A=np.full((2, 6), 1e-44, np.float32)), 0, "not so small"),
    Case("B is zero", holding(B=np.zeros((5, 2), np.float32)), 0, '"untrained": true'),
    Case("A is zero", holding(A=np.zeros((2, 6), np.float32)), 0, ""),
    Case(
        "everything is zero",
        holding(A=np.zeros((2, 6), np.float32), B=np.zeros((5, 2), np.float32)),
        0,
        '"untrained": true',
    ),
]
CASES = [*SHAPES, *NUMBERS]

"""A factor as it lies in a file: the shape it promises is the shape it reads as."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from lora_analysis.formats.stored import StoredFactor, block_diagonal, stack, tensor
from lora_analysis.storage.tensors import NamedTensors, open_tensors

ARRAYS = {
    "a": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b": -np.arange(12, dtype=np.float32).reshape(2, 6),
    "kernel": np.arange(36, dtype=np.float32).reshape(2, 2, 3, 3),
    "vector": np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32),
}


@pytest.fixture
def tensors(tmp_path: Path) -> NamedTensors:
    (tmp_path / "t.safetensors").write_bytes(save(ARRAYS))
    return open_tensors(tmp_path / "t.safetensors")


A, B, KERNEL, VECTOR = ARRAYS.values()
CASES: list[tuple[StoredFactor, np.ndarray]] = [
    (tensor("a"), A),
    (tensor("a").transpose(), A.T),
    (tensor("kernel").transpose(1, 0, 2, 3), KERNEL.transpose(1, 0, 2, 3)),
    (tensor("kernel").flatten(), KERNEL.reshape(2, 18)),
    (tensor("a").reshape(2, 2, -1), A.reshape(2, 2, 6)),
    (tensor("kernel").at(1), KERNEL[1]),
    (tensor("a").rows(slice(1, 3)), A[1:3]),
    (tensor("a").rows(slice(1, 99)), A[1:]),
    (tensor("a").columns(slice(1, None, 2)), A[:, 1::2]),
    (tensor("a").times(-0.5), -0.5 * A),
    (tensor("a").scale_rows(tensor("vector")), np.diag(VECTOR) @ A),
    (stack([tensor("a"), tensor("b")]), np.vstack([A, B])),
    (stack([tensor("a"), tensor("a").times(2)], axis=1), np.hstack([A, 2 * A])),
    (
        block_diagonal([tensor("a"), tensor("b")]),
        np.block([[A, np.zeros((4, 6))], [np.zeros((2, 6)), B]]),
    ),
    (tensor("a").reshape(2, 2, 6).transpose(1, 0, 2).reshape(4, 6), A[[0, 2, 1, 3]]),
]


@pytest.mark.parametrize(("factor", "expected"), CASES)
def test_a_factor_reads_as_what_was_said_of_it(
    tensors: NamedTensors, factor: StoredFactor, expected: np.ndarray
) -> None:
    assert factor.shape(tensors) == expected.shape
    np.testing.assert_array_equal(factor.read(tensors), expected)
    again = pickle.loads(pickle.dumps(factor))
    np.testing.assert_array_equal(again.read(tensors), expected)


@pytest.mark.parametrize(
    "factor",
    [
        tensor("a").at(4),
        tensor("a").reshape(5, -1),
        tensor("a").reshape(5, 5),
        tensor("a").transpose(0, 0),
        tensor("vector").columns(slice(1)),
        tensor("b").scale_rows(tensor("vector")),
        stack([tensor("a"), tensor("b")], axis=1),
        block_diagonal([tensor("a"), tensor("kernel")]),
    ],
)
def test_what_the_stored_shape_does_not_allow_is_known_before_reading(
    tensors: NamedTensors, factor: StoredFactor
) -> None:
    with pytest.raises(ValueError, match="shape"):
        factor.shape(tensors)


def test_the_first_tensor_names_the_factor() -> None:
    assert stack([tensor("a").at(0), tensor("b")]).names == ("a", "b")
    assert tensor("a").scale_rows(tensor("v")).name == "a"

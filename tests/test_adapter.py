"""The values every level speaks of: checked and frozen at construction, loaded when asked for."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from factories import low_rank_update

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate, Provenance
from lora_analysis.errors import InputError, ScaleError
from lora_analysis.patterns import natural_key


def factors(**changes):
    given = {"name": "layers.0.q_proj", "A": np.ones((2, 5)), "B": np.ones((7, 2)), "scale": 2.0}
    return LowRankUpdate(**(given | changes))


def test_delta_weight_is_scale_times_b_times_a():
    update = LowRankUpdate(
        name="q", A=np.array([[1.0, 2.0, 3.0]]), B=np.array([[10.0], [20.0]]), scale=0.5
    )
    np.testing.assert_array_equal(update.delta_weight(), [[5, 10, 15], [10, 20, 30]])
    assert update.shape == (2, 3)
    assert update.rank == 1


def test_delta_weight_of_single_precision_factors_is_formed_in_double(rng):
    update = low_rank_update(rng, dtype=np.float32)
    expected = 2.0 * (update.B.astype(np.float64) @ update.A.astype(np.float64))
    assert update.delta_weight().dtype == np.float64
    np.testing.assert_array_equal(update.delta_weight(), expected)


@pytest.mark.parametrize(
    ("given", "kept", "label"),
    [
        ("float16", np.float32, "float16"),
        ("float32", np.float32, "float32"),
        ("float64", np.float64, "float64"),
        (">f4", np.float32, "float32"),
        (">f8", np.float64, "float64"),
    ],
)
def test_half_precision_is_widened_exactly_and_its_type_remembered(given, kept, label):
    values = np.array([[1.0, 0.333251953125]], dtype=given)
    update = factors(A=values, B=np.ones((7, 1), dtype=given))
    assert update.A.dtype == kept
    assert update.stored_dtype == label
    np.testing.assert_array_equal(update.A, [[1.0, 0.333251953125]])
    assert DenseUpdate(name="q", delta=values).stored_dtype == label


def test_a_stored_type_given_by_the_reader_is_kept():
    assert factors(stored_dtype="bfloat16").stored_dtype == "bfloat16"


def test_updates_are_read_only_and_leave_the_callers_arrays_writeable():
    a = np.ones((2, 5))
    update = factors(A=a)
    for array in (update.A, update.B, DenseUpdate(name="q", delta=a).delta):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 3.0
    with pytest.raises(AttributeError):
        update.scale = 3.0
    assert a.flags.writeable


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"A": np.ones(5)}, ["A of 'layers.0.q_proj'", "(5,)"]),
        ({"B": np.ones((7, 2, 1))}, ["B of 'layers.0.q_proj'", "(7, 2, 1)"]),
        ({"A": np.ones((0, 5)), "B": np.ones((7, 0))}, ["A of", "non-empty", "(0, 5)"]),
        ({"A": np.ones((2, 5), dtype=int)}, ["A of", "floating-point", "int64"]),
        ({"B": np.ones((7, 2), dtype=complex)}, ["B of", "floating-point", "complex128"]),
        ({"A": np.full((2, 5), np.nan)}, ["A of", "10 non-finite of 10"]),
        ({"B": np.array([[1.0, np.inf]])}, ["B of", "1 non-finite of 2", "diverged"]),
        ({"A": np.ones((3, 5))}, ["different ranks", "(3, 5)", "(7, 2)", "transposed"]),
        ({"scale": np.nan}, ["scale of 'layers.0.q_proj'", "finite", "nan"]),
        ({"alpha": np.inf}, ["alpha of 'layers.0.q_proj'", "finite", "inf"]),
    ],
)
def test_a_bad_factor_is_refused_with_its_name_and_numbers(changes, words):
    with pytest.raises(InputError) as caught:
        factors(**changes)
    for word in words:
        assert word in str(caught.value)


def test_a_bad_dense_update_is_refused_with_its_name_and_numbers():
    with pytest.raises(InputError, match=r"delta of 'q'.*1 non-finite of 4"):
        DenseUpdate(name="q", delta=np.array([[1.0, 2.0], [np.nan, 3.0]]))
    with pytest.raises(InputError, match=r"delta of 'q'.*\(3,\)"):
        DenseUpdate(name="q", delta=np.ones(3))


def test_an_unknown_scale_is_refused_where_it_is_needed_and_nowhere_else():
    update = factors(scale=None, label="r8-s0")
    assert update.scale is None
    for ask in (update.known_scale, update.delta_weight):
        with pytest.raises(ScaleError, match=r"'layers\.0\.q_proj' in r8-s0.*--alpha"):
            ask()


def test_a_dense_update_gives_its_matrix_and_the_rank_its_shape_allows():
    update = DenseUpdate(name="q", delta=np.arange(6, dtype=np.float32).reshape(2, 3))
    assert update.shape == (2, 3)
    assert update.rank == 2
    assert update.delta_weight().dtype == np.float64
    np.testing.assert_array_equal(update.delta_weight(), [[0, 1, 2], [3, 4, 5]])


# --- adapters ---------------------------------------------------------------------------------


def test_modules_come_in_natural_order(rng):
    names = ["layers.10.q_proj", "layers.2.v_proj", "layers.2.q_proj", "embed", "layers.9.q_proj"]
    adapter = Adapter({name: low_rank_update(rng, name=name) for name in names}, label="a")
    assert list(adapter) == [
        "embed", "layers.2.q_proj", "layers.2.v_proj", "layers.9.q_proj", "layers.10.q_proj",
    ]  # fmt: skip
    assert sorted(["7", "a.01", "a.1", "10"], key=natural_key) == ["7", "10", "a.01", "a.1"]


def test_a_module_is_loaded_when_asked_for_and_not_kept(rng):
    loaded = []

    def loader(name):
        def load():
            loaded.append(name)
            return low_rank_update(rng, name=name)

        return load

    adapter = Adapter({name: loader(name) for name in ("q", "k", "v")}, label="adapter")
    assert len(adapter) == 3
    assert "q" in adapter
    assert "o" not in adapter
    assert list(adapter) == ["k", "q", "v"]
    assert "3 modules" in repr(adapter)
    assert loaded == []
    assert adapter["q"].name == "q"
    assert adapter["q"] is not adapter["q"]
    assert loaded == ["q", "q", "q"]


def test_an_unknown_module_is_a_key_error_that_lists_near_names(rng):
    names = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj"]
    adapter = Adapter({name: low_rank_update(rng, name=name) for name in names}, label="r8-s0")
    with pytest.raises(KeyError) as caught:
        adapter["layers.0.q_porj"]
    assert "r8-s0" in str(caught.value)
    assert "layers.0.q_proj" in str(caught.value)
    assert adapter.get("nothing") is None


def test_an_update_carries_the_label_of_its_adapter(rng):
    update = low_rank_update(rng, name="q", label="other")
    adapter = Adapter({"q": update, "k": lambda: update}, label="r8-s0")
    again = adapter.with_label("renamed")
    assert {adapter["q"].label, adapter["k"].label} == {"r8-s0"}
    assert again["q"].label == "renamed"
    np.testing.assert_array_equal(again["q"].A, update.A)
    assert again["q"].stored_dtype == update.stored_dtype
    assert update.label == "other"


def test_what_belongs_to_an_adapter_cannot_be_changed_from_outside(rng):
    head, config = {"classifier.weight": np.ones((2, 3))}, {"task_type": "SEQ_CLS"}
    adapter = Adapter({"q": low_rank_update(rng)}, label="a", saved_modules=head, config=config)
    head.clear()
    config.clear()
    assert list(adapter.saved_modules) == ["classifier.weight"]
    assert adapter.config["task_type"] == "SEQ_CLS"
    with pytest.raises(TypeError):
        adapter.config["task_type"] = "other"
    assert adapter.provenance == Provenance()


def test_provenance_hashes_its_files_in_order(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"lora" * 400_000)  # more than one block
    two.write_bytes(b"B")
    found = Provenance(files=(one, two)).sha256
    assert found == hashlib.sha256(b"lora" * 400_000 + b"B").hexdigest()
    assert found != Provenance(files=(two, one)).sha256
    assert Provenance().sha256 is None

"""What is kept on disk, and W's spectrum among it."""

from __future__ import annotations

import os

import numpy as np
import pytest
from reference import assert_close

from lora_analysis import linalg
from lora_analysis.errors import BaseWeightError, InputError
from lora_analysis.spectra import weight_svd, weights
from lora_analysis.storage import cache


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "kept"))
    monkeypatch.delenv(cache.SIZE_VARIABLE, raising=False)
    return tmp_path / "kept"


def test_arrays_come_back_as_they_were_kept(rng):
    arrays = {"a": rng.standard_normal((3, 2)), "b": np.arange(4.0)[::2]}
    assert cache.read_cached("key") is None
    assert cache.write_cached("key", arrays)
    found = cache.read_cached("key")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_the_least_recently_used_goes_first(folder, monkeypatch):
    monkeypatch.setenv(cache.SIZE_VARIABLE, "3e-5")  # 30 kB
    one = {"a": np.zeros(1000)}  # 8 kB
    for at, key in enumerate("abc"):
        cache.write_cached(key, one)
        os.utime(folder / f"{key}.safetensors", (at, at))
    assert cache.read_cached("a") is not None  # now "b" is the oldest
    cache.write_cached("d", one)
    assert sorted(path.stem for path in folder.iterdir()) == ["a", "c", "d"]


def test_what_exceeds_the_limit_alone_is_not_kept(folder, monkeypatch):
    monkeypatch.setenv(cache.SIZE_VARIABLE, "0")
    assert not cache.write_cached("a", {"a": np.zeros(10)})
    assert not folder.exists()


def test_a_damaged_file_is_as_good_as_none(folder):
    cache.write_cached("a", {"a": np.zeros(10)})
    (folder / "a.safetensors").write_bytes(b"abc")
    assert cache.read_cached("a") is None


def test_a_folder_that_cannot_be_made_takes_nothing_away(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "file"))
    assert not cache.write_cached("a", {"a": np.zeros(10)})


@pytest.mark.parametrize("text", ["many", "-1", "nan", "inf"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch, text):
    monkeypatch.setenv(cache.SIZE_VARIABLE, text)
    with pytest.raises(InputError, match=f"LORA_ANALYSIS_CACHE_GB must be .*'{text}'"):
        cache.cache_limit()


def test_the_users_cache_folder_is_the_default(monkeypatch, tmp_path):
    monkeypatch.delenv(cache.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "lora-analysis"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder().parts[-2:] == (".cache", "lora-analysis")


# --- the spectrum of a weight -----------------------------------------------------------------


@pytest.fixture
def worth_keeping(monkeypatch):
    monkeypatch.setattr(weights, "_WORTH_KEEPING", 0.0)


@pytest.mark.parametrize("shape", [(30, 30), (40, 20), (20, 40)])
@pytest.mark.usefixtures("worth_keeping")
def test_a_kept_spectrum_is_read_instead_of_computed(rng, folder, monkeypatch, shape):
    W = rng.standard_normal(shape).astype(np.float32)
    first = weight_svd(W)
    assert_close(first.U * first.S @ first.V.T, W, atol=1e-12)
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(linalg, "gram_svd", lambda _: pytest.fail("computed again"))
    again = weight_svd(W.copy())
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("worth_keeping")
def test_another_weight_type_or_shape_has_a_spectrum_of_its_own(rng, folder):
    W = rng.standard_normal((20, 20))
    others = (W, W + 1e-15, W.astype(np.float32), W.reshape(10, 40), W.T)
    for other in others:
        found = weight_svd(other)
        assert_close(found.S, np.linalg.svd(other, compute_uv=False), rtol=1e-5)
    assert len(list(folder.iterdir())) == len(others)


@pytest.mark.usefixtures("worth_keeping")
def test_the_cache_can_be_left_alone(rng, folder):
    weight_svd(rng.standard_normal((8, 8)), cache=False)
    assert not folder.exists()


def test_small_weights_are_not_kept(rng, folder):
    weight_svd(rng.standard_normal((8, 8)))
    assert not folder.exists()


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(BaseWeightError, match="'W' holds values that are not finite"):
        weight_svd(np.full((3, 3), np.inf))

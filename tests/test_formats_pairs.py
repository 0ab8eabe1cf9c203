"""Bare pairs under any naming, and what is said about files that no format recognizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from factories import low_rank_update
from safetensors.numpy import save

from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.errors import (
    InputError,
    MalformedFileError,
    SourceError,
    UnknownFormatError,
    UnsupportedMethodError,
)
from lora_analysis.formats import find_adapters, read_adapter, write_adapter

PAIR = ("w_a_{name}", "w_b_{name}")


def pair_file(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(tensors))
    return path


def matrix(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def ring(rng: np.random.Generator, modules: int = 2, rank: int = 3) -> dict[str, np.ndarray]:
    return {
        f"w_{role}_{i:03}": matrix(rng, *((rank, 8) if role == "a" else (8, rank)))
        for i in range(modules)
        for role in "ab"
    }


def test_pairs_read_with_the_callers_scale(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = ring(rng)
    path = pair_file(tmp_path / "lora_rank3.safetensors", tensors)
    adapter = read_adapter(path, pair=PAIR, scale=1)
    assert list(adapter) == ["000", "001"]
    assert adapter.label == "lora_rank3"
    assert adapter.provenance.format == "pairs"
    assert adapter.provenance.rank == 3
    assert adapter.provenance.scale_origin == {"000": "caller", "001": "caller"}
    assert adapter.provenance.findings == ()
    np.testing.assert_allclose(
        adapter["001"].delta_weight(), tensors["w_b_001"] @ tensors["w_a_001"], rtol=1e-5
    )
    by_alpha = read_adapter(path, pair=PAIR, alpha=6)["000"]
    assert isinstance(by_alpha, LowRankUpdate)
    assert (by_alpha.scale, by_alpha.alpha) == (2.0, 6.0)


def test_without_a_scale_the_pairs_are_read_and_it_is_a_finding(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    adapter = read_adapter(pair_file(tmp_path / "f.safetensors", ring(rng)), pair=PAIR)
    assert {update.scale for update in adapter.values()} == {None}  # type: ignore[union-attr]
    assert set(adapter.provenance.scale_origin.values()) == {"unknown"}
    assert "scale of 2 of 2 modules is not known" in adapter.provenance.findings[0].text


def test_a_file_with_one_factor_of_each_pair_is_half_an_adapter(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    for role, missing in (("a", "B"), ("b", "A")):
        half = {name: one for name, one in ring(rng).items() if f"_{role}_" in name}
        path = pair_file(tmp_path / f"{role}.safetensors", half)
        with pytest.raises(UnknownFormatError, match=f"no {missing} among them.*half of an ad"):
            read_adapter(path)


def test_transposed_factors_under_a_known_name_say_how_and_are_then_read(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    A, B = matrix(rng, 6, 2), matrix(rng, 2, 9)  # x·A·B, as code written by hand has it
    path = pair_file(tmp_path / "f.safetensors", {"h.0.q.lora_A": A, "h.0.q.lora_B": B})
    pair = ("{name}.lora_A", "{name}.lora_B")
    with pytest.raises(MalformedFileError, match=r"fit transposed.*--pair '{name}\.lora_A,{name}"):
        read_adapter(path)
    adapter = read_adapter(path, pair=pair, scale=2)  # before what the names look like
    np.testing.assert_allclose(adapter["h.0.q"].delta_weight(), 2 * (A @ B).T, rtol=1e-5)
    assert "stored transposed" in adapter.provenance.findings[0].text
    odd = {"h.0.q.lora_A": matrix(rng, 6, 2), "h.0.q.lora_B": matrix(rng, 3, 9)}
    with pytest.raises(MalformedFileError, match="fused, grouped or block-diagonal"):
        read_adapter(pair_file(tmp_path / "g.safetensors", odd))


def test_the_name_may_stand_anywhere_in_the_patterns(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = {"net.q.down.weight": matrix(rng, 2, 6), "net.q.up.weight": matrix(rng, 5, 2)}
    path = pair_file(tmp_path / "f.safetensors", tensors)
    adapter = read_adapter(path, pair=("net.{name}.down.weight", "net.{name}.up.weight"), scale=1)
    assert list(adapter) == ["q"]
    assert adapter["q"].shape == (5, 6)


@pytest.mark.parametrize(
    ("a", "b", "shape"),
    [
        ((2, 6), (5, 2), (5, 6)),
        ((6, 2), (2, 5), (5, 6)),
        ((2, 6), (6, 2), (6, 6)),
        ((6, 2), (2, 6), (6, 6)),
        ((6, 6), (6, 6), (6, 6)),
    ],
)
def test_orientation_is_decided_by_the_shapes(
    tmp_path: Path,
    rng: np.random.Generator,
    a: tuple[int, int],
    b: tuple[int, int],
    shape: tuple[int, int],
) -> None:
    tensors = {"w_a_0": matrix(rng, *a), "w_b_0": matrix(rng, *b)}
    adapter = read_adapter(pair_file(tmp_path / "f.safetensors", tensors), pair=PAIR, scale=1)
    update = adapter["0"]
    assert (update.shape, update.rank) == (shape, min(a))
    flipped = a[0] > a[1]
    first, second = tensors["w_a_0"].astype(float), tensors["w_b_0"].astype(float)
    np.testing.assert_allclose(
        update.delta_weight(), (first @ second).T if flipped else second @ first
    )
    assert len(adapter.provenance.findings) == flipped
    if flipped:
        assert "stored transposed" in adapter.provenance.findings[0].text


def test_tensors_that_match_neither_pattern_are_a_finding(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = ring(rng) | {"head": matrix(rng, 2, 2)}
    adapter = read_adapter(pair_file(tmp_path / "f.safetensors", tensors), pair=PAIR, scale=1)
    (finding,) = map(str, adapter.provenance.findings)
    assert "1 tensor next to the factors: they match neither pattern" in finding
    assert "'head'" in finding


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        (("w_a_", "w_b_{name}"), "'w_a_' must hold '{name}' exactly once"),
        (("{name}{name}", "w_b_{name}"), "exactly once"),
        (("w_{name}", "w_{name}"), "two different patterns"),
        (("w_a_{name}",), "two different patterns"),
        ("w_a_{name},w_b_{name}", "two different patterns"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused(
    tmp_path: Path, rng: np.random.Generator, pair: tuple[str, str], told: str
) -> None:
    path = pair_file(tmp_path / "f.safetensors", ring(rng))
    with pytest.raises(InputError) as caught:
        read_adapter(path, pair=pair, scale=1)
    assert told in str(caught.value)


def test_a_missing_partner_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = ring(rng)
    del tensors["w_b_001"]
    path = pair_file(tmp_path / "f.safetensors", tensors)
    with pytest.raises(MalformedFileError, match=r"f\.safetensors.*'w_a_001' but no 'w_b_001'"):
        read_adapter(path, pair=PAIR, scale=1)


def test_shapes_that_fit_in_no_orientation_are_refused(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = {"w_a_0": matrix(rng, 2, 6), "w_b_0": matrix(rng, 5, 3)}
    path = pair_file(tmp_path / "f.safetensors", tensors)
    with pytest.raises(MalformedFileError, match=r"\(2, 6\).*\(5, 3\)"):
        read_adapter(path, pair=PAIR, scale=1)
    path = pair_file(tmp_path / "g.safetensors", {"w_a_0": matrix(rng, 2), "w_b_0": matrix(rng, 2)})
    with pytest.raises(MalformedFileError, match=r"'w_a_0'.*\(2,\)"):
        read_adapter(path, pair=PAIR, scale=1)
    tensors = {"w_a_0": matrix(rng, 2, 3, 1, 1), "w_b_0": matrix(rng, 3, 2, 1, 1)}
    path = pair_file(tmp_path / "h.safetensors", tensors)
    with pytest.raises(UnsupportedMethodError, match="convolution"):
        read_adapter(path, pair=PAIR, scale=1)


def test_a_tensor_that_matches_both_patterns_is_refused(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = pair_file(tmp_path / "f.safetensors", {"ab": matrix(rng, 2, 2)})
    with pytest.raises(MalformedFileError, match="'ab' matches both"):
        read_adapter(path, pair=("a{name}", "{name}b"), scale=1)


def test_patterns_that_match_nothing_are_answered_with_the_names(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = pair_file(tmp_path / "f.safetensors", {"x.down": matrix(rng, 2, 2)})
    with pytest.raises(UnknownFormatError, match=r"no tensor matches.*x\.down"):
        read_adapter(path, pair=PAIR, scale=1)


def test_alpha_and_scale_together_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    path = pair_file(tmp_path / "f.safetensors", ring(rng))
    with pytest.raises(InputError, match=r"alpha=2.*scale=1"):
        read_adapter(path, pair=PAIR, scale=1, alpha=2)
    with pytest.raises(InputError, match="scale must be a finite number, found inf"):
        read_adapter(path, pair=PAIR, scale=float("inf"))
    with pytest.raises(InputError, match="alpha must be a finite number"):
        read_adapter(path, pair=PAIR, alpha=10**309)


def test_a_folder_of_pairs_is_listed_and_one_alone_is_read(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    for rank in (10, 2):
        pair_file(tmp_path / "ring" / f"rank{rank}.safetensors", ring(rng, rank=rank))
    assert [ref.label for ref in find_adapters(tmp_path)] == ["rank2", "rank10"]
    assert len(find_adapters(tmp_path, pair=PAIR)) == 2
    with pytest.raises(SourceError, match=r"2 adapters.*rank2\.safetensors.*rank10\.safetensors"):
        read_adapter(tmp_path, pair=PAIR, scale=1)
    (tmp_path / "ring" / "rank10.safetensors").unlink()
    assert read_adapter(tmp_path, pair=PAIR, scale=1).provenance.rank == 2


def test_pairs_of_a_known_naming_are_answered_with_the_call_that_reads_them(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = pair_file(tmp_path / "f.safetensors", ring(rng))
    for source in (path, tmp_path):
        with pytest.raises(UnknownFormatError) as caught:
            read_adapter(source)
        assert "pair=('w_a_{name}', 'w_b_{name}')" in str(caught.value)
        assert "--pair 'w_a_{name},w_b_{name}' --scale 1" in str(caught.value)


def test_a_file_without_an_adapter_is_described_by_its_first_tensors(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path, key = tmp_path / "f.safetensors", "model.embed_tokens.weight"
    path.write_bytes(save({key: matrix(rng, 2, 3)}, {"format": "pt"}))
    for source in (path, tmp_path):
        with pytest.raises(UnknownFormatError) as caught:
            read_adapter(source)
        for part in (
            "no known naming",
            key,
            "(2, 3)",
            "metadata format 'pt'",
            "f.safetensors",
            "PEFT folders",
        ):
            assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("pytorch_lora_weights.bin", b"PK\x03\x04", "pickle"),
        ("adapter.pt", b"\x80\x02", "pickle"),
        ("adapter", b"PK\x03\x04", "pickle"),
        ("notes.md", b"# A title", "plain text"),
        ("empty", b"", "not a safetensors file"),
    ],
)
def test_files_that_are_no_safetensors_are_told_apart(
    tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnknownFormatError) as caught:
        read_adapter(tmp_path / name)
    assert told in str(caught.value)
    assert name in str(caught.value)
    assert "safetensors" in str(caught.value)


def test_a_damaged_safetensors_file_is_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "f.safetensors").write_bytes(b"abc")
    with pytest.raises(MalformedFileError, match="3 bytes"):
        read_adapter(tmp_path / "f.safetensors")


def test_nothing_at_the_source_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no file or folder"):
        read_adapter(tmp_path / "gone")
    with pytest.raises(SourceError, match=r"On the hub: .* is not in the local cache"):
        read_adapter("someone/some-adapter")
    with pytest.raises(SourceError, match="no file or folder"):
        read_adapter("a\0b")
    with pytest.raises(SourceError, match="no file or folder"):
        read_adapter("x" * 5000)
    with pytest.raises(UnknownFormatError, match="the folder is empty"):
        find_adapters(tmp_path)


def test_a_damaged_file_among_others_is_listed_and_says_why(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    whole = pair_file(tmp_path / "a.safetensors", ring(rng))
    (tmp_path / "b.safetensors").write_bytes(whole.read_bytes()[:-1])
    for pair in (None, PAIR):
        found = find_adapters(tmp_path, pair=pair)
        assert [(ref.label, ref.format) for ref in found] == [("a", "pairs"), ("b", "damaged")]
        with pytest.raises(MalformedFileError, match="cut short"):
            read_adapter(found[1], pair=pair)


def test_a_folder_without_any_readable_file_says_what_it_holds(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"PK")
    with pytest.raises(
        UnknownFormatError, match=r"pytorch_lora_weights\.bin.*Pickles can run code"
    ):
        read_adapter(tmp_path)
    with pytest.raises(UnknownFormatError, match=r"pytorch_lora_weights\.bin"):
        read_adapter(tmp_path, pair=PAIR)
    pair_file(tmp_path / "x.safetensors", {"head.weight": matrix(rng, 2, 2)})
    with pytest.raises(UnknownFormatError, match=r"x\.safetensors: it holds 1 tensors"):
        find_adapters(tmp_path)


def test_linked_folders_are_followed_and_cycles_end(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    pair_file(tmp_path / "real" / "one.safetensors", ring(rng))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path / "runs")
    found = find_adapters(tmp_path / "runs")
    assert [ref.path for ref in found] == [tmp_path / "runs" / "linked" / "one.safetensors"]


@pytest.mark.real
def test_the_real_ring_reads_and_names_its_untrained_file(real_adapters: Path) -> None:
    folder = real_adapters / "sam-ring"
    assert [ref.label for ref in find_adapters(folder)] == [
        *(f"lora_rank{rank}" for rank in (2, 4, 8, 16)),
        "untrained",
    ]
    for rank in (2, 4, 8, 16):
        adapter = read_adapter(folder / f"lora_rank{rank}.safetensors", pair=PAIR, scale=1)
        assert len(adapter) == 24
        assert adapter.provenance.rank == rank
        assert adapter["023"].shape == (768, 768)
    untrained = read_adapter(folder / "untrained.safetensors", pair=PAIR, scale=1)
    assert all(not update.B.any() for update in untrained.values())  # type: ignore[union-attr]


@pytest.mark.real
def test_a_real_pickle_is_refused_unless_allowed(real_adapters: Path) -> None:
    with pytest.raises(UnknownFormatError, match="pickle"):
        read_adapter(real_adapters / "sd15-diffusers" / "pytorch_lora_weights.bin")


@pytest.mark.parametrize("option", ["alpha", "scale"])
def test_a_scale_of_zero_is_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(InputError, match=f"{option} = 0 would make every update zero"):
        read_adapter(tmp_path, **{option: 0.0})


def test_a_pair_option_leaves_peft_folders_beside_the_file_as_they_are(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = write_adapter(
        Adapter({"q": low_rank_update(rng, name="q")}, label="p"), tmp_path / "p"
    )
    assert read_adapter(folder, pair=("w_a_{name}", "w_b_{name}")).provenance.format == "peft"
    assert [ref.format for ref in find_adapters(folder, pair=("w_a_{name}", "w_b_{name}"))] == [
        "peft"
    ]


def test_bare_pairs_are_read_from_any_container(tmp_path: Path, rng: np.random.Generator) -> None:
    import torch

    tensors = ring(rng)
    wanted = read_adapter(pair_file(tmp_path / "a.safetensors", tensors), pair=PAIR, scale=2)
    np.savez(tmp_path / "b.npz", **tensors)
    torch.save({key: torch.tensor(value) for key, value in tensors.items()}, tmp_path / "c.pt")
    assert [ref.path.name for ref in find_adapters(tmp_path)] == ["a.safetensors", "b.npz"]
    assert len(find_adapters(tmp_path, allow_pickle=True)) == 3
    with pytest.raises(UnknownFormatError, match="allow_pickle=True"):
        read_adapter(tmp_path / "c.pt", pair=PAIR, scale=2)
    for name in ("b.npz", "c.pt"):
        found = read_adapter(tmp_path / name, pair=PAIR, scale=2, allow_pickle=True)
        assert found.label == name[0]
        for module in wanted:
            np.testing.assert_array_equal(
                found[module].delta_weight(), wanted[module].delta_weight()
            )

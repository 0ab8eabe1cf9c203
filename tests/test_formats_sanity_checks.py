"""Numbers that training does not leave are refused or named, all others are left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from factories import adapter, low_rank_update
from image_files import lora_pair, stored

from lora_analysis.adapter import Adapter, DenseUpdate, FilePosition, LowRankUpdate, Update
from lora_analysis.cli import run
from lora_analysis.conclusions import findings
from lora_analysis.errors import InputError, MalformedFileError, SourceError
from lora_analysis.formats import find_adapters, read_adapter, write_adapter
from lora_analysis.formats.sanity_checks import check_updates
from lora_analysis.formats.stored import stack, tensor
from lora_analysis.storage import limits
from lora_analysis.storage.safetensors import read_header
from lora_analysis.storage.tensors import open_tensors
from lora_analysis.studies import study

PEFT = "base_model.model.q"


def flipped(values: np.ndarray, bit: int) -> np.ndarray:
    """The same numbers with one bit of the first turned over."""
    changed = values.copy()
    raw = changed.view(f"u{values.itemsize}")
    raw.flat[0] ^= np.asarray(1 << bit).astype(raw.dtype)
    return changed


def codes(*updates: Update) -> list[str]:
    """The codes of the findings about some modules."""
    return [finding.code for finding in check_updates(updates)]


def test_trained_factors_have_no_findings(rng: np.random.Generator) -> None:
    update = low_rank_update(rng, 300, 200, 16)
    assert codes(update) == []
    assert codes(replace(update, B=np.zeros_like(update.B))) == []
    rows = np.zeros_like(update.B)
    rows[7] = 0.1  # one token of an embedding was seen
    assert codes(replace(update, B=rows)) == []
    falling = update.B * 10.0 ** -np.arange(16)  # a spectrum over sixteen decades
    assert codes(replace(update, B=falling)) == []
    assert codes(DenseUpdate("q", rng.standard_normal((4, 4)))) == []


@pytest.mark.parametrize(("dtype", "bit"), [(np.float16, 14), (np.float32, 30), (np.float64, 62)])
@pytest.mark.parametrize("role", ["A", "B"])
def test_the_top_bit_of_an_exponent_is_an_enlarged_entry(
    rng: np.random.Generator, dtype: type, bit: int, role: str
) -> None:
    update = low_rank_update(rng, 30, 20, 4)
    values = flipped(np.full((4, 20), 0.01, dtype), bit)
    changed = {"A": values} if role == "A" else {"B": values.T}
    (finding,) = check_updates([replace(update, **changed)])  # type: ignore[arg-type]
    assert (finding.code, finding.severity) == ("enlarged-entry", "damage")
    assert finding.text.startswith(f"{role} of '{update.name}' holds ")


@pytest.mark.parametrize(("ratio", "expected"), [(45, []), (55, ["enlarged-entry"])])
def test_the_limit_of_an_enlarged_entry_is_fifty_times_the_rms_of_the_others(
    rng: np.random.Generator, ratio: float, expected: list[str]
) -> None:
    update = low_rank_update(rng, 300, 200, 16)
    A = update.A.copy()
    others = np.delete(A.ravel(), 0)
    A[0, 0] = ratio * np.sqrt(np.mean(others**2))
    assert codes(replace(update, A=A)) == expected


def test_a_factor_with_one_entry_only_is_damage(rng: np.random.Generator) -> None:
    update = low_rank_update(rng)
    B = np.zeros_like(update.B)
    B[2, 1] = 2.0  # the top exponent bit of a zero in half precision
    assert codes(replace(update, B=B)) == ["single-entry"]


def test_tiny_values_and_huge_scales_are_damage(rng: np.random.Generator) -> None:
    update = low_rank_update(rng, 30, 20, 4)
    (tiny,) = check_updates([replace(update, A=update.A * 1e-40)])
    assert (tiny.code, tiny.severity) == ("tiny-values", "damage")
    (scale,) = check_updates([replace(update, scale=3e4)])
    assert scale.text.startswith("The scale of 'layers.0.q_proj' is 3e+04 ")
    (large,) = check_updates([DenseUpdate("q", np.full((4, 4), 2e4))])
    assert large.code == "large-values"


@pytest.mark.parametrize("role", ["A", "B"])
def test_what_no_training_leaves_is_refused_with_the_number(
    tmp_path: Path, rng: np.random.Generator, role: str
) -> None:
    tensors = lora_pair(rng, f"{PEFT}.lora_A.weight", f"{PEFT}.lora_B.weight")
    tensors[f"{PEFT}.lora_{role}.weight"][0, 0] = 3e38
    adapter = read_adapter(stored(tmp_path / "adapter_model.safetensors", tensors), scale=1)
    with pytest.raises(MalformedFileError, match=rf"{role} of 'q' holds 3e\+38 \(limit 1e\+15\)"):
        _ = adapter["q"]


def test_scales_and_sizes_beyond_the_limits_are_refused(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = lora_pair(rng, f"{PEFT}.lora_A.weight", f"{PEFT}.lora_B.weight")
    path = stored(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(MalformedFileError, match=r"scale of 'q' would be 5e\+08 \(caller\)"):
        read_adapter(path, alpha=1e9)
    monkeypatch.setattr("lora_analysis.formats.factors.MAX_ADAPTER_BYTES", 80)
    with pytest.raises(MalformedFileError, match="take 88 bytes, the limit is 80"):
        read_adapter(path, scale=1)
    assert limits.MAX_ADAPTER_BYTES == 8 * 2**30


def test_what_the_system_refuses_is_named_as_any_bad_input(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = lora_pair(rng, f"{PEFT}.lora_A.weight", f"{PEFT}.lora_B.weight")
    for name in ("good", "bad"):
        stored(tmp_path / name / "adapter_model.safetensors", tensors)
    bad = tmp_path / "bad" / "adapter_model.safetensors"
    adapter = read_adapter(bad, scale=1)
    plain = Path.open

    def refusing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == bad:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(SourceError, match=r"bad/adapter_model.safetensors: cannot be read: Perm"):
        _ = adapter["q"]
    with pytest.raises(SourceError, match="cannot be read: Permission denied"):
        read_adapter(bad, scale=1)
    assert [ref.format for ref in find_adapters(tmp_path)] == ["unreadable", "peft"]
    assert run(["inspect", str(tmp_path), "--scale", "1"]) == 4


def damaged(rng: np.random.Generator, label: str, *names: str) -> Adapter:
    """An adapter with one number of 1e9 in B of some modules."""
    updates = dict(adapter(rng, label=label))
    for name in names:
        B = updates[name].B.copy()
        B[0, 0] = 1e9
        updates[name] = replace(updates[name], B=B)
    return Adapter(updates, label=label)


def test_a_study_names_adapters_and_modules_with_damage_first(rng: np.random.Generator) -> None:
    names = ("layers.0.v_proj", "layers.1.q_proj")
    result = study([damaged(rng, "bad", *names), adapter(rng, label="good")])
    ((label, warnings),) = result.warnings.items()
    assert label == "bad"
    assert warnings[0].code == "enlarged-entry"
    assert warnings[0].fields["modules"] == list(names)
    concluded = findings(result)
    first = next(finding for finding in concluded if finding.severity == "damage")
    assert (first.topic, first.code) == ("numbers", "enlarged-entry")
    assert " holds 1e+09, " in first.text
    assert "'layers.0.v_proj', 'layers.1.q_proj' (2 of 4 modules)" in first.text
    assert first.to_dict()["fields"]["modules"] == list(names)
    assert concluded.index(first) < min(
        i for i, f in enumerate(concluded) if f.severity == "result"
    )
    assert not study([adapter(rng, label="good")]).warnings


@pytest.mark.slow
def test_every_verb_that_shows_a_damaged_number_says_so(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {f"{name}.weight": rng.standard_normal((24, 20)) for name in adapter(rng)}
    base = stored(tmp_path / "base.safetensors", weights)
    bad = write_adapter(damaged(rng, "bad", "layers.0.v_proj"), tmp_path / "bad")
    good = write_adapter(adapter(rng), tmp_path / "good")
    broken = {name: value.copy() for name, value in weights.items()}
    broken["layers.0.v_proj.weight"][3, 4] = 1e9
    tuned = stored(tmp_path / "tuned.safetensors", broken)
    picture, out = tmp_path / "out.svg", tmp_path / "out"
    for words in (
        ["inspect", bad],
        ["compare", bad, good],
        ["heatmap", bad, good, "--module", "v_proj", "-o", picture],
        ["amplify", bad, "--base", base],
        ["resize", bad, "--rank", "2", "-o", tmp_path / "small"],
        ["convert", bad, "--to", "mlx", "-o", tmp_path / "mlx"],
        ["extract", tuned, "--base", base, "--not-transposed", "--rank", "2", "-o", tmp_path / "e"],
        ["report", bad, good, "--as", "md", "--figures", "", "-o", out],
    ):
        assert run([str(word) for word in words]) == 0
        output = "".join(capsys.readouterr()) + "".join(p.read_text() for p in out.glob("*.md"))
        assert "holds 1e+09" in " ".join(output.replace("\\", "").split()), words[0]


def layers(
    rng: np.random.Generator, count: int = 6, kinds: str = "qkvo", *, d: int = 64, rank: int = 4
) -> dict[str, LowRankUpdate]:
    """Modules as a training leaves them: A of one size, B of a size that differs by layer."""
    updates = {}
    for i in range(count):
        for kind in kinds:
            name = f"layers.{i}.{kind}_proj"
            update = low_rank_update(rng, d, d, rank, name=name, dtype=np.float32)
            size = 0.02 * np.exp(0.3 * rng.standard_normal())
            updates[name] = replace(update, A=update.A / 8, B=(size * update.B).astype(np.float32))
    return updates


def changed(updates: dict[str, LowRankUpdate], name: str, **factors: Any) -> list[str]:
    """The codes after some factors of a module were replaced."""
    return codes(*(updates | {name: replace(updates[name], **factors)}).values())


def test_norms_are_compared_with_the_other_modules_of_the_type(rng: np.random.Generator) -> None:
    updates = layers(rng)
    B = updates["layers.2.q_proj"].B
    assert codes(*updates.values()) == []
    assert changed(updates, "layers.2.q_proj", B=30 * B) == ["norm-outlier"]
    assert changed(updates, "layers.2.q_proj", B=B / 30) == ["norm-outlier"]
    assert changed(updates, "layers.2.q_proj", A=40 * updates["layers.2.q_proj"].A) == [
        "norm-outlier"
    ]
    largest = max(float(np.abs(u.B).max()) for n, u in updates.items() if n.endswith("q_proj"))
    spike = B.copy()
    spike[3, 2] = 7 * largest
    assert changed(updates, "layers.2.q_proj", B=spike) == ["unusual-norm"]


def test_factors_of_unequal_size_are_no_damage_if_the_update_is_usual(
    rng: np.random.Generator,
) -> None:
    updates = layers(rng)
    update = updates["layers.2.q_proj"]
    scaled = {"A": update.A / 30, "B": 30 * update.B}
    assert changed(updates, "layers.2.q_proj", **scaled) == []
    G = rng.standard_normal((update.rank, update.rank)) + 0.1 * np.eye(update.rank)
    mixed = {"A": G @ update.A, "B": update.B @ np.linalg.inv(G)}
    mixed = {name: factor.astype(np.float32) for name, factor in mixed.items()}
    assert "norm-outlier" not in changed(updates, "layers.2.q_proj", **mixed)


def test_the_norm_finding_names_the_cause_and_the_range(rng: np.random.Generator) -> None:
    updates = layers(rng)
    name = "layers.2.q_proj"
    others = [np.linalg.norm(u.B) for n, u in updates.items() if n.endswith("q_") or "q_" in n]
    others.remove(np.linalg.norm(updates[name].B))
    updates[name] = replace(updates[name], B=3000 * updates[name].B)
    (finding,) = check_updates(updates.values())
    norm = np.linalg.norm(updates[name].B)
    assert finding.fields["quantity"] == "‖B‖"
    assert finding.fields["value"] == pytest.approx(norm, rel=1e-5)
    assert finding.fields["ratio"] == pytest.approx(norm / max(others), rel=1e-5)
    assert (finding.fields["others"], finding.fields["scope"]) == (5, "of its type")


def test_a_type_of_few_modules_is_compared_with_the_whole_adapter(rng: np.random.Generator) -> None:
    updates = layers(rng, count=2, kinds="qkv")
    B = 100 * updates["layers.0.q_proj"].B
    assert changed(updates, "layers.0.q_proj", B=B) == ["norm-outlier"]
    few = {name: updates[name] for name in ("layers.0.q_proj", "layers.0.k_proj")}
    assert changed(few, "layers.0.q_proj", B=B) == []  # two norms say nothing


def test_embeddings_are_not_compared_with_linear_layers(rng: np.random.Generator) -> None:
    updates: dict[str, LowRankUpdate] = layers(rng)
    table = low_rank_update(rng, 64, 500, 4, name="embed_tokens")  # B starts at a norm of 16
    seen = np.zeros_like(table.A)
    seen[:, :40] = 0.01 * table.A[:, :40]
    updates["embed_tokens"] = replace(table, A=seen, layout="embedding")
    assert codes(*updates.values()) == []
    updates["embed_tokens"] = replace(table, A=np.zeros_like(table.A), layout="embedding")
    assert codes(*updates.values()) == ["no-gradient"]


def test_a_zero_a_is_damage_in_linear_layers(rng: np.random.Generator) -> None:
    updates = layers(rng)
    zero = np.zeros_like(updates["layers.0.q_proj"].A)
    assert changed(updates, "layers.0.q_proj", A=zero) == ["zero-a"]
    untrained = {n: replace(u, A=zero, B=np.zeros_like(u.B)) for n, u in updates.items()}
    (finding,) = check_updates(untrained.values())
    assert (finding.code, finding.fields["count"]) == ("zero-a", 24)


NO_GRADIENT = {
    "untrained": (lambda _: True, []),
    "a whole type": (lambda name: "k_proj" in name, ["no-gradient"]),
    "a whole layer": (lambda name: ".3." in name, ["no-gradient"]),
    "scattered": (lambda name: name in ("layers.1.k_proj", "layers.4.q_proj"), ["zero-b"]),
    "a layer and one more": (
        lambda name: ".5." in name or name == "layers.2.q_proj",
        ["zero-b", "no-gradient"],
    ),
}


@pytest.mark.parametrize("case", NO_GRADIENT)
def test_a_zero_b_is_a_note_in_whole_types_and_layers(rng: np.random.Generator, case: str) -> None:
    is_zero, expected = NO_GRADIENT[case]
    updates = layers(rng)
    zeroed = [replace(u, B=np.zeros_like(u.B)) if is_zero(n) else u for n, u in updates.items()]
    assert codes(*zeroed) == expected


def test_experts_that_were_never_routed_to_are_a_note(rng: np.random.Generator) -> None:
    updates = {
        f"layers.{i}.experts.{e}.w{k}": low_rank_update(rng, name=f"layers.{i}.experts.{e}.w{k}")
        for i in range(2)
        for e in range(8)
        for k in (1, 2)
    }
    for name, update in updates.items():
        if ".experts.6." in name and name.startswith("layers.0"):
            updates[name] = replace(update, B=np.zeros_like(update.B))
    assert codes(*updates.values()) == ["no-gradient"]
    rare = updates["layers.1.experts.2.w1"]
    updates[rare.name] = replace(rare, B=rare.B / 40)  # routed to a few times
    assert codes(*updates.values()) == ["unusual-norm", "no-gradient"]


def test_two_modules_with_the_same_factors_are_damage(rng: np.random.Generator) -> None:
    updates = layers(rng)
    other = updates["layers.1.v_proj"]
    assert changed(updates, "layers.4.v_proj", A=other.A, B=other.B) == ["twin-modules"]
    assert changed(updates, "layers.4.v_proj", A=other.A) == []  # an A that layers share
    copied = changed(updates, "layers.1.q_proj", A=other.A)
    assert copied == ["copied-a"]
    zero = np.zeros_like(other.B)
    untrained = {n: replace(u, A=other.A, B=zero) for n, u in updates.items()}
    assert codes(*untrained.values()) == ["copied-a"]


@pytest.mark.parametrize(
    "tied",
    [
        ("model.embed_tokens", "lm_head"),
        ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
        ("transformer.wte", "lm_head"),
        ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ],
)
def test_an_embedding_and_a_head_with_one_update_are_tied(
    rng: np.random.Generator, tied: tuple[str, ...]
) -> None:
    updates = layers(rng)
    shared = replace(updates["layers.1.v_proj"], layout="embedding")
    updates |= {name: replace(shared, name=name) for name in tied}
    del updates["layers.1.v_proj"]
    assert codes(*updates.values()) == []
    copied = replace(shared, name="layers.1.v_proj", layout="linear")
    assert codes(*updates.values(), copied) == ["twin-modules"]


def saved(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A folder in PEFT's layout."""
    path.mkdir(parents=True, exist_ok=True)
    stored(path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def factors(updates: dict[str, LowRankUpdate], dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Their tensors under PEFT's names."""
    return {
        f"base_model.model.{name}.lora_{role}.weight": getattr(update, role).astype(dtype)
        for name, update in updates.items()
        for role in "AB"
    }


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a file starts and stops."""
    return {info.name: (info.start, info.stop) for info in read_header(path).tensors.values()}


def damage(path: Path) -> list[str]:
    """The codes of all findings about an adapter, "refused" if it is not read."""
    try:
        return [f.code for f in check_updates(read_adapter(path, allow_pickle=True).values())]
    except InputError:
        return ["refused"]


def test_a_hole_ends_on_blocks_of_the_file(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = saved(tmp_path / "a", factors(layers(rng, d=512)))
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    start, stop = spans(file)["base_model.model.layers.3.k_proj.lora_B.weight"]
    first = -(-start // 512) * 512

    def zeroed(begin: int, end: int) -> list[str]:
        file.write_bytes(whole[:begin] + bytes(end - begin) + whole[end:])
        return damage(folder)

    assert damage(folder) == []
    assert zeroed(first, first + 1024) == ["file-hole"]
    assert zeroed(start, first + 512) == ["file-hole"]
    assert zeroed(stop - 300, stop) == []  # ends at the tensor's end alone
    assert zeroed(first + 4, first + 1028) == ["zeros-in-a-row"]
    assert zeroed(first + 4, first + 300) == []
    middle = (start + stop) // 8 * 4 + 4
    after = spans(file)["base_model.model.layers.3.o_proj.lora_A.weight"]
    assert zeroed(middle, after[1]) == ["zero-a", "file-hole"]  # from anywhere, over the next one


def test_tokens_that_were_never_seen_are_no_holes(tmp_path: Path, rng: np.random.Generator) -> None:
    A = np.zeros((8, 100_000), np.float32)
    A[:, rng.choice(100_000, 800, replace=False)] = 0.01
    A *= rng.standard_normal(A.shape).astype(np.float32)
    tensors = factors(layers(rng)) | {
        "base_model.model.embed.lora_embedding_A": A,
        "base_model.model.embed.lora_embedding_B": rng.standard_normal((64, 8)).astype(np.float32),
    }
    assert damage(saved(tmp_path / "a", tensors)) == ["zeros-in-a-row"]


def test_scattered_zeros_are_said_once(tmp_path: Path, rng: np.random.Generator) -> None:
    updates = layers(rng)
    sparse = {n: replace(u, B=u.B * (rng.random(u.B.shape) > 0.1)) for n, u in updates.items()}
    folder = saved(tmp_path / "a", factors(sparse, np.float16))
    (finding,) = check_updates(read_adapter(folder).values())
    assert (finding.code, finding.severity) == ("scattered-zeros", "limit")
    assert finding.fields["count"] == 24
    assert "underflow in float16" in finding.text
    dead = {n: replace(u, B=u.B * (np.arange(64) % 4 > 0)[:, None]) for n, u in updates.items()}
    assert damage(saved(tmp_path / "b", factors(dead))) == []  # zero rows are no finding


def test_transposed_and_sliced_factors_know_their_place(tmp_path: Path) -> None:
    path = stored(tmp_path / "x.safetensors", {"a": np.arange(24, dtype=np.float32).reshape(6, 4)})
    tensors = open_tensors(path)
    start = tensors.infos["a"].start  # type: ignore[attr-defined]
    whole = tensor("a")
    assert whole.position(tensors) == FilePosition(start, 4, (6, 4))
    assert whole.transpose().position(tensors) == FilePosition(start, 4, (4, 6))
    assert whole.rows(slice(2, 4)).position(tensors) == FilePosition(start + 32, 4, (2, 4))
    assert whole.columns(slice(0, 2)).position(tensors) is None
    assert whole.rows(slice(0, 6, 2)).position(tensors) is None
    assert whole.transpose().rows(slice(0, 2)).position(tensors) is None
    assert stack([whole, whole]).position(tensors) is None
    for factor in (whole, whole.transpose(), whole.rows(slice(2, 4))):
        position = factor.position(tensors)
        assert position is not None
        flat = factor.read(tensors).ravel(order="K")
        raw = path.read_bytes()[position.offset : position.offset + position.bytes]
        np.testing.assert_array_equal(flat, np.frombuffer(raw, "<f4"))


def test_swapped_factors_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    updates = layers(rng)
    swap = {"A": "B", "B": "A"}
    swapped = {
        f"base_model.model.{name}.lora_{swap[role]}.weight": getattr(update, role)
        for name, update in updates.items()
        for role in "AB"
    }
    path = stored(tmp_path / "a" / "adapter_model.safetensors", swapped)
    with pytest.raises(MalformedFileError, match="A and B are swapped: the rank of every module"):
        read_adapter(path, scale=1)
    high = factors({n: low_rank_update(rng, 8, 8, 32, name=n) for n in updates})
    folder = saved(tmp_path / "high", high)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"r": 32}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert damage(folder) == []  # a rank that the config states


class Planted(NamedTuple):
    """Damage, and the least share of it that has to be found."""

    change: Callable[[np.random.Generator, bytearray, dict[str, tuple[int, int]], np.dtype], None]
    rate: float


def _flip(
    rng: np.random.Generator, raw: bytearray, spans: dict[str, tuple[int, int]], dtype: np.dtype
) -> None:
    start, stop = list(spans.values())[rng.integers(len(spans))]
    element = start + int(rng.integers((stop - start) // dtype.itemsize)) * dtype.itemsize
    raw[element + dtype.itemsize - 1] ^= 0x40  # the top bit of the exponent


def _times(factor: float) -> Any:
    def change(
        rng: np.random.Generator, raw: bytearray, spans: dict[str, tuple[int, int]], dtype: np.dtype
    ) -> None:
        names = [name for name in spans if "lora_B" in name]
        start, stop = spans[names[rng.integers(len(names))]]
        values = np.frombuffer(bytes(raw[start:stop]), dtype)
        raw[start:stop] = (values * dtype.type(factor)).tobytes()

    return change


def _hole(size: int) -> Any:
    def change(
        rng: np.random.Generator, raw: bytearray, spans: dict[str, tuple[int, int]], _: np.dtype
    ) -> None:
        first = -(-min(start for start, _ in spans.values()) // 4096)
        start = int(rng.integers(first, (len(raw) - size) // 4096 + 1)) * 4096
        raw[start : start + size] = bytes(size)

    return change


def _half(
    rng: np.random.Generator, raw: bytearray, spans: dict[str, tuple[int, int]], _: np.dtype
) -> None:
    middle = len(raw) // 2 // 512 * 512 if rng.random() < 0.5 else len(raw) // 2
    raw[middle:] = bytes(len(raw) - middle)


PLANTED = {
    "top exponent bit": Planted(_flip, 0.97),
    "B x 3000": Planted(_times(3000), 0.97),
    "B x 100": Planted(_times(100), 0.94),
    "B x 30": Planted(_times(30), 0.84),
    "hole of 4 KiB": Planted(_hole(4096), 0.96),
    "hole of 64 KiB": Planted(_hole(65536), 0.98),
    "half of the file": Planted(_half, 0.9),
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name", PLANTED)
def test_planted_damage_is_found(
    tmp_path: Path, rng: np.random.Generator, name: str, dtype: type
) -> None:
    planted, trials, hits = PLANTED[name], 50, 0
    for trial in range(trials):
        if trial % 10 == 0:
            folder = saved(tmp_path, factors(layers(rng, d=384), dtype))
            file = folder / "adapter_model.safetensors"
            whole, tensor_spans = file.read_bytes(), spans(file)
            assert damage(folder) == []
        raw = bytearray(whole)
        planted.change(rng, raw, tensor_spans, np.dtype(dtype))
        file.write_bytes(raw)
        try:
            findings = check_updates(read_adapter(folder).values())
        except InputError:
            hits += 1
        else:
            hits += any(finding.severity == "damage" for finding in findings)
    assert hits >= planted.rate * trials


@pytest.mark.real
def test_no_adapter_of_others_is_accused(real_adapters: Path) -> None:
    read = 0
    for folder in sorted(path for path in real_adapters.iterdir() if path.is_dir()):
        pair = ("w_a_{name}", "w_b_{name}") if folder.name == "sam-ring" else None
        scale = None if pair is None else 1.0
        for ref in find_adapters(folder, pair=pair, allow_pickle=True):
            loaded = read_adapter(ref, pair=pair, scale=scale, allow_pickle=True)
            assert check_updates(loaded.values()) == (), ref.source
            read += 1
    assert read >= 10


def test_an_identity_as_a_is_no_copy(rng: np.random.Generator) -> None:
    # The exact factors of a LoKr of full rank are its product and an identity.
    A = np.eye(20, dtype=np.float32)
    updates = {
        name: LowRankUpdate(name, A=A, B=rng.standard_normal((24, 20)), scale=1.0)
        for name in ("layers.0.q_proj", "layers.0.v_proj")
    }
    assert "copied-a" not in {finding.code for finding in check_updates(updates.values())}
    copied = {name: replace(update, A=2 * A) for name, update in updates.items()}
    assert "copied-a" in {finding.code for finding in check_updates(copied.values())}

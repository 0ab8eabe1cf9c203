"""Adapters that name the same modules differently: compared as one, for every verb."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import low_rank_update
from safetensors.torch import save_file

from lora_analysis import open_base, read_adapter, study
from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.cli import run
from lora_analysis.conclusions import findings
from lora_analysis.errors import BaseWeightError
from lora_analysis.pairwise import align_adapters, pairwise

DENOISER = [f"layers.{i}.attention.{n}" for i in range(2) for n in ("to_q", "to_k", "to_out.0")]
DECODER = [f"layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qv"]


def called(updates: Iterable[LowRankUpdate], names: Iterable[str], label: str) -> Adapter:
    """Return an adapter of given factors under other names."""
    pairs = zip(updates, names, strict=True)
    return Adapter(
        {n: LowRankUpdate(name=n, A=u.A, B=u.B, scale=u.scale, label=label) for u, n in pairs},
        label=label,
    )


@pytest.fixture
def updates(rng: np.random.Generator) -> list[LowRankUpdate]:
    """Six updates of different weights of one shape."""
    return [low_rank_update(rng, 24, 20, 3, name=str(i)) for i in range(6)]


def spelled(prefix: str, names: list[str]) -> list[str]:
    """Return names behind a prefix; kohya's take their dots."""
    flat = prefix.startswith("lora_")
    return [prefix + (name.replace(".", "_") if flat else name) for name in names]


SPELLINGS = [
    ("lora_unet_", "diffusion_model.", DENOISER),
    ("lora_transformer_", "transformer.", DENOISER),
    ("model.diffusion_model.", "transformer.", DENOISER),
    ("", "unet.", DENOISER),
    ("model.", "model.language_model.", DECODER),
    ("language_model.model.", "model.language_model.", DECODER),
    ("module.model._orig_mod.", "_fsdp_wrapped_module.model.", DECODER),
    ("thinker.model.", "model.", DECODER),
    ("my_wrapper.inner.", "", DECODER),
]


@pytest.mark.parametrize(("first", "second", "names"), SPELLINGS)
def test_one_training_in_two_spellings_is_one(
    updates: list[LowRankUpdate], first: str, second: str, names: list[str]
) -> None:
    a = called(updates, spelled(first, names), "a")
    b = called(updates, spelled(second, names), "b")
    result = pairwise([a, b])
    assert len(result.modules) == len(names)
    assert set(result.modules) <= {*a, *b}  # names as they are stored, in one of the two
    np.testing.assert_allclose(result.cosine[:, 0, 1], 1.0)
    np.testing.assert_allclose(result.total_cosine, 1.0)
    table = study([a, b]).pairs.iloc[0]
    assert table["modules"] == len(names)
    assert table["total_cosine"] == pytest.approx(1.0)


# The same modules in the spelling of a model's authors and in that of diffusers or transformers.
FAMILIES = [
    (
        [
            f"diffusion_model.blocks.{i}.{n}"
            for i in range(2)
            for n in ("self_attn.o", "cross_attn.k", "ffn.0")
        ],
        [
            f"transformer.blocks.{i}.{n}"
            for i in range(2)
            for n in ("attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj")
        ],
    ),
    (
        [
            f"diffusion_model.{n}"
            for i in range(2)
            for n in (
                f"double_blocks.{i}.img_attn.proj",
                f"double_blocks.{i}.img_mlp.2",
                f"single_blocks.{i}.linear2",
            )
        ],
        [
            f"transformer.{n}"
            for i in range(2)
            for n in (
                f"transformer_blocks.{i}.attn.to_out.0",
                f"transformer_blocks.{i}.ff.net.2",
                f"single_transformer_blocks.{i}.proj_out",
            )
        ],
    ),
    (
        [
            f"lora_unet_input_blocks_{b}_1_transformer_blocks_0_attn1_to_{p}"
            for b in (4, 5)
            for p in "qkv"
        ],
        [
            f"unet.down_blocks.1.attentions.{a}.transformer_blocks.0.attn1.to_{p}"
            for a in (0, 1)
            for p in "qkv"
        ],
    ),
    (
        [
            f"vit.encoder.layer.{i}.{n}"
            for i in range(2)
            for n in ("attention.attention.query", "attention.output.dense", "intermediate.dense")
        ],
        [
            f"vit.layers.{i}.{n}"
            for i in range(2)
            for n in ("attention.q_proj", "attention.o_proj", "mlp.fc1")
        ],
    ),
    (
        [
            f"model.layers.{i}.block_sparse_moe.experts.1.{n}"
            for i in range(2)
            for n in ("w1", "w2", "w3")
        ],
        [
            f"model.layers.{i}.mlp.experts.1.{n}_proj"
            for i in range(2)
            for n in ("gate", "down", "up")
        ],
    ),
    (
        [
            f"lora_unet_double_blocks_{i}_{n}"
            for i in range(3)
            for n in ("txt_attn_proj", "img_mlp_0")
        ],
        [
            f"transformer.transformer_blocks.{i}.{n}"
            for i in range(3)
            for n in ("attn.to_add_out", "ff.net.0.proj")
        ],
    ),
]


@pytest.mark.parametrize(("first", "second"), FAMILIES)
def test_the_spellings_of_a_family_are_one(
    updates: list[LowRankUpdate], first: list[str], second: list[str]
) -> None:
    pair = [called(updates, first, "a"), called(updates, second, "b")]
    for order in (pair, pair[::-1]):
        result = pairwise(order)
        assert len(result.modules) == len(first)
        np.testing.assert_allclose(result.cosine[:, 0, 1], 1.0)


def test_adapters_of_equal_names_are_returned_as_they_are(updates: list[LowRankUpdate]) -> None:
    a, b = called(updates, DECODER, "a"), called(updates[:4], DECODER[:4], "b")
    assert align_adapters([a, b]) == [a, b]
    assert align_adapters([a, a]) == [a, a]


def test_updates_keep_the_name_of_their_file_for_the_base(updates: list[LowRankUpdate]) -> None:
    a = called(updates, DECODER, "a")
    b = called(updates, spelled("thinker.model.", DECODER), "b")
    _, again = align_adapters([a, b])
    assert list(again) == list(a)
    update = again[DECODER[0]]
    assert isinstance(update, LowRankUpdate)
    assert update.base_name == f"thinker.model.{DECODER[0]}"
    codes = [finding.code for finding in again.provenance.findings]
    assert codes == ["names-matched", "names-prefix"]


def test_a_prefix_is_asked_for_where_several_fit_alike(updates: list[LowRankUpdate]) -> None:
    a = called(updates[:3], DECODER[:3], "a")
    names = spelled("thinker.model.", DECODER[:3]) + spelled("talker.model.", DECODER[:3])
    b = called(updates, names, "b")
    for pair in ([a, b], [b, a]):
        result = study(pair)
        assert not result.pairs["modules"].any()
        assert any(one.code == "names-ambiguous" for one in findings(result))
        told = pairwise(pair, prefix="talker.model")
        own = updates[3:]
        cosine = [_cosine(x, y) for x, y in zip(updates[:3], own, strict=True)]
        assert np.nanmean(told.cosine[:, 0, 1]) == pytest.approx(np.mean(cosine))
        assert study(pair, prefix=["thinker="]).pairs["total_cosine"].item() == pytest.approx(1.0)


def _cosine(a: LowRankUpdate, b: LowRankUpdate) -> float:
    x, y = a.delta_weight(), b.delta_weight()
    return float(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))


def test_layers_of_the_mtp_head_are_not_the_decoders(updates: list[LowRankUpdate]) -> None:
    a = called(updates, spelled("model.", DECODER), "a")
    b = called(updates, spelled("mtp.", DECODER), "b")
    assert not study([a, b]).pairs["modules"].any()
    both = called([*updates, *updates[::-1]], spelled("mtp.", DECODER) + DECODER, "both")
    result = pairwise([a, both])
    assert np.isfinite(result.cosine[:, 0, 1]).sum() == len(DECODER)


def test_names_that_nothing_matches_are_listed_with_the_next_step(
    updates: list[LowRankUpdate],
) -> None:
    a = called(updates, spelled("left.", DECODER), "a")
    b = called(updates, spelled("right.", DECODER), "b")
    (text,) = (f.text for f in findings(study([a, b])) if f.code == "no-common-module")
    assert f"'left.{DECODER[0]}'" in text
    assert f"'right.{DECODER[0]}'" in text
    assert "--prefix" in text
    assert study([a, b], prefix={"left": "right"}).pairs["total_cosine"].item() == pytest.approx(1)


def test_a_text_adapter_and_a_vision_tower_of_one_shape_are_not_compared(
    updates: list[LowRankUpdate],
) -> None:
    a = called(updates, spelled("model.", DECODER), "a")
    b = called(updates, spelled("model.vision_tower.", DECODER), "b")
    assert not study([a, b]).pairs["modules"].any()


def test_three_spellings_of_one_file_find_one_base(
    rng: np.random.Generator, updates: list[LowRankUpdate]
) -> None:
    weights = {n: rng.standard_normal((24, 20)) for n in DENOISER}
    fused = {"model.diffusion_model.layers.0.attention.qkv.weight": rng.standard_normal((72, 20))}
    for base in (
        {f"{n}.weight": W for n, W in weights.items()},
        {f"model.diffusion_model.{n}.weight": W for n, W in weights.items()},
        {f"transformer.{n}.weight": W for n, W in weights.items()},
    ):
        opened = open_base(base)
        for prefix in ("lora_unet_", "diffusion_model.", "transformer.", ""):
            adapter = called(updates, spelled(prefix, DENOISER), "a")
            matched = opened.matched_to([adapter])
            for name, plain in zip(spelled(prefix, DENOISER), DENOISER, strict=True):
                W = matched.weight(name, shape=(24, 20)).array()
                np.testing.assert_array_equal(W, weights[plain].astype(np.float32))
    whole = fused["model.diffusion_model.layers.0.attention.qkv.weight"].astype(np.float32)
    for prefix in ("lora_unet_", "diffusion_model.", "transformer."):
        (name,) = spelled(prefix, ["layers.0.attention.to_k"])
        part = open_base(fused).weight(name, shape=(24, 20)).array()
        np.testing.assert_array_equal(part, whole[24:48])


def test_the_prefix_of_a_base_is_decided_for_the_adapter_as_a_whole(
    rng: np.random.Generator, updates: list[LowRankUpdate]
) -> None:
    def base(**heights: int) -> dict[str, np.ndarray]:
        return {
            f"{part}.model.{name}.weight": rng.standard_normal((height, 20))
            for part, height in heights.items()
            for name in DECODER
        }

    adapter = called(updates, spelled("model.", DECODER), "a")
    apart = open_base(base(thinker=24, talker=32)).matched_to([adapter])
    assert apart.weight(next(iter(adapter)), shape=(24, 20)).name.startswith("thinker")
    alike = open_base(base(thinker=24, talker=24))
    with pytest.raises(BaseWeightError, match="--prefix"):
        study([adapter], base=alike)
    result = study([adapter], base=alike, prefix="talker.model=model")
    assert result.amplifications["module"].nunique() == len(DECODER)
    # One module fits the talker alone: it does not go there while the others stay open.
    odd = base(thinker=24, talker=24)
    odd[f"thinker.model.{DECODER[0]}.weight"] = rng.standard_normal((32, 20))
    chosen = open_base(odd).matched_to([adapter])
    names = {chosen.weight(name, shape=(24, 20)).name.partition(".")[0] for name in adapter}
    assert names == {"talker"}


def test_a_base_of_other_names_is_refused_with_both_lists(updates: list[LowRankUpdate]) -> None:
    inner = [name.removeprefix("layers.") for name in DECODER]
    adapter = called(updates, spelled("left.blocks.", inner), "a")
    base = open_base({f"right.stages.{name}.weight": np.ones((24, 20)) for name in inner})
    with pytest.raises(BaseWeightError) as error:
        study([adapter], base=base)
    for text in ("'left.blocks.0.self_attn", "'right.stages.0.self_attn", "--prefix"):
        assert text in str(error.value)
    result = study([adapter], base=base, prefix="left.blocks=right.stages")
    assert result.amplifications["module"].nunique() == len(DECODER)


def _files(folder: Path, updates: list[LowRankUpdate]) -> dict[str, str]:
    tensors: dict[str, dict[str, torch.Tensor]] = {"musubi": {}, "comfy": {}, "diffusers": {}}
    for name, update in zip(DENOISER, updates, strict=True):
        a, b = (torch.tensor(factor, dtype=torch.float32) for factor in (update.A, update.B))
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors["musubi"] |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        tensors["comfy"] |= {
            f"diffusion_model.{name}.lora_A.weight": a,
            f"diffusion_model.{name}.lora_B.weight": b,
        }
        tensors["diffusers"] |= {
            f"transformer.{name}.lora_A.weight": a.clone(),
            f"transformer.{name}.lora_B.weight": b.clone(),
        }
    for label, stored in tensors.items():
        save_file({k: v.contiguous() for k, v in stored.items()}, folder / f"{label}.safetensors")
    return {label: str(folder / f"{label}.safetensors") for label in tensors}


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run a command; return its exit code and what it printed."""
    code = run([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


@pytest.mark.slow
def test_the_verbs_take_files_of_three_programs(
    updates: list[LowRankUpdate], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = _files(tmp_path, updates)
    options = ("--scale", 1, "--format", "json")
    for a, b in (("musubi", "comfy"), ("comfy", "diffusers"), ("diffusers", "musubi")):
        code, out = call(capsys, "compare", files[a], files[b], *options)
        assert code == 0
        pair = json.loads(out)["pair"]
        assert pair["modules"] == len(DENOISER)
        assert pair["total_cosine"] == pytest.approx(1.0)
    code, out = call(
        capsys, "heatmap", files["musubi"], files["comfy"], *options, "-o", tmp_path / "h.svg"
    )
    assert code == 0
    assert set(json.loads(out)["modules"]) <= set(spelled("diffusion_model.", DENOISER))
    base = tmp_path / "base.safetensors"
    weights = {f"{name}.weight": np.ones((24, 20), np.float32) for name in DENOISER}
    save_file({name: torch.tensor(W) for name, W in weights.items()}, base)
    for label in files:
        code, out = call(capsys, "amplify", files[label], "--base", base, *options)
        assert code == 0
        assert {row["module"] for row in json.loads(out)["modules"]} == set(
            read_adapter(files[label])
        )


def test_the_command_line_takes_prefixes(
    updates: list[LowRankUpdate], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label, prefix in (("a", "left."), ("b", "right.")):
        stored = {}
        for name, update in zip(spelled(prefix, DECODER), updates, strict=True):
            key = f"base_model.model.{name}"
            stored[f"{key}.lora_A.weight"] = torch.tensor(update.A).float()
            stored[f"{key}.lora_B.weight"] = torch.tensor(update.B).float()
        (tmp_path / label).mkdir()
        save_file(stored, tmp_path / label / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
        (tmp_path / label / "adapter_config.json").write_text(json.dumps(config))
    places = [tmp_path / label for label in "ab"]
    code, out = call(capsys, "compare", *places, "--prefix", "left=right", "--format", "json")
    assert code == 0
    assert json.loads(out)["pair"]["total_cosine"] == pytest.approx(1.0)
    assert list(read_adapter(places[0])) == spelled("left.", DECODER)  # as they are stored
    assert call(capsys, "compare", *places, "--prefix", "=right")[0] == 3
    output = tmp_path / "h.svg"
    assert call(capsys, "heatmap", *places, "-o", output)[0] == 3
    assert call(capsys, "heatmap", *places, "-o", output, "--prefix", "left=right")[0] == 0

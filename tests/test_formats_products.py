"""LoHa and LoKr: the factors that are read multiply to the update that their own code applies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_analysis import (
    merge_check,
    read_adapter,
    resize_adapter,
    singular_values,
    spectrum,
)
from lora_analysis.cli import run
from lora_analysis.edit import truncate
from lora_analysis.errors import MalformedFileError, UnsupportedMethodError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ROUND = 1e-12


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def write(path: Path, tensors: dict[str, np.ndarray]) -> Any:
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
    return read_adapter(path)


LOKR: dict[str, tuple[dict[str, tuple[int, ...]], int | None]] = {
    "both whole": ({"w1": (3, 4), "w2": (8, 6)}, None),
    "second factored": ({"w1": (3, 4), "w2_a": (8, 2), "w2_b": (2, 6)}, 2),
    "first factored": ({"w1_a": (3, 2), "w1_b": (2, 4), "w2": (8, 6)}, 2),
    "both factored": ({"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (8, 2), "w2_b": (2, 6)}, 2),
    "convolution": ({"w1": (3, 4), "w2": (8, 6, 3, 3)}, None),
    "factored convolution": ({"w1": (3, 4), "w2_a": (8, 2), "w2_b": (2, 54)}, 2),
    "Tucker": ({"w1": (3, 4), "t2": (2, 2, 3, 3), "w2_a": (2, 8), "w2_b": (2, 6)}, 2),
}  # fmt: skip


def kronecker(parts: dict[str, np.ndarray]) -> np.ndarray:
    """Return C ⊗ D as its authors write it, in float64."""
    p = {name: value.astype(np.float64) for name, value in parts.items()}
    first = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
    if "t2" in p:
        second = np.einsum("ijkl,ip,jr->prkl", p["t2"], p["w2_a"], p["w2_b"])
    else:
        second = p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"]
    return np.kron(first, second.reshape(len(second), -1))


@pytest.mark.parametrize("case", LOKR)
def test_lokr_is_a_kronecker_product(case: str, tmp_path: Path, rng: np.random.Generator) -> None:
    shapes, rank = LOKR[case]
    parts = {name: draw(rng, *shape) for name, shape in shapes.items()}
    module = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {f"{module}.lokr_{name}": value for name, value in parts.items()}
    tensors[f"{module}.alpha"] = np.array(3.0, np.float32)
    adapter = write(tmp_path / "a.safetensors", tensors)
    assert adapter.provenance.format == "lycoris"
    (update,) = adapter.values()
    # LyCORIS ignores alpha if nothing is factored.
    assert update.scale == (1 if rank is None else 3.0 / rank)
    expected = update.scale * kronecker(parts)
    np.testing.assert_allclose(update.delta_weight(), expected, rtol=ROUND, atol=ROUND)
    assert update.kernel == ((3, 3) if case in ("convolution", "Tucker") else ())
    singular = np.linalg.svd(expected, compute_uv=False)
    values = spectrum(update).S
    np.testing.assert_allclose(values, singular[: len(values)], rtol=1e-9, atol=1e-9 * singular[0])


@pytest.mark.parametrize("case", LOKR)
def test_the_spectrum_of_lokr_comes_from_its_parts(
    case: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    parts = {name: draw(rng, *shape) for name, shape in LOKR[case][0].items()}
    tensors = {f"lora_unet_m.lokr_{name}": value for name, value in parts.items()}
    (update,) = write(tmp_path / "a.safetensors", tensors).values()
    assert update.kronecker is not None
    by_parts, from_factors = spectrum(update), spectrum(replace(update, kronecker=None))
    expected = update.scale * kronecker(parts)
    size = by_parts.S[0]
    np.testing.assert_allclose(by_parts.S, from_factors.S, atol=ROUND * size)
    np.testing.assert_allclose(by_parts.U * by_parts.S @ by_parts.V.T, expected, atol=ROUND * size)
    assert by_parts.numerical_rank == from_factors.numerical_rank
    assert np.isclose(by_parts.factor_condition, from_factors.factor_condition)
    np.testing.assert_allclose(singular_values(update), by_parts.S, rtol=ROUND)
    # Other factors have other parts, or none.
    halved = replace(update, A=update.A / 2)
    assert halved.kronecker is None
    np.testing.assert_allclose(spectrum(halved).S, by_parts.S / 2, atol=ROUND * size)
    assert replace(update, label="x").kronecker is update.kronecker
    truncated, _ = truncate(update, rank=2)
    best = (by_parts.U[:, :2] * by_parts.S[:2]) @ by_parts.V[:, :2].T
    np.testing.assert_allclose(truncated.delta_weight(), best, atol=ROUND * size)


@pytest.mark.parametrize("tucker", [False, True])
def test_loha_is_a_hadamard_product(tucker: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    r, d_out, d_in = 3, 20, 15
    shapes = {"w1_a": (d_out, r), "w1_b": (r, d_in), "w2_a": (d_out, r), "w2_b": (r, d_in)}
    if tucker:
        shapes |= {"w1_a": (r, d_out), "w2_a": (r, d_out), "t1": (r, r, 3, 3), "t2": (r, r, 3, 3)}
    parts = {name: draw(rng, *shape) for name, shape in shapes.items()}
    tensors = {f"lora_unet_mid_block.hada_{name}": value for name, value in parts.items()}
    tensors["lora_unet_mid_block.alpha"] = np.array(1.5, np.float32)
    (update,) = write(tmp_path / "a.safetensors", tensors).values()
    p = {name: value.astype(np.float64) for name, value in parts.items()}
    if tucker:
        each = [
            np.einsum("ijkl,ip,jr->prkl", p[f"t{n}"], p[f"w{n}_a"], p[f"w{n}_b"]) for n in (1, 2)
        ]
    else:
        each = [p[f"w{n}_a"] @ p[f"w{n}_b"] for n in (1, 2)]
    expected = (1.5 / r * each[0] * each[1]).reshape(d_out, -1)
    np.testing.assert_allclose(update.delta_weight(), expected, rtol=ROUND, atol=ROUND)
    assert update.rank == r * r


def test_a_file_may_mix_them_with_plain_pairs(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {
        "lora_unet_a.lora_down.weight": draw(rng, 2, 12),
        "lora_unet_a.lora_up.weight": draw(rng, 8, 2),
        "lora_unet_a.alpha": np.array(2.0, np.float32),
        "lora_unet_b.lokr_w1": draw(rng, 2, 3),
        "lora_unet_b.lokr_w2": draw(rng, 4, 4),
    }
    adapter = write(tmp_path / "a.safetensors", tensors)
    assert list(adapter) == ["lora_unet_a", "lora_unet_b"]
    assert [update.scale for update in adapter.values()] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"m.lokr_w1": (2, 2)}, "lokr_w2"),
        ({"m.hada_w1_a": (4, 2), "m.hada_w1_b": (2, 4)}, "hada_w2_a"),
        ({"m.lokr_w1": (2, 2, 2), "m.lokr_w2": (2, 2)}, "parts of 'm'"),
        (
            {"m.hada_w1_a": (4, 2), "m.hada_w1_b": (2, 4), "m.hada_w2_a": (5, 2),
             "m.hada_w2_b": (2, 4)},
            "rows of shapes",
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(
    tensors: dict[str, tuple[int, ...]], text: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    with pytest.raises(MalformedFileError, match=text):
        write(tmp_path / "a.safetensors", {k: draw(rng, *shape) for k, shape in tensors.items()})


def test_a_factor_larger_than_any_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {"m.lokr_w1": draw(rng, 300, 300), "m.lokr_w2": draw(rng, 300, 300)}
    with pytest.raises(MalformedFileError, match="shape"):
        write(tmp_path / "a.safetensors", tensors)


class Model(torch.nn.Module):
    """A linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(24, 20)
        self.conv = torch.nn.Conv2d(8, 12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def peft_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(Model(), config)
    for name, parameter in model.named_parameters():
        if "hada_" in name or "lokr_" in name:
            parameter.data = torch.randn_like(parameter)
    return model


CONFIGS = {
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=["proj", "conv"]),
    "loha effective": peft.LoHaConfig(
        r=3, alpha=5, target_modules=["proj", "conv"], use_effective_conv2d=True
    ),
    "lokr": peft.LoKrConfig(r=2, alpha=5, target_modules=["proj", "conv"]),
    "lokr both": peft.LoKrConfig(
        r=2, alpha=5, target_modules=["proj", "conv"], decompose_both=True, decompose_factor=4
    ),
    "lokr effective": peft.LoKrConfig(
        r=2, alpha=5, target_modules=["proj", "conv"], use_effective_conv2d=True
    ),
    "lokr whole": peft.LoKrConfig(r=64, alpha=5, target_modules=["proj", "conv"]),
    "patterns": peft.LoHaConfig(
        r=3, alpha=5, target_modules=["proj", "conv"], rank_pattern={"proj": 2},
        alpha_pattern={"conv": 7},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_pefts_update_is_read(case: str, tmp_path: Path) -> None:
    model = peft_model(CONFIGS[case])
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert list(adapter) == ["conv", "proj"]
    for name, update in adapter.items():
        layer = model.base_model.model.get_submodule(name)
        expected = layer.get_delta_weight("default").detach().double().numpy()
        size = np.abs(expected).max()
        np.testing.assert_allclose(
            update.delta_weight(), expected.reshape(len(expected), -1), atol=1e-5 * size
        )


def test_a_merge_of_lokr_is_checked(tmp_path: Path) -> None:
    model = peft_model(CONFIGS["lokr"])
    model.save_pretrained(tmp_path / "adapter")
    base = {f"{n}.weight": p.detach().numpy().copy() for n, p in (
        (name, getattr(model.base_model.model, name).base_layer.weight) for name in ("proj", "conv")
    )}  # fmt: skip
    merged = model.merge_and_unload()
    after = {f"{name}.weight": getattr(merged, name).weight.detach().numpy() for name in
             ("proj", "conv")}  # fmt: skip
    adapter = read_adapter(tmp_path / "adapter")
    assert not merge_check(adapter, base, after).is_failed
    assert merge_check(adapter, base, base).is_failed


OTHERS = {
    "OFT": peft.OFTConfig(r=4, oft_block_size=0, target_modules=["proj"]),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=["proj"]),
    "IA3": peft.IA3Config(target_modules=["proj"], feedforward_modules=[]),
    "HRA": peft.HRAConfig(target_modules=["proj"]),
    "VERA": peft.VeraConfig(target_modules=["proj"]),
    "RANDLORA": peft.RandLoraConfig(target_modules=["proj"]),
    "FOURIERFT": peft.FourierFTConfig(target_modules=["proj"], n_frequency=10),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_name_a_way_out_that_exists(method: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(Model(), OTHERS[method])
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedMethodError, match="extract merged --base base") as error:
        read_adapter(tmp_path)
    assert f"'{method}'" in str(error.value)
    assert ("convert_to_lora" in str(error.value)) == model.supports_lora_conversion()
    assert load_file(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("keys", "method"),
    [
        (("m.on_input", "m.weight"), "IA3"),
        (("m.oft_blocks", "m.alpha"), "OFT or BOFT"),
        (("m.lambda_layer", "m.p_layer.weight", "m.q_layer.weight"), "T-LoRA"),
        (("m.a1.weight", "m.a2.weight", "m.b1.weight", "m.b2.weight"), "GLoRA"),
        (("m.diff", "m.diff_b"), "difference of a whole weight"),
    ],
)
def test_other_methods_of_lycoris_name_a_way_out(
    keys: tuple[str, ...], method: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    with pytest.raises(UnsupportedMethodError, match="extract merged --base base") as error:
        write(tmp_path / "a.safetensors", {key: draw(rng, 4, 4) for key in keys})
    assert method in str(error.value).replace("\n", " ")


@pytest.mark.parametrize("kind", ["LoKr", "LoHa"])
def test_the_error_of_a_reduced_rank_is_that_of_the_dense_update(
    kind: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "LoKr":
        C, D = (draw(rng, *shape).astype(np.float64) for shape in ((4, 3), (6, 8)))
        dense = np.kron(C, D)
        parts = {"lokr_w1": C, "lokr_w2": D}
    else:
        parts = {
            f"hada_w{n}_{side}": draw(rng, *shape).astype(np.float64)
            for n in (1, 2) for side, shape in (("a", (24, 3)), ("b", (3, 20)))
        }  # fmt: skip
        dense = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (
            parts["hada_w2_a"] @ parts["hada_w2_b"]
        )
    tensors = {f"lora_unet_down_blocks_0_attentions_0_proj_in.{k}": v for k, v in parts.items()}
    (name,) = adapter = write(tmp_path / "a.safetensors", tensors)
    dense *= adapter[name].scale
    resized = resize_adapter(adapter, rank=3)
    error = np.linalg.norm(dense - resized.adapter[name].delta_weight()) / np.linalg.norm(dense)
    assert resized.error == pytest.approx(error, rel=ROUND)
    singular = np.linalg.svd(dense, compute_uv=False)
    best = np.linalg.norm(singular[3:]) / np.linalg.norm(singular)
    assert resized.error == pytest.approx(best, rel=1e-10)
    options = ["--rank", "3", "--format", "json", "-o", str(tmp_path / "small.safetensors")]
    assert run(["resize", str(tmp_path / "a.safetensors"), *options]) == 0
    printed = json.loads(capsys.readouterr().out)["error"]
    small = next(iter(read_adapter(tmp_path / "small.safetensors").values()))
    written = np.linalg.norm(dense - small.delta_weight()) / np.linalg.norm(dense)
    assert printed == pytest.approx(written, rel=1e-9)
    assert run(
        ["convert", str(tmp_path / "a.safetensors"), "--to", "peft", "-o", str(tmp_path / "peft")]
    ) == 0  # fmt: skip
    converted = next(iter(read_adapter(tmp_path / "peft").values()))
    np.testing.assert_allclose(converted.delta_weight(), dense, rtol=1e-5, atol=1e-5)

"""kohya-ss files and LyCORIS' LoCon; their other methods are refused by name.

All files are made here by the layout that sd-scripts (``networks/lora.py``, ``lora_flux.py``) and
LyCORIS 4.1 (``modules/locon.py``) document.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from image_files import kohya_conv, kohya_linear, kohya_tucker, normal, stored

from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.errors import MalformedFileError, UnsupportedMethodError
from lora_analysis.formats import find_adapters, read_adapter

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def low_rank(adapter: Adapter, name: str = NAME) -> LowRankUpdate:
    update = adapter[name]
    assert isinstance(update, LowRankUpdate)
    return update


def test_a_linear_reads_with_alpha_over_r(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = kohya_linear(rng, NAME, rank=4, alpha=3.0)
    adapter = read_adapter(stored(tmp_path / "anime.safetensors", tensors))
    update = low_rank(adapter)
    assert (adapter.provenance.format, adapter.label) == ("kohya", "anime")
    assert (update.scale, update.alpha, update.layout) == (0.75, 3.0, "linear")
    assert adapter.provenance.scale_origin == {NAME: "tensor"}
    assert adapter.provenance.findings == ()
    up, down = (tensors[f"{NAME}.lora_{role}.weight"].astype(float) for role in ("up", "down"))
    np.testing.assert_allclose(update.delta_weight(), 0.75 * up @ down, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.float64])
def test_alpha_may_be_of_any_type_and_of_one_dimension(
    tmp_path: Path, rng: np.random.Generator, dtype: type
) -> None:
    tensors = kohya_linear(rng, NAME, rank=4) | {f"{NAME}.alpha": np.array([3], dtype)}
    assert low_rank(read_adapter(stored(tmp_path / "f.safetensors", tensors))).scale == 0.75


def test_the_callers_scale_comes_before_the_files(tmp_path: Path, rng: np.random.Generator) -> None:
    path = stored(tmp_path / "f.safetensors", kohya_linear(rng, NAME, rank=4, alpha=3.0))
    assert low_rank(read_adapter(path, alpha=8)).scale == 2
    assert read_adapter(path, scale=5).provenance.scale_origin == {NAME: "caller"}


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_a_missing_alpha_is_r_by_the_format_and_is_said(
    tmp_path: Path, rng: np.random.Generator, alpha: float | None
) -> None:
    tensors = kohya_linear(rng, NAME, rank=4, alpha=alpha) | kohya_linear(rng, "lora_te_q")
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
    assert (low_rank(adapter).scale, low_rank(adapter).alpha) == (1.0, 4.0)
    assert adapter.provenance.scale_origin == {NAME: "format", "lora_te_q": "tensor"}
    (finding,) = map(str, adapter.provenance.findings)
    assert "1 of 2 modules state no alpha" in finding
    assert "alpha = r" in finding


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_is_its_kernels_row_by_row(
    tmp_path: Path, rng: np.random.Generator, kernel: int
) -> None:
    tensors = kohya_conv(rng, NAME, kernel)
    update = low_rank(read_adapter(stored(tmp_path / "f.safetensors", tensors)))
    assert (update.layout, update.kernel) == ("conv", (kernel, kernel))
    up, down = (tensors[f"{NAME}.lora_{role}.weight"].astype(float) for role in ("up", "down"))
    wanted = np.zeros((6, 5, kernel, kernel))
    for o, c, x, y in np.ndindex(*wanted.shape):
        wanted[o, c, x, y] = 0.5 * sum(up[o, k, 0, 0] * down[k, c, x, y] for k in range(2))
    np.testing.assert_allclose(update.delta_weight().reshape(wanted.shape), wanted, rtol=1e-10)


def test_a_tucker_core_is_exactly_contracted(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = kohya_tucker(rng, NAME, rank=3)
    update = low_rank(read_adapter(stored(tmp_path / "f.safetensors", tensors)))
    assert (update.layout, update.kernel, update.rank) == ("conv", (3, 3), 3)
    up, down, mid = (
        tensors[f"{NAME}.lora_{role}.weight"].astype(float) for role in ("up", "down", "mid")
    )
    # The formula as LyCORIS writes it (functional/general.py, rebuild_tucker).
    wanted = np.einsum("ijkl,ip,jr->prkl", mid, up[:, :, 0, 0].T, down[:, :, 0, 0]) / 3
    np.testing.assert_allclose(update.delta_weight().reshape(6, 5, 3, 3), wanted, rtol=1e-6)


def test_a_core_that_does_not_fit_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = kohya_tucker(rng, NAME) | {f"{NAME}.lora_mid.weight": normal(rng, 2, 3, 3, 3)}
    with pytest.raises(MalformedFileError, match=r"a core of shape \(2, 3, 3, 3\)"):
        read_adapter(stored(tmp_path / "f.safetensors", tensors))


def test_a_stored_scalar_multiplies(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = kohya_linear(rng, NAME)
    plain = read_adapter(stored(tmp_path / "f.safetensors", tensors))[NAME].delta_weight()
    tensors[f"{NAME}.scalar"] = np.array(0.25, np.float32)
    scaled = read_adapter(stored(tmp_path / "g.safetensors", tensors))[NAME].delta_weight()
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-10)


@pytest.mark.parametrize("conv", [False, True])
def test_dora_norms_of_rows_come_with_the_update(
    tmp_path: Path, rng: np.random.Generator, conv: bool
) -> None:
    tensors = kohya_conv(rng, NAME) if conv else kohya_linear(rng, NAME)
    norms = normal(rng, 6, *((1, 1, 1) if conv else (1,)))
    tensors[f"{NAME}.dora_scale"] = norms
    update = low_rank(read_adapter(stored(tmp_path / "f.safetensors", tensors)))
    assert update.variant == "DoRA"
    np.testing.assert_array_equal(update.magnitude, norms.ravel())


def test_dora_norms_of_columns_are_told_apart_even_where_square(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = kohya_linear(rng, NAME, 5, 5) | {f"{NAME}.dora_scale": normal(rng, 1, 5)}
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
    assert (low_rank(adapter).variant, low_rank(adapter).magnitude_side) == ("DoRA", "input")
    assert [finding.code for finding in adapter.provenance.findings] == ["dora", "dora-columns"]


@pytest.mark.parametrize(
    "prefix",
    [
        *("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_"),
        *("lycoris_", "diffusion_model.blocks.0."),
    ],
)
def test_every_prefix_is_kept_in_the_name(
    tmp_path: Path, rng: np.random.Generator, prefix: str
) -> None:
    """The prefixes of sd-scripts, OneTrainer, SimpleTuner, and of dotted names."""
    adapter = read_adapter(stored(tmp_path / "f.safetensors", kohya_linear(rng, f"{prefix}q")))
    assert list(adapter) == [f"{prefix}q"]
    assert adapter.provenance.scale_origin == {f"{prefix}q": "tensor"}


def test_an_underscored_conversion_with_doubled_prefixes_reads(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Keys as a published conversion has them: ``_lora_down``, the prefix twice, no alpha."""
    tensors = {}
    for prefix in ("lora_unet_unet_down_q", "lora_te_text_encoder_q", "lora_te_v"):
        tensors |= {
            f"{prefix}_lora_down.weight": normal(rng, 2, 5),
            f"{prefix}_lora_up.weight": normal(rng, 6, 2),
        }
    for role in ("down", "up"):
        key = f"lora_te_v_lora_{role}.weight"
        tensors[f"lora_te_v_lora_linear_layer_{role}.weight"] = tensors.pop(key)
    adapter = read_adapter(stored(tmp_path / "new.safetensors", tensors))
    assert list(adapter) == ["lora_te_q", "lora_te_v", "lora_unet_down_q"]
    assert set(adapter.provenance.scale_origin.values()) == {"format"}


def test_dora_norms_of_another_number_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = kohya_linear(rng, NAME) | {f"{NAME}.dora_scale": normal(rng, 7, 1)}
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
    with pytest.raises(MalformedFileError, match="has 7 entries for 6 rows"):
        adapter[NAME]


def test_kohyas_metadata_names_base_and_seed(tmp_path: Path, rng: np.random.Generator) -> None:
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_seed": "42",
        "ss_network_dim": "Dynamic",
        "ss_sd_model_name": "x.safetensors",
    }
    path = stored(tmp_path / "f.safetensors", kohya_linear(rng, NAME), metadata)
    provenance = read_adapter(path).provenance
    assert (provenance.base_model, provenance.seed) == ("sdxl_base_v1-0", 42)


def fused(rng: np.random.Generator, module: str, widths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A fused projection of FLUX as sd-scripts saves one trained with ``split_qkv``."""
    n = len(widths)
    up, top = np.zeros((sum(widths), 2 * n), np.float32), 0
    for k, width in enumerate(widths):
        up[top : top + width, 2 * k : 2 * k + 2] = normal(rng, width, 2)
        top += width
    return {
        f"{module}.lora_down.weight": normal(rng, 2 * n, 5),
        f"{module}.lora_up.weight": up,
        f"{module}.alpha": np.array(2.0, np.float32),
    }


@pytest.mark.parametrize(
    ("module", "widths"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", (4, 4, 4)),
        ("lora_unet_single_blocks_7_linear1", (4, 4, 4, 16)),
    ],
)
def test_split_projections_saved_as_one_are_a_finding_and_keep_the_loaders_scale(
    tmp_path: Path, rng: np.random.Generator, module: str, widths: tuple[int, ...]
) -> None:
    tensors = fused(rng, module, widths)
    adapter = read_adapter(stored(tmp_path / "flux.safetensors", tensors))
    n = len(widths)
    assert low_rank(adapter, module).scale == 2 / (2 * n)
    assert f"trained as {n} separate LoRAs (split_qkv)" in adapter.provenance.findings[0].text
    tensors[f"{module}.lora_up.weight"][0, -1] = 1
    joint = read_adapter(stored(tmp_path / "joint.safetensors", tensors))
    assert joint.provenance.findings == ()
    tensors[f"{module}.lora_up.weight"][:] = 0  # untrained: no block says anything
    untrained = read_adapter(stored(tmp_path / "untrained.safetensors", tensors))
    assert untrained.provenance.findings == ()


def test_an_a_copied_to_q_k_and_v_is_a_finding(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors: dict[str, np.ndarray] = {}
    for block, letter in itertools.product(range(2), "qkv"):
        tensors |= kohya_linear(rng, f"lora_transformer_blocks_{block}_attn_to_{letter}")
    own = read_adapter(stored(tmp_path / "own.safetensors", tensors))
    assert own.provenance.findings == ()
    for key in tensors:
        if key.endswith("down.weight"):
            tensors[key] = tensors[key.replace("to_k", "to_q").replace("to_v", "to_q")]
    copied = read_adapter(stored(tmp_path / "copied.safetensors", tensors))
    (finding,) = map(str, copied.provenance.findings)
    assert "6 modules share their A" in finding
    assert [one.severity for one in copied.provenance.findings] == ["artifact"]


def test_whole_differences_beside_factors_are_reported(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = kohya_linear(rng, NAME) | {
        "lora_unet_norm.diff": normal(rng, 5),
        "lora_unet_norm.diff_b": normal(rng, 5),
        "lora_unet_lost.alpha": np.ones(1, np.float32),
    }
    adapter = read_adapter(stored(tmp_path / "f.safetensors", tensors))
    assert list(adapter) == [NAME]
    lost, full = sorted(map(str, adapter.provenance.findings))
    assert "2 tensors next to the factors: trained in full" in full
    assert "1 tensor next to the factors: no factors" in lost
    assert "'lora_unet_lost.alpha'" in lost


@pytest.mark.parametrize(
    ("ends", "method"),
    [
        (["oft_blocks"], "OFT"),
        (["a1.weight", "a2.weight", "b1.weight", "b2.weight"], "GLoRA"),
        (["weight", "on_input"], "IA3"),
        (["lora_down.weight", "lora_up.weight", "lambda_layer"], "T-LoRA"),
        (["diff"], "whole weight"),
        (["w_norm", "b_norm"], "whole weight"),
    ],
)
def test_other_methods_are_refused_by_name(
    tmp_path: Path, rng: np.random.Generator, ends: list[str], method: str
) -> None:
    tensors = {f"{NAME}.{end}": normal(rng, 4, 4) for end in ends}
    path = stored(tmp_path / "f.safetensors", tensors)
    for source in (path, tmp_path):
        with pytest.raises(UnsupportedMethodError, match=method) as caught:
            read_adapter(source)
        assert "f.safetensors" in str(caught.value)
    assert len(find_adapters(tmp_path)) == 1


def test_what_cannot_be_an_adapter_is_refused_with_names(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    whole = kohya_linear(rng, NAME)
    for change, told in (
        ({f"{NAME}.lora_up.weight": None}, rf"'{NAME}.lora_down.weight' but no .*lora_up.weight'"),
        ({f"{NAME}.alpha": normal(rng, 2)}, r"alpha' must be one finite number, found \(2,\)"),
        ({f"{NAME}.alpha": np.float32("nan")}, r"must be one finite number, found nan"),
        ({f"{NAME}.lora_up.weight": normal(rng, 6, 3)}, r"different ranks.*\(2, 5\).*\(6, 3\)"),
        ({f"{NAME}_lora_up.weight": normal(rng, 6, 2)}, "are both B of"),
        (
            {"lora_unet_x.lora_mid.weight": normal(rng, 2, 2, 3, 3)},
            "'lora_unet_x' has .*no factors",
        ),
    ):
        tensors = {key: value for key, value in (whole | change).items() if value is not None}
        path = stored(tmp_path / "f.safetensors", tensors)
        with pytest.raises(MalformedFileError, match=told):
            read_adapter(path)


def test_names_given_by_the_caller_come_first(tmp_path: Path, rng: np.random.Generator) -> None:
    path = stored(tmp_path / "f.safetensors", kohya_linear(rng, NAME))
    pair = ("{name}.lora_down.weight", "{name}.lora_up.weight")
    assert read_adapter(path, pair=pair, scale=1).provenance.format == "pairs"

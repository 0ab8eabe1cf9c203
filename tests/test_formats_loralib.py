"""loralib's state dictionaries, and fused weights in early PEFT, against the layers' own ΔW."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.cli import run
from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.formats import find_adapters, read_adapter

Q_AND_V = (True, False, True)


def matrix(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture
def merged(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, dict[str, np.ndarray]]:
    """A MergedLinear of q and v (A (2r, in), B (2·out/3, r)) beside a plain layer, r = 3.

    Made by the layout of loralib's ``layers.py``; the test below holds it against loralib.
    """
    tensors = {
        "h.0.attn.c_attn.lora_A": matrix(rng, 6, 8),
        "h.0.attn.c_attn.lora_B": matrix(rng, 10, 3),
        "h.0.mlp.lora_A": matrix(rng, 3, 8),
        "h.0.mlp.lora_B": matrix(rng, 7, 3),
    }
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    return path, tensors


def test_a_merged_layer_is_read_as_its_enabled_blocks(
    merged: tuple[Path, dict[str, np.ndarray]],
) -> None:
    path, tensors = merged
    adapter = read_adapter(path, enable_lora=Q_AND_V, alpha=6)
    assert list(adapter) == ["h.0.attn.c_attn.q", "h.0.attn.c_attn.v", "h.0.mlp"]
    a, b = (tensors[f"h.0.attn.c_attn.lora_{role}"].astype(float) for role in "AB")
    np.testing.assert_allclose(adapter["h.0.attn.c_attn.q"].delta_weight(), 2 * b[:5] @ a[:3])
    np.testing.assert_allclose(adapter["h.0.attn.c_attn.v"].delta_weight(), 2 * b[5:] @ a[3:])
    assert adapter.provenance.format == "loralib"
    assert adapter.provenance.rank == 3
    assert "1 fused module are read block by block" in adapter.provenance.findings[0].text


def test_without_enable_lora_a_merged_layer_is_refused_with_the_hint(
    merged: tuple[Path, dict[str, np.ndarray]],
) -> None:
    with pytest.raises(UnsupportedMethodError, match=r"2 blocks .* enable_lora=.* --enable-lora"):
        read_adapter(merged[0])
    with pytest.raises(InputError, match=r"which does not fit enable_lora=\(True, True, True\)"):
        read_adapter(merged[0], enable_lora=(True, True, True))
    with pytest.raises(InputError, match="enables no block"):
        read_adapter(merged[0], enable_lora=(False, False))


def test_one_enabled_block_is_told_by_the_modules_name(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = {"c_attn.lora_A": matrix(rng, 2, 8), "c_attn.lora_B": matrix(rng, 4, 2)}
    tensors |= {"proj.lora_A": matrix(rng, 2, 8), "proj.lora_B": matrix(rng, 4, 2)}
    save_file(tensors, tmp_path / "m.safetensors")
    one = read_adapter(tmp_path / "m.safetensors", enable_lora=(False, True, False))
    assert list(one) == ["c_attn.k", "proj"]
    assert list(read_adapter(tmp_path / "m.safetensors")) == ["c_attn", "proj"]


def test_blocks_of_an_interleaved_weight_are_not_called_q_and_v(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    key = "h.0.self_attention.query_key_value.lora_"
    save_file({f"{key}A": matrix(rng, 4, 8), f"{key}B": matrix(rng, 10, 2)}, tmp_path / "m.npz.st")
    adapter = read_adapter(tmp_path / "m.npz.st", enable_lora=Q_AND_V)
    assert [name.rpartition(".")[2] for name in adapter] == ["rows0", "rows2"]
    assert "interleaves q, k and v per head" in adapter.provenance.findings[2].text


def test_the_command_line_says_which_blocks_are_enabled(
    merged: tuple[Path, dict[str, np.ndarray]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", str(merged[0]), "--format", "json", "--alpha", "6"]
    assert run([*arguments, "--enable-lora", "1,0,1"]) == 0
    assert "h.0.attn.c_attn.v" in capsys.readouterr().out
    assert run([*arguments, "--enable-lora", "yes"]) == 2
    assert "a 1 for each block" in capsys.readouterr().err
    assert run([*arguments, "--enable-lora", "1,0,1", "--heads", "4"]) == 2
    assert "heads of queries and of keys" in capsys.readouterr().err
    assert run([*arguments, "--enable-lora", "1,0,1", "--heads", "4,2", "--kernel", "3"]) == 0


def convolution(
    path: Path, rng: np.random.Generator, **frozen: np.ndarray
) -> dict[str, np.ndarray]:
    """A ConvLoRA, r = 2, 3 channels to 5, kernel 3 × 3, by the layout of loralib's layers.py."""
    tensors = {"conv1.lora_A": matrix(rng, 6, 9), "conv1.lora_B": matrix(rng, 15, 6)}
    save_file(tensors | {key.replace("_", "."): value for key, value in frozen.items()}, path)
    return tensors


def test_a_convolutions_update_is_the_product_viewed_as_kernels(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "c.safetensors"
    tensors = convolution(path, rng)
    adapter = read_adapter(path, kernel=3, alpha=6)
    update = adapter["conv1"]
    assert isinstance(update, LowRankUpdate)
    assert (update.layout, update.kernel, update.scale) == ("conv", (3, 3), 3.0)
    whole = tensors["conv1.lora_B"].astype(float) @ tensors["conv1.lora_A"]
    np.testing.assert_allclose(update.delta_weight(), 3 * whole.reshape(5, 27), rtol=1e-5)


def test_the_frozen_kernel_tells_its_width_and_else_the_caller_must(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "c.safetensors"
    convolution(path, rng, conv1_conv_weight=matrix(rng, 5, 3, 3, 3))
    assert read_adapter(path)["conv1"].shape == (5, 27)
    convolution(path, rng, conv1_conv_weight=matrix(rng, 10, 3, 3, 3))
    with pytest.raises(UnsupportedMethodError, match="without groups"):
        read_adapter(path)
    convolution(path, rng)
    with pytest.raises(UnsupportedMethodError, match="kernel="):
        read_adapter(path)
    with pytest.raises(MalformedFileError, match=r"kernel of 4 needs \(r·4, c_in·4\)"):
        read_adapter(path, kernel=4)


def test_nested_dictionaries_embeddings_and_biases_are_read_through(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = {
        "wte.lora_A": torch.randn(2, 30),
        "wte.lora_B": torch.randn(8, 2),
        "q.lora_A": torch.randn(2, 8),
        "q.lora_B": torch.randn(4, 2),
        "q.bias": torch.randn(4),
    }
    torch.save(
        {"model_state_dict": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "m.pt"
    )
    adapter = read_adapter(tmp_path / "m.pt", allow_pickle=True)
    assert list(adapter) == ["q", "wte"]
    assert adapter["wte"].layout == "embedding"  # type: ignore[union-attr]
    assert "states no alpha" not in adapter.provenance.findings[0].text
    assert "files state no alpha" in adapter.provenance.findings[0].text
    assert "1 tensor next to the factors" in adapter.provenance.findings[1].text
    assert [ref.format for ref in find_adapters(tmp_path, allow_pickle=True)] == ["loralib"]


@pytest.mark.parametrize("enabled", [Q_AND_V, (True, True), (False, False, True, True)])
def test_merged_layers_agree_with_loralib_itself(tmp_path: Path, enabled: tuple[bool, ...]) -> None:
    loralib = pytest.importorskip("loralib")
    torch.manual_seed(0)
    layer = loralib.MergedLinear(8, 24, r=3, lora_alpha=6, enable_lora=list(enabled))
    torch.nn.init.normal_(layer.lora_B)
    model = torch.nn.ModuleDict({"c_attn": layer})
    save_torch_file(loralib.lora_state_dict(model), tmp_path / "m.safetensors")
    adapter = read_adapter(tmp_path / "m.safetensors", enable_lora=enabled, alpha=6)
    whole = np.zeros((24, 8))
    height = 24 // len(enabled)
    blocks = iter(adapter.values())
    for index, on in enumerate(enabled):
        if on:
            whole[index * height : (index + 1) * height] = next(blocks).delta_weight()
    expected = (layer.merge_AB() * layer.scaling).detach().numpy()
    np.testing.assert_allclose(whole, expected, atol=1e-6)


def test_convolutions_agree_with_loralib_itself(tmp_path: Path) -> None:
    loralib = pytest.importorskip("loralib")
    torch.manual_seed(0)
    layer = loralib.Conv2d(4, 6, 3, r=2, lora_alpha=5)
    torch.nn.init.normal_(layer.lora_B)
    before = layer.conv.weight.detach().clone()
    model = torch.nn.ModuleDict({"stem": layer})
    save_torch_file(model.state_dict(), tmp_path / "m.safetensors")
    update = read_adapter(tmp_path / "m.safetensors", alpha=5)["stem"]
    layer.eval()
    delta = (layer.conv.weight - before).detach().numpy().reshape(6, -1)
    np.testing.assert_allclose(update.delta_weight(), delta, atol=1e-5)


@pytest.fixture
def early_peft(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Path]:
    """An adapter as PEFT 0.2 saved it, by the layout of its tuners/lora.py: B a Conv1d's."""

    def make(**fields: object) -> Path:
        key = "base_model.model.transformer.h.0.attn.c_attn.lora_"
        plain = "base_model.model.transformer.h.0.mlp.c_fc.lora_"
        tensors = {
            f"{key}A.weight": matrix(rng, 4, 8),
            f"{key}B.weight": matrix(rng, 10, 2, 1),
            f"{plain}A.weight": matrix(rng, 2, 8),
            f"{plain}B.weight": matrix(rng, 6, 2),
        }
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": "gpt2"}
        text = json.dumps(config | {"enable_lora": Q_AND_V} | fields)
        (tmp_path / "adapter_config.json").write_text(text)
        return tmp_path

    return make


def test_early_pefts_fused_layers_are_split_by_the_config(early_peft: Callable[..., Path]) -> None:
    folder = early_peft()
    adapter = read_adapter(folder)
    name = "transformer.h.0.attn.c_attn"
    assert list(adapter) == [f"{name}.q", f"{name}.v", "transformer.h.0.mlp.c_fc"]
    assert adapter.provenance.format == "peft-merged"
    assert adapter.provenance.base_model == "gpt2"
    assert set(adapter.provenance.scale_origin.values()) == {"config"}
    value = adapter[f"{name}.v"]
    assert isinstance(value, LowRankUpdate)
    assert (value.shape, value.rank, value.scale) == ((5, 8), 2, 4.0)
    stored = read_adapter(folder / "adapter_model.safetensors")[f"{name}.v"]
    np.testing.assert_array_equal(stored.delta_weight(), value.delta_weight())


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"enable_lora": "yes"}, "list of true and false"), ({"lora_alpha": "8"}, "must be a number")],
)
def test_a_config_of_wrong_types_is_refused(
    early_peft: Callable[..., Path], fields: dict[str, object], said: str
) -> None:
    with pytest.raises(MalformedFileError, match=said):
        read_adapter(early_peft(**fields))

"""Merges by each format's own rules: what was merged is applied, what was not is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_bases import permuted, write_gguf
from quantized_bases import bitsandbytes_4bit, write_base
from safetensors.numpy import load_file
from safetensors.torch import save_file as save_torch_file

from lora_analysis import Adapter, LowRankUpdate, merge_check, read_adapter
from lora_analysis.merging import Cause, MergeConclusion, TensorState

Array = np.ndarray
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANK, D = 4, 48


def rounded(values: Array, dtype: str) -> Array:
    """Round with torch, which is not what is tested."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(TYPES[dtype]).float().numpy()


def save(path: Path, tensors: dict[str, Array], dtype: str = "float32") -> Path:
    """Write tensors in a type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}
    save_torch_file({k: v.to(TYPES[dtype], copy=True) for k, v in stored.items()}, path)
    return path


@dataclass
class Draw:
    """Random weights and factors of about one size: ‖ΔW‖/‖W‖ near ``change``."""

    change: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def weight(self, *shape: int) -> Array:
        values = self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return rounded(values.astype(np.float32), "bfloat16")

    def factors(self, d_out: int, d_in: int, scale: float, rank: int = RANK) -> tuple[Array, Array]:
        """Return A and B whose s·B·A has the relative size that is asked for."""
        A = self.rng.standard_normal((rank, d_in)).astype(np.float32) / np.sqrt(d_in)
        B = self.rng.standard_normal((d_out, rank)).astype(np.float32)
        B *= self.change / scale / np.sqrt(rank)
        return A, B.astype(np.float32)


@dataclass
class Target:
    """Where one ΔW is added: a tensor of the base, and ΔW in its orientation and shape."""

    tensor: str
    delta: Array  # float32, of the shape of the part
    part: Any = ...  # index into the tensor


@dataclass
class Form:
    """An adapter file, the base that it was trained on, and what its program adds."""

    source: Path
    base: dict[str, Array]
    targets: dict[str, Target]
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def merged(self, dtype: str, deltas: dict[str, Array] | None = None) -> dict[str, Array]:
        """Return the base with every ΔW, or others, added in float32 and rounded to a type."""
        model = {name: W.astype(np.float32).copy() for name, W in self.base.items()}
        for module, target in self.targets.items():
            delta = target.delta if deltas is None else deltas[module]
            model[target.tensor][target.part] += delta.astype(np.float32)
        return {name: rounded(W, dtype) for name, W in model.items()}

    def write(self, folder: Path, tensors: dict[str, Array], dtype: str) -> Path:
        save(folder / "model.safetensors", tensors, dtype)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder

    def adapter(self) -> Any:
        return read_adapter(self.source, **self.options)


def product(scale: float, B: Array, A: Array) -> Array:
    return np.float32(scale) * (B @ A)


def peft_config(folder: Path, **fields: Any) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 6} | fields)
    )


LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


def llama_base(draw: Draw) -> dict[str, Array]:
    layers = {
        f"model.layers.{i}.{name}.weight": draw.weight(*shape)
        for i in range(2)
        for name, shape in {
            "self_attn.q_proj": (D, D), "self_attn.k_proj": (D // 2, D),
            "self_attn.v_proj": (D // 2, D), "self_attn.o_proj": (D, D),
            "mlp.up_proj": (2 * D, D), "mlp.down_proj": (D, 2 * D),
        }.items()
    }  # fmt: skip
    norms = {f"model.layers.{i}.input_layernorm.weight": draw.weight(D, 1)[:, 0] for i in range(2)}
    table = {"model.embed_tokens.weight": draw.weight(64, D), "lm_head.weight": draw.weight(64, D)}
    return layers | norms | table


def linears(base: dict[str, Array], *ends: str) -> list[str]:
    return [key.removesuffix(".weight") for key in base if key.endswith(ends)]


def peft_linear(folder: Path, draw: Draw) -> Form:
    base = llama_base(draw)
    tensors, targets = {}, {}
    for name in linears(
        base, "q_proj.weight", "v_proj.weight", "o_proj.weight", "down_proj.weight"
    ):
        A, B = draw.factors(*base[f"{name}.weight"].shape, 1.5)
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
        targets[name] = Target(f"{name}.weight", product(1.5, B, A))
    A, B = draw.factors(D, 64, 1.5)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = A
    tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = B
    targets["model.embed_tokens"] = Target("model.embed_tokens.weight", product(1.5, B, A).T)
    save(folder / "adapter_model.safetensors", tensors)
    peft_config(folder, target_modules=["q_proj", "v_proj", "o_proj", "down_proj", "embed_tokens"])
    return Form(folder, base, targets, LLAMA)


def gpt2_conv1d(folder: Path, draw: Draw) -> Form:
    base, tensors, targets = {}, {}, {}
    for i in range(2):
        for name, shape in {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D)}.items():
            path = f"transformer.h.{i}.{name}"
            base[f"{path.removeprefix('transformer.')}.weight"] = draw.weight(*shape)
            A, B = draw.factors(*shape[::-1], 1.5)
            tensors[f"base_model.model.{path}.lora_A.weight"] = A
            tensors[f"base_model.model.{path}.lora_B.weight"] = B
            targets[path] = Target(f"h.{i}.{name}.weight", product(1.5, B, A).T)
        base[f"h.{i}.attn.c_attn.bias"] = draw.weight(3 * D, 1)[:, 0]
    save(folder / "adapter_model.safetensors", tensors)
    peft_config(folder, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    return Form(folder, base, targets, {"model_type": "gpt2"})


def loralib_fused(folder: Path, draw: Draw) -> Form:
    base, tensors, targets = {}, {}, {}
    for i in range(2):
        path = f"h.{i}.attn.c_attn"
        base[f"{path}.weight"] = draw.weight(D, 3 * D)
        base[f"{path}.bias"] = draw.weight(3 * D, 1)[:, 0]
        pairs = {part: draw.factors(D, D, 2.0) for part in (0, 2)}
        tensors[f"{path}.lora_A"] = np.vstack([A for A, _ in pairs.values()])
        tensors[f"{path}.lora_B"] = np.vstack([B for _, B in pairs.values()])
        for part, (A, B) in pairs.items():
            columns = np.s_[:, part * D : (part + 1) * D]
            targets[f"{path}.{'qkv'[part]}"] = Target(
                f"{path}.weight", product(2.0, B, A).T, columns
            )
    path = save(folder / "lora.safetensors", tensors)
    options = {"enable_lora": (True, False, True), "alpha": 2 * RANK}
    return Form(path, base, targets, {"model_type": "gpt2"}, options)


def kohya(
    folder: Path, draw: Draw, layers: dict[str, tuple[str, tuple[int, ...]]]
) -> tuple[Path, dict[str, Array], dict[str, Target]]:
    """Name in the file → tensor of the base and its shape; convolutions have four sides."""
    base, tensors, targets = {}, {}, {}
    for name, (tensor, shape) in layers.items():
        base[tensor] = draw.weight(*shape)
        A, B = draw.factors(shape[0], int(np.prod(shape[1:])), 0.5)
        tensors[f"{name}.lora_down.weight"] = A.reshape(RANK, *shape[1:])
        tensors[f"{name}.lora_up.weight"] = B.reshape(*B.shape, *(1 for _ in shape[2:]))
        tensors[f"{name}.alpha"] = np.array(RANK / 2, np.float32)
        targets[name] = Target(tensor, product(0.5, B, A).reshape(shape))
    return save(folder / "kohya.safetensors", tensors), base, targets


def kohya_sd15(folder: Path, draw: Draw) -> Form:
    unet = "down_blocks.0.attentions.1"
    layers = {
        f"lora_unet_{path.replace('.', '_')}": (f"{path}.weight", shape)
        for path, shape in {
            f"{unet}.proj_in": (D, D, 1, 1),
            f"{unet}.transformer_blocks.0.attn1.to_q": (D, D),
            f"{unet}.transformer_blocks.0.attn1.to_out.0": (D, D),
            f"{unet}.transformer_blocks.0.attn2.to_k": (D, 2 * D),
            "down_blocks.0.resnets.1.conv2": (D, D, 3, 3),
        }.items()
    }
    source, base, targets = kohya(folder, draw, layers)
    base["conv_norm_out.weight"] = draw.weight(D, 1)[:, 0]
    return Form(source, base, targets)


def kohya_sdxl(folder: Path, draw: Draw) -> Form:
    """A single-file checkpoint under the authors' names."""
    unet = "input_blocks.4.1"
    layers = {
        f"lora_unet_{path.replace('.', '_')}": (f"model.diffusion_model.{path}.weight", shape)
        for path, shape in {
            f"{unet}.proj_in": (D, D),
            f"{unet}.transformer_blocks.0.attn1.to_q": (D, D),
            f"{unet}.transformer_blocks.1.attn1.to_q": (D, D),
            f"{unet}.transformer_blocks.0.ff.net.0.proj": (4 * D, D),
            "input_blocks.1.0.in_layers.2": (D, D, 3, 3),
        }.items()
    }
    source, base, targets = kohya(folder, draw, layers)
    base["first_stage_model.post_quant_conv.weight"] = draw.weight(4, 4, 1, 1)
    return Form(source, base, targets)


def kohya_sdxl_on_diffusers(folder: Path, draw: Draw) -> Form:
    names = {
        "input_blocks.4.1": "down_blocks.1.attentions.0",
        "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    }
    layers = {
        f"lora_unet_{path.replace('.', '_')}": (f"{diffusers}.weight", shape)
        for path, diffusers, shape in (
            *(
                (f"{a}.{layer}", f"{d}.{layer}", shape)
                for a, d in list(names.items())[:1]
                for layer, shape in {
                    "proj_in": (D, D),
                    "transformer_blocks.0.attn1.to_q": (D, D),
                    "transformer_blocks.1.attn1.to_q": (D, D),
                }.items()
            ),
            (*list(names.items())[1], (D, D, 3, 3)),
        )
    }
    return Form(*kohya(folder, draw, layers))


def _flux(draw: Draw, *, fused: bool) -> tuple[dict[str, Array], dict[str, Target], dict[str, Any]]:
    """Return base and targets of kohya's FLUX names: fused in the file, in the base perhaps not."""
    base, targets, tensors = {}, {}, {}
    for i in range(2):
        double = f"double_blocks.{i}.img_attn"
        diffusers = f"transformer_blocks.{i}.attn"
        parts = {
            f"{double}.qkv": [f"{diffusers}.{p}" for p in ("to_q", "to_k", "to_v")],
            f"{double}.proj": [f"{diffusers}.to_out.0"],
            f"single_blocks.{i}.linear1": [
                *(f"single_transformer_blocks.{i}.attn.{p}" for p in ("to_q", "to_k", "to_v")),
                f"single_transformer_blocks.{i}.proj_mlp",
            ],
        }
        for name, pieces in parts.items():
            heights = [4 * D if piece.endswith("mlp") else D for piece in pieces]
            stem = f"lora_unet_{name.replace('.', '_')}"
            A, B = draw.factors(sum(heights), D, 0.5)
            tensors |= {
                f"{stem}.lora_down.weight": A,
                f"{stem}.lora_up.weight": B,
                f"{stem}.alpha": np.array(RANK / 2, np.float32),
            }
            delta, W = product(0.5, B, A), draw.weight(sum(heights), D)
            if fused:
                base[f"{name}.weight"] = W
                targets[name] = Target(f"{name}.weight", delta)
                continue
            starts = np.cumsum([0, *heights])
            for piece, low, high in zip(pieces, starts, starts[1:], strict=False):
                base[f"{piece}.weight"] = W[low:high]
                targets[piece] = Target(f"{piece}.weight", delta[low:high])
    return base, targets, tensors


def kohya_flux_fused(folder: Path, draw: Draw) -> Form:
    base, targets, tensors = _flux(draw, fused=True)
    return Form(save(folder / "flux.safetensors", tensors), base, targets)


def kohya_flux_on_diffusers(folder: Path, draw: Draw) -> Form:
    base, targets, tensors = _flux(draw, fused=False)
    return Form(save(folder / "flux.safetensors", tensors), base, targets)


def diffusers_unet(folder: Path, draw: Draw) -> Form:
    unet = "down_blocks.0.attentions.1.transformer_blocks.0"
    base, tensors, targets = {}, {}, {}
    for path in (f"{unet}.attn1.to_q", f"{unet}.attn1.to_v", f"{unet}.attn2.to_out.0"):
        A, B = draw.factors(D, D, 1.0)
        base[f"{path}.weight"] = draw.weight(D, D)
        tensors[f"unet.{path}.lora_A.weight"], tensors[f"unet.{path}.lora_B.weight"] = A, B
        tensors[f"unet.{path}.alpha"] = np.array(RANK, np.float32)
        targets[path] = Target(f"{path}.weight", product(1.0, B, A))
    source = save(folder / "pytorch_lora_weights.safetensors", tensors)
    return Form(source, base, targets)


def mlx(folder: Path, draw: Draw) -> Form:
    base = llama_base(draw)
    tensors, targets = {}, {}
    for name in linears(base, "q_proj.weight", "v_proj.weight", "o_proj.weight"):
        A, B = draw.factors(*base[f"{name}.weight"].shape, 10.0)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = A.T, B.T
        targets[name] = Target(f"{name}.weight", product(10.0, B, A))
    save(folder / "adapters.safetensors", tensors)
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {"num_layers": 2, "fine_tune_type": "lora",
             "lora_parameters": {"rank": RANK, "scale": 10.0, "dropout": 0.0}}
        )
    )  # fmt: skip
    return Form(folder, base, targets, LLAMA)


def gguf_adapter(folder: Path, draw: Draw) -> Form:
    base = llama_base(draw)
    path = folder / "adapter.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 6.0)
    targets = {}
    for i in range(2):
        for short, name, heads in (
            ("attn_q", "self_attn.q_proj", 4), ("attn_k", "self_attn.k_proj", 2),
            ("attn_output", "self_attn.o_proj", 0), ("ffn_down", "mlp.down_proj", 0),
        ):  # fmt: skip
            tensor = f"model.layers.{i}.{name}.weight"
            A, B = draw.factors(*base[tensor].shape, 1.5)
            writer.add_tensor(f"blk.{i}.{short}.weight.lora_a", A)
            stored = permuted(B, heads) if heads else B
            writer.add_tensor(f"blk.{i}.{short}.weight.lora_b", stored)
            targets[f"model.layers.{i}.{name}"] = Target(tensor, product(1.5, B, A))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Form(path, base, targets, LLAMA, {"heads": (4, 2)})


def lycoris(folder: Path, draw: Draw, *, kind: str) -> Form:
    """LoKr or LoHa under kohya's names; scale α/r once, as their forward applies it."""
    base, tensors, targets = {}, {}, {}
    unet = "down_blocks.0.attentions.1.transformer_blocks"
    for i in range(3):
        path = f"{unet}.{i}.attn1.to_q"
        stem = f"lora_unet_{path.replace('.', '_')}"
        W = base[f"{path}.weight"] = draw.weight(D, D)
        if kind == "lokr":
            C = draw.rng.standard_normal((4, 4)).astype(np.float32)
            a, b = (draw.rng.standard_normal(s).astype(np.float32) for s in ((12, 2), (2, 12)))
            delta = np.kron(C, a @ b)
            a *= np.float32(2 * draw.change * np.linalg.norm(W) / np.linalg.norm(delta))
            tensors |= {f"{stem}.lokr_w1": C, f"{stem}.lokr_w2_a": a, f"{stem}.lokr_w2_b": b}
            delta = np.float32(0.5) * np.kron(C, a @ b)
        else:
            w = {
                name: draw.rng.standard_normal(s).astype(np.float32)
                for name, s in (
                    ("w1_a", (D, 2)),
                    ("w1_b", (2, D)),
                    ("w2_a", (D, 2)),
                    ("w2_b", (2, D)),
                )
            }
            delta = (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])
            w["w1_a"] *= np.float32(2 * draw.change * np.linalg.norm(W) / np.linalg.norm(delta))
            delta = np.float32(0.5) * (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])
            tensors |= {f"{stem}.hada_{name}": value for name, value in w.items()}
        tensors[f"{stem}.alpha"] = np.array(1.0, np.float32)
        targets[path] = Target(f"{path}.weight", delta.astype(np.float32))
    return Form(save(folder / f"{kind}.safetensors", tensors), base, targets)


FORMS: dict[str, Callable[[Path, Draw], Form]] = {
    "PEFT": peft_linear, "GPT-2": gpt2_conv1d, "loralib": loralib_fused,
    "kohya SD1.5": kohya_sd15, "kohya SDXL": kohya_sdxl, "kohya SDXL on diffusers":
    kohya_sdxl_on_diffusers, "kohya FLUX": kohya_flux_fused,
    "kohya FLUX on diffusers": kohya_flux_on_diffusers, "diffusers": diffusers_unet, "MLX": mlx,
    "GGUF": gguf_adapter, "LoKr": lambda folder, draw: lycoris(folder, draw, kind="lokr"),
    "LoHa": lambda folder, draw: lycoris(folder, draw, kind="loha"),
}  # fmt: skip


def opened(form: Form, folder: Path, dtype: str, deltas: dict[str, Array] | None = None) -> Any:
    """Check a merge whose models are files."""
    base = form.write(folder / "base", form.base, "bfloat16")
    merged = form.write(folder / "merged", form.merged(dtype, deltas), dtype)
    return merge_check(form.adapter(), base, merged)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", FORMS)
def test_a_healthy_merge_of_each_format_is_applied(name: str, dtype: str, tmp_path: Path) -> None:
    form = FORMS[name](tmp_path, Draw())
    result = opened(form, tmp_path, dtype)
    assert result.conclusion is MergeConclusion.APPLIED, result.counts()
    assert not result.tensors
    assert not result.is_partial
    low, high = result.strength()
    assert low <= 1 <= high
    assert high - low < 1e-4


def scaled(form: Form, factor: float) -> dict[str, Array]:
    return {name: np.float32(factor) * target.delta for name, target in form.targets.items()}


@pytest.mark.parametrize("name", FORMS)
def test_mistakes_in_each_format_are_named(name: str, tmp_path: Path) -> None:
    form = FORMS[name](tmp_path, Draw())
    (tmp_path / "other").mkdir()
    stranger = FORMS[name](tmp_path / "other", Draw(seed=7))
    plain = scaled(form, 1)
    first = next(iter(plain))
    for deltas, conclusion, strength in (
        (scaled(form, 0), MergeConclusion.ABSENT, None),
        (scaled(form, 2), MergeConclusion.TWICE, 2),
        (scaled(form, -1), MergeConclusion.WRONG_STRENGTH, -1),
        (scaled(form, 1.25), MergeConclusion.WRONG_STRENGTH, 1.25),
        (scaled(form, 1.001), MergeConclusion.WRONG_STRENGTH, 1.001),
        (plain | {first: 0 * plain[first]}, MergeConclusion.PARTLY, None),
        (scaled(stranger, 1), MergeConclusion.CHANGED, None),
    ):
        result = opened(form, tmp_path, "bfloat16", deltas)
        assert result.conclusion is conclusion, (conclusion, result.counts())
        assert result.is_failed
        for module in result.modules:
            if strength is not None:
                assert module.strength[0] <= np.float32(strength) <= module.strength[1]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [0.05, 0.001])
def test_second_merges_and_undone_ones_are_named(dtype: str, size: float, tmp_path: Path) -> None:
    form = peft_linear(tmp_path, Draw(size))
    base = {name: rounded(W, dtype) for name, W in form.base.items()}
    once = Form(form.source, base, form.targets).merged(dtype)
    again = Form(form.source, once, form.targets)
    twice = merge_check(form.adapter(), base, again.merged(dtype))
    assert twice.conclusion is MergeConclusion.TWICE
    undone = merge_check(form.adapter(), base, again.merged(dtype, scaled(form, -1)))
    assert undone.conclusion is MergeConclusion.RESTORED
    # Subtracted by mistake, and then added to make up for it.
    negated = Form(form.source, form.merged(dtype, scaled(form, -1)), form.targets)
    restored = merge_check(form.adapter(), base, negated.merged(dtype))
    assert restored.conclusion is MergeConclusion.RESTORED


HALF_PRECISION: dict[str, Callable[..., torch.Tensor]] = {
    "factors cast, product in half": lambda W, A, B, s: W + s * (B.to(W) @ A.to(W)),
    "factors cast, B scaled": lambda W, A, B, s: W + (s * B.to(W)) @ A.to(W),
    "B scaled, then cast": lambda W, A, B, s: W + (s * B).to(W) @ A.to(W),
    "A scaled": lambda W, A, B, s: W + B.to(W) @ (s * A.to(W)),
    "factors cast, fused": lambda W, A, B, s: torch.addmm(W, B.to(W), A.to(W), alpha=s),
    "factors cast, float32": lambda W, A, B, s: W.float() + s * (B.to(W).float() @ A.to(W).float()),
    "ΔW cast": lambda W, A, B, s: W + (s * (B.float() @ A.float())).to(W),
}


@pytest.mark.parametrize(
    ("dtype", "stored"), [(t, s) for t in ("bfloat16", "float16") for s in ("float32", t)]
)
@pytest.mark.parametrize("way", HALF_PRECISION)
def test_merges_computed_in_half_precision_are_applied(way: str, dtype: str, stored: str) -> None:
    draw, scale = Draw(0.02), 0.7
    W = torch.from_numpy(draw.weight(2 * D, D)).to(TYPES[dtype])
    A, B = (torch.from_numpy(x).to(TYPES[stored]) for x in draw.factors(2 * D, D, scale))
    update = LowRankUpdate("q", A.float().numpy(), B.float().numpy(), scale, stored_dtype=stored)
    adapter = Adapter({"q": update}, label="a")
    for factor, conclusion in ((1, "applied"), (2, "applied twice"), (-1, "wrong strength")):
        merged = HALF_PRECISION[way](W, A, B, factor * scale).to(TYPES[dtype])
        result = merge_check(
            adapter, {"q.weight": W.float().numpy()}, {"q.weight": merged.float().numpy()}
        )
        assert str(result.conclusion) == conclusion


def llama_form(folder: Path) -> tuple[Form, dict[str, Array]]:
    form = peft_linear(folder, Draw())
    return form, form.merged("float32")


def checked(
    folder: Path, form: Form, merged: dict[str, Array], base: dict[str, Array] | None = None
) -> Any:
    """Check a merge given by its tensors, base and merged model as files of float32."""
    before = form.write(folder / "base", form.base if base is None else base, "float32")
    return merge_check(form.adapter(), before, form.write(folder / "merged", merged, "float32"))


def test_a_merged_weight_with_infinities_is_a_failure(tmp_path: Path) -> None:
    form, merged = llama_form(tmp_path)
    merged["model.layers.0.self_attn.q_proj.weight"][1, 2] = np.inf
    result = checked(tmp_path, form, merged)
    assert result.is_failed
    assert Cause.NOT_FINITE in {module.cause for module in result.modules}


def test_a_table_with_more_rows_is_a_difference(tmp_path: Path) -> None:
    form, merged = llama_form(tmp_path)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        longer = merged | {name: np.vstack([merged[name], merged[name][:2]])}
        result = checked(tmp_path, form, longer)
        assert [(t.name, t.state) for t in result.tensors] == [(name, TensorState.RESIZED)]
        assert result.is_failed
        assert bool(result.unmatched) == (name == "model.embed_tokens.weight")


def test_a_tied_head_that_the_merge_stores_is_compared(tmp_path: Path) -> None:
    form, merged = llama_form(tmp_path)
    base = {name: W for name, W in form.base.items() if name != "lm_head.weight"}
    table = merged["model.embed_tokens.weight"]
    for head, state in (
        (table, None),
        (base["model.embed_tokens.weight"], TensorState.BASES_EMBEDDING),
        (table + 1, TensorState.CHANGED),
    ):
        result = checked(tmp_path, form, merged | {"lm_head.weight": head}, base)
        assert [t.state for t in result.tensors] == ([] if state is None else [state])


def side(folder: Path, form: Form, **tensors: Array) -> None:
    """Add tensors to a file of PEFT, with two underscores for a dot."""
    stored = load_file(folder / "adapter_model.safetensors")
    names = {f"base_model.model.{key.replace('__', '.')}": value for key, value in tensors.items()}
    save(folder / "adapter_model.safetensors", stored | names)


def test_biases_and_tokens_next_to_the_factors_are_checked(tmp_path: Path) -> None:
    form = gpt2_conv1d(tmp_path, Draw())
    rng = np.random.default_rng(5)
    form.base["wte.weight"] = rng.standard_normal((20, D)).astype(np.float32)
    bias, rows = (rng.standard_normal(shape).astype(np.float32) for shape in (3 * D, (2, D)))
    side(
        tmp_path, form, transformer__h__0__attn__c_attn__lora_B__bias=bias,
        transformer__wte__token_adapter__trainable_tokens_delta=rows,
    )  # fmt: skip
    peft_config(
        tmp_path, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, lora_bias=True,
        trainable_token_indices={"wte": [3, 7]},
    )  # fmt: skip
    merged = form.merged("float32")
    forgotten = checked(tmp_path, form, merged)
    assert [t.state for t in forgotten.tensors] == [TensorState.SAVED_ABSENT] * 2
    assert forgotten.is_failed
    merged["h.0.attn.c_attn.bias"] = merged["h.0.attn.c_attn.bias"] + np.float32(1.5) * bias
    merged["wte.weight"][[3, 7]] = rows
    healthy = checked(tmp_path, form, merged)
    assert [t.state for t in healthy.tensors] == [TensorState.SAVED] * 2
    assert not healthy.is_failed
    assert not healthy.is_partial
    nowhere = {name: W for name, W in form.base.items() if name != "wte.weight"}
    partial = checked(tmp_path, form, {k: v for k, v in merged.items() if k in nowhere}, nowhere)
    assert TensorState.UNMATCHED in {tensor.state for tensor in partial.tensors}
    assert partial.is_partial


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}  # fmt: skip


def to_gguf(path: Path, tensors: dict[str, Array], kind: str) -> Path:
    """Write a llama as its converter does: other names, and q and k permuted by heads."""
    named = {}
    for name, W in tensors.items():
        module = name.removesuffix(".weight")
        if not module.startswith("model.layers."):
            short = {"model.embed_tokens": "token_embd", "lm_head": "output"}[module]
            named[f"{short}.weight"] = W
            continue
        number, _, layer = module.removeprefix("model.layers.").partition(".")
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(layer)
        stored = permuted(W, heads) if heads else W
        named[f"blk.{number}.{GGUF_NAMES[layer]}.weight"] = stored
    return write_gguf(path, named, kind=kind, heads=4, kv_heads=2)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_gguf_model_is_compared_with_its_base_as_safetensors(kind: str, tmp_path: Path) -> None:
    form, merged = llama_form(tmp_path)
    base = form.write(tmp_path / "base", form.base, "float32")
    healthy = merge_check(form.adapter(), base, to_gguf(tmp_path / "m.gguf", merged, kind))
    assert healthy.conclusion is MergeConclusion.APPLIED
    assert not healthy.tensors  # every other tensor was found under its name, and is equal
    merged["model.layers.1.self_attn.k_proj.weight"][0, 0] += 1
    damaged = merge_check(form.adapter(), base, to_gguf(tmp_path / "d.gguf", merged, kind))
    assert [(t.name, t.state) for t in damaged.tensors] == [
        ("blk.1.attn_k.weight", TensorState.CHANGED)
    ]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_merge_into_a_dequantized_base_is_applied(dtype: str, tmp_path: Path) -> None:
    form = peft_linear(tmp_path, Draw())
    stored: dict[str, Any] = {}
    values = dict(form.base)
    for name, W in form.base.items():
        if "proj" not in name:
            stored[name] = torch.from_numpy(W).to(torch.bfloat16)
            continue
        codes, decoded = bitsandbytes_4bit(
            torch.from_numpy(W).to(torch.bfloat16), "nf4", nested=True,
            path=name.removesuffix(".weight"),
        )  # fmt: skip
        stored |= codes
        values[name] = decoded.float().numpy()
    base = write_base(
        tmp_path / "base", stored, quant_method="bitsandbytes", load_in_4bit=True,
        bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    dequantized = Form(form.source, values, form.targets, LLAMA)
    merged = dequantized.write(tmp_path / "merged", dequantized.merged(dtype), dtype)
    result = merge_check(form.adapter(), base, merged)
    assert result.conclusion is MergeConclusion.APPLIED
    assert not result.tensors
    unquantized = form.write(tmp_path / "other", form.merged(dtype), dtype)
    assert merge_check(form.adapter(), base, unquantized).is_failed


def test_deltalint_comes_to_the_same_conclusions(tmp_path: Path) -> None:
    """Where it covers a merge: linear layers and embeddings of PEFT's files."""
    deltalint = pytest.importorskip("deltalint")
    form = peft_linear(tmp_path / "adapter", Draw())
    base = form.write(tmp_path / "base", form.base, "bfloat16")
    plain = scaled(form, 1)
    names = list(plain)
    for deltas in (
        plain,
        scaled(form, 2),
        scaled(form, 0.5),
        scaled(form, 0),
        plain | {names[0]: 0 * plain[names[0]]},
        plain | {names[0]: plain[names[4]], names[4]: plain[names[0]]},
    ):
        # It replays PEFT, which rounds ΔW of an embedding to the type of the base.
        table = {"model.embed_tokens": rounded(deltas["model.embed_tokens"], "bfloat16")}
        tensors = form.merged("bfloat16", deltas | table)
        merged = form.write(tmp_path / "merged", tensors, "bfloat16")
        report = deltalint.check_merge(base, form.source, merged)
        theirs = {layer.name: layer.verdict.is_ok for layer in report.layers}
        result = merge_check(form.adapter(), base, merged)
        ours = {m.module: m.conclusion is MergeConclusion.APPLIED for m in result.modules}
        assert ours == theirs

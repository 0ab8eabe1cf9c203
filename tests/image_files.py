"""Adapter files of image models by the layouts their trainers document, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

Tensors = dict[str, np.ndarray]


def stored(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata))
    return path


def normal(rng: np.random.Generator, *shape: int, dtype: type = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def kohya_linear(
    rng: np.random.Generator,
    module: str,
    d_out: int = 6,
    d_in: int = 5,
    rank: int = 2,
    *,
    alpha: float | None = 1.0,
) -> Tensors:
    """A Linear as sd-scripts saves it (``networks/lora.py``, ``LoRAModule``)."""
    tensors = {
        f"{module}.lora_down.weight": normal(rng, rank, d_in),
        f"{module}.lora_up.weight": normal(rng, d_out, rank),
    }
    if alpha is not None:
        tensors[f"{module}.alpha"] = np.array(alpha, np.float32)
    return tensors


def kohya_conv(
    rng: np.random.Generator, module: str, kernel: int = 3, *, rank: int = 2, alpha: float = 1.0
) -> Tensors:
    """A Conv2d of 5 to 6 channels as sd-scripts and LyCORIS save it."""
    return {
        f"{module}.lora_down.weight": normal(rng, rank, 5, kernel, kernel),
        f"{module}.lora_up.weight": normal(rng, 6, rank, 1, 1),
        f"{module}.alpha": np.array(alpha, np.float32),
    }


def kohya_tucker(rng: np.random.Generator, module: str, *, rank: int = 2) -> Tensors:
    """A Conv2d with a Tucker core as LyCORIS saves it (``modules/locon.py``)."""
    return {
        f"{module}.lora_down.weight": normal(rng, rank, 5, 1, 1),
        f"{module}.lora_mid.weight": normal(rng, rank, rank, 3, 3),
        f"{module}.lora_up.weight": normal(rng, 6, rank, 1, 1),
        f"{module}.alpha": np.array(1.0, np.float32),
    }


def lora_pair(
    rng: np.random.Generator,
    a: str,
    b: str,
    shape: tuple[int, int] = (6, 5),
    rank: int = 2,
) -> Tensors:
    """The two factors of a Linear under any keys, A's first."""
    return {a: normal(rng, rank, shape[1]), b: normal(rng, shape[0], rank)}


# Transformer layers of the blocks with attention, by block of the original code.
SD15_BLOCKS = dict.fromkeys(
    [
        *(f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)),
        "mid_block_attentions_0",
        *(f"up_blocks_{i}_attentions_{j}" for i in range(1, 4) for j in range(3)),
    ],
    1,
)
SDXL_BLOCKS = {
    "input_blocks_4_1": 2,
    "input_blocks_5_1": 2,
    "input_blocks_7_1": 10,
    "input_blocks_8_1": 10,
    "middle_block_1": 10,
    **{f"output_blocks_{n}_1": 10 for n in range(3)},
    **{f"output_blocks_{n}_1": 2 for n in range(3, 6)},
}
SDXL_DIFFUSERS = {
    "down_blocks.1.attentions.0": 2,
    "down_blocks.1.attentions.1": 2,
    "down_blocks.2.attentions.0": 10,
    "down_blocks.2.attentions.1": 10,
    "mid_block.attentions.0": 10,
    **{f"up_blocks.0.attentions.{n}": 10 for n in range(3)},
    **{f"up_blocks.1.attentions.{n}": 2 for n in range(3)},
}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_OF_LAYER = (
    *(f"{kind}.{layer}" for kind in ("attn1", "attn2") for layer in _ATTENTION),
    "ff.net.0.proj",
    "ff.net.2",
)
_CLIP = (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")


def unet_modules(blocks: dict[str, int], separator: str = "_") -> list[str]:
    """Return the paths that sd-scripts adapts in a U-Net: its transformers' linear layers."""
    dotted = [
        f"{block}.{path}"
        for block, layers in blocks.items()
        for path in (
            "proj_in",
            *(f"transformer_blocks.{n}.{layer}" for n in range(layers) for layer in _OF_LAYER),
            "proj_out",
        )
    ]
    return [path.replace(".", separator) for path in dotted]


def clip_modules(layers: int, separator: str = "_") -> list[str]:
    """Return the paths that sd-scripts adapts in a CLIP text encoder."""
    dotted = [
        f"text_model.encoder.layers.{n}.{layer}" for n in range(layers) for layer in _CLIP
    ]  # fmt: skip
    return [path.replace(".", separator) for path in dotted]


def _file(
    path: Path, names: list[str], keys: tuple[str, str], *, rank: int, width: int, seed: int,
    alpha: bool,
) -> Path:  # fmt: skip
    """Write float16 factors of square modules; ΔW grows towards the last modules."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for i, name in enumerate(names):
        tensors[name + keys[0]] = normal(rng, rank, width, dtype=np.float16)
        tensors[name + keys[1]] = ((1 + i / len(names)) * normal(rng, width, rank)).astype(
            np.float16
        )
        if alpha:
            tensors[f"{name}.alpha"] = np.array(rank / 2, np.float16)
    return stored(path, tensors)


_KOHYA = (".lora_down.weight", ".lora_up.weight")
_PEFT = (".lora_A.weight", ".lora_B.weight")


def kohya_sd15(path: Path, *, rank: int = 4, width: int = 8, seed: int = 0) -> Path:
    """Stable Diffusion 1.5 from sd-scripts: 192 modules of the U-Net, 72 of the text encoder."""
    names = [f"lora_unet_{name}" for name in unet_modules(SD15_BLOCKS)]
    names += [f"lora_te_{name}" for name in clip_modules(12)]
    return _file(path, names, _KOHYA, rank=rank, width=width, seed=seed, alpha=True)


def kohya_sdxl(
    path: Path, *, rank: int = 32, width: int = 40, seed: int = 0, text_encoders: bool = True
) -> Path:
    """Stable Diffusion XL from sd-scripts: 722 modules of the U-Net, 72 and 192 of the encoders."""
    names = [f"lora_unet_{name}" for name in unet_modules(SDXL_BLOCKS)]
    if text_encoders:
        names += [f"lora_te1_{name}" for name in clip_modules(12)]
        names += [f"lora_te2_{name}" for name in clip_modules(32)]
    return _file(path, names, _KOHYA, rank=rank, width=width, seed=seed, alpha=True)


def diffusers_sdxl(path: Path, *, rank: int = 4, width: int = 8, seed: int = 0) -> Path:
    """Stable Diffusion XL as diffusers saves it, with the modules that sd-scripts adapts."""
    names = [f"unet.{name}" for name in unet_modules(SDXL_DIFFUSERS, ".")]
    names += [f"text_encoder.{name}" for name in clip_modules(12, ".")]
    names += [f"text_encoder_2.{name}" for name in clip_modules(32, ".")]
    return _file(path, names, _PEFT, rank=rank, width=width, seed=seed, alpha=False)


def kohya_flux(path: Path, *, rank: int = 4, width: int = 8, seed: int = 0) -> Path:
    """FLUX from sd-scripts: 19 double and 38 single blocks, and CLIP."""
    layers = [
        f"{s}_{x}" for s in ("img", "txt") for x in ("attn_qkv", "attn_proj", "mlp_0", "mlp_2")
    ]
    layers += ["img_mod_lin", "txt_mod_lin"]
    names = [f"lora_unet_double_blocks_{n}_{layer}" for n in range(19) for layer in layers]
    names += [
        f"lora_unet_single_blocks_{n}_{layer}"
        for n in range(38)
        for layer in ("linear1", "linear2", "modulation_lin")
    ]
    names += [f"lora_te1_{name}" for name in clip_modules(12)]
    return _file(path, names, _KOHYA, rank=rank, width=width, seed=seed, alpha=True)


def diffusers_flux(path: Path, *, rank: int = 4, width: int = 8, seed: int = 0) -> Path:
    """FLUX as diffusers saves it."""
    double = [f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj",
              "add_k_proj", "add_v_proj", "to_add_out")]  # fmt: skip
    double += ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
    single = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
    names = [f"transformer.transformer_blocks.{n}.{x}" for n in range(19) for x in double]
    names += [f"transformer.single_transformer_blocks.{n}.{x}" for n in range(38) for x in single]
    return _file(path, names, _PEFT, rank=rank, width=width, seed=seed, alpha=False)

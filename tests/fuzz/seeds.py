"""One healthy adapter of every format, small, to be damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.formats import write_adapter

Arrays = dict[str, np.ndarray]
_RNG = np.random.default_rng(11)


def _normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return _RNG.standard_normal(shape).astype(dtype)


def _adapter() -> Adapter:
    names = [f"model.layers.{at}.self_attn.{part}_proj" for at in range(2) for part in "qv"]
    updates = {
        name: LowRankUpdate(name=name, A=_normal(2, 8), B=_normal(8, 2), scale=2.0, alpha=4.0)
        for name in names
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    return Adapter(updates, label="seed", provenance=Provenance(rank=2), config=config)


def _unet() -> Adapter:
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    updates = {
        f"{stem}.to_{part}": LowRankUpdate(
            name=f"{stem}.to_{part}", A=_normal(2, 8), B=_normal(8, 2), scale=2.0, alpha=4.0
        )
        for part in "qk"
    }
    return Adapter(updates, label="seed", provenance=Provenance(rank=2))


def _written(format: str, **options: Any) -> Callable[[Path], Path]:
    image = format in ("diffusers", "kohya")

    def make(folder: Path) -> Path:
        file = folder / "seed"
        if format == "gguf":
            file = file.with_suffix(".gguf")
        elif format not in ("peft", "mlx"):
            file = file.with_suffix(".safetensors")
        return write_adapter(_unet() if image else _adapter(), file, format=format, **options)

    return make


def _safetensors(
    tensors: Arrays, beside: dict[str, str] | None = None, name: str = "seed.safetensors"
) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_file(tensors, folder / name)
        return _beside(folder, name, beside)

    return make


def _saved(name: str, content: Any, beside: dict[str, str] | None = None, **options: Any) -> Any:
    def make(folder: Path) -> Path:
        torch.save(content, folder / name, **options)
        return _beside(folder, name, beside)

    return make


def _beside(folder: Path, name: str, beside: dict[str, str] | None) -> Path:
    for other, text in (beside or {}).items():
        (folder / other).write_text(text)
    return folder if "adapter_config.json" in (beside or {}) else folder / name


def _npz(folder: Path) -> Path:
    np.savez(folder / "adapters.npz", **_pair("q.lora_a", "q.lora_b", turned=True))
    return folder / "adapters.npz"


def _pair(a: str, b: str, *, turned: bool = False, rank: int = 2) -> Arrays:
    first, second = _normal(rank, 8), _normal(6, rank)
    return {a: first.T.copy(), b: second.T.copy()} if turned else {a: first, b: second}


def _torch(tensors: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(one) for name, one in tensors.items()}


_LITGPT = "transformer.h.0.attn.qkv"
_PEFT = "base_model.model.layers.0.q_proj"
_PEFT_TEXT = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
_HUB = json.dumps({"config": {"architecture": "lora", "r": 2, "alpha": 8}, "model_name": "b"})
_DORA = {
    **_pair(f"{_PEFT}.lora_A.weight", f"{_PEFT}.lora_B.weight"),
    f"{_PEFT}.lora_magnitude_vector": np.abs(_normal(6)),
    "base_model.model.layers.1.k.lora_embedding_A": _normal(2, 9),
    "base_model.model.layers.1.k.lora_embedding_B": _normal(4, 2),
}
_CONV = {
    "lora_unet_a_0_conv.lora_down.weight": _normal(2, 3, 3, 3),
    "lora_unet_a_0_conv.lora_mid.weight": _normal(2, 2, 1, 1),
    "lora_unet_a_0_conv.lora_up.weight": _normal(4, 2, 1, 1),
    "lora_unet_a_0_conv.alpha": np.array(1, np.float32),
}
SEEDS: dict[str, Callable[[Path], Path]] = {
    "peft": _written("peft"),
    "diffusers": _written("diffusers"),
    "kohya": _written("kohya"),
    "loralib": _written("loralib"),
    "mlx": _written("mlx"),
    "gguf": _written("gguf", architecture="llama", heads=(2, 2)),
    "dora": _safetensors(_DORA, {"adapter_config.json": _PEFT_TEXT}, "adapter_model.safetensors"),
    "tucker": _safetensors(_CONV),
    "npz": _npz,
    "peft-bin": _saved(
        "adapter_model.bin",
        _torch(_pair(f"{_PEFT}.lora_A.weight", f"{_PEFT}.lora_B.weight")),
        {"adapter_config.json": _PEFT_TEXT},
    ),
    "old-torch": _saved(
        "a.pt",
        _torch(_pair(f"{_PEFT}.lora_A.weight", f"{_PEFT}.lora_B.weight")),
        _use_new_zipfile_serialization=False,
    ),
    "dump": _saved(
        "mp_rank_00_model_states.pt",
        {
            "module": _torch(
                _pair(f"{_PEFT}.lora_A.default.weight", f"{_PEFT}.lora_B.default.weight")
            )
        },
    ),
    "torchtune": _saved(
        "adapter_model.pt",
        _torch(
            _pair("layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight")
            | _pair("layers.0.mlp.w1.lora_a.weight", "layers.0.mlp.w1.lora_b.weight")
        ),
        {"torchtune_config.yaml": "model:\n  lora_alpha: 8\n"},
    ),
    "litgpt": _saved(
        "lit_model.pth.lora",
        {
            "model": _torch(
                _pair("transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B")
            )
        },
        {
            "hyperparameters.yaml": "lora_r: 2\nlora_alpha: 8\nlora_query: true\n"
            "lora_key: false\nlora_value: false\n",
            "model_config.yaml": "n_head: 2\nn_query_groups: 1\n",
        },
    ),
    "adapterhub": _saved(
        "pytorch_adapter.bin",
        _torch(_pair("bert.query.loras.t.lora_A", "bert.query.loras.t.lora_B")),
        {"adapter_config.json": _HUB},
    ),
    "opendelta": _saved(
        "pytorch_model.bin",
        _torch(_pair("h.0.attn.q.lora.lora_A", "h.0.attn.q.lora.lora_B")),
        {"config.json": json.dumps({"delta_type": "lora", "lora_r": 2, "lora_alpha": 16})},
    ),
    "nemo": _saved(
        "model_weights.ckpt",
        _torch(
            _pair(
                "model.decoder.layers.0.mlp.linear_fc2.adapter.linear_in.weight",
                "model.decoder.layers.0.mlp.linear_fc2.adapter.linear_out.weight",
            )
        ),
        {"model_config.yaml": "peft:\n  lora_tuning:\n    alpha: 4\n"},
    ),
    "cloneofsimo": _safetensors({"unet:0:up": _normal(6, 2), "unet:0:down": _normal(2, 5)}),
    "xlabs": _safetensors(
        _pair(
            "double_blocks.0.processor.qkv_lora1.down.weight",
            "double_blocks.0.processor.qkv_lora1.up.weight",
        )
    ),
    "old-diffusers": _safetensors(
        _pair("a.attn1.processor.to_q_lora.down.weight", "a.attn1.processor.to_q_lora.up.weight")
    ),
}


def real_adapters(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Adapters that others trained: their folders, with the files in each."""
    for path in sorted(folder.rglob("*.safetensors")):
        config = path.with_name("adapter_config.json")
        yield str(path.relative_to(folder)), [path, *([config] if config.is_file() else [])]

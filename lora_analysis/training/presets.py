"""The LoRA paper's hyperparameters (arXiv 2106.09685 v2, Tables 9 to 12) as presets by name.

All numbers are those of the tables, also where the authors' scripts (microsoft/LoRA, examples/NLU
and examples/NLG) differ: alpha of RoBERTa base (16 in the scripts); rank, alpha and warmup of
DeBERTa (16, 32, in steps); learning rates, batches, lengths or epochs of RoBERTa large on SST-2,
CoLA and STS-B and of DeBERTa on CoLA and RTE. The scripts give what the tables do not: RoBERTa's
weight decay, and no clipping for GPT-2. What neither gives (AdamW's betas) has the loop's
defaults. The batch size is that of the table for any number of processes.

Two parts of the paper's method are left out: dropout of the inputs of DeBERTa's classifier, which
belongs to the base model, and training MRPC, RTE and STS-B (except RoBERTa's runs marked †) from
the adapter of MNLI. Targets are the query and value projections, under the names of each family.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from lora_analysis.errors import InputError
from lora_analysis.patterns import near_names
from lora_analysis.training.options import override

_GLUE: Final = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")

# Per task in the order above: batch size, epochs, learning rate, maximum length.
_ROBERTA_BASE: Final = (
    (16, 30, 5e-4, 512), (16, 60, 5e-4, 512), (16, 30, 4e-4, 512), (32, 80, 4e-4, 512),
    (32, 25, 4e-4, 512), (16, 25, 5e-4, 512), (32, 80, 5e-4, 512), (16, 40, 4e-4, 512),
)  # fmt: skip
_ROBERTA_LARGE: Final = (
    (4, 10, 3e-4, 128), (4, 10, 4e-4, 128), (4, 20, 3e-4, 512), (4, 20, 2e-4, 128),
    (4, 10, 2e-4, 512), (4, 20, 3e-4, 512), (8, 20, 4e-4, 512), (8, 30, 2e-4, 512),
)  # fmt: skip
# The same and weight decay.
_DEBERTA_XXL: Final = (
    (8, 5, 1e-4, 256, 0.0), (8, 16, 6e-5, 128, 0.01), (32, 30, 2e-4, 128, 0.01),
    (4, 10, 1e-4, 64, 0.0), (6, 8, 1e-4, 512, 0.01), (8, 11, 1e-4, 320, 0.01),
    (4, 11, 2e-4, 320, 0.01), (4, 10, 2e-4, 128, 0.1),
)  # fmt: skip
_ROBERTA_DECAY: Final = 0.1  # only in the scripts
# Batches of 128 sequences of 384 tokens (WikiSQL) for the table's 250,000 warmup tokens.
_GPT3_WARMUP: Final = 5
# Weight decay, dropout, label smoothing.
_GPT2: Final = {"e2e": (0.01, 0.1, 0.1), "webnlg": (0.01, 0.1, 0.1), "dart": (0.0, 0.0, 0.0)}


def _glue_preset(
    batch: int, epochs: int, lr: float, length: int, decay: float, *, alpha: float, warmup: float
) -> dict[str, Any]:
    return {
        "rank": 8,
        "alpha": alpha,
        "targets": ["query", "value"] if warmup < 0.1 else ["query_proj", "value_proj"],
        "data": {"max_length": length},
        "loop": {
            "batch_size": batch,
            "epochs": epochs,
            "lr": lr,
            "schedule": "linear",
            "warmup_ratio": warmup,
            "weight_decay": decay,
        },
    }


def _build_presets() -> dict[str, dict[str, Any]]:
    presets: dict[str, dict[str, Any]] = {}
    for task, base, large, xxl in zip(
        _GLUE, _ROBERTA_BASE, _ROBERTA_LARGE, _DEBERTA_XXL, strict=True
    ):
        presets |= {
            f"roberta-base-{task}": _glue_preset(*base, _ROBERTA_DECAY, alpha=8, warmup=0.06),
            f"roberta-large-{task}": _glue_preset(*large, _ROBERTA_DECAY, alpha=16, warmup=0.06),
            f"deberta-xxl-{task}": _glue_preset(*xxl, alpha=8, warmup=0.1),
        }
    for task, (decay, dropout, smoothing) in _GPT2.items():
        presets[f"gpt2-{task}"] = {
            "rank": 4,
            "alpha": 32.0,
            "dropout": dropout,
            "targets": ["c_attn"],
            "parts": {"c_attn": ["q", "v"]},
            "loop": {
                "batch_size": 8,
                "epochs": 5,
                "lr": 2e-4,
                "schedule": "linear",
                "warmup_steps": 500,
                "weight_decay": decay,
                "label_smoothing": smoothing,
                "max_grad_norm": None,
            },
        }
    presets["gpt3"] = {
        "targets": ["q_proj", "v_proj"],
        "loop": {
            "batch_size": 128,
            "epochs": 2,
            "lr": 2e-4,
            "schedule": "linear",
            "warmup_steps": _GPT3_WARMUP,
            "weight_decay": 0.1,
        },
    }
    return presets


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(_build_presets())


def get_preset(name: str) -> dict[str, Any]:
    """Return the fields of a preset, for `RunConfig.from_dict`.

    Raises
    ------
    InputError
        There is no such preset.
    """
    if name not in PRESETS:
        near = ", ".join(near_names(name, PRESETS) or PRESETS)
        message = f"There is no preset '{name}'. Near names: {near}."
        raise InputError(message)
    return {key: dict(v) if isinstance(v, Mapping) else v for key, v in PRESETS[name].items()}


def merge_tables(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables merged field by field; later ones override earlier ones."""
    result: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            earlier = result.get(key)
            if isinstance(value, Mapping) and isinstance(earlier, Mapping):
                result[key] = override(earlier, value)
            else:
                result[key] = dict(value) if isinstance(value, Mapping) else value
    return result

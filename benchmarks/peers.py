"""What peers do with an adapter, by calling them: PEFT's conversion, merging, intruders."""

from __future__ import annotations

import numpy as np
import peft
import torch
from peft.tuners.lora.conversion import _convert_module_to_lora
from peft.tuners.lora.intruders import reduce_intruder_dimension

from lora_analysis import LowRankUpdate


def peft_model(update: LowRankUpdate, W: np.ndarray | None = None) -> peft.PeftModel:
    """Return one linear layer with the update as its LoRA adapter, as PEFT holds it."""
    d_out, d_in = update.shape
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(d_in, d_out, bias=False))
    if W is not None:
        model[0].weight.data = torch.from_numpy(np.ascontiguousarray(W, dtype=np.float32))
    alpha = update.known_scale() * update.rank
    config = peft.LoraConfig(r=update.rank, lora_alpha=alpha, target_modules=["0"])
    adapted = peft.get_peft_model(model, config)
    layer = adapted.base_model.model[0]
    layer.lora_A["default"].weight.data = torch.from_numpy(update.A.astype(np.float32))
    layer.lora_B["default"].weight.data = torch.from_numpy(update.B.astype(np.float32))
    return adapted


def convert(model: peft.PeftModel, rank: int) -> object:
    """Convert the layer to a LoRA of some rank, as ``peft.convert_to_lora`` does per layer."""
    return _convert_module_to_lora(model.base_model.model[0], rank)


def merge(model: peft.PeftModel, rank: int) -> None:
    """Merge the adapter with itself by SVD, as a user does with two."""
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    model.add_weighted_adapter(
        ["default", "default"], [0.5, 0.5], "merged", combination_type="svd", svd_rank=rank,
        svd_full_matrices=False,
    )  # fmt: skip


def intruders(model: peft.PeftModel) -> None:
    """Find and reduce intruder dimensions."""
    reduce_intruder_dimension(model, logging_sink=None)

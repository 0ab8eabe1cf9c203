"""PEFT as the oracle of what was edited: it loads, and computes what the printed error promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import dense_svd
from test_formats_peft_oracle import MODELS, assert_same_updates, peft_deltas, peft_model

from lora_analysis.edit import resize_adapter, without_subspace
from lora_analysis.formats import read_adapter, write_adapter

pytestmark = [
    pytest.mark.slow,
    # Importing PEFT and building tiny models touches code that warns of its own affairs.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
IDS = torch.arange(10)[None]


def loaded(family: str, folder: Path) -> Any:
    from peft import PeftModel

    torch.manual_seed(3)
    return PeftModel.from_pretrained(MODELS[family]()[0], str(folder)).eval()


def logits_with(family: str, deltas: dict[str, np.ndarray], head: Any = None) -> torch.Tensor:
    """Logits of the base with dense updates added to its weights, which uses no LoRA layer."""
    torch.manual_seed(3)
    model = MODELS[family]()[0].eval()
    with torch.no_grad():
        for name, delta in deltas.items():
            module = model.get_submodule(name)
            turned = type(module).__name__ == "Conv1D"
            module.weight += torch.from_numpy(delta.T.copy() if turned else delta).float()
        if head is not None:
            model.classifier.load_state_dict(head)
        return model(IDS).logits


def truncated(delta: np.ndarray, rank: int) -> np.ndarray:
    U, S, V = dense_svd(delta, rank)
    return (U * S) @ V.T


@pytest.mark.parametrize("asked", [{"rank": 2}, {"energy": 0.7}, {"budget": 700}])
@pytest.mark.parametrize("family", MODELS)
def test_a_resized_adapter_loads_with_the_logits_its_errors_promise(
    tmp_path: Path, family: str, asked: dict[str, Any]
) -> None:
    model = peft_model(family, {"use_rslora": True}).eval()
    model.save_pretrained(tmp_path / "whole")
    small = resize_adapter(read_adapter(tmp_path / "whole"), **asked)
    folder = write_adapter(small.adapter, tmp_path / "small")
    ours, whole = loaded(family, folder), peft_deltas(model)
    found = peft_deltas(ours)
    # PEFT's own ΔW differs from the whole by exactly what was said of each module,
    for one in small.modules:
        rest = whole[one.module] - found.get(one.module, 0.0)
        norm = np.linalg.norm(whole[one.module])
        assert np.linalg.norm(rest) / norm == pytest.approx(one.error, rel=1e-5, abs=1e-6)
    apart = sum(np.sum((whole[m] - found.get(m, 0.0)) ** 2) for m in whole)
    norms = sum(np.sum(whole[m] ** 2) for m in whole)
    assert np.sqrt(apart / norms) == pytest.approx(small.error, rel=1e-5)
    # and the logits are those of the best approximations of those ranks.
    best = {one.module: truncated(whole[one.module], one.rank) for one in small.modules if one.rank}
    head = None
    if family == "roberta":
        head = model.base_model.model.classifier.modules_to_save["default"].state_dict()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(IDS).logits, logits_with(family, best, head), rtol=1e-4, atol=1e-5
        )


def test_ranks_of_their_own_become_patterns_that_peft_reads(tmp_path: Path) -> None:
    model = peft_model("llama", {})
    model.save_pretrained(tmp_path / "whole")
    small = resize_adapter(read_adapter(tmp_path / "whole"), budget=1500)
    folder = write_adapter(small.adapter, tmp_path / "small")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert len({one.rank for one in small.modules}) > 2
    assert config["rank_pattern"]
    assert config["alpha_pattern"].keys() == config["rank_pattern"].keys()
    for name, module in loaded("llama", folder).base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            assert module.r["default"] == small.adapter[name].rank
            assert module.scaling["default"] == small.adapter[name].scale


def test_an_intervention_loads_as_an_ordinary_adapter(tmp_path: Path) -> None:
    one, other = peft_model("gpt2", {}), peft_model("gpt2", {"use_rslora": True})
    torch.manual_seed(9)
    for key, parameter in other.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter)
    for model, name in ((one, "one"), (other, "other")):
        model.save_pretrained(tmp_path / name)
    a, b = (read_adapter(tmp_path / name) for name in ("one", "other"))
    folder = write_adapter(without_subspace(a, b, side="output"), tmp_path / "rest")
    found = peft_deltas(loaded("gpt2", folder))
    wanted = {}
    for name, delta in peft_deltas(one).items():
        U, _, _ = dense_svd(peft_deltas(other)[name], 4)
        wanted[name] = delta - U @ (U.T @ delta)
    assert_same_updates(read_adapter(folder), wanted)
    for name, delta in wanted.items():
        np.testing.assert_allclose(found[name], delta, atol=1e-5 * np.abs(delta).max())

"""Parts of fused projections, adapted as loralib's MergedLinear does, on three layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZE, bare_model
from torch import Tensor, nn

from lora_analysis.errors import TargetError
from lora_analysis.formats import write_adapter
from lora_analysis.lora import (
    add_lora,
    extract_adapter,
    initial_factor,
    merge_lora,
    trainable_parameters,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOKENS = torch.arange(20).reshape(2, 10) % SIZE
FUSED = {"gpt2": "c_attn", "gpt-neox": "query_key_value", "bloom": "query_key_value"}
HEADS, WIDTH = 2, 8  # 16 features


def rows_by_hand(family: str, part: str) -> list[int]:
    """The rows as each family's own code takes its fused projection apart."""
    marks = torch.arange(3 * HEADS * WIDTH)
    if family == "gpt2":  # split into three
        q, k, v = marks.split(HEADS * WIDTH)
    else:  # (heads, 3, width)
        q, k, v = marks.view(HEADS, 3, WIDTH).unbind(1)
    return {"q": q, "k": k, "v": v}[part].reshape(-1).tolist()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits  # type: ignore[no-any-return]


def trained(family: str, parts: list[str], **options: Any) -> Any:
    model = bare_model(family)
    target = FUSED[family]
    add_lora(model, rank=2, alpha=6, targets=[target], seed=4, parts={target: parts}, **options)
    optimiser = torch.optim.AdamW([p for _, p in trainable_parameters(model)], lr=0.05)
    for _ in range(4):
        labels = (TOKENS * 7) % SIZE
        loss = nn.functional.cross_entropy(model(TOKENS).logits.flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("parts", [["q", "v"], ["k"], ["v", "q"]])
@pytest.mark.parametrize("family", FUSED)
def test_the_rows_of_the_parts_change_and_no_others(family: str, parts: list[str]) -> None:
    adapter = extract_adapter(trained(family, parts))
    for name, update in adapter.items():
        assert name.endswith(FUSED[family])
        assert update.rank == 2 * len(parts)
        for at, part in enumerate(parts):
            block = update.B[:, 2 * at : 2 * at + 2]  # type: ignore[union-attr]
            assert block.any(axis=1).nonzero()[0].tolist() == sorted(rows_by_hand(family, part))


@pytest.mark.parametrize("family", FUSED)
def test_peft_loads_the_parts_as_one_update_with_equal_logits(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = trained(family, ["q", "v"])
    expected = logits(model)
    assert (expected - logits(bare_model(family))).abs().max() > 0.05
    write_adapter(extract_adapter(model), tmp_path / "adapter")
    foreign = PeftModel.from_pretrained(bare_model(family), tmp_path / "adapter")
    torch.testing.assert_close(logits(foreign), expected, rtol=1e-5, atol=1e-5)
    merge_lora(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_what_is_trained_are_the_blocks_alone() -> None:
    model = bare_model("gpt2")
    names = add_lora(model, rank=2, alpha=6, targets=["c_attn"], seed=4, parts={"c_attn": "qv"})
    counted = sum(value.numel() for _, value in trainable_parameters(model))
    assert counted == 2 * (2 * 2 * 16 + 2 * 16 * 2)  # per layer: A (2·r, d), two B (d, r)
    A = extract_adapter(model)[names[0]].A  # type: ignore[union-attr]
    assert (initial_factor(names[0], 4, 4, 16).numpy() == A).all()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"c_attn": ["gate"]}, "part 'gate' of 'transformer.h.0.attn.c_attn'"),
        ({"c_attn": ["x"]}, "its rows are q, k and v, not x"),
        ({"attn.c_atn": ["q"]}, "matches the pattern 'attn.c_atn'"),
    ],
)
def test_parts_that_a_module_does_not_have_are_refused(
    parts: dict[str, list[str]], words: str
) -> None:
    model = bare_model("gpt2")
    with pytest.raises(TargetError, match=words):
        add_lora(model, rank=2, alpha=6, targets=["c_attn"], seed=4, parts=parts)

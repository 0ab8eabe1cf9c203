"""Stacks of experts, adapted as PEFT's ``target_parameters``: Mixtral's, and transposed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZE, bare_model
from torch import Tensor, nn

from lora_analysis.errors import (
    IncompatibleError,
    InputError,
    TargetError,
    UnsupportedMethodError,
)
from lora_analysis.formats import read_adapter, write_adapter
from lora_analysis.lora import (
    add_lora,
    extract_adapter,
    initial_adapter,
    load_adapter_into,
    merge_lora,
    set_active,
    trainable_parameters,
    unmerge_lora,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

TOKENS = torch.arange(20).reshape(2, 10) % SIZE
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits  # type: ignore[no-any-return]


def trained(**options: Any) -> Any:
    model = bare_model("mixtral")
    given: dict[str, Any] = {"targets": [], "target_parameters": BOTH, **options}
    add_lora(model, rank=2, alpha=6, seed=4, **given)
    optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(model)], lr=0.05)
    for _ in range(4):
        labels = (TOKENS * 7) % SIZE
        loss = nn.functional.cross_entropy(model(TOKENS).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_parameters": BOTH[:1]},
        {"targets": ["q_proj"], "rank_pattern": {"experts.down_proj": 3}},
        {"targets": ["q_proj"], "alpha_pattern": {"q_proj": 2}},
    ],
)
def test_peft_loads_experts_trained_here_with_equal_logits(
    options: dict[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    model = trained(**options)
    expected, plain = logits(model), logits(bare_model("mixtral"))
    assert (expected - plain).abs().max() > 0.05
    adapter = extract_adapter(model)
    write_adapter(adapter, tmp_path / "adapter")
    foreign = PeftModel.from_pretrained(bare_model("mixtral"), tmp_path / "adapter")
    torch.testing.assert_close(logits(foreign), expected, rtol=1e-4, atol=1e-5)
    again = read_adapter(tmp_path / "adapter")
    assert list(again) == list(adapter)
    for name, update in adapter.items():
        assert again[name].base_name == update.base_name  # type: ignore[union-attr]
        assert (again[name].B == update.B).all()  # type: ignore[union-attr]
        assert again[name].scale == update.scale  # type: ignore[union-attr]


def test_merged_experts_compute_the_same_and_come_back() -> None:
    model = trained()
    expected = logits(model)
    before = {name: value.clone() for name, value in bare_model("mixtral").state_dict().items()}
    handle = merge_lora(model)
    assert not any("adapters" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    unmerge_lora(handle)
    assert torch.equal(logits(model), expected)
    set_active(model, None)
    torch.testing.assert_close(logits(model), logits(bare_model("mixtral")))
    for name, value in model.state_dict().items():
        if ".adapters." not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])


def test_every_expert_starts_from_rows_of_its_own_that_can_be_drawn_again() -> None:
    model = bare_model("mixtral")
    names = add_lora(model, rank=2, alpha=6, seed=4, targets=[], target_parameters=BOTH)
    assert names[0] == "model.layers.0.mlp.experts.down_proj"
    start = extract_adapter(model)
    assert len(start) == 2 * 2 * 3  # layers, parameters, experts
    again = initial_adapter(extract_adapter(trained()))
    first = [update.A for name, update in start.items() if name.endswith("gate_up_proj")]  # type: ignore[union-attr]
    assert all((start[name].A == again[name].A).all() for name in start)  # type: ignore[union-attr]
    assert abs(first[0] - first[1]).max() > 0.01


class Transposed(nn.Module):
    """Experts as gpt-oss stores them, [E, in, out]."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,eio->neo", x, self.up)


def test_transposed_experts_get_the_transposed_update() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Transposed())
    add_lora(model, rank=2, alpha=2, seed=0, targets=[], target_parameters=["up"])
    with torch.no_grad():
        model[0].adapters["default"]["up"].B.normal_()
    x = torch.randn(5, 4)
    adapter = extract_adapter(model)
    assert adapter["0.0.up"].shape == (6, 4)
    change = torch.stack([torch.tensor(u.delta_weight()).float().T for u in adapter.values()])
    expected = torch.einsum("ni,eio->neo", x, model[0].base_layer.up + change)
    torch.testing.assert_close(model(x), expected)


def test_what_is_no_stack_of_experts_is_refused() -> None:
    with pytest.raises(TargetError, match=r"'experts.gate_proj'. Near names: .*gate_up_proj"):
        trained(target_parameters=["experts.gate_proj"])
    with pytest.raises(TargetError, match=r"embed_tokens.weight': its shape is \(39, 16\)"):
        trained(target_parameters=["embed_tokens.weight"])
    with pytest.raises(InputError, match="Dropout is not supported for expert parameters"):
        trained(dropout=0.1)


def test_a_stack_that_lacks_an_expert_is_not_written(tmp_path: Path) -> None:
    adapter = extract_adapter(trained(target_parameters=BOTH[:1]))
    part = type(adapter)({n: u for n, u in adapter.items() if ".1.gate" not in n}, label="part")
    with pytest.raises(UnsupportedMethodError, match="found 2 of them, up to number 2"):
        write_adapter(part, tmp_path / "adapter")


@pytest.mark.parametrize("options", [{}, {"targets": ["q_proj"], "target_parameters": BOTH[:1]}])
def test_experts_are_loaded_into_a_model_and_compute_the_same(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(**options)
    adapter = extract_adapter(model)
    write_adapter(adapter, tmp_path / "adapter")
    for given in (adapter, read_adapter(tmp_path / "adapter")):
        other = bare_model("mixtral")
        names = load_adapter_into(other, given, trainable=True)
        assert torch.equal(logits(other), logits(model))
        assert "model.layers.0.mlp.experts.gate_up_proj" in names
        counted = sum(value.numel() for _, value in trainable_parameters(other))
        assert counted == sum(value.numel() for _, value in trainable_parameters(model))
        held = extract_adapter(other)
        assert list(held) == list(adapter)
        for name, update in adapter.items():
            assert (held[name].A == update.A).all()  # type: ignore[union-attr]
            assert held[name].base_name == update.base_name  # type: ignore[union-attr]


def test_an_adapter_of_peft_on_experts_is_loaded_with_equal_logits(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    foreign = get_peft_model(
        bare_model("mixtral"),
        LoraConfig(r=2, lora_alpha=6, target_modules=["v_proj"], target_parameters=BOTH),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in foreign.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    foreign.save_pretrained(tmp_path)
    own = bare_model("mixtral")
    load_adapter_into(own, read_adapter(tmp_path))
    assert (logits(foreign) - logits(bare_model("mixtral"))).abs().max() > 0.05
    torch.testing.assert_close(logits(own), logits(foreign), rtol=1e-4, atol=1e-5)


def test_transposed_experts_are_loaded_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Transposed())
    other = nn.Sequential(Transposed())
    other.load_state_dict(model.state_dict())
    add_lora(model, rank=2, alpha=2, seed=0, targets=[], target_parameters=["up"])
    with torch.no_grad():
        model[0].adapters["default"]["up"].B.normal_()
    load_adapter_into(other, extract_adapter(model))
    x = torch.randn(5, 4)
    assert torch.equal(other(x), model(x))


def test_experts_that_are_not_the_whole_stack_are_not_loaded() -> None:
    adapter = extract_adapter(trained(target_parameters=BOTH[:1]))
    part = type(adapter)({n: u for n, u in adapter.items() if ".1.gate" not in n}, label="part")
    words = r"experts.gate_up_proj' has 3 experts of shape .* part adapts 2 up to number 2"
    with pytest.raises(IncompatibleError, match=words):
        load_adapter_into(bare_model("mixtral"), part)
    with pytest.raises(TargetError, match="No parameter is named by the target"):
        load_adapter_into(bare_model("llama"), adapter)

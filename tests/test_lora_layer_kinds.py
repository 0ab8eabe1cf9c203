"""Embeddings, convolutions, dropout, and ranks of single modules, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_analysis.errors import TargetError
from lora_analysis.formats import read_adapter, write_adapter
from lora_analysis.lora import (
    add_lora,
    extract_adapter,
    initial_adapter,
    load_adapter_into,
    merge_lora,
    set_active,
    unmerge_lora,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

TARGETS = ["table", "line", "plane", "space", "head"]


class Kinds(nn.Module):
    """One layer of each kind, in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=0)
        self.line = nn.Conv1d(8, 6, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(1, 4, (3, 2), padding=1)
        self.space = nn.Conv3d(1, 2, 2, bias=False)
        self.head = nn.Linear(2, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.line(self.table(tokens).transpose(1, 2))  # (n, 6, 5)
        x = self.plane(torch.tanh(x)[:, None])  # (n, 4, 6, 6)
        x = self.space(torch.tanh(x)[:, None])  # (n, 2, 3, 5, 5)
        return self.head(torch.tanh(x).mean((2, 3, 4)))  # type: ignore[no-any-return]


TOKENS = torch.arange(20).reshape(2, 10) % 11


def base() -> Kinds:
    torch.manual_seed(0)
    return Kinds().eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS)  # type: ignore[no-any-return]


def train(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(TOKENS), torch.tensor([0, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_peft_loads_every_kind_trained_here_and_gives_the_same_output(tmp_path: Path) -> None:
    from peft import PeftModel

    model = base()
    add_lora(model, rank=3, alpha=6, targets=TARGETS, seed=1, rank_pattern={"plane": 2})
    assert torch.equal(output(model), output(base()))
    train(model)
    expected = output(model)
    assert (expected - output(base())).abs().max() > 0.1
    write_adapter(extract_adapter(model), tmp_path / "adapter")
    foreign = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    close(output(foreign), expected)
    handle = merge_lora(model)
    close(output(model), expected)
    unmerge_lora(handle)
    close(output(model), expected)


def test_every_kind_that_peft_trained_is_loaded_here(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS, alpha_pattern={"line": 9}, rank_pattern={"l": 1}
    )
    with pytest.warns(RuntimeWarning, match="rank_pattern"):
        foreign = get_peft_model(base(), config)
    train(foreign)
    expected = output(foreign)
    foreign.save_pretrained(tmp_path)
    model = base()
    adapter = read_adapter(tmp_path)
    load_adapter_into(model, adapter)
    close(output(model), expected)
    again = extract_adapter(model)
    for name, update in adapter.items():
        assert again[name].kernel == update.kernel  # type: ignore[union-attr]
        assert again[name].layout == update.layout


def test_the_start_of_each_kind_can_be_drawn_again() -> None:
    model = base()
    add_lora(model, rank=3, alpha=6, targets=TARGETS, seed=5)
    start = extract_adapter(model)
    train(model)
    again = initial_adapter(extract_adapter(model))
    for name, update in start.items():
        assert (update.A == again[name].A).all()  # type: ignore[union-attr]
        assert (update.B == again[name].B).all()  # type: ignore[union-attr]
    assert not start["table"].A.any()  # type: ignore[union-attr]
    assert start["table"].B.std() == pytest.approx(1, abs=0.4)  # type: ignore[union-attr]


def test_the_padding_entry_of_an_embedding_is_not_trained() -> None:
    model = base()
    add_lora(model, rank=3, alpha=6, targets=["table"], seed=1)
    train(model)
    A = model.get_submodule("table").adapters["default"].A  # type: ignore[union-attr,index]
    assert not A[:, 0].any()
    assert A[:, 1].any()


def test_a_scaled_embedding_scales_its_update_and_merges_to_the_same() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    model = nn.Sequential(Gemma3TextScaledWordEmbedding(11, 4, padding_idx=0, embed_scale=2.5))
    add_lora(model, rank=2, alpha=2, targets=["0"], seed=1)
    with torch.no_grad():
        for value in model[0].adapters["default"].parameters():
            value.normal_()
    expected = output(model)
    merge_lora(model)
    close(output(model), expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 2, dilation=2, padding="same", padding_mode="circular"),
        nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect", bias=False),
        nn.Conv3d(3, 4, 2, dilation=(1, 2, 1)),
    ],
)
def test_a_convolution_merges_to_the_same_whatever_its_stride_padding_and_dilation(
    layer: nn.Module,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    x = torch.randn(2, 3, *(6 for _ in layer.kernel_size))  # type: ignore[union-attr]
    plain = model(x)
    add_lora(model, rank=2, alpha=2, targets=["0"], seed=1)
    with torch.no_grad():
        model[0].adapters["default"].B.normal_()
    expected = model(x)
    assert (expected - plain).abs().max() > 0.1
    merge_lora(model)
    close(model(x), expected)


def test_dropout_hides_inputs_from_the_factors_in_training_alone() -> None:
    model = nn.Sequential(nn.Linear(4096, 2))
    add_lora(model, rank=2, alpha=2, targets=["0"], seed=1, dropout=0.25)
    factors = model[0].adapters["default"]
    with torch.no_grad():
        model[0].base_layer.weight.zero_()
        model[0].base_layer.bias.zero_()
        factors.A.fill_(1 / 4096)  # exact, and so is every sum of it
        factors.B.fill_(1.0)
    x = torch.ones(1, 4096)
    torch.testing.assert_close(model.eval()(x), torch.full((1, 2), 2.0))
    torch.manual_seed(0)
    seen = model.train()(x)  # each input is dropped with 0.25, the others grow by 1 / 0.75
    assert seen[0, 0].item() != 2.0
    assert seen[0, 0].item() == pytest.approx(2.0, abs=0.1)
    assert extract_adapter(model).config["lora_dropout"] == 0.25


def test_each_module_has_the_rank_and_alpha_of_its_pattern() -> None:
    model = base()
    add_lora(
        model,
        rank=3,
        alpha=6,
        targets=TARGETS,
        seed=1,
        rank_pattern={"line": 2, "p.*": 1},
        alpha_pattern={"head": 12.0},
    )
    adapter = extract_adapter(model)
    ranks = {name: update.rank for name, update in adapter.items()}
    assert ranks == {"table": 3, "line": 2, "plane": 1, "space": 3, "head": 3}
    scales = {name: update.scale for name, update in adapter.items()}  # type: ignore[union-attr]
    assert scales == {"table": 2, "line": 3, "plane": 6, "space": 2, "head": 4}
    assert adapter.provenance.rank is None


def test_swapping_adapters_back_and_forth_changes_nothing() -> None:
    model = base()
    plain = output(model)
    seen = {}
    for number, name in enumerate(("first", "second")):
        add_lora(model, rank=2, alpha=4, targets=TARGETS, seed=number, name=name)
        train(model)
        seen[name] = output(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        for name in ("second", "first"):
            set_active(model, name)
            assert torch.equal(output(model), seen[name])
        set_active(model, None)
        assert torch.equal(output(model), plain)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(4, 4, 1, groups=2), "a Conv2d in 2 groups has no matrix to factor"),
        (nn.ConvTranspose1d(4, 4, 1), "a ConvTranspose1d is not a Linear"),
        (nn.Embedding(4, 4, max_norm=1.0), "a Embedding is not a Linear"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention keeps q, k and v in one parameter"),
    ],
)
def test_what_has_no_plain_matrix_is_refused_by_name(layer: nn.Module, words: str) -> None:
    model = nn.ModuleDict({"odd": layer})
    with pytest.raises(TargetError, match=f"Cannot adapt 'odd': {words}"):
        add_lora(model, rank=2, alpha=2, targets=["odd"], seed=0)

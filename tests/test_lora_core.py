"""The adapted layer and the factor it starts from."""

from __future__ import annotations

import pytest
import torch
from lora_models import Conv1D
from torch import nn

from lora_analysis.errors import IncompatibleError
from lora_analysis.lora import Conv1DLoraLayer, LoraLayer, initial_factor


def wrapped(layer: nn.Module, rank: int = 3, scale: float = 1.7) -> LoraLayer:
    """The layer with an active adapter of random factors."""
    kind = Conv1DLoraLayer if isinstance(layer, Conv1D) else LoraLayer
    d_out, d_in = kind.shape(layer)
    result = kind(layer)
    A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)
    result.adapters["default"] = kind.make_factors(
        layer, A, B, "q", scale=scale, alpha=None, config={}
    )
    result.active = "default"
    return result


LAYERS = [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), Conv1D(4, 6)]


@pytest.mark.parametrize("layer", LAYERS)
def test_the_output_is_wx_plus_scaled_b_of_ax(layer: nn.Module) -> None:
    lora = wrapped(layer)
    factors = lora.adapters["default"]
    x = torch.randn(2, 5, 6)
    expected = torch.stack([factors.B @ (factors.A @ row) for row in x.reshape(-1, 6)])
    expected = layer(x) + 1.7 * expected.reshape(2, 5, 4)
    torch.testing.assert_close(lora(x), expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_merged_weight_computes_the_same(layer: nn.Module) -> None:
    lora = wrapped(layer)
    x = torch.randn(5, 6)
    expected = lora(x)
    merged = lora.merged_parameters()["weight"]
    assert merged.shape == layer.weight.shape
    output = torch.func.functional_call(layer, {"weight": merged}, x)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("base", "factors"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_factors_are_never_in_half_precision_and_outputs_keep_the_bases_type(
    base: torch.dtype, factors: torch.dtype
) -> None:
    lora = wrapped(nn.Linear(6, 4).to(base))
    assert lora.adapters["default"].A.dtype == factors
    assert lora.adapters["default"].B.dtype == factors
    assert lora(torch.randn(2, 6).to(base)).dtype == base
    assert lora.merged_parameters()["weight"].dtype == base


def test_a_half_precision_base_is_rounded_once_after_the_sum() -> None:
    lora = wrapped(nn.Linear(6, 4).to(torch.bfloat16))
    x = torch.randn(2, 6).to(torch.bfloat16)
    factors = lora.adapters["default"]
    update = x.float() @ factors.A.T @ factors.B.T * 1.7
    expected = (lora.base_layer(x).float() + update).bfloat16()
    assert torch.equal(lora(x), expected)


def test_a_wrapper_answers_for_the_layer_it_wraps() -> None:
    lora = wrapped(nn.Linear(6, 4))
    assert lora.weight is lora.base_layer.weight
    assert lora.in_features == 6
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = lora.no_such_thing


def test_factors_of_another_shape_are_refused_with_both_shapes() -> None:
    with pytest.raises(IncompatibleError, match=r"'q'.*\(4, 6\).*A is \(2, 5\).*B \(4, 2\)"):
        LoraLayer.make_factors(nn.Linear(6, 4), torch.ones(2, 5), torch.ones(4, 2), "q")


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(4),
        nn.Embedding(4, 4),
        nn.Conv1d(4, 4, 1),
        nn.Bilinear(4, 4, 4),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    ],
)
def test_no_kind_accepts_a_layer_without_a_plain_matrix_to_merge_into(layer: nn.Module) -> None:
    assert not LoraLayer.accepts(layer)
    assert not Conv1DLoraLayer.accepts(layer)


def test_each_kind_accepts_its_own_layers() -> None:
    assert LoraLayer.accepts(nn.Linear(4, 4))
    assert not LoraLayer.accepts(Conv1D(4, 4))
    assert Conv1DLoraLayer.accepts(Conv1D(4, 4))
    assert not Conv1DLoraLayer.accepts(nn.Linear(4, 4))


def test_the_initial_factor_depends_on_name_rank_and_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = initial_factor("layers.0.q", 4, 0, 16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    initial_factor("layers.1.q", 4, 0, 16)
    assert torch.equal(initial_factor("layers.0.q", 4, 0, 16), first)


@pytest.mark.parametrize(
    "other", [("layers.1.q", 4, 0), ("layers.0.q", 8, 0), ("layers.0.q", 4, 1)]
)
def test_other_names_ranks_and_seeds_share_no_rows(other: tuple[str, int, int]) -> None:
    a = nn.functional.normalize(initial_factor("layers.0.q", 4, 0, 512))
    b = nn.functional.normalize(initial_factor(*other, 512))
    assert (a @ b.T).abs().max() < 0.25  # five standard deviations of a random cosine


def test_the_initial_factor_is_the_same_on_every_machine() -> None:
    values = initial_factor("layers.0.q", 4, 0, 16)[0, :3]
    torch.testing.assert_close(
        values, torch.tensor([-0.18181190, 0.14930514, 0.24361479]), rtol=0, atol=1e-7
    )


def test_the_initial_factor_is_uniform_within_one_over_the_root_of_d_in() -> None:
    d_in = 400
    values = initial_factor("q", 64, 0, d_in)
    bound = d_in**-0.5
    assert values.shape == (64, d_in)
    assert values.dtype == torch.float32
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.999 * bound
    assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert abs(float(values.mean())) < 0.02 * bound

"""LoRA layers in a model: which modules, what trains, active or not, merged and unmerged."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from lora_models import TOKENS, adapted, fill, lora_layers, output, tiny_model
from torch import nn

from lora_analysis.errors import InputError, TargetError
from lora_analysis.lora import (
    add_lora,
    extract_adapter,
    initial_factor,
    merge_lora,
    parameter_counts,
    set_active,
    trainable_parameters,
    unmerge_lora,
)

SETTINGS: dict[str, Any] = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "seed": 0}


def add(model: nn.Module, **changes: Any) -> list[str]:
    return add_lora(model, **(SETTINGS | changes))


# Which modules


def test_adapted_modules_are_named_as_in_the_base_in_natural_order() -> None:
    names = add(tiny_model(), targets=["c_proj", "q_proj"])
    assert names[:4] == ["layers.0.c_proj", "layers.0.q_proj", "layers.1.c_proj", "layers.1.q_proj"]
    assert names[-1] == "layers.10.q_proj"
    assert len(names) == 22


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 11),
        (["1.q_proj"], 1),  # the end of the name in whole segments: not layers.11
        (["layers.0.q_proj", "10.c_proj"], 2),
        (r"layers\.\d\.[qc]_proj", 20),
        (r".*\.10\.q_proj", 1),
    ],
)
def test_targets_are_suffixes_or_one_expression(targets: str | list[str], count: int) -> None:
    model = tiny_model()
    names = add(model, targets=targets)
    assert names == sorted(lora_layers(model), key=names.index)
    assert len(names) == count


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ["q_porj"]}, "'q_porj'.*Near names: layers.0.q_proj"),
        ({"targets": ["q_proj", "k_proj"]}, "No module is named by the target 'k_proj'"),
        ({"targets": "q_proj"}, "'q_proj'.*regular expression for the whole name; pass a list"),
        ({"targets": []}, "No targets.*end in: embed, q_proj, c_proj, head"),
        ({"targets": ["norm"]}, "'layers.0.norm': a LayerNorm is not a Linear, Conv1D"),
        ({"targets": ["out_proj"]}, "'layers.0.mixer.out_proj': MultiheadAttention reads its"),
        ({"targets": ["mixer"]}, "'layers.0.mixer': MultiheadAttention keeps q, k and v in one"),
        ({"rank_pattern": {"q_porj": 4}}, "matches the pattern 'q_porj'. Near names: .*q_proj"),
        ({"alpha_pattern": {"head": 4}}, "No adapted module matches the pattern 'head'"),
        ({"targets": ["layers"]}, "'layers': a ModuleList"),
        ({"targets": "head.*"}, "Cannot adapt 'head': a Sequential"),
        ({"targets": ["head.0"], "trainable": ["head"]}, "target 'head.0'"),
        ({"trainable": ["haed"]}, "No module to train ends in 'haed'. Near names: head"),
        ({"trainable": [""]}, "No module to train ends in ''"),
        ({"trainable": ["head.1"]}, "No module to train ends in 'head.1'"),  # a Tanh
    ],
)
def test_a_wrong_target_is_refused_by_name_and_leaves_the_model_alone(
    changes: dict[str, Any], words: str
) -> None:
    model = tiny_model()
    before = list(model.state_dict())
    with pytest.raises(TargetError, match=words):
        add(model, **changes)
    assert list(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank must be a positive integer, found 0"),
        ({"rank": True}, "found True"),
        ({"rank": 2.0}, "found 2.0"),
        ({"rank": np.True_}, "rank must be a positive integer"),
        ({"rank": "2"}, "found '2'"),
        ({"seed": 1.5}, "seed must be an integer, found 1.5"),
        ({"alpha": 0}, "alpha must be a positive number, found 0"),
        ({"alpha": float("nan")}, "found nan"),
        ({"rank_pattern": {"q_proj": 0}}, "rank of 'q_proj' must be a positive integer, found 0"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha must be a positive number, found -1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, found 1.0"),
        ({"name": "a.b"}, "cannot be called 'a.b'"),
        ({"name": ""}, "cannot be called ''"),
        ({"name": "keys"}, "cannot be called 'keys'"),
    ],
)
def test_wrong_settings_are_refused_and_leave_the_model_alone(
    changes: dict[str, Any], words: str
) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match=words):
        add(model, **changes)
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_integers_of_numpy_are_ranks_and_seeds_and_draw_the_same_start() -> None:
    model, plain = tiny_model(), tiny_model()
    add(model, rank=np.int64(2), seed=np.int64(7))
    add(plain, rank=2, seed=7)
    layer, other = lora_layers(model)["layers.0.q_proj"], lora_layers(plain)["layers.0.q_proj"]
    assert torch.equal(layer.adapters["default"].A, other.adapters["default"].A)
    assert type(extract_adapter(model).provenance.seed) is int


def test_a_single_name_and_other_collections_are_noted_as_lists_of_names() -> None:
    model = tiny_model()
    add(model, targets=(kind for kind in ("q_proj", "c_proj")), trainable="head")
    config = extract_adapter(model).config
    assert config["target_modules"] == ["q_proj", "c_proj"]
    assert config["modules_to_save"] == ["head"]
    add(model, targets=r".*\.q_proj", trainable=("head",), name="second")
    config = extract_adapter(model, name="second").config
    assert (config["target_modules"], config["modules_to_save"]) == (r".*\.q_proj", ["head"])


def test_a_module_with_two_names_is_refused() -> None:
    model = tiny_model()
    model.layers[1].q_proj = model.layers[0].q_proj
    with pytest.raises(TargetError, match=r"'layers.0.q_proj'.*same module as 'layers.1.q_proj'"):
        add(model)
    model = tiny_model()
    model.second_head = model.head
    with pytest.raises(TargetError, match=r"'head' alone.*same module as 'second_head'"):
        add(model, trainable=["head"])


def test_a_layer_that_a_fast_path_would_pass_over_is_refused() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(TargetError, match="set_fastpath_enabled"):
        add(block, targets=["linear1"])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        add(block, targets=["linear1"])
        x = torch.randn(2, 3, 8)
        before = block.eval()(x)
        fill(block)
        with torch.no_grad():
            assert not torch.allclose(block(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_an_adapter_is_not_added_twice() -> None:
    model = tiny_model()
    add(model)
    with pytest.raises(InputError, match="has an adapter 'default' already"):
        add(model, targets=["c_proj"])
    assert len(lora_layers(model)) == 11


# What it computes and what it trains


def test_a_fresh_adapter_leaves_the_output_exactly_as_it_was() -> None:
    model = tiny_model()
    before = output(model)
    add(model, targets=["q_proj", "c_proj"], trainable=["head"])
    assert torch.equal(output(model), before)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4 / 9), (True, 4 / 3)])
def test_the_scale_is_alpha_over_the_rank_or_its_root(rslora: bool, scale: float) -> None:
    model = tiny_model()
    add(model, rank=9, use_rslora=rslora)
    assert {layer.adapters["default"].scale for layer in lora_layers(model).values()} == {scale}


def test_the_start_is_the_same_for_every_task_order_and_choice_of_modules() -> None:
    few, many = tiny_model(seed=1), tiny_model(seed=2)
    add(few, targets=["3.q_proj"])
    torch.manual_seed(99)
    state = torch.get_rng_state()
    add(many, targets=["c_proj", "q_proj"])
    assert torch.equal(torch.get_rng_state(), state)
    name = "layers.3.q_proj"
    starts = [model.get_submodule(name).adapters["default"] for model in (few, many)]
    assert torch.equal(starts[0].A, starts[1].A)
    assert torch.equal(starts[0].A, initial_factor(name, 2, 0, 8))
    assert not starts[0].B.any()


def test_gradients_and_optimizer_states_exist_for_the_adapter_and_the_head_alone() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    model(TOKENS).square().sum().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert {name for name, p in after.items() if p.grad is not None} == set(after) - set(frozen)
    assert len(optimizer.state) == len(after) - len(frozen) == 22 * 2 + 4
    assert all(".adapters.default." in name for name, _ in trainable_parameters(model))


def test_numbers_are_counted_with_and_without_the_adapter() -> None:
    model = tiny_model()
    base = sum(p.numel() for p in model.parameters())
    add(model, rank=2, trainable=["head"])
    head = 8 * 8 + 8 + 8 * 3 + 3
    assert parameter_counts(model) == (11 * 2 * (8 + 10) + head, base)


def test_evaluation_mode_computes_the_same_and_changes_no_weight() -> None:
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = [model.train()(TOKENS), model.eval()(TOKENS), model.train()(TOKENS)]
    for later in outputs[1:]:
        torch.testing.assert_close(later, outputs[0], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# Active or not


def test_without_an_active_adapter_the_model_is_its_base_head_included() -> None:
    expected = output(tiny_model())
    model = adapted()
    trained = output(model)
    assert not torch.allclose(trained, expected)
    set_active(model, None)
    assert torch.equal(output(model), expected)
    set_active(model, "default")
    assert torch.equal(output(model), trained)


def test_a_second_adapter_leaves_the_first_as_it_was() -> None:
    model = adapted()
    first = output(model)
    names = add(model, rank=3, targets=["1.q_proj"], name="second", trainable=["head"])
    assert names == ["layers.1.q_proj"]
    assert all(".second." in name for name, _ in trainable_parameters(model))
    assert torch.equal(output(model), output(tiny_model()))  # its B is zero, its head the base's
    fill(model, "second")
    assert not torch.allclose(output(model), first)
    set_active(model, "default")
    assert torch.equal(output(model), first)


def test_a_module_is_not_both_adapted_and_trained_in_full() -> None:
    model = tiny_model()
    add(model, targets=["head.0"])
    with pytest.raises(TargetError, match=r"'head.0' has LoRA factors of another adapter"):
        add(model, trainable=["head.0"], name="second")
    add(model, trainable=["head.2"], name="second")
    with pytest.raises(TargetError, match=r"'head.2': a TrainedModule"):
        add(model, targets=["head.2"], name="third")


@pytest.mark.parametrize("name", ["other", "defaul"])
def test_an_unknown_adapter_is_not_activated(name: str) -> None:
    with pytest.raises(InputError, match=f"no adapter '{name}'; it has 'default'"):
        set_active(adapted(), name)
    with pytest.raises(InputError, match="no adapter None; it has none"):
        set_active(tiny_model(), None)


# Merged and unmerged


def shape_of(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def test_a_merged_model_has_the_modules_and_tensors_of_its_base_and_the_same_output() -> None:
    model, base = adapted(), tiny_model()
    expected = output(model)
    merge_lora(model)
    assert shape_of(model) == shape_of(base)
    assert list(model.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)
    base.load_state_dict(model.state_dict())
    assert torch.equal(output(base), output(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unmerging_gives_back_every_weight_bit_for_bit(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    owners = [layer.base_layer.weight for layer in lora_layers(model).values()]
    expected = output(model)
    for _ in range(3):
        handle = merge_lora(model)
        assert not torch.equal(
            model.layers[0].q_proj.weight, before["layers.0.q_proj.base_layer.weight"]
        )
        unmerge_lora(handle)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    now = [layer.base_layer.weight for layer in lora_layers(model).values()]
    assert all(one is two for one, two in zip(owners, now, strict=True))
    assert torch.equal(output(model), expected)


def test_a_merged_bfloat16_model_equals_the_unmerged_one_to_its_precision() -> None:
    model = adapted(dtype=torch.bfloat16)
    expected = model(TOKENS).float()
    merge_lora(model)
    torch.testing.assert_close(model(TOKENS).float(), expected, rtol=0.05, atol=0.1)


def test_merging_takes_the_active_adapter_and_none_gives_the_base() -> None:
    model = adapted()
    set_active(model, None)
    handle = merge_lora(model)
    assert torch.equal(output(model), output(tiny_model()))
    unmerge_lora(handle)
    set_active(model, "default")
    assert not torch.allclose(output(model), output(tiny_model()))


def test_merging_and_unmerging_twice_are_errors_that_change_nothing() -> None:
    model = adapted()
    handle = merge_lora(model)
    merged = output(model)
    with pytest.raises(InputError, match="merged already"):
        merge_lora(model)
    assert torch.equal(output(model), merged)
    unmerge_lora(handle)
    with pytest.raises(InputError, match=r"'layers.0.q_proj' \(of 23 modules\).*unmerged already"):
        unmerge_lora(handle)


def test_a_model_adapted_after_the_merge_is_not_unmerged_under_its_feet() -> None:
    model = adapted()
    handle = merge_lora(model)
    add(model, name="next")
    with pytest.raises(InputError, match="an adapter added to the merged one"):
        unmerge_lora(handle)


def test_a_tied_weight_is_merged_in_the_adapted_module_alone_and_tied_again_after() -> None:
    model = tiny_model()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    add(model, targets=["0.q_proj"])
    fill(model)
    original = model.layers[1].q_proj.weight
    handle = merge_lora(model)
    assert model.layers[1].q_proj.weight is original
    assert not torch.equal(model.layers[0].q_proj.weight, original)
    unmerge_lora(handle)
    assert model.layers[0].q_proj.base_layer.weight is original


def test_a_model_converted_while_merged_is_not_unmerged_to_two_types() -> None:
    model = adapted()
    handle = merge_lora(model)
    before = list(model.state_dict())
    model.half()
    with pytest.raises(InputError, match=r"'layers.0.q_proj' is float16.*merged as float32"):
        unmerge_lora(handle)
    assert list(model.state_dict()) == before
    model.float()
    unmerge_lora(handle)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_a_base_converted_while_its_adapter_was_off_is_not_unmerged_either() -> None:
    model = adapted()
    set_active(model, None)
    handle = merge_lora(model)
    model.double()
    with pytest.raises(InputError, match=r"is float64 now and was merged as float32"):
        unmerge_lora(handle)


def test_modes_set_while_merged_hold_after_unmerging() -> None:
    model = adapted().train()
    handle = merge_lora(model)
    model.eval()
    unmerge_lora(handle)
    assert not any(module.training for module in model.modules())


# Copies and compilers


def test_a_deep_copy_is_independent() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    expected = output(model)
    fill(twin, seed=5)
    set_active(twin, None)
    assert torch.equal(output(model), expected)
    assert torch.equal(output(twin), output(tiny_model()))


# Deprecated in favor of torch.export, which takes eight seconds to import.
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_a_trace_computes_the_same() -> None:
    model = adapted().eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, (TOKENS,))
        torch.testing.assert_close(traced(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-6)


def test_the_share_of_trained_numbers_at_gpt3s_width_is_the_papers() -> None:
    width = 12288
    with torch.device("meta"):
        model = nn.ModuleDict({kind: nn.Linear(width, width) for kind in "qkvo"})
        model["up"], model["down"] = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    add(model, rank=4, targets=["q", "v"])
    trained, base = parameter_counts(model)
    assert trained == 2 * 2 * 4 * width
    assert trained / base == pytest.approx(1.1e-4, rel=0.05)  # a ten-thousandth

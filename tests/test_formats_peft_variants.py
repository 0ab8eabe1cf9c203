"""Every layer and method of PEFT, saved by PEFT itself, against the ΔW of its live layers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate
from lora_analysis.bases import open_base
from lora_analysis.effective import effective_update, initial_factors_from_base
from lora_analysis.errors import (
    MalformedFileError,
    SourceError,
    UnknownFormatError,
    UnsupportedMethodError,
)
from lora_analysis.formats import find_adapters, read_adapter, write_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # Patterns that name a parameter hold, and are said not to match any module.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match"),
]


class Base(nn.Module):
    """One layer of each kind, under names of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.proj = nn.Linear(12, 16)
        self.out = nn.Linear(16, 10, bias=False)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, (3, 5), padding=1)
        self.conv3 = nn.Conv3d(4, 6, 2)
        self.point = nn.Conv2d(4, 6, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.proj(self.embed(ids)))


def base() -> Base:
    torch.manual_seed(0)
    return Base()


def randomize(model: nn.Module) -> nn.Module:
    """Give every factor and every magnitude values that training could have given it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_magnitude" in key:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in key and "default" in key:
                parameter.copy_(torch.randn_like(parameter))
    return model


def lora(targets: list[str], **fields: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=10, target_modules=targets, **fields)
    return randomize(get_peft_model(base(), config))


def layer(model: Any, name: str) -> Any:
    return model.base_model.model.get_submodule(name)


def delta(model: Any, name: str) -> np.ndarray:
    """PEFT's ΔW of a layer as a matrix from inputs to outputs."""
    own = layer(model, name)
    found = own.get_delta_weight("default").detach().double()
    if isinstance(own.get_base_layer(), nn.Embedding):
        return found.T.numpy()
    return found.reshape(len(found), -1).numpy()


def assert_same(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-6) -> None:
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


def low_rank(adapter: Adapter, name: str) -> LowRankUpdate:
    update = adapter[name]
    assert isinstance(update, LowRankUpdate)
    return update


LAYERS = {
    "proj": ("linear", ()),
    "embed": ("embedding", ()),
    "conv1": ("conv", (3,)),
    "conv2": ("conv", (3, 5)),
    "conv3": ("conv", (2, 2, 2)),
    "point": ("conv", (1, 1)),
}


@pytest.mark.parametrize("safe", [True, False])
def test_every_kind_of_layer_reads_as_peft_applies_it(tmp_path: Path, safe: bool) -> None:
    model = lora(list(LAYERS), alpha_pattern={"conv2": 3}, rank_pattern={"embed": 2})
    model.save_pretrained(tmp_path, safe_serialization=safe)
    adapter = read_adapter(tmp_path, allow_pickle=not safe)
    assert set(adapter) == set(LAYERS)
    for name, (layout, kernel) in LAYERS.items():
        update = low_rank(adapter, name)
        assert (update.layout, update.kernel) == (layout, kernel)
        assert update.variant == ""
        assert_same(update.delta_weight(), delta(model, name))
    assert set(adapter.provenance.scale_origin.values()) == {"config"}
    assert adapter.provenance.findings == ()


def test_a_grouped_convolution_reads_as_peft_computes_it(tmp_path: Path) -> None:
    model = lora(["grouped"])
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    update = low_rank(adapter, "grouped")
    own = layer(model, "grouped")
    x = torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        wanted = own.lora_B["default"](own.lora_A["default"](x)) * own.scaling["default"]
    kernels = torch.tensor(update.delta_weight()).float().reshape(12, 8, *update.kernel)
    assert_same(nn.functional.conv2d(x, kernels).numpy(), wanted.numpy())
    assert any("grouped" in finding for finding in map(str, adapter.provenance.findings))


@pytest.mark.parametrize("name", ["proj", "embed", "conv1", "conv2", "conv3"])
def test_dora_is_read_as_its_low_rank_part_and_is_whole_with_the_base(
    tmp_path: Path, name: str
) -> None:
    model = lora([name], use_dora=True)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    update = low_rank(adapter, name)
    assert update.variant == "DoRA"
    assert any(
        "DoRA in 1 of 1 modules" in finding for finding in map(str, adapter.provenance.findings)
    )
    assert_same(update.delta_weight(), delta(model, name))
    before = base().get_submodule(name).weight.detach().double()
    after = model.merge_and_unload().get_submodule(name).weight.detach().double()
    if name == "embed":
        before, after = before.T, after.T
    W = before.reshape(len(before), -1).numpy()
    whole = effective_update(update, W)
    assert isinstance(whole, DenseUpdate)
    # Of a difference of two float32 weights some digits are lost.
    assert_same(whole.delta, after.reshape(len(after), -1).numpy() - W, 1e-5)


def test_kasa_has_a_diagonal_and_a_base_cut_beforehand(tmp_path: Path) -> None:
    model = lora(["proj", "out"], kasa_config=peft.KasaConfig())
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    merged = copy.deepcopy(model).merge_and_unload()
    for name in ("proj", "out"):
        update = low_rank(adapter, name)
        assert update.variant == "KaSA"
        own = layer(model, name)
        variant = own.lora_variant["default"]
        assert_same(
            update.delta_weight(), variant._get_delta_weight(own, "default").detach().numpy()
        )
        before, after = (
            one.get_submodule(name).weight.detach().double().numpy() for one in (base(), merged)
        )
        whole = effective_update(update, before)
        assert_same(whole.delta_weight(), after - before, 1e-5)


def adalora(targets: list[str], **fields: Any) -> Any:
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=10, target_modules=targets, total_step=10, **fields
    )
    return randomize(get_peft_model(base(), config))


def test_adalora_reads_with_its_singular_values_and_its_own_scale(tmp_path: Path) -> None:
    model = adalora(["proj", "out", "conv2"])
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    for name in ("proj", "out", "conv2"):
        assert_same(adapter[name].delta_weight(), delta(model, name))
    (finding,) = adapter.provenance.findings
    assert (finding.code, finding.fields["first"]) == ("kernel-assumed", "conv2")
    assert low_rank(adapter, "conv2").layout == "conv"
    assert low_rank(adapter, "proj").layout == "linear"
    assert low_rank(adapter, "proj").alpha == 10
    half = read_adapter(tmp_path, alpha=5)
    assert_same(2 * half["proj"].delta_weight(), adapter["proj"].delta_weight())
    assert half.provenance.scale_origin["proj"] == "caller"


def test_the_kernel_of_adalora_on_a_convolution_may_be_given(tmp_path: Path) -> None:
    """Its A is ``(r, c_in·k·k)``; ``point`` has 4 inputs and a kernel of 1."""
    adalora(["conv2", "point"]).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, kernel=1)
    assert low_rank(adapter, "conv2").kernel == (1, 1)
    assert adapter.provenance.findings == ()


def test_adalora_after_pruning_keeps_the_scale_of_the_first_rank(tmp_path: Path) -> None:
    model = adalora(["proj", "out"])
    kept = {"proj": [True, False, True, True, False, False], "out": [False] * 6}
    for name, rows in kept.items():
        # Pruning sets the singular values of the dropped rows to zero.
        with torch.no_grad():
            layer(model, name).lora_E["default"][~torch.tensor(rows)] = 0
    wanted = delta(model, "proj")
    model.peft_config["default"].rank_pattern = {
        f"{name}.lora_E.default": rows for name, rows in kept.items()
    }
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert list(adapter) == ["proj"]
    assert low_rank(adapter, "proj").rank == 3
    assert_same(adapter["proj"].delta_weight(), wanted)
    loaded = PeftModel.from_pretrained(base(), str(tmp_path))
    assert_same(adapter["proj"].delta_weight(), delta(loaded, "proj"))
    (finding,) = map(str, adapter.provenance.findings)
    assert "1 modules were pruned to rank 0" in finding


def test_adalora_of_old_files_names_its_divisor(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = adalora(["proj"])
    model.save_pretrained(tmp_path)
    before = read_adapter(tmp_path)["proj"].delta_weight()
    weights = tmp_path / "adapter_model.safetensors"
    stored = load_file(weights) | {"base_model.model.proj.ranknum": torch.tensor([12.0])}
    save_file(stored, weights)
    assert_same(read_adapter(tmp_path)["proj"].delta_weight(), before * 6.00001 / 12.00001)


def started(tmp_path: Path, start: str, **fields: Any) -> tuple[Any, np.ndarray]:
    """A model after a step of training, saved before and after; and the true ΔW of ``proj``."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["proj", "out"], init_lora_weights=start, **fields
    )
    model = get_peft_model(base(), config)
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path / "trained")
    merged = copy.deepcopy(model).merge_and_unload()
    wanted = merged.proj.weight.detach().double() - base().proj.weight.detach().double()
    return model, wanted.numpy()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_starts_from_a_product_of_the_base_is_less_that_product(
    tmp_path: Path, start: str, rslora: bool
) -> None:
    _, wanted = started(tmp_path, start, use_rslora=rslora)
    with pytest.raises(UnsupportedMethodError, match=r"W - s·B0·A0.*initial="):
        read_adapter(tmp_path / "trained")
    adapter = read_adapter(tmp_path / "trained", initial=tmp_path / "initial")
    update = low_rank(adapter, "proj")
    assert (update.rank, adapter.provenance.rank, update.alpha) == (8, 8, None)
    assert_same(update.delta_weight(), wanted, 1e-5)
    assert "init-offset-in-weight" in [finding.code for finding in adapter.provenance.findings]
    again = read_adapter(write_adapter(adapter, tmp_path / "written"))
    assert_same(again["proj"].delta_weight(), wanted, 1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_start_is_worked_out_of_the_base_as_peft_does(tmp_path: Path, start: str) -> None:
    _, wanted = started(tmp_path, start)
    adapter = read_adapter(
        tmp_path / "trained", initial=initial_factors_from_base(open_base(base()))
    )
    assert_same(adapter["proj"].delta_weight(), wanted, 1e-5)


def test_a_start_drawn_at_random_is_not_worked_out(tmp_path: Path) -> None:
    started(tmp_path, "pissa_niter_4")
    adapter = read_adapter(
        tmp_path / "trained", initial=initial_factors_from_base(open_base(base()))
    )
    with pytest.raises(UnsupportedMethodError, match="drawn at random"):
        adapter["proj"]


def test_lora_ga_and_corda_are_read_with_their_initial_factors(tmp_path: Path) -> None:
    # Both need data to start; what counts here is what the files hold and the config says.
    for start in ("corda", "lora_ga"):
        _, wanted = started(tmp_path / start, "pissa")
        for folder in ("initial", "trained"):
            path = tmp_path / start / folder / "adapter_config.json"
            config = json.loads(path.read_text()) | {"init_lora_weights": start}
            path.write_text(json.dumps(config))
        with pytest.raises(UnsupportedMethodError, match="initial="):
            read_adapter(tmp_path / start / "trained")
        adapter = read_adapter(tmp_path / start / "trained", initial=tmp_path / start / "initial")
        assert_same(adapter["proj"].delta_weight(), wanted, 1e-5)


def test_what_peft_converted_is_read_as_it_is_and_not_twice(tmp_path: Path) -> None:
    model, wanted = started(tmp_path, "pissa")
    initial = tmp_path / "initial" / "adapter_config.json"
    initial.write_text(json.dumps(json.loads(initial.read_text()) | {"init_lora_weights": True}))
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    adapter = read_adapter(tmp_path / "converted")
    assert low_rank(adapter, "proj").rank == 8
    assert_same(adapter["proj"].delta_weight(), wanted, 1e-5)
    with pytest.raises(MalformedFileError, match="twice the rank was converted"):
        read_adapter(tmp_path / "converted", initial=tmp_path / "initial")


def test_mica_is_a_plain_update_whose_b_was_not_learned(tmp_path: Path) -> None:
    model = lora(["proj"], init_lora_weights="mica")
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert_same(adapter["proj"].delta_weight(), delta(model, "proj"))
    assert any("MiCA" in finding for finding in map(str, adapter.provenance.findings))


class Experts(nn.Module):
    """Stacked experts as models register them, ``[E, out, in]``, or ``[E, in, out]`` if turned."""

    def __init__(self, *, turned: bool, experts: int = 3) -> None:
        super().__init__()
        self.is_transposed = turned
        gate_up, down = (experts, 20, 8), (experts, 8, 10)
        if turned:
            gate_up, down = (experts, 8, 20), (experts, 10, 8)
        self.gate_up_proj = nn.Parameter(torch.randn(gate_up))
        self.down_proj = nn.Parameter(torch.randn(down))


class Mixture(nn.Module):
    def __init__(self, *, turned: bool) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = Experts(turned=turned)


class Layers(nn.Module):
    def __init__(self, *, turned: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixture(turned=turned) for _ in range(2))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "parameters",
    [
        ["experts.gate_up_proj", "experts.down_proj"],
        ["experts.down_proj", "experts.gate_up_proj"],
        ["down_proj"],
        ["layers.1.experts.gate_up_proj"],
    ],
)
def test_experts_are_read_one_by_one(tmp_path: Path, turned: bool, parameters: list[str]) -> None:
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["router"],
        target_parameters=parameters,
        rank_pattern={"experts.down_proj": 3},
    )
    model = randomize(get_peft_model(Layers(turned=turned), config))
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    wanted = {}
    for name, module in model.base_model.model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            own = name.replace(".base_layer", "")
            stacked = module.get_delta_weight("default").detach().double().numpy()
            for expert, change in enumerate(stacked):
                wanted[f"{own}.{expert}.{module.parameter_name}"] = change.T if turned else change
    assert set(adapter) == {"layers.0.router", "layers.1.router", *wanted}
    for name, change in wanted.items():
        update = low_rank(adapter, name)
        assert_same(update.delta_weight(), change)
        owner, _, parameter = name.rpartition(".")
        stem, _, expert = owner.rpartition(".")
        assert update.base_name == f"{stem}.{parameter}[{expert}]"
        assert update.rank == (3 if parameter == "down_proj" else 2)
    assert {finding.code for finding in adapter.provenance.findings} == {"expert-order"}


def test_experts_of_early_versions_are_turned_where_their_shapes_tell(tmp_path: Path) -> None:
    """PEFT before 0.19 took ``[E, out, in]`` for ``[E, in, out]``: here as the new one turned."""
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets)
    model = Layers(turned=False)
    for one in model.layers:
        one.experts.is_transposed = True  # PEFT then reads the axes as they come
    model = randomize(get_peft_model(model, config))
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    wrapper = model.base_model.model.layers[0].experts.base_layer
    assert wrapper.parameter_name == "gate_up_proj"
    wanted = wrapper.get_delta_weight("default").detach().double().numpy()
    assert wanted.shape == (3, 20, 8)
    assert_same(adapter["layers.0.experts.1.gate_up_proj"].delta_weight(), wanted[1])


def test_experts_of_one_parameter_and_an_unknown_version_are_a_finding(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    randomize(get_peft_model(Layers(turned=False), config)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stated = json.loads(path.read_text())
    path.write_text(json.dumps(stated | {"peft_version": "0.18.1"}))
    codes = [finding.code for finding in read_adapter(tmp_path).provenance.findings]
    assert codes == ["expert-orientation-unknown", "expert-order"]
    path.write_text(json.dumps(stated | {"r": 4}))
    with pytest.raises(MalformedFileError, match=r"6 rows.*rank 4"):
        read_adapter(tmp_path)
    path.write_text(json.dumps(stated | {"target_parameters": ["down_proj", "gate_up_proj"]}))
    with pytest.raises(MalformedFileError, match="has 1 pairs of factors"):
        read_adapter(tmp_path)


def test_replicated_layers_name_the_layer_they_share(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            vocab_size=40,
        )
    )
    weights = [one.self_attn.q_proj.weight for one in model.model.layers]
    replicated = [[0, 2], [1, 3]]
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=replicated)
    model = randomize(get_peft_model(model, config))
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert len(adapter) == 4
    for index, origin in enumerate([0, 1, 1, 2]):
        name = f"model.layers.{index}.self_attn.q_proj"
        update = low_rank(adapter, name)
        assert (update.base_name or name) == f"model.layers.{origin}.self_attn.q_proj"
        own = layer(model, name)
        assert own.base_layer.weight.data_ptr() == weights[origin].data_ptr()
        assert_same(update.delta_weight(), delta(model, name))
    written = write_adapter(adapter, tmp_path.with_name("again"))
    assert low_rank(read_adapter(written), "model.layers.2.self_attn.q_proj").base_name
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_replication": [[0, 2]]}))
    with pytest.raises(MalformedFileError, match="beyond the layers"):
        read_adapter(tmp_path)


def test_weights_that_are_named_are_read_whatever_lies_beside_them(tmp_path: Path) -> None:
    model = lora(["proj"])
    model.save_pretrained(tmp_path)
    other = {key.replace(".default", ""): 2 * value for key, value in model.state_dict().items()}
    torch.save(other, tmp_path / "adapter_model.bin")
    named = read_adapter(tmp_path / "adapter_model.bin", allow_pickle=True)
    whole = read_adapter(tmp_path, allow_pickle=True)  # safetensors first, as in PEFT
    np.testing.assert_array_equal(low_rank(named, "proj").B, 2 * low_rank(whole, "proj").B)
    assert named.provenance.files[0] == tmp_path / "adapter_model.bin"
    with pytest.raises(UnknownFormatError, match=r"adapter_model\.bin: this is a pickle"):
        read_adapter(tmp_path / "adapter_model.bin")


def test_a_pickle_and_a_dump_of_one_read_as_the_safetensors_do(tmp_path: Path) -> None:
    model = lora(["proj", "embed"], use_dora=True)
    model.save_pretrained(tmp_path / "safe")
    dump = {key: value for key, value in model.state_dict().items() if ".default" in key}
    assert any(".lora_A.default.weight" in key for key in dump)
    (tmp_path / "dump").mkdir()
    torch.save(dump, tmp_path / "dump" / "adapter_model.bin")
    config = (tmp_path / "safe" / "adapter_config.json").read_text()
    (tmp_path / "dump" / "adapter_config.json").write_text(config)
    wanted = read_adapter(tmp_path / "safe")
    found = read_adapter(tmp_path / "dump", allow_pickle=True)
    assert list(found) == list(wanted) == ["embed", "proj"]
    for name in wanted:
        one, two = low_rank(found, name), low_rank(wanted, name)
        np.testing.assert_array_equal(one.delta_weight(), two.delta_weight())
        np.testing.assert_array_equal(one.magnitude, two.magnitude)  # type: ignore[arg-type]
    bare = tmp_path / "some.pt"
    torch.save(dump, bare)
    assert [ref.path for ref in find_adapters(tmp_path, allow_pickle=True)] == [
        tmp_path / "dump",
        tmp_path / "safe",
        bare,
    ]
    assert low_rank(read_adapter(bare, allow_pickle=True), "proj").variant == "DoRA"
    assert find_adapters(tmp_path / "dump")[0].format == "peft"
    with pytest.raises(SourceError, match="holds 2 adapters"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_written_of_every_layer_peft_loads(tmp_path: Path, dora: bool) -> None:
    names = [name for name in LAYERS if not (dora and name == "point")]
    model = lora(names, use_dora=dora, rank_pattern={"embed": 2})
    model.save_pretrained(tmp_path / "peft")
    written = write_adapter(read_adapter(tmp_path / "peft"), tmp_path / "ours")
    loaded = PeftModel.from_pretrained(base(), str(written)).eval()
    for name in names:
        assert_same(delta(loaded, name), delta(model, name))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), model.eval()(ids), rtol=1e-5, atol=1e-5)


def test_what_peft_cannot_load_again_is_not_written(tmp_path: Path) -> None:
    lora(["proj"], kasa_config=peft.KasaConfig()).save_pretrained(tmp_path / "kasa")
    with pytest.raises(UnsupportedMethodError, match="part of a KaSA update"):
        write_adapter(read_adapter(tmp_path / "kasa"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("targets", [["down_proj"], ["gate_up_proj", "down_proj"]])
def test_experts_are_written_back_as_peft_stored_them(
    tmp_path: Path, targets: list[str], turned: bool
) -> None:
    from safetensors.numpy import load_file

    named = [f"experts.{name}" for name in targets]
    config = LoraConfig(
        r=2, target_modules=[], target_parameters=named, rank_pattern={"experts.down_proj": 3}
    )
    randomize(get_peft_model(Layers(turned=turned), config)).save_pretrained(tmp_path / "theirs")
    write_adapter(read_adapter(tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"use_qalora": True}, "QA-LoRA"),
        ({"monteclora_config": {"buffer_size": 4}}, "MonteCLoRA"),
        ({"init_lora_weights": "loftq", "loftq_config": {}}, "LoftQ"),
    ],
)
def test_variants_that_are_no_product_are_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    plain = LoraConfig(r=4, target_modules=["proj"])
    get_peft_model(base(), plain).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stated = {key: getattr(value, "__dict__", value) for key, value in fields.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))
    with pytest.raises(UnsupportedMethodError, match=told):
        read_adapter(tmp_path)

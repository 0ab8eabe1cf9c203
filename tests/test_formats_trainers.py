"""torchtune, litgpt, AdapterHub, OpenDelta, NeMo and dumps of PEFT, by their documented layouts.

Each fixture writes what the trainer's source says it writes; where the library is installed,
the last tests of a section hold the reading against its own layers.
"""

from __future__ import annotations

import json
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.effective import effective_update
from lora_analysis.errors import (
    InputError,
    MalformedFileError,
    SourceError,
    UnsupportedMethodError,
)
from lora_analysis.formats import find_adapters, read_adapter


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20210617)


def read(path: Path, **options: object) -> Adapter:
    return read_adapter(path, allow_pickle=True, **options)  # type: ignore[arg-type]


def assert_delta(adapter: Adapter, name: str, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(adapter[name].delta_weight(), expected.numpy(), atol=1e-10)


def one(adapter: Adapter, name: str) -> LowRankUpdate:
    update = adapter[name]
    assert isinstance(update, LowRankUpdate)
    return update


def in_metas_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Hugging Face's rows of q or k in Meta's order: the halves of a head row by row in turn."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


@pytest.fixture
def torchtune(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Factors of q (4 heads), k (2 heads), an MLP matrix: epoch_0/adapter_model.pt of torchtune."""
    tensors = {
        "layers.0.attn.q_proj.lora_a.weight": random(2, 6),
        "layers.0.attn.q_proj.lora_b.weight": random(16, 2),
        "layers.0.attn.k_proj.lora_a.weight": random(2, 6),
        "layers.0.attn.k_proj.lora_b.weight": random(8, 2),
        "layers.0.mlp.w2.lora_a.weight": random(2, 9),
        "layers.0.mlp.w2.lora_b.weight": random(6, 2),
    }
    stored = dict(tensors)
    for part, heads in (("q", 4), ("k", 2)):
        key = f"layers.0.attn.{part}_proj.lora_b.weight"
        stored[key] = in_metas_order(tensors[key], heads)
    (tmp_path / "epoch_0").mkdir()
    path = tmp_path / "epoch_0" / "adapter_model.pt"
    torch.save(stored, path)
    return path, tensors


@pytest.mark.parametrize("by", ["caller", "config"])
def test_torchtunes_rows_are_turned_where_the_heads_are_known(
    torchtune: tuple[Path, dict[str, torch.Tensor]], by: str
) -> None:
    path, tensors = torchtune
    (path.parents[1] / "torchtune_config.yaml").write_text("model:\n  lora_alpha: 6.0  # so\n")
    options = {"heads": (4, 2)} if by == "caller" else {}
    if by == "config":
        base = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
        path.with_name("config.json").write_text(json.dumps(base))
    adapter = read(path, **options)
    names = {"attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj"}
    for own, theirs in (names | {"mlp.w2": "mlp.down_proj"}).items():
        a, b = (tensors[f"layers.0.{own}.lora_{role}.weight"] for role in "ab")
        assert_delta(adapter, f"model.layers.0.{theirs}", 3 * b @ a)
    assert adapter.provenance.format == "torchtune"
    assert set(adapter.provenance.scale_origin.values()) == {"config"}
    assert adapter.provenance.findings == ()


def test_torchtunes_rows_are_marked_where_the_heads_are_not_known(
    torchtune: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, tensors = torchtune
    adapter = read(path)
    assert one(adapter, "model.layers.0.self_attn.q_proj").variant == "rows in torchtune's order"
    assert one(adapter, "model.layers.0.mlp.down_proj").variant == ""
    assert "scale of 3 of 3 modules is not known" in adapter.provenance.findings[0].text
    assert "Output side not to be used" in adapter.provenance.findings[1].text
    with pytest.raises(MalformedFileError, match="do not divide into 3 heads"):
        read(path, heads=(3, 2))
    path.with_name("config.json").write_text(json.dumps({"model_type": "qwen2"}))
    key = "layers.0.attn.q_proj.lora_"
    stored = in_metas_order(tensors[f"{key}b.weight"], 4) @ tensors[f"{key}a.weight"]
    assert_delta(read(path, scale=1), "model.layers.0.self_attn.q_proj", stored)


def test_torchtunes_dora_norms_are_turned_with_their_rows(tmp_path: Path) -> None:
    a, b, norms, weight = random(2, 6), random(8, 2), random(8).abs() + 1, random(8, 6)
    tensors = {"lora_a.weight": a, "lora_b.weight": in_metas_order(b, 2)}
    tensors["magnitude"] = in_metas_order(norms[:, None], 2)[:, 0].contiguous()
    torch.save({f"layers.1.attn.q_proj.{k}": v for k, v in tensors.items()}, tmp_path / "a.pt")
    update = one(read(tmp_path / "a.pt", heads=(2, 2), scale=1), "model.layers.1.self_attn.q_proj")
    moved = weight + b @ a
    expected = norms[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight
    ours = effective_update(update, weight.numpy()).delta_weight()
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-10)


@pytest.fixture
def litgpt(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A lit_model.pth.lora: q of 4 heads and v of 2 groups, 3 features each, and a projection."""
    tensors = {
        "transformer.h.1.attn.qkv.lora_A": random(4, 12),
        "transformer.h.1.attn.qkv.lora_B": random(18, 2),
        "transformer.h.1.attn.proj.lora_A": random(2, 12),
        "transformer.h.1.attn.proj.lora_B": random(12, 2),
    }
    path = tmp_path / "lit_model.pth.lora"
    torch.save({"model": tensors}, path)
    return path, tensors


SETTINGS = "lora_r: 2\nlora_alpha: 8\nlora_query: true\nlora_key: false\nlora_value: true\n"
MODEL = "n_head: 4\nn_query_groups: 2\nmlp_class_name: LLaMAMLP\n"


def test_litgpts_fused_factors_are_split_by_the_models_heads(
    litgpt: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, tensors = litgpt
    path.with_name("hyperparameters.yaml").write_text(f"checkpoint_dir: base/llama\n{SETTINGS}")
    path.with_name("model_config.yaml").write_text(MODEL)
    adapter = read(path)
    attention = "model.layers.1.self_attn"
    assert list(adapter) == [f"{attention}.{part}_proj" for part in "oqv"]
    a, b = (tensors[f"transformer.h.1.attn.qkv.lora_{role}"] for role in "AB")
    assert_delta(adapter, f"{attention}.q_proj", 4 * b[:12] @ a[:2])
    assert_delta(adapter, f"{attention}.v_proj", 4 * b[12:] @ a[2:])
    assert adapter.provenance.format == "litgpt"
    assert adapter.provenance.base_model == "base/llama"
    assert [path.name for path in adapter.provenance.files][1:] == [
        "hyperparameters.yaml",
        "model_config.yaml",
    ]


def test_litgpts_settings_may_come_from_the_caller_and_must_come_from_somewhere(
    litgpt: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, _ = litgpt
    adapter = read(path, heads=(4, 2), enable_lora=(True, False, True))
    assert adapter["transformer.h.1.attn.qkv.v"].shape == (6, 12)
    assert "no hyperparameters.yaml" in adapter.provenance.findings[0].text
    with pytest.raises(UnsupportedMethodError, match="--enable-lora"):
        read(path)
    with pytest.raises(UnsupportedMethodError, match="--heads 32,4"):
        read(path, enable_lora=(True, False, True))
    torch.save(
        {
            "model": {"transformer.h.0.attn.qkv.lora_A": random(2, 4)}
            | {"transformer.h.0.attn.qkv.lora_B": random(4, 2)}
        },
        path,
    )
    with pytest.raises(UnsupportedMethodError, match="adapts one of q, k and v"):
        read(path)
    assert list(read(path, enable_lora=(False, True, False))) == ["transformer.h.0.attn.qkv.k"]
    torch.save(
        {"transformer.h.0.attn.attn.lora_A": random(2, 4)}
        | {"transformer.h.0.attn.attn.lora_B": random(4, 2)},
        path,
    )
    with pytest.raises(UnsupportedMethodError, match=r"litgpt before 0\.5"):
        read(path)


def test_litgpt_agrees_with_its_own_layer(tmp_path: Path) -> None:
    lora = pytest.importorskip("litgpt.lora")
    layer = lora.LoRAQKVLinear(
        12,
        24,
        head_size=3,
        n_head=4,
        n_query_groups=2,
        r=2,
        lora_alpha=8,
        enable_lora=(True, False, True),
        bias=False,
    )
    torch.nn.init.normal_(layer.lora_B)
    before = layer.linear.weight.detach().clone()
    tensors = {
        f"transformer.h.0.attn.qkv.{key}": getattr(layer, key).data for key in ("lora_A", "lora_B")
    }
    torch.save({"model": tensors}, tmp_path / "lit_model.pth.lora")
    (tmp_path / "hyperparameters.yaml").write_text(SETTINGS)
    (tmp_path / "model_config.yaml").write_text("n_head: 4\nn_query_groups: 2\n")
    adapter = read(tmp_path / "lit_model.pth.lora")
    layer.merge()
    delta = (layer.linear.weight.detach() - before).numpy()
    key = "transformer.h.0.attn.qkv"
    np.testing.assert_allclose(adapter[f"{key}.q"].delta_weight(), delta[:12], atol=1e-6)
    np.testing.assert_allclose(adapter[f"{key}.v"].delta_weight(), delta[18:], atol=1e-6)


HUB = {"architecture": "lora", "r": 2, "alpha": 8, "attn_matrices": ["q", "v"]}
HUB |= {"composition_mode": "add", "use_gating": False, "use_dora": False}


def adapterhub(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """A folder as adapters 1.3 saves it: nested config, names with ``.loras.<name>.``."""
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "pytorch_adapter.bin")
    document = {"config": HUB | config, "model_name": "gpt2", "name": "task", "hidden_size": 12}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def test_adapterhub_splits_fused_layers_by_attn_matrices(tmp_path: Path) -> None:
    fused, plain = "transformer.h.0.attn.c_attn.loras.task", "bert.query.loras.task"
    tensors = {
        f"{fused}.lora_A": random(4, 12),
        f"{fused}.lora_B": random(24, 2),
        f"{plain}.lora_A": random(2, 12),
        f"{plain}.lora_B": random(5, 2),
        "heads.task.weight": random(2, 5),
    }
    adapter = read(adapterhub(tmp_path / "a", tensors))
    assert list(adapter) == ["bert.query", *(f"transformer.h.0.attn.c_attn.{p}" for p in "qv")]
    a, b = tensors[f"{fused}.lora_A"], tensors[f"{fused}.lora_B"]
    assert_delta(adapter, "transformer.h.0.attn.c_attn.v", 4 * b[12:] @ a[2:])
    assert_delta(adapter, "bert.query", 4 * tensors[f"{plain}.lora_B"] @ tensors[f"{plain}.lora_A"])
    assert adapter.provenance.format == "adapterhub"
    assert adapter.provenance.base_model == "gpt2"
    assert [ref.label for ref in find_adapters(tmp_path, allow_pickle=True)] == ["a"]
    with pytest.raises(SourceError, match=r"it holds: '.*#task'"):
        read_adapter(f"{tmp_path / 'a'}#other", allow_pickle=True)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"composition_mode": "scale"}, "IA3"),
        ({"vera_d": 0.1}, "VeRA"),
        ({"use_gating": True}, "use_gating"),
        ({"architecture": None}, "architecture None"),
    ],
)
def test_adapterhubs_other_methods_are_refused_by_name(
    tmp_path: Path, config: dict[str, object], said: str
) -> None:
    tensors = {"q.loras.t.lora_A": random(2, 4), "q.loras.t.lora_B": random(4, 2)}
    with pytest.raises(UnsupportedMethodError, match=said):
        read(adapterhub(tmp_path / "a", tensors, **config))


def test_adapterhubs_dora_keeps_its_norms(tmp_path: Path) -> None:
    tensors = {"q.loras.t.lora_A": random(2, 4), "q.loras.t.lora_B": random(5, 2)}
    tensors["q.loras.t.m.weight"] = random(5, 1).abs()
    update = one(read(adapterhub(tmp_path / "a", tensors, use_dora=True)), "q")
    assert update.variant == "DoRA"
    np.testing.assert_allclose(update.magnitude, tensors["q.loras.t.m.weight"][:, 0])


def test_opendelta_reads_with_its_configs_alpha(tmp_path: Path) -> None:
    """Written by OpenDelta 0.3's layout: a parallel module ``lora`` beside each weight."""
    tensors = {"h.0.attn.q.lora.lora_A": random(2, 6), "h.0.attn.q.lora.lora_B": random(5, 2)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    config = {"delta_type": "lora", "lora_r": 2, "lora_alpha": 16, "backbone_checkpoint_name": "t5"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        adapter = read(source)
        assert adapter.provenance.format == "opendelta"
        a, b = tensors.values()
        assert_delta(adapter, "h.0.attn.q", 8 * b @ a)


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter", "self_attn.q_proj"),
        ("self_attention.linear_qkv.adapter.adapter_v", "self_attn.v_proj"),
        ("self_attention.linear_proj.adapter", "self_attn.o_proj"),
        ("mlp.linear_fc1.adapter.adapter_gate", "mlp.gate_proj"),
        ("mlp.adapter_layer.lora_4htoh_adapter", "mlp.down_proj"),
        ("mlp.linear_fc1.adapter", "mlp.linear_fc1"),
    ],
)
def test_nemos_canonical_modules_are_named_as_in_the_base(
    tmp_path: Path, key: str, module: str
) -> None:
    full = f"model.decoder.layers.3.{key}"
    tensors = {f"{full}.linear_in.weight": random(2, 6), f"{full}.linear_out.weight": random(5, 2)}
    torch.save(tensors, tmp_path / "model_weights.ckpt")
    (tmp_path / "model_config.yaml").write_text("peft:\n  lora_tuning:\n    alpha: 32\n")
    adapter = read(tmp_path / "model_weights.ckpt")
    a, b = tensors.values()
    assert_delta(adapter, f"model.layers.3.{module}", 16 * b @ a)
    assert ("linear_fc1 are kept whole" in str(adapter.provenance.findings)) == (
        module == "mlp.linear_fc1"
    )


def test_nemos_fused_rows_are_taken_apart_by_groups_of_heads(tmp_path: Path) -> None:
    parts = {"q": random(12, 2), "k": random(6, 2), "v": random(6, 2)}
    rows = []
    for group in range(2):  # 4 heads of 3 features in 2 groups: q, q, k, v of each
        rows += [parts["q"][6 * group : 6 * group + 6]]
        rows += [parts[part][3 * group : 3 * group + 3] for part in "kv"]
    key = "decoder.layers.0.self_attention.linear_qkv.adapter"
    a = random(2, 8)
    tensors = {f"{key}.linear_in.weight": a, f"{key}.linear_out.weight": torch.cat(rows)}
    torch.save(tensors, tmp_path / "m.pt")
    adapter = read(tmp_path / "m.pt", heads=(4, 2), scale=1)
    for part, b in parts.items():
        assert_delta(adapter, f"model.layers.0.self_attn.{part}_proj", b @ a)
    with pytest.raises(UnsupportedMethodError, match="export the adapter to PEFT"):
        read(tmp_path / "m.pt")
    with pytest.raises(MalformedFileError, match="do not divide"):
        read(tmp_path / "m.pt", heads=(5, 5))


@pytest.mark.parametrize("parts", [1, 2])
def test_nemos_gate_and_up_are_split_where_they_lie_whole(tmp_path: Path, parts: int) -> None:
    a, gate, up = random(2, 6), random(8, 2), random(8, 2)
    key = "model.decoder.layers.0.mlp.linear_fc1.adapter"
    tensors = {f"{key}.linear_in.weight": a, f"{key}.linear_out.weight": torch.cat([gate, up])}
    torch.save(tensors, tmp_path / "model_weights.ckpt")
    (tmp_path / "model_config.yaml").write_text(
        f"tensor_model_parallel_size: {parts}\nffn_hidden_size: 8\npeft:\n  alpha: 4\n"
    )
    adapter = read(tmp_path / "model_weights.ckpt")
    if parts == 1:
        assert_delta(adapter, "model.layers.0.mlp.gate_proj", 2 * gate @ a)
        assert_delta(adapter, "model.layers.0.mlp.up_proj", 2 * up @ a)
        assert adapter.provenance.findings == ()
    else:
        assert list(adapter) == ["model.layers.0.mlp.linear_fc1"]


def test_nemos_archive_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "lora.nemo", "w") as archive:
        archive.add(__file__, "model_config.yaml")
    with pytest.raises(UnsupportedMethodError, match="tar xf"):
        read_adapter(tmp_path / "lora.nemo")


def dump(path: Path, way: str, tensors: dict[str, torch.Tensor], **others: object) -> Path:
    """A checkpoint of a PEFT model: under ``module`` as DeepSpeed's, beside a run's other state."""
    torch.save({way: tensors} | others, path)
    return path


PEFT_KEY = "base_model.model.layers.0.q_proj"


@pytest.mark.parametrize("way", ["module", "state_dict"])
def test_dumps_are_read_through_their_nesting(tmp_path: Path, way: str) -> None:
    tensors = {
        f"{PEFT_KEY}.lora_A.default.weight": random(2, 6),
        f"{PEFT_KEY}.lora_B.default.weight": random(5, 2),
        f"{PEFT_KEY}.base_layer.weight": random(5, 6),
        "base_model.model.norm.weight": random(6),
    }
    shapes = [OrderedDict(a=torch.Size([2, 2]))]
    state = {"param_shapes": shapes, "sparse_tensor_module_names": set(), "optimizer": None}
    path = dump(tmp_path / "mp_rank_00_model_states.pt", way, tensors, **state)
    adapter = read(path, alpha=4)
    assert list(adapter) == ["layers.0.q_proj"]
    assert adapter.provenance.format == "peft-dump"
    a, b, *_ = tensors.values()
    assert_delta(adapter, "layers.0.q_proj", 2 * b @ a)
    assert "2 tensors next to the factors: the base model's" in adapter.provenance.findings[0].text
    assert (
        "there is no adapter_config.json next to the dump" in read(path).provenance.findings[0].text
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "b"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert one(read(path), "layers.0.q_proj").scale == 3.0


def test_parts_that_were_not_gathered_are_refused_with_the_tool(tmp_path: Path) -> None:
    tensors = {f"{PEFT_KEY}.lora_{role}.default.weight": torch.empty(0) for role in "AB"}
    path = dump(tmp_path / "mp_rank_00_model_states.pt", "module", tensors)
    with pytest.raises(UnsupportedMethodError, match=r"shape \(0,\).*zero_to_fp32.py"):
        read(path)
    parts = tmp_path / "global_step4"
    parts.mkdir()
    torch.save({"module": tensors}, parts / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(UnsupportedMethodError, match="ZeRO-3 in parts"):
        read(parts)
    sharded = tmp_path / "pytorch_model_fsdp_0"
    sharded.mkdir()
    (sharded / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UnsupportedMethodError, match="dcp_to_torch_save"):
        read(sharded)


def test_several_adapters_of_a_dump_are_chosen_by_name(tmp_path: Path) -> None:
    tensors = {
        f"{PEFT_KEY}.lora_{role}.{name}.weight": random(*((2, 6) if role == "A" else (5, 2)))
        for role in "AB"
        for name in ("one", "two")
    }
    path = dump(tmp_path / "model.pt", "state_dict", tensors)
    with pytest.raises(SourceError, match="several adapters"):
        read(path, scale=1)
    a, b = (tensors[f"{PEFT_KEY}.lora_{role}.two.weight"] for role in "AB")
    chosen = read_adapter(f"{path}#two", allow_pickle=True, scale=1)
    assert_delta(chosen, "layers.0.q_proj", b @ a)


@pytest.mark.parametrize(
    "key",
    [
        "q.lora_a.weight",
        "transformer.h.0.attn.qkv.lora_A",
        "q.loras.t.lora_A",
        "q.lora.lora_A",
        "layers.0.mlp.linear_fc2.adapter.linear_in.weight",
        "q.lora_A",
    ],
)
def test_a_module_with_one_factor_is_refused_whatever_the_trainer(tmp_path: Path, key: str) -> None:
    torch.save({key: random(2, 4)}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"has '.*' but no '"):
        read(tmp_path / "m.pt")


@pytest.mark.parametrize("where", ["mp_rank_00/model_weights.ckpt", "mp_rank_00_model_states.pt"])
def test_a_part_of_a_tensor_parallel_training_is_refused(tmp_path: Path, where: str) -> None:
    """Half of B's rows would pass for a smaller adapter."""
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    if where.endswith(".ckpt"):
        key = "model.decoder.layers.0.mlp.linear_fc2.adapter.linear_"
        tensors = {f"{key}in.weight": random(2, 6), f"{key}out.weight": random(5, 2)}
    else:
        tensors = {
            f"module.{PEFT_KEY}.lora_A.default.weight": random(2, 6),
            f"module.{PEFT_KEY}.lora_B.default.weight": random(5, 2),
        }
    torch.save(tensors, path)
    assert len(read(path, scale=1)) == 1
    other = tmp_path / where.replace("00", "01")
    other.parent.mkdir(exist_ok=True)
    torch.save(tensors, other)
    with pytest.raises(UnsupportedMethodError, match=r"one of 2 parts .* \(next to it: mp_rank_01"):
        read(path, scale=1)


def test_ms_swifts_own_tuners_are_read_as_pefts(tmp_path: Path) -> None:
    """Its LoRAConfig extends PEFT's; keys keep the adapter's name and have no prefix."""
    key = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{key}.lora_A.default.weight": random(2, 6),
        f"{key}.lora_B.default.weight": random(5, 2),
    }
    torch.save(tensors, tmp_path / "adapter_model.bin")
    config = {"swift_type": "LORA", "r": 2, "lora_alpha": 8, "use_qa_lora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = read(tmp_path)
    a, b = tensors.values()
    assert_delta(adapter, key, 4 * b @ a)
    assert set(adapter.provenance.scale_origin.values()) == {"config"}
    for changed, said in (({"swift_type": "REFT"}, "'REFT'"), ({"use_qa_lora": True}, "QA-LoRA")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UnsupportedMethodError, match=said):
            read(tmp_path)

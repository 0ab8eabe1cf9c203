"""The config of a PEFT adapter against its tensors: what is missing is told, nothing accused."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lora_analysis import patterns
from lora_analysis.adapter import Adapter
from lora_analysis.cli import run
from lora_analysis.errors import SourceError
from lora_analysis.finding import Finding
from lora_analysis.formats import read_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def folder(path: Path, modules: list[str], saved: list[str] | None = None, **fields: Any) -> Path:
    """Write an adapter of these modules and further tensors."""
    rng = np.random.default_rng(0)
    tensors = {
        f"base_model.model.{module}.lora_{role}.weight": rng.standard_normal(shape)
        for module in modules
        for role, shape in (("A", (4, 6)), ("B", (5, 4)))
    } | {f"base_model.model.{name}": np.ones((3, 2)) for name in saved or ()}
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, path / WEIGHTS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config | fields))
    return path


WEIGHTS = "adapter_model.safetensors"


def grid(layers: list[int], *types: str) -> list[str]:
    return [f"model.layers.{layer}.self_attn.{name}" for layer in layers for name in types]


def only(adapter: Adapter) -> Finding:
    (finding,) = adapter.provenance.findings
    return finding


def codes(adapter: Adapter) -> set[str]:
    return {finding.code for finding in adapter.provenance.findings}


ALL = list(range(12))


def test_a_target_without_factors_is_a_finding(tmp_path: Path) -> None:
    path = folder(tmp_path, grid(ALL, "o_proj"), target_modules=["q_proj", "k_proj", "o_proj"])
    finding = only(read_adapter(path))
    assert finding.code == "config-targets-missing"
    assert finding.fields == {"targets": ["q_proj", "k_proj"], "count": 2, "of": 3}


@pytest.mark.parametrize("excluded", [["q_proj"], r".*\.q_proj"])
def test_factors_of_an_excluded_module_are_a_finding(tmp_path: Path, excluded: Any) -> None:
    fields = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": excluded}
    path = folder(tmp_path, grid(ALL, "q_proj", "v_proj"), **fields)
    finding = only(read_adapter(path))
    assert finding.code == "config-excluded"
    assert (finding.fields["modules"], finding.fields["of"]) == (12, 24)


@pytest.mark.parametrize("targets", [["v_proj", "q_proj"], r".*\.[vq]_proj"])
def test_factors_that_are_no_target_are_a_finding(tmp_path: Path, targets: Any) -> None:
    path = folder(tmp_path, grid(ALL, "q_proj", "v_proj", "up_proj"), target_modules=targets)
    finding = only(read_adapter(path))
    assert finding.code == "config-targets-exceeded"
    assert (finding.fields["modules"], finding.fields["of"]) == (12, 36)


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["all-linear"], None, r"model\.layers\.\d+\.self_attn\.(q|v)_proj", [3]],
)
def test_targets_that_name_the_modules_or_cannot_be_compared_accuse_nobody(
    tmp_path: Path, targets: Any
) -> None:
    path = folder(tmp_path, grid(ALL, "q_proj", "v_proj"), target_modules=targets)
    assert read_adapter(path).provenance.findings == ()


def test_targets_that_are_no_expression_are_named(tmp_path: Path) -> None:
    path = folder(tmp_path, grid(ALL, "q_proj"), target_modules="(")
    finding = only(read_adapter(path))
    assert (finding.code, finding.severity) == ("config-targets-unchecked", "limit")
    assert "'(' is not a regular expression" in finding.text


def test_targets_share_the_time_of_all_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = []

    def matches(*_: Any) -> bool:
        budgets.append(patterns._BUDGET.get())
        return True

    monkeypatch.setattr("lora_analysis.formats.peft.config_checks.matches_target", matches)
    read_adapter(folder(tmp_path, grid(ALL, "q_proj"), target_modules=r".*\.q_proj"))
    assert len(budgets) == len(ALL)
    assert None not in budgets
    assert len(set(map(id, budgets))) == 1


@pytest.mark.parametrize("missing", [[5], [1], [10], [4, 5], [2, 7, 8]])
def test_a_gap_in_a_types_own_layers_is_a_finding(tmp_path: Path, missing: list[int]) -> None:
    present = [layer for layer in ALL if layer not in missing]
    modules = grid(ALL, "v_proj") + grid(present, "q_proj")
    finding = only(read_adapter(folder(tmp_path, modules, target_modules=["q_proj", "v_proj"])))
    assert finding.code == "layers-missing"
    assert finding.fields["layers"] == missing
    assert finding.fields["first"] == f"model.layers.{missing[0]}.self_attn.q_proj"
    assert finding.fields["modules"] == len(missing)


HYBRIDS = {
    "attention in every fourth layer": [3, 7, 11, 15],
    "all but every fourth": [i for i in range(16) if i % 4 != 3],
    "the last layers only": [13, 14, 15],
    "the first layer missing": list(range(1, 16)),
    "few layers at irregular places": [2, 5, 8, 10, 12, 14],
    "every other layer": list(range(1, 16, 2)),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_models_of_mixed_layers_are_not_accused(tmp_path: Path, name: str) -> None:
    modules = grid(list(range(16)), "v_proj") + grid(HYBRIDS[name], "q_proj")
    path = folder(tmp_path, modules, target_modules=["q_proj", "v_proj"])
    assert read_adapter(path).provenance.findings == ()


def test_numbers_of_a_sequence_are_no_layers(tmp_path: Path) -> None:
    modules = ["visual.merger.mlp.0", "visual.merger.mlp.2", "mm_projector.0", "mm_projector.2"]
    path = folder(tmp_path, modules, target_modules="all-linear")
    assert read_adapter(path).provenance.findings == ()


def test_targets_that_name_layers_one_by_one_leave_gaps_on_purpose(tmp_path: Path) -> None:
    modules = grid([0, 1, 2, 4, 5], "q_proj")
    assert read_adapter(folder(tmp_path, modules, target_modules=modules)).provenance.findings == ()


def test_layers_to_transform_is_compared_with_the_layers(tmp_path: Path) -> None:
    modules = grid([0, 1, 2, 4, 6], "q_proj")
    path = folder(tmp_path, modules, layers_to_transform=[0, 1, 2, 3, 4])
    finding = only(read_adapter(path))
    assert finding.code == "config-layers-differ"
    assert finding.fields == {"missing": [3], "beyond": [6]}
    path = folder(tmp_path, modules, layers_to_transform=[0, 1, 2, 4, 6])
    assert read_adapter(path).provenance.findings == ()


def test_what_modules_to_save_names_and_the_file_lacks_is_a_finding(tmp_path: Path) -> None:
    path = folder(
        tmp_path, grid(ALL, "q_proj"), ["score.weight"], modules_to_save=["score", "embed_tokens"]
    )
    finding = only(read_adapter(path))
    assert (finding.code, finding.fields["modules"]) == ("config-saved-missing", ["embed_tokens"])


SAVED = [
    ({"modules_to_save": ["head"]}, ["lm_head.weight", "lm_head.bias"]),  # PEFT: plain endswith
    ({"modules_to_save": ["classifier"]}, ["classifier.dense.weight", "classifier.out.bias"]),
    ({"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}, ["score.weight"]),
    ({"task_type": "TOKEN_CLS"}, ["classifier.weight", "classifier.bias"]),
    ({"task_type": "QUESTION_ANS"}, ["qa_outputs.weight"]),
    (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ["lm_head.weight", "model.embed_tokens.weight"],
    ),
]


@pytest.mark.parametrize(("fields", "saved"), SAVED)
def test_what_peft_saves_by_itself_is_no_finding(
    tmp_path: Path, fields: dict[str, Any], saved: list[str]
) -> None:
    adapter = read_adapter(folder(tmp_path, grid(ALL, "q_proj"), saved, **fields))
    assert set(adapter.saved_modules) == set(saved)
    assert adapter.provenance.findings == ()


def test_biases_that_the_config_promises_and_the_file_lacks_are_a_finding(tmp_path: Path) -> None:
    adapter = read_adapter(folder(tmp_path, grid(ALL, "q_proj"), bias="lora_only"))
    assert (only(adapter).code, only(adapter).fields["bias"]) == (
        "config-biases-missing",
        "lora_only",
    )
    path = folder(
        tmp_path,
        grid(ALL, "q_proj"),
        ["model.layers.0.self_attn.q_proj.base_layer.bias"],
        bias="lora_only",
    )
    assert codes(read_adapter(path)) == {"tensors-beside"}


def test_an_alpha_of_0_is_not_applied_and_not_untrained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, grid(ALL, "q_proj"), lora_alpha=0)
    adapter = read_adapter(path)
    assert only(adapter).code == "alpha-zero"
    assert "not applied as configured" in only(adapter).text
    assert run(["inspect", str(path)]) == 0
    assert "untrained" not in capsys.readouterr().out
    given = read_adapter(path, alpha=8)
    assert given.provenance.findings == ()
    assert given["model.layers.0.self_attn.q_proj"].scale == 2.0
    part = folder(tmp_path, grid(ALL, "q_proj"), alpha_pattern={"layers.3.self_attn.q_proj": 0})
    assert only(read_adapter(part)).fields == {"modules": 1, "of": 12}


def test_a_config_without_a_type_is_read_where_it_states_the_rank(tmp_path: Path) -> None:
    path = folder(tmp_path, grid(ALL, "q_proj"))
    (path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    adapter = read_adapter(path)
    assert codes(adapter) == {"config-type-missing"}
    assert adapter["model.layers.0.self_attn.q_proj"].scale == 4.0


WRAPPED = [
    "base_model.model.model._orig_mod.layers.0.{}",
    "_orig_mod.base_model.model.model.layers.0.{}",
    "base_model.model.model.layers.0._checkpoint_wrapped_module.{}",
    "module._fsdp_wrapped_module.base_model.model.model.layers.0._fsdp_wrapped_module.{}",
    "module.base_model.model.model.layers.0.{}",
]


@pytest.mark.parametrize("key", WRAPPED)
def test_wrappers_in_names_are_read(tmp_path: Path, key: str) -> None:
    rng = np.random.default_rng(0)
    for module in ("self_attn.q_proj", "self_attn.q_proj.linear"):
        stem = key.format(module)
        tensors = {f"{stem}.lora_A.weight": rng.random((4, 6)), f"{stem}.lora_B.weight":
                   rng.random((5, 4))}  # fmt: skip
        save_file({k: v.astype(np.float32) for k, v in tensors.items()}, tmp_path / WEIGHTS)
        assert list(read_adapter(tmp_path)) == [f"model.layers.0.{module}"]


def tiny(kind: Any = LlamaForCausalLM, **fields: Any) -> Any:
    torch.manual_seed(0)
    return kind(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=40,
            pad_token_id=0,
            **fields,
        )
    )


PEFTS = [
    ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
     {"tensors-beside"}),
    ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
      "ensure_weight_tying": True}, set()),
    ({"target_modules": ["q_proj"], "modules_to_save": ["tokens"]}, set()),
    ({"target_modules": "all-linear"}, set()),
    ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}, set()),
    ({"target_modules": ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"]}, set()),
    ({"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}, set()),
    ({"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}}, set()),
    ({"target_modules": ["mlp.up_proj"], "layer_replication": [[0, 2], [1, 3]]},
     {"layers-replicated"}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), PEFTS)
def test_what_peft_itself_saves_is_not_accused(
    tmp_path: Path, fields: dict[str, Any], expected: set[str]
) -> None:
    model = tiny(tie_word_embeddings=bool(fields.get("ensure_weight_tying")))
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **fields)
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert codes(read_adapter(tmp_path)) == expected


def test_a_classifiers_head_is_not_accused(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["q_proj"], task_type="SEQ_CLS")
    get_peft_model(tiny(LlamaForSequenceClassification), config).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert set(adapter.saved_modules) == {"score.weight"}
    assert adapter.provenance.findings == ()


def test_real_adapters_are_not_accused(real_adapters: Path) -> None:
    for path in ("gpt-neo-peft", "qwen2.5-peft/final", "qwen2.5-peft/checkpoint-23"):
        assert read_adapter(real_adapters / path).provenance.findings == ()


def test_weights_behind_a_broken_link_are_called_that(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    (tmp_path / "adapter_model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match=r"adapter_model\.safetensors is a link to .*gone"):
        read_adapter(tmp_path)
    with pytest.raises(SourceError, match=r"is a link to .*gone"):
        read_adapter(tmp_path / "adapter_model.safetensors")


def test_a_folder_that_may_not_be_entered_is_called_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    monkeypatch.setattr(Path, "readlink", refuse)
    with pytest.raises(SourceError, match=r"Permission denied.*every folder above"):
        read_adapter(tmp_path / "locked" / "adapter")

"""Parts of fused projections, adapted as loralib's MergedLinear does, on three layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SIZE, bare_model
from torch import Tensor, nn

from lora_analysis.bases import open_base
from lora_analysis.edit import truncate
from lora_analysis.errors import MalformedFileError, TargetError
from lora_analysis.formats import read_adapter, write_adapter
from lora_analysis.formats.fused_parts import join_parts
from lora_analysis.lora import (
    add_lora,
    extract_adapter,
    initial_adapter,
    initial_factor,
    load_adapter_into,
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
    optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(model)], lr=0.05)
    for _ in range(4):
        labels = (TOKENS * 7) % SIZE
        loss = nn.functional.cross_entropy(model(TOKENS).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("parts", [["q", "v"], ["k"], ["v", "q"]])
@pytest.mark.parametrize("family", FUSED)
def test_the_rows_of_the_parts_change_and_no_others(family: str, parts: list[str]) -> None:
    model, plain = trained(family, parts), bare_model(family)
    adapter = extract_adapter(model)
    merge_lora(model)
    for name in (name for name, _ in plain.named_modules() if name.endswith(FUSED[family])):
        old, new = (m.get_submodule(name).weight.detach() for m in (plain, model))
        change = (new - old).T if family == "gpt2" else new - old  # (d_out, d_in)
        rows = [row for part in parts for row in rows_by_hand(family, part)]
        assert change.abs().sum(dim=1).nonzero().flatten().tolist() == sorted(rows)
        for part in parts:
            update = adapter[f"{name}.{part}"]
            assert (update.rank, update.scale, update.shape) == (2, 3.0, (16, 16))
            own = change[rows_by_hand(family, part)].double()
            torch.testing.assert_close(torch.tensor(update.delta_weight()), own, atol=1e-6, rtol=0)


@pytest.mark.parametrize("parts", [["q", "v"], ["v", "q"]])
@pytest.mark.parametrize("family", FUSED)
def test_the_base_gives_the_rows_of_a_part_by_the_name_of_its_update(
    family: str, parts: list[str], tmp_path: Path
) -> None:
    model = trained(family, parts)
    plain = bare_model(family)
    plain.save_pretrained(tmp_path / "base")
    adapter = extract_adapter(model)
    for base in (open_base(plain), open_base(tmp_path / "base")):
        for name, update in adapter.items():
            module, _, part = name.rpartition(".")
            weight = plain.get_submodule(module).weight.detach().numpy()
            weight = weight.T if family == "gpt2" else weight
            own = base.weight(name, shape=update.shape).array()
            assert (own == weight[rows_by_hand(family, part)]).all()


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
    start = extract_adapter(model)
    assert [name.rpartition(".")[2] for name in start] == ["q", "v"] * 2
    for name, update in start.items():
        assert (initial_factor(name, 2, 4, 16).numpy() == update.A).all()  # type: ignore[union-attr]
        assert not update.B.any()  # type: ignore[union-attr]
    again = initial_adapter(extract_adapter(trained("gpt2", ["q", "v"])))
    assert (again[f"{names[0]}.v"].A == start[f"{names[0]}.v"].A).all()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"h.1.attn.c_attn": 3}}]
)
@pytest.mark.parametrize("parts", [["q", "v"], ["v", "q"], ["k"]])
def test_parts_that_were_written_are_read_as_parts_again(
    parts: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    model = trained("gpt2", parts, **options)
    adapter = extract_adapter(model)
    write_adapter(adapter, tmp_path / "adapter")
    again = read_adapter(tmp_path / "adapter")
    assert list(again) == list(adapter)
    assert again.provenance.rank == adapter.provenance.rank
    for name, update in adapter.items():
        same = again[name]
        assert (same.scale, same.alpha, same.layout) == (update.scale, update.alpha, "conv1d")  # type: ignore[union-attr]
        assert (same.A == update.A).all()  # type: ignore[union-attr]
        assert (same.B == update.B).all()  # type: ignore[union-attr]
    write_adapter(again, tmp_path / "twice")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (
            tmp_path / "adapter" / file
        ).read_bytes()
    other = bare_model("gpt2")
    load_adapter_into(other, again)
    assert torch.equal(logits(other), logits(model))
    held = extract_adapter(other)
    assert list(held) == list(adapter)
    assert all((held[name].B == update.B).all() for name, update in adapter.items())  # type: ignore[union-attr]


def test_parts_of_other_ranks_are_still_one_update_to_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = extract_adapter(trained("gpt2", ["q", "v"]))
    changed = {n: truncate(u, rank=1)[0] if n.endswith(".q") else u for n, u in adapter.items()}
    mixed = type(adapter)(changed, label="mixed", config=adapter.config)
    write_adapter(mixed, tmp_path / "adapter")
    again = read_adapter(tmp_path / "adapter")
    assert [update.rank for update in again.values()] == [1, 2, 1, 2]
    for name, update in mixed.items():
        np.testing.assert_allclose(again[name].delta_weight(), update.delta_weight(), atol=1e-6)
    foreign = PeftModel.from_pretrained(bare_model("gpt2"), tmp_path / "adapter")
    own = bare_model("gpt2")
    load_adapter_into(own, again)
    torch.testing.assert_close(logits(foreign), logits(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["[", "[]", None, '{"rows": 48}', "ranks", "rows", "overlap"])
def test_metadata_that_does_not_fit_the_factors_is_refused(
    text: str | None, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    write_adapter(extract_adapter(trained("gpt2", ["q", "v"])), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, framework="np") as opened:
        told = json.loads(opened.metadata()["lora_analysis.fused_parts"])
    module = next(iter(told))
    if text in ("ranks", "rows", "overlap"):
        value = told[module]
        value["ranks"]["q"] = 3 if text == "ranks" else 2
        value["parts"]["v"] = {"rows": [[32, 49]], "overlap": [[8, 48]]}.get(text, [[32, 48]])
        text = json.dumps(told)
    elif text is None or "rows" in text:
        text = json.dumps({module: json.loads(text or "null")})
    save_file(load_file(file), file, metadata={"lora_analysis.fused_parts": text})
    with pytest.raises(MalformedFileError, match=r"adapter_model.safetensors: .*fused_parts"):
        read_adapter(tmp_path)


def test_factors_that_reach_beyond_their_parts_are_not_cut_to_them(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    write_adapter(extract_adapter(trained("gpt2", ["q", "v"])), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    B = next(value for name, value in tensors.items() if "lora_B" in name)
    B[20, 0] = 0.5  # as where another program went on training the whole weight: k moved too
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(MalformedFileError, match="does not fit its factors"):
        read_adapter(tmp_path)


def test_blocks_of_loralib_are_one_update_to_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    own = extract_adapter(trained("gpt2", ["q", "v"]))
    file = write_adapter(own, tmp_path / "lora.safetensors", format="loralib")
    blocks = read_adapter(file)
    assert list(blocks) == list(own)
    write_adapter(blocks, tmp_path / "peft", format="peft")
    foreign = PeftModel.from_pretrained(bare_model("gpt2"), tmp_path / "peft").base_model
    layers = {n: m for n, m in foreign.named_modules() if n.endswith("c_attn")}
    assert len(layers) == 2
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").detach().numpy()  # Conv1D: (in, out)
        module = name.removeprefix("model.")
        for part, rows in (("q", slice(16)), ("k", slice(16, 32)), ("v", slice(32, 48))):
            wanted = 0 if part == "k" else own[f"{module}.{part}"].delta_weight()
            np.testing.assert_allclose(delta.T[rows], wanted, atol=1e-6)


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


@pytest.mark.parametrize(
    ("family", "parts", "names"),
    [("gpt2", ["q", "v"], ["c_attn.q", "c_attn.v"]), ("bloom", ["q", "v"], ["query_key_value"])],
)
def test_loralib_has_equal_blocks_as_its_own_merged_layers(
    family: str, parts: list[str], names: list[str], tmp_path: Path
) -> None:
    adapter = extract_adapter(trained(family, parts))
    again = read_adapter(write_adapter(adapter, tmp_path, format="loralib"))
    assert len(again) == 2 * len(names)
    assert all(name.endswith(tuple(names)) for name in again)
    for name, update in again.items():
        wanted = adapter if name in adapter else join_parts(adapter)
        own = wanted[name].delta_weight()
        np.testing.assert_allclose(update.delta_weight(), own, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "kind", "count"), [("gpt2", "peft", 4), ("gpt2", "loralib", 4), ("bloom", "mlx", 2)]
)
def test_converting_parts_says_how_far_they_are_from_what_they_were(
    family: str, kind: str, count: int, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from lora_analysis.cli import group

    write_adapter(extract_adapter(trained(family, ["q", "v"])), tmp_path / "adapter")
    command = ["convert", str(tmp_path / "adapter"), "--to", kind, "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(group, [*command, "--format", "json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert len(told["modules"]) == count
    assert told["error"] < 1e-6

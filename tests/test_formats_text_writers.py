"""loralib, MLX and GGUF written and read back: the same ΔW, or a refusal that says why."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.errors import InputError, ScaleError, UnsupportedMethodError
from lora_analysis.formats import read_adapter, write_adapter
from lora_analysis.formats.writing import writing_notes

FILE_EQUALITY = 1e-6
HEADS = (4, 2)
GGUF = {"architecture": "llama", "heads": HEADS}
LAYER = "model.layers.{}.{}"
SHAPES = {
    "self_attn.q_proj": (16, 12),
    "self_attn.k_proj": (8, 12),
    "mlp.down_proj": (12, 20),
}

scales = st.floats(1e-3, 1e3) | st.sampled_from([0.0, -2.0, 16 / math.sqrt(8), 1 / 3])


def update(
    rng: np.random.Generator, name: str, shape: tuple[int, int], rank: int, **fields: object
) -> LowRankUpdate:
    a, b = rng.standard_normal((rank, shape[1])), rng.standard_normal((shape[0], rank))
    whole = {"scale": 2.0} | fields
    return LowRankUpdate(name=name, A=a, B=b, **whole)  # type: ignore[arg-type]


def adapter_of(*updates: LowRankUpdate, **fields: object) -> Adapter:
    return Adapter({module.name: module for module in updates}, label="made", **fields)  # type: ignore[arg-type]


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Llama-like modules of any ranks and scales, an embedding among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    names = {
        LAYER.format(layer, part): shape for layer in range(2) for part, shape in SHAPES.items()
    }
    chosen = draw(st.lists(st.sampled_from(sorted(names)), min_size=1, unique=True))
    made = [
        update(rng, name, names[name], draw(st.integers(1, 5)), scale=draw(scales))
        for name in chosen
    ]
    if draw(st.booleans()):
        made.append(
            update(rng, "model.embed_tokens", (12, 30), 2, layout="embedding", scale=draw(scales))
        )
    return adapter_of(*made)


def assert_same(ours: Adapter, theirs: Adapter) -> None:
    assert list(ours) == list(theirs)
    for name, module in ours.items():
        before, after = module.delta_weight(), theirs[name].delta_weight()
        assert np.linalg.norm(after - before) <= FILE_EQUALITY * np.linalg.norm(before)
        assert module.layout == theirs[name].layout  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["loralib", "mlx", "gguf"])
@given(made=adapters())
def test_what_is_written_reads_back_as_the_same_update(
    kind: str, made: Adapter, tmp_path_factory: pytest.TempPathFactory
) -> None:
    options = GGUF if kind == "gguf" else {}
    path = write_adapter(made, tmp_path_factory.mktemp("out"), format=kind, **options)
    read = read_adapter(path)
    assert read.provenance.format == kind
    assert "unknown" not in read.provenance.scale_origin.values()
    assert_same(made, read)


def test_a_file_may_be_named_itself(tmp_path: Path, rng: np.random.Generator) -> None:
    made = adapter_of(update(rng, "model.layers.0.self_attn.v_proj", (8, 12), 2))
    for kind, name in (("loralib", "a.safetensors"), ("gguf", "b.gguf")):
        options = {"architecture": "qwen2"} if kind == "gguf" else {}
        path = write_adapter(made, tmp_path / name, format=kind, **options)
        assert path == tmp_path / name
        assert_same(made, read_adapter(path))


def test_blocks_of_fused_weights_become_one_merged_layer_again(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    from safetensors.numpy import load_file

    names = [f"h.{layer}.attn.c_attn.{part}" for layer in range(2) for part in "qv"]
    made = adapter_of(*(update(rng, name, (8, 12), 3) for name in names))
    path = write_adapter(made, tmp_path, format="loralib")
    shapes = {key: tensor.shape for key, tensor in load_file(path).items()}
    assert shapes["h.0.attn.c_attn.lora_A"] == (6, 12)
    assert shapes["h.0.attn.c_attn.lora_B"] == (16, 3)
    assert_same(made, read_adapter(path))
    uneven = adapter_of(update(rng, names[0], (8, 12), 3), update(rng, names[1], (8, 12), 2))
    with pytest.raises(InputError, match="differ in shape or rank"):
        write_adapter(uneven, tmp_path, format="loralib")


def test_the_scale_of_rslora_goes_into_ggufs_alpha_and_that_is_said(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    scale = 16 / math.sqrt(8)
    module = update(rng, "model.layers.0.mlp.down_proj", (12, 20), 8, scale=scale, alpha=16)
    made = adapter_of(module, config={"use_rslora": True})
    (note,) = writing_notes(made, "gguf")
    assert "cannot express rsLoRA" in note
    assert f"{scale * 8:g}" in note
    path = write_adapter(made, tmp_path, format="gguf", architecture="llama")
    read = read_adapter(path)
    assert read[module.name].alpha == pytest.approx(scale * 8)  # type: ignore[union-attr]
    assert_same(made, read)


def test_what_is_folded_or_filled_up_is_said(rng: np.random.Generator) -> None:
    names = [LAYER.format(0, part) for part in SHAPES]
    made = adapter_of(
        *(
            update(rng, name, shape, rank, scale=scale)
            for name, shape, rank, scale in zip(
                names, SHAPES.values(), (4, 4, 2), (2.0, 2.0, 3.0), strict=True
            )
        )
    )
    fold = "the scale of 1 of 3 modules is folded into B"
    assert fold in writing_notes(made, "gguf")[0]
    assert fold in writing_notes(made, "mlx")[0]
    assert "1 of 3 are filled up with zeros to rank 4" in writing_notes(made, "mlx")[1]
    assert "lora_alpha = 2 · r" in writing_notes(made, "loralib")[0]
    assert fold in writing_notes(made, "loralib")[1]
    assert writing_notes(made, "peft") == []


def test_dora_goes_to_mlx_with_its_norms_and_nowhere_else(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    norms = np.abs(rng.standard_normal(16)) + 1
    query = update(
        rng, LAYER.format(0, "self_attn.q_proj"), (16, 12), 2, variant="DoRA", magnitude=norms
    )
    read = read_adapter(write_adapter(adapter_of(query), tmp_path, format="mlx"))
    back = read[query.name]
    assert isinstance(back, LowRankUpdate)
    assert back.variant == "DoRA"
    np.testing.assert_allclose(back.magnitude, norms, rtol=1e-6)  # type: ignore[arg-type]
    plain = update(rng, LAYER.format(0, "mlp.down_proj"), (12, 20), 2)
    with pytest.raises(InputError, match="DoRA in some modules only"):
        write_adapter(adapter_of(query, plain), tmp_path, format="mlx")
    for kind in ("loralib", "gguf"):
        with pytest.raises(UnsupportedMethodError, match="part of a DoRA update"):
            write_adapter(
                adapter_of(query), tmp_path, format=kind, **(GGUF if kind == "gguf" else {})
            )


@pytest.mark.parametrize("kind", ["mlx", "gguf"])
def test_experts_are_stacked_and_come_back(
    tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    names = [f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(3)]
    experts = [update(rng, name, (6, 12), 2, scale=1 + i) for i, name in enumerate(names)]
    options = {"architecture": "qwen3moe"} if kind == "gguf" else {}
    path = write_adapter(adapter_of(*experts), tmp_path, format=kind, **options)
    assert_same(adapter_of(*experts), read_adapter(path))
    with pytest.raises(InputError, match=r"found experts \[0, 2\]"):
        write_adapter(adapter_of(experts[0], experts[2]), tmp_path, format=kind, **options)


@pytest.mark.parametrize(
    ("fields", "error", "expected"),
    [
        ({"scale": None}, ScaleError, "is not known"),
        ({"layout": "conv", "kernel": (2, 2)}, UnsupportedMethodError, "layout 'conv'"),
        ({"variant": "KaSA"}, UnsupportedMethodError, "KaSA"),
        ({"base_name": "other[3]"}, UnsupportedMethodError, "loaders look for"),
    ],
)
@pytest.mark.parametrize("kind", ["loralib", "mlx", "gguf"])
def test_what_no_format_can_say_is_refused(
    tmp_path: Path,
    rng: np.random.Generator,
    *,
    kind: str,
    fields: dict[str, object],
    error: type[Exception],
    expected: str,
) -> None:
    module = update(rng, LAYER.format(0, "mlp.down_proj"), (12, 20), 2, **fields)
    if kind == "loralib" and error is ScaleError:  # its files need not state a scale
        other = update(rng, LAYER.format(1, "mlp.down_proj"), (12, 20), 2)
        with pytest.raises(error, match=expected):
            write_adapter(adapter_of(module, other), tmp_path, format=kind)
        return
    with pytest.raises(error, match=expected):
        write_adapter(adapter_of(module), tmp_path / "new", format=kind)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["loralib", "mlx", "gguf"])
def test_modules_trained_in_full_and_empty_adapters_are_refused(
    tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    module = update(rng, LAYER.format(0, "mlp.down_proj"), (12, 20), 2)
    head = {"classifier.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(UnsupportedMethodError, match="also trained 'classifier"):
        write_adapter(adapter_of(module, saved_modules=head), tmp_path, format=kind)
    with pytest.raises(InputError, match="adapts no module"):
        write_adapter(adapter_of(), tmp_path, format=kind)


def test_gguf_needs_an_architecture_its_tensors_and_its_heads(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    query = update(rng, LAYER.format(0, "self_attn.q_proj"), (16, 12), 2)
    for made, options, expected in (
        (adapter_of(query), {}, "Pass architecture="),
        (adapter_of(query), {"architecture": "llama"}, "whose number is not known"),
        (adapter_of(query), GGUF | {"heads": (3, 3)}, "3 does not divide them"),
        (adapter_of(update(rng, "visual.proj", (8, 8), 2)), GGUF, "has no known tensor in GGUF's"),
    ):
        with pytest.raises(InputError, match=expected):
            write_adapter(made, tmp_path, format="gguf", **options)
    base = tmp_path / "base"
    base.mkdir()
    config = {"model_type": "mistral", "num_attention_heads": 4, "num_key_value_heads": 2}
    (base / "config.json").write_text(json.dumps(config))
    with_base = adapter_of(query, provenance=Provenance(base_model=str(base)))
    path = write_adapter(with_base, tmp_path / "out", format="gguf")
    assert_same(with_base, read_adapter(path))
    again = write_adapter(read_adapter(path), tmp_path / "again", format="gguf")
    assert again.read_bytes()[-224:] == path.read_bytes()[-224:]


def test_names_that_mean_something_else_are_refused(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    conv = adapter_of(update(rng, "conv1", (8, 8), 2))
    with pytest.raises(InputError, match="infer a different one from the name"):
        write_adapter(conv, tmp_path, format="loralib")
    table = adapter_of(update(rng, "model.tokens", (8, 30), 2, layout="embedding"))
    for kind in ("loralib", "mlx"):
        with pytest.raises(InputError, match="infer a different one from the name"):
            write_adapter(table, tmp_path, format=kind)


def test_gguf_is_what_the_formats_own_package_reads(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    gguf = pytest.importorskip("gguf")
    query = update(rng, LAYER.format(1, "self_attn.q_proj"), (16, 12), 2, scale=3.0)
    path = write_adapter(adapter_of(query), tmp_path, format="gguf", **GGUF)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert sorted(tensors) == ["blk.1.attn_q.weight.lora_a", "blk.1.attn_q.weight.lora_b"]
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight.lora_a"], query.A.astype(np.float32))
    permuted = query.B.reshape(4, 2, 2, 2).swapaxes(1, 2).reshape(16, 2)
    np.testing.assert_array_equal(
        tensors["blk.1.attn_q.weight.lora_b"], permuted.astype(np.float32)
    )
    assert reader.get_field("adapter.lora.alpha").contents() == 6.0
    assert reader.get_field("llama.attention.head_count_kv").contents() == 2
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"


def test_mlx_lm_loads_what_is_written(tmp_path: Path, rng: np.random.Generator) -> None:
    mx = pytest.importorskip("mlx.core")
    nn = pytest.importorskip("mlx.nn")
    utils = pytest.importorskip("mlx_lm.tuner.utils")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(12, 16, bias=False), nn.Linear(12, 8, bias=False)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Layer() for _ in range(3)]

    model = Model()
    before = {i: np.array(layer.q_proj.weight) for i, layer in enumerate(model.layers)}
    made = adapter_of(
        update(rng, "layers.0.q_proj", (16, 12), 3, scale=2.0),
        update(rng, "layers.2.q_proj", (16, 12), 2, scale=5.0),
    )
    utils.load_adapters(model, str(write_adapter(made, tmp_path, format="mlx")))
    mx.eval(model.parameters())
    for i, layer in enumerate(model.layers):
        delta = np.array(layer.q_proj.fuse().weight) - before[i]
        name = f"layers.{i}.q_proj"
        expected = made[name].delta_weight() if name in made else 0
        np.testing.assert_allclose(delta, expected, atol=1e-4)

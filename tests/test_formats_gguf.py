"""LoRA in GGUF, written by the package ``gguf`` as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.errors import InputError, MalformedFileError, UnsupportedMethodError
from lora_analysis.formats import find_adapters, read_adapter

gguf = pytest.importorskip("gguf")

HEADS, KEY_HEADS, ROWS, RANK, INPUTS = 4, 2, 16, 2, 12
NAMES = {
    "blk.3.attn_q": "model.layers.3.self_attn.q_proj",
    "blk.3.attn_k": "model.layers.3.self_attn.k_proj",
    "blk.3.ffn_down": "model.layers.3.mlp.down_proj",
}


def permuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's ``LlamaModel.permute``: the halves of every head, row by row in turn."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


@pytest.fixture
def factors(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of three modules, as the model has them."""
    return {
        name: (
            rng.standard_normal((RANK, INPUTS)).astype(np.float32),
            rng.standard_normal((ROWS, RANK)).astype(np.float32),
        )
        for name in NAMES
    }


@pytest.fixture
def written(
    tmp_path: Path, factors: dict[str, tuple[np.ndarray, np.ndarray]]
) -> Callable[..., Path]:
    """A GGUF adapter; ``extra`` tensors and fields go beside those of the converter."""

    def make(
        architecture: str = "llama",
        *,
        alpha: float | None = 6.0,
        kind: str = "lora",
        dtype: object = np.float32,
        extra: dict[str, np.ndarray] | None = None,
        fields: Callable[[object], None] | None = None,
    ) -> Path:
        path = tmp_path / "adapter.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, kind)
        if alpha is not None:
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if fields:
            fields(writer)
        for name, (a, b) in factors.items():
            heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(name.rpartition(".")[2])
            stored = permuted(b, heads) if heads and architecture == "llama" else b
            writer.add_tensor(f"{name}.weight.lora_a", a.astype(dtype))
            writer.add_tensor(f"{name}.weight.lora_b", stored.astype(dtype))
        for name, tensor in (extra or {}).items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def assert_reads(
    path: Path, factors: dict[str, tuple[np.ndarray, np.ndarray]], **options: object
) -> None:
    adapter = read_adapter(path, **options)  # type: ignore[arg-type]
    for name, (a, b) in factors.items():
        update = adapter[NAMES[name]]
        assert update.variant == ""  # type: ignore[union-attr]
        np.testing.assert_allclose(update.delta_weight(), 3 * b.astype(float) @ a, rtol=1e-6)


def test_permuted_rows_are_put_back_where_the_caller_says_the_heads(
    written: Callable[..., Path], factors: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    path = written()
    assert_reads(path, factors, heads=(HEADS, KEY_HEADS))
    adapter = read_adapter(path, heads=(HEADS, KEY_HEADS))
    assert adapter.provenance.format == "gguf"
    assert set(adapter.provenance.scale_origin.values()) == {"metadata"}
    assert "2 q and k modules are put back" in adapter.provenance.findings[0].text
    with pytest.raises(MalformedFileError, match="do not divide into 3 heads"):
        read_adapter(path, heads=(3, 3))


def test_permuted_rows_are_put_back_where_the_file_states_the_heads(
    written: Callable[..., Path], factors: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    def fields(writer: object) -> None:
        writer.add_head_count(HEADS)  # type: ignore[attr-defined]
        writer.add_head_count_kv(KEY_HEADS)  # type: ignore[attr-defined]

    assert_reads(written(fields=fields), factors)


def test_of_unknown_heads_the_output_side_is_marked_and_nothing_guessed(
    written: Callable[..., Path], factors: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    adapter = read_adapter(written())
    finding = adapter.provenance.findings[0].text
    assert "Output side not to be used" in finding
    assert "--heads 32,8" in finding
    update = adapter[NAMES["blk.3.attn_q"]]
    assert isinstance(update, LowRankUpdate)
    assert update.variant == "rows in llama.cpp's order"
    assert adapter[NAMES["blk.3.ffn_down"]].variant == ""  # type: ignore[union-attr]
    a, b = factors["blk.3.attn_q"]
    wanted = np.linalg.svd(3 * b.astype(float) @ a, compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(update.delta_weight())[1], wanted, atol=1e-6)


def test_architectures_that_are_not_permuted_are_left(
    written: Callable[..., Path], factors: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    assert_reads(written("qwen2"), factors)
    unknown = read_adapter(written("newllm"))
    assert "whether architecture 'newllm' permutes them is not known" in (
        unknown.provenance.findings[0].text
    )
    assert list(unknown) == ["blk.3.attn_k", "blk.3.attn_q", "blk.3.ffn_down"]


@pytest.mark.parametrize(("alpha", "said"), [(0.0, "alpha is 0"), (None, "no adapter.lora.alpha")])
def test_without_alpha_the_scale_is_one_and_that_is_said(
    written: Callable[..., Path], alpha: float | None, said: str
) -> None:
    path = written("qwen2", alpha=alpha)
    adapter = read_adapter(path)
    assert adapter[NAMES["blk.3.attn_q"]].scale == 1.0  # type: ignore[union-attr]
    assert said in adapter.provenance.findings[0].text
    mine = read_adapter(path, alpha=4)
    assert mine[NAMES["blk.3.attn_q"]].scale == 2.0  # type: ignore[union-attr]
    assert mine.provenance.findings == ()


def test_the_embedding_is_transposed_and_experts_are_taken_apart(
    written: Callable[..., Path], rng: np.random.Generator
) -> None:
    table_a, table_b = rng.standard_normal((30, 2)), rng.standard_normal((12, 2))
    experts_a, experts_b = rng.standard_normal((3, 2, 12)), rng.standard_normal((3, 8, 2))
    extra = {
        "token_embd.weight.lora_a": table_a,
        "token_embd.weight.lora_b": table_b,
        "blk.0.ffn_up_exps.weight.lora_a": experts_a,
        "blk.0.ffn_up_exps.weight.lora_b": experts_b,
        "blk.0.attn_norm.weight": rng.standard_normal(12),
    }
    single = {name: tensor.astype(np.float32) for name, tensor in extra.items()}
    adapter = read_adapter(written("qwen3moe", extra=single))
    table = adapter["model.embed_tokens"]
    assert isinstance(table, LowRankUpdate)
    assert table.layout == "embedding"
    np.testing.assert_allclose(table.delta_weight(), 3 * table_b @ table_a.T, atol=1e-5)
    expert = adapter["model.layers.0.mlp.experts.2.up_proj"]
    np.testing.assert_allclose(
        expert.delta_weight(), 3 * experts_b[2] @ experts_a[2], rtol=1e-5, atol=1e-6
    )
    assert "1 tensor next to the factors" in adapter.provenance.findings[0].text


def test_half_precision_is_exact_and_blocks_are_decoded(
    written: Callable[..., Path], factors: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    path = written("qwen2", dtype=np.float16)
    update = read_adapter(path)[NAMES["blk.3.attn_q"]]
    assert isinstance(update, LowRankUpdate)
    assert update.stored_dtype == "float16"
    a, b = (factor.astype(np.float16).astype(np.float64) for factor in factors["blk.3.attn_q"])
    np.testing.assert_allclose(update.delta_weight(), 3 * b @ a, rtol=1e-12)


def test_quantized_factors_are_decoded(tmp_path: Path, rng: np.random.Generator) -> None:
    a = rng.standard_normal((RANK, 64)).astype(np.float32)
    b = rng.standard_normal((ROWS, RANK)).astype(np.float32)
    path = tmp_path / "q8.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 2.0)
    kind = gguf.GGMLQuantizationType.Q8_0
    codes = gguf.quantize(a, kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", codes, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    update = read_adapter(path)["model.layers.0.self_attn.q_proj"]
    assert isinstance(update, LowRankUpdate)
    assert update.stored_dtype == "gguf_q8_0"
    np.testing.assert_array_equal(update.A, gguf.dequantize(codes, kind))


def test_invocation_tokens_are_said(written: Callable[..., Path]) -> None:
    def fields(writer: object) -> None:
        key = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS
        writer.add_array(key, [3, 14, 15])  # type: ignore[attr-defined]

    adapter = read_adapter(written("qwen2", fields=fields))
    assert tuple(map(str, adapter.provenance.findings)) == (
        "aLoRA: the update acts only after the invocation tokens [3, 14, 15].",
    )


def test_models_and_other_adapters_are_refused(
    written: Callable[..., Path], factors: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    with pytest.raises(UnsupportedMethodError, match="'control'; only 'lora' is read"):
        read_adapter(written(kind="control"))
    kept = dict(factors)
    factors.clear()
    path = written("qwen2", extra={"blk.0.attn_q.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(UnsupportedMethodError, match="none is a LoRA factor"):
        read_adapter(path)
    with pytest.raises(InputError):
        find_adapters(path)
    factors.update({"blk.3.attn_q": kept["blk.3.attn_q"]})
    path = written("qwen2")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(MalformedFileError):
        read_adapter(path)


GPT2 = {"blk.0.attn_qkv": (24, 8), "blk.0.attn_output": (8, 8), "blk.0.ffn_down": (8, 32)}


@pytest.mark.parametrize("turned", [True, False])
def test_gpt2s_factors_are_read_as_the_model_has_them_whichever_way_they_lie(
    written: Callable[..., Path],
    factors: dict[str, tuple[np.ndarray, np.ndarray]],
    rng: np.random.Generator,
    turned: bool,
) -> None:
    """llama.cpp's converter turns GPT-2's weights, and the factors with them; ours does not."""
    factors.clear()
    for name, (d_out, d_in) in GPT2.items():
        a, b = rng.standard_normal((2, d_in)), rng.standard_normal((d_out, 2))
        factors[name] = (a, b)
    kept = dict(factors)
    if turned:
        factors.update({name: (b.T, a.T) for name, (a, b) in kept.items()})
    adapter = read_adapter(written("gpt2", alpha=2.0, dtype=np.float64))
    for name, module in (
        ("blk.0.attn_qkv", "transformer.h.0.attn.c_attn"),
        ("blk.0.attn_output", "transformer.h.0.attn.c_proj"),
        ("blk.0.ffn_down", "transformer.h.0.mlp.c_proj"),
    ):
        a, b = kept[name]
        np.testing.assert_allclose(adapter[module].delta_weight(), b @ a, atol=1e-12)
    is_named = "A and B were exchanged and transposed" in " ".join(
        map(str, adapter.provenance.findings)
    )
    assert is_named == turned


def test_gpt2s_square_matrices_alone_leave_the_sides_open(
    written: Callable[..., Path],
    factors: dict[str, tuple[np.ndarray, np.ndarray]],
    rng: np.random.Generator,
) -> None:
    factors.clear()
    square = (rng.standard_normal((2, 8)), rng.standard_normal((8, 2)))
    factors["blk.0.attn_output"] = square
    assert "may be exchanged" in read_adapter(written("gpt2")).provenance.findings[0].text
    factors["blk.0.ffn_up"] = (rng.standard_normal((2, 8)), rng.standard_normal((32, 2)))
    factors["blk.1.ffn_up"] = (rng.standard_normal((2, 32)), rng.standard_normal((8, 2)))
    with pytest.raises(MalformedFileError, match="some factors of GPT-2 are transposed"):
        read_adapter(written("gpt2"))

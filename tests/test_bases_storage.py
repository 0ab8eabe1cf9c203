"""Where bases lie: torch files, shards, a hub's cache; and what is in memory meanwhile."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import low_rank_update
from gguf_bases import permuted, q4_k, write_gguf
from quantized_bases import (
    awq,
    bitsandbytes_4bit,
    bitsandbytes_int8,
    fp8_blocks,
    gptq,
    write_base,
)
from safetensors.torch import save_file

from lora_analysis.adapter import Adapter
from lora_analysis.amplify import amplification
from lora_analysis.bases import open_base
from lora_analysis.cli import run
from lora_analysis.conclusions import findings
from lora_analysis.errors import SourceError, UnknownFormatError, UnsupportedMethodError
from lora_analysis.formats import write_adapter
from lora_analysis.studies import study


def torch_weights(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    W = torch.from_numpy(rng.standard_normal((6, 4)).astype(np.float32))
    return {
        "layers.0.q.weight": W.to(torch.bfloat16),
        "layers.0.k.weight": W.T.contiguous().T,  # lies column by column
        "layers.0.v.weight": W.half()[1:5],  # a part of a storage
        "layers.0.conv.weight": W.reshape(6, 2, 2),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read_where_the_caller_allows_it(
    rng: np.random.Generator, tmp_path: Path, zipped: bool
) -> None:
    tensors = torch_weights(rng)
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for source in (path, tmp_path):
        with pytest.raises(UnknownFormatError, match="allow_pickle=True"):
            open_base(source)
        base = open_base(source, allow_pickle=True)
        assert base.label == tmp_path.name
        for name, value in tensors.items():
            weight = base.weight(name.removesuffix(".weight"))
            np.testing.assert_array_equal(weight.array(), value.float().flatten(1))
            assert weight.stored_dtype == str(value.dtype).removeprefix("torch.")


def test_sharded_torch_files_read_through_their_index(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    places = {}
    for at, (name, value) in enumerate(torch_weights(rng).items()):
        places[name] = f"pytorch_model-{at}.bin"
        torch.save({name: value}, tmp_path / places[name])
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base = open_base(tmp_path, allow_pickle=True)
    for name, value in torch_weights(np.random.default_rng(20210617)).items():
        found = base.weight(name.removesuffix(".weight")).array()
        np.testing.assert_array_equal(found, value.float().flatten(1))


def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"layers.0.q.weight": Harm()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedMethodError):
        open_base(tmp_path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_quantized_weights_are_read_out_of_torch_files_too(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    W = rng.standard_normal((32, 64)).astype(np.float32)
    stored, values = gptq(W, bits=4, group=32)
    torch.save({name: torch.from_numpy(part) for name, part in stored.items()}, tmp_path / "a.pt")
    weight = open_base(tmp_path / "a.pt", allow_pickle=True).weight("q", shape=(32, 64))
    np.testing.assert_allclose(weight.array(), values, rtol=1e-6)


def hub_cache(root: Path, commits: list[str]) -> Path:
    """A hub's cache folder as huggingface_hub lays it out: snapshots of links to blobs."""
    repository = root / "models--owner--tiny"
    (repository / "blobs").mkdir(parents=True)
    for at, commit in enumerate(commits):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        blob = repository / "blobs" / f"b{at}"
        save_file({"layers.0.q.weight": torch.full((2, 3), float(at))}, blob)
        (snapshot / "model-00001-of-00001.safetensors").symlink_to(blob)
        index = repository / "blobs" / f"i{at}"
        places = {"layers.0.q.weight": "model-00001-of-00001.safetensors"}
        index.write_text(json.dumps({"weight_map": places}))
        (snapshot / "model.safetensors.index.json").symlink_to(index)
        config = repository / "blobs" / f"c{at}"
        config.write_text('{"model_type": "llama"}')
        (snapshot / "config.json").symlink_to(config)
    return repository


def test_a_hubs_cache_folder_is_read_through_its_links(tmp_path: Path) -> None:
    repository = hub_cache(tmp_path, ["aaa", "bbb"])
    with pytest.raises(SourceError, match="aaa, bbb"):
        open_base(repository)
    for at, commit in enumerate(["aaa", "bbb"]):
        base = open_base(repository / "snapshots" / commit)
        assert base.weight("layers.0.q").array()[0, 0] == at
        assert (base.label, base.model_type) == ("tiny", "llama")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb\n")
    base = open_base(repository)
    assert base.weight("layers.0.q").array()[0, 0] == 1
    assert base.label == "tiny"
    assert open_base(hub_cache(tmp_path / "one", ["ccc"])).label == "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "nf4", "gptq"])
def test_memory_stays_near_one_tensors_size(
    rng: np.random.Generator, tmp_path: Path, kind: str
) -> None:
    size, count = 2048, 6
    places = {}
    for at in range(count):
        W = torch.from_numpy(rng.standard_normal((size, size)).astype(np.float32))
        name = f"layers.{at}.q"
        if kind == "bfloat16":
            tensors = {f"{name}.weight": W.to(torch.bfloat16)}
        elif kind == "nf4":
            tensors, _ = bitsandbytes_4bit(W, "nf4", nested=True, path=name)
        else:
            words = rng.integers(-(2**31), 2**31, (size // 8, size), dtype=np.int32)
            tensors = {
                f"{name}.qweight": torch.from_numpy(words),
                f"{name}.qzeros": torch.from_numpy(words[: size // 128, : size // 8].copy()),
                f"{name}.scales": torch.full((size // 128, size), 0.01).half(),
            }
        shard = f"model-{at}.safetensors"
        save_file(tensors, tmp_path / shard)
        places |= dict.fromkeys(tensors, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tracemalloc.start()
    try:
        base = open_base(tmp_path)
        for at in range(count):
            for _ in base.weight(f"layers.{at}.q", shape=(size, size)).blocks():
                pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    one = size * size * 4  # of the six
    assert peak < {"bfloat16": 0.75, "nf4": 1.75, "gptq": 2.5}[kind] * one


def quantized_versions(W: np.ndarray, folder: Path) -> dict[str, Path]:
    """Every storage of one weight, under the name of a llama's q."""
    path = "model.layers.0.self_attn.q_proj"
    torch_W = torch.from_numpy(W)

    def written(kind: str, stored: dict[str, object], **config: object) -> Path:
        named = {f"{path}{name.removeprefix('q')}": value for name, value in stored.items()}
        return write_base(folder / kind, named, **config)

    heads = {"heads": 4, "kv_heads": 4}
    rows = {"blk.0.attn_q.weight": permuted(W, 4)}
    q4 = {"blk.0.attn_q.weight": q4_k(permuted(W, 4))}
    return {
        "nf4": written("nf4", bitsandbytes_4bit(torch_W, "nf4", nested=True)[0]),
        "fp4": written("fp4", bitsandbytes_4bit(torch_W, "fp4", nested=False)[0]),
        "int8": written("int8", bitsandbytes_int8(torch_W)[0]),
        "fp8": written("fp8", fp8_blocks(torch_W, (128, 128))[0]),
        "gptq": written("gptq", gptq(W, bits=4, group=64)[0], quant_method="gptq"),
        "awq": written("awq", awq(W, group=64)[0], quant_method="awq"),
        "q4_0": write_gguf(folder / "q4_0.gguf", rows, kind="Q4_0", **heads),
        "q8_0": write_gguf(folder / "q8_0.gguf", rows, kind="Q8_0", **heads),
        "q4_k": write_gguf(folder / "q4_k.gguf", q4, kind="Q4_K", raw=True, **heads),
    }


def test_amplification_differs_from_the_float_base_by_the_stated_noise_alone(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    shape = (128, 256)
    # A weight with structure: some directions are much stronger than others.
    W = rng.standard_normal((128, 8)) @ rng.standard_normal((8, 256)) / 4
    W = (W + rng.standard_normal(shape) * 0.5).astype(np.float32)
    name = "model.layers.0.self_attn.q_proj"
    update = low_rank_update(rng, *shape, rank=4, name=name)
    plain = amplification(update, W)
    assert (plain.storage, plain.noise) == ("", None)
    seen = {}
    for kind, path in quantized_versions(W, tmp_path).items():
        rounded = amplification(update, open_base(path).weight(name, shape=shape))
        assert rounded.storage
        assert rounded.noise is not None
        # The error has k² parts along ΔW's directions, each like one of a random direction's.
        one = rounded.noise * plain.weight_norm / np.sqrt(shape[0] * shape[1])
        difference = np.linalg.norm(rounded.core - plain.core)
        assert difference < 2 * one * len(plain.S), kind
        assert difference > one * len(plain.S) / 4, kind  # it is that noise, not less
        moved = np.abs(rounded.enrichment - plain.enrichment)
        assert (moved < 4 * rounded.noise / plain.k).all(), kind
        seen[kind] = rounded.noise
    assert seen["int8"] < seen["fp8"] < seen["q4_0"]
    assert seen["q8_0"] < seen["nf4"] < seen["fp4"]


def test_a_study_of_a_quantized_base_says_so(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    W = rng.standard_normal((128, 256)).astype(np.float32)
    name = "model.layers.0.self_attn.q_proj"
    adapter = Adapter({name: low_rank_update(rng, 128, 256, rank=4, name=name)}, label="a")
    versions = quantized_versions(W, tmp_path)
    result = study([adapter], base=str(versions["nf4"]))
    row = result.amplifications.iloc[-1]
    assert row["storage"] == "bitsandbytes nf4"
    assert row["noise"] == pytest.approx(0.095, abs=0.01)
    (finding,) = [one for one in findings(result) if one.code == "quantized-base"]
    assert "bitsandbytes nf4" in finding.text
    assert finding.fields["noise"] == row["noise"]
    write_adapter(adapter, tmp_path / "adapter")
    code = run(["amplify", str(tmp_path / "adapter"), "--base", str(versions["q4_k"])])
    shown = " ".join(capsys.readouterr().out.split())
    assert code == 0
    assert "W is quantized (GGUF Q4_K): expected rounding error 0.0" in shown
    plain = study([adapter], base=open_base({name: W}))
    assert plain.amplifications["noise"].isna().all()
    assert not [one for one in findings(plain) if one.code == "quantized-base"]

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from factories import adapter
from safetensors.numpy import save_file

from lora_analysis.adapter import Adapter, Provenance
from lora_analysis.bases import open_base
from lora_analysis.conclusions import findings
from lora_analysis.studies import Relation, study
from lora_analysis.studies.base_identity import base_titles, fingerprint, resolve_keys
from lora_analysis.studies.base_models import (
    base_key,
    bases_of,
    differing_base_name,
    other_bases,
    runs_on_base,
    same_base,
)

LLAMA = "meta-llama/Llama-3.1-8B"
QWEN = "Qwen/Qwen2-7B-Instruct"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (LLAMA, "unsloth/Llama-3.1-8B-bnb-4bit"),
        (LLAMA, "unsloth/Llama-3.1-8B-unsloth-bnb-4bit"),
        (LLAMA, "unsloth/Meta-Llama-3.1-8B"),
        (LLAMA, "https://huggingface.co/meta-llama/Llama-3.1-8B"),
        (LLAMA, "hf://meta-llama/Llama-3.1-8B@0e9e39f"),
        (
            LLAMA,
            "/home/user/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e",
        ),
        (LLAMA, "checkpoints/meta-llama/Llama-3.1-8B"),
        (QWEN, "Qwen/Qwen2-7B-Instruct-GPTQ-Int4"),
        (QWEN, "neuralmagic/Qwen2-7B-Instruct-quantized.w4a16"),
        (QWEN, "RedHatAI/Qwen2-7B-Instruct-FP8-dynamic"),
        (QWEN, "mlx-community/Qwen2-7B-Instruct-4bit"),
        (QWEN, "somebody/Qwen2-7B-Instruct-Q4_K_M-GGUF"),
        (QWEN, "somebody/Qwen2-7B-Instruct-4.0bpw-h6-exl2"),
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("meta-llama/Llama-2-7b-hf", "TheBloke/Llama-2-7B-GPTQ"),
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("gpt2", "openai-community/gpt2"),
        ("/data/base", "/data/base/"),
        ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
    ],
)
def test_copies_of_one_model_are_one_base(a: str, b: str) -> None:
    assert same_base(a, b) is True
    assert same_base(b, a) is True


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("google/gemma-2b", "google/gemma-2b-it"),
        ("google/gemma-3-4b-it", "google/gemma-3-4b-it-qat-q4_0-gguf"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
        (QWEN, "Qwen/Qwen2-7B-AWQ"),
        (LLAMA, "mistralai/Mistral-7B-v0.1"),
        ("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-128k-instruct"),
        ("gpt2", "gpt2-medium"),
        ("gpt2", LLAMA),
        ("sd_v1", "sdxl_base_v1-0"),
    ],
)
def test_variants_and_other_models_are_different_bases(a: str, b: str) -> None:
    assert same_base(a, b) is False
    assert same_base(b, a) is False


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (LLAMA, "/models/Llama-3.1-8B"),
        (LLAMA, "models/Llama-3.1-8B"),
        (LLAMA, "Llama-3.1-8B"),
        (LLAMA, "/models/other"),
        ("/data/llama-1b/final", "/data/qwen-1b/final"),
        ("one/model-7b", "two/model-7b"),
        ("final", "model"),
        ("x/checkpoints/one/final", "y/checkpoints/one/final"),
        (LLAMA, None),
        (None, None),
    ],
)
def test_a_path_does_not_identify_a_model(a: str | None, b: str | None) -> None:
    assert same_base(a, b) is None
    assert same_base(b, a) is None


def model_folder(folder: Path, seed: int = 0, *, weights: bool = True, **fields: object) -> str:
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 9}
    (folder / "config.json").write_text(json.dumps(config | fields))
    if weights:
        values = np.random.default_rng(seed).standard_normal((9, 16)).astype(np.float32)
        save_file({"model.embed_tokens.weight": values}, folder / "model.safetensors")
    return str(folder)


def test_folders_are_compared_by_structure_and_weights(tmp_path: Path) -> None:
    first = model_folder(tmp_path / "x" / "final")
    copied = model_folder(tmp_path / "y" / "copy", torch_dtype="bfloat16", _name_or_path="q")
    tuned = model_folder(tmp_path / "z" / "final", seed=1)
    wider = model_folder(tmp_path / "w" / "final", hidden_size=32)
    assert same_base(first, copied) is True
    assert same_base(first, tuned) is False  # same structure, other weights
    assert same_base(first, wider) is False
    assert same_base(first, str(tmp_path / "absent" / "final")) is None


def test_a_quantized_folder_is_its_model_if_the_names_agree(tmp_path: Path) -> None:
    config = {"quantization_config": {"bits": 4, "group_size": 128}}
    plain = model_folder(tmp_path / "a" / "base-1b")
    quantized = model_folder(tmp_path / "b" / "base-1b-4bit", weights=False, **config)
    variant = model_folder(tmp_path / "b" / "base-1b-it-4bit", weights=False, **config)
    assert same_base(plain, quantized) is True
    assert same_base(plain, variant) is None


def test_a_folder_without_a_readable_config_has_no_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert fingerprint(tmp_path) == ("", "", "")
    assert fingerprint(tmp_path / "absent") == ("", "", "")
    assert fingerprint(Path("x" * 5000)) == ("", "", "")
    assert fingerprint(Path("x\0")) == ("", "", "")


def test_keys_hold_no_path() -> None:
    assert "somebody" not in str(base_key("/home/somebody/llama"))


def test_a_copy_gets_the_key_of_the_only_model_that_it_can_copy() -> None:
    copied = "unsloth/Llama-3.1-8B-bnb-4bit"
    assert len(set(resolve_keys([LLAMA, copied]))) == 1
    keys = resolve_keys(["one/m-7b", "unsloth/m-7b", "two/m-7b", None])
    assert len(set(keys)) == 4


def test_local_bases_are_shown_by_enough_of_the_path() -> None:
    names = ["/data/llama-1b/final", "/data/qwen-1b/final", "/a/b/llama", "/a/c/llama", LLAMA, "/"]
    assert base_titles(names) == {
        None: None,
        "/data/llama-1b/final": "llama-1b/final",
        "/data/qwen-1b/final": "qwen-1b/final",
        "/a/b/llama": "b/llama",
        "/a/c/llama": "c/llama",
        LLAMA: LLAMA,
        "/": None,
    }


def on(bases: Sequence[str | None], rng: np.random.Generator) -> list[Adapter]:
    return [
        Adapter(dict(adapter(rng)), label=label, provenance=Provenance(base_model=base))
        for label, base in zip("abcd", bases, strict=False)
    ]


def codes(adapters: list[Adapter], **options: bool) -> dict[str, str]:
    notes = findings(study(adapters, **options))  # type: ignore[arg-type]
    return {note.code: note.text for note in notes if "base" in note.code}


def test_adapters_on_two_paths_are_compared_only_if_asked(rng: np.random.Generator) -> None:
    adapters = on(["/data/llama-1b/final", "/data/qwen-1b/final"], rng)
    result = study(adapters)
    assert result.pairs.empty
    assert bases_of(result, result.runs["adapter"]) == ["llama-1b/final", "qwen-1b/final"]
    (text,) = codes(adapters).values()
    assert "not known whether llama-1b/final and qwen-1b/final are the same base model" in text
    assert "1 pair not compared" in text
    compared = study(adapters, across_bases=True)
    assert list(compared.pairs["relation"]) == [Relation.BASE_NOT_KNOWN_SAME]
    assert "1 pair compared as requested" in codes(adapters, across_bases=True).popitem()[1]


def test_a_model_and_its_quantized_copy_are_one_base(rng: np.random.Generator) -> None:
    adapters = on([LLAMA, "unsloth/Llama-3.1-8B-bnb-4bit"], rng)
    result = study(adapters)
    assert len(result.pairs) == 1
    assert codes(adapters) == {}
    assert bases_of(result, result.runs["adapter"]) == [LLAMA, LLAMA]
    assert runs_on_base(result, "mlx-community/Llama-3.1-8B-4bit").all()
    assert not runs_on_base(result, "/models/Llama-3.1-8B").any()


def test_adapters_without_a_base_are_compared_and_named(rng: np.random.Generator) -> None:
    adapters = on([None, LLAMA], rng)
    assert len(study(adapters).pairs) == 1
    assert codes(adapters)["base-not-known-same"].startswith("No base model is named by a")


def test_the_given_base_is_recognized_by_structure_or_name(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    first = model_folder(tmp_path / "x" / "final")
    tuned = model_folder(tmp_path / "z" / "final", seed=1)
    assert other_bases({"a": first, "b": tuned}, open_base(first)) == {"b"}
    named = {"a": LLAMA, "b": "mistralai/Mistral-7B"}
    given = open_base(model_folder(tmp_path / "Llama-3.1-8B-4bit"))
    assert other_bases(named, given) == {"b"}
    assert differing_base_name({"a": LLAMA}, given) is None
    assert differing_base_name({"a": "mistralai/Mistral-7B"}, given) == "mistralai/Mistral-7B"

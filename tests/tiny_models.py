"""Random models of transformers' families, small enough to train in a second, in folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORDS = [
    *("the", "a", "food", "film", "plot", "cast", "was", "is", "good", "great", "fine", "bad"),
    *("poor", "dull", "not", "very", "and", "but", "i", "liked", "hated", "it", "name", "eat"),
    *("type", "price", "cheap", "high", "pub", "river", "city", "||", "slow", "fast"),
]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
SIZE = len(WORDS) + len(SPECIAL)
_LAYERS = {"vocab_size": SIZE, "num_attention_heads": 2, "num_hidden_layers": 2}
_WIDE = {**_LAYERS, "hidden_size": 16, "intermediate_size": 24}
_ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    kv = {"num_key_value_heads": 1, "head_dim": 8}
    return {
        "gpt2": lambda: t.GPT2Config(
            vocab_size=SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=64, **_ENDS
        ),
        "roberta": lambda: t.RobertaConfig(**_WIDE, **_ENDS, max_position_embeddings=70),
        "bert": lambda: t.BertConfig(**_WIDE, **_ENDS, max_position_embeddings=64),
        "deberta-v3": lambda: t.DebertaV2Config(
            **_WIDE,
            **_ENDS,
            max_position_embeddings=64,
            relative_attention=True,
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type="p2c|c2p",
        ),
        "llama": lambda: t.LlamaConfig(**_WIDE, **_ENDS, **kv),
        "llama-wide": lambda: t.LlamaConfig(  # as 4-bit kernels want it: a multiple of 32
            **_LAYERS, **_ENDS, hidden_size=64, intermediate_size=64, num_key_value_heads=1
        ),
        "qwen2": lambda: t.Qwen2Config(**_WIDE, **_ENDS, num_key_value_heads=1),
        "gemma": lambda: t.GemmaConfig(**_WIDE, **_ENDS, **kv),
        "t5": lambda: t.T5Config(
            vocab_size=SIZE,
            d_model=16,
            d_ff=24,
            d_kv=8,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=3,
            decoder_start_token_id=0,
        ),
        "gpt-neox": lambda: t.GPTNeoXConfig(**_WIDE, **_ENDS),
        "bloom": lambda: t.BloomConfig(vocab_size=SIZE, hidden_size=16, n_layer=2, n_head=2),
        "mixtral": lambda: t.MixtralConfig(
            **_WIDE, **_ENDS, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2
        ),
    }


CAUSAL = ("gpt2", "llama", "qwen2", "gemma", "gpt-neox", "bloom", "mixtral")
ENCODERS = ("roberta", "bert", "deberta-v3")
FAMILIES = (*CAUSAL, *ENCODERS, "t5")


def bare_model(family: str, seed: int = 0) -> Any:
    """The family's model with a language model's head, or of T5 and encoders what is pretrained."""
    import transformers as t

    config = _configs()[family]()
    kind = t.AutoModelForCausalLM if family in (*CAUSAL, "llama-wide") else t.AutoModelForMaskedLM
    kind = t.AutoModelForSeq2SeqLM if family == "t5" else kind
    torch.manual_seed(seed)
    model = kind.from_config(config)
    with torch.no_grad():  # as after pretraining: larger weights, biases that are not zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model.eval()


def write_model(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a family's model and its tokenizer as transformers does."""
    bare_model(family, seed).save_pretrained(folder)
    write_tokenizer(folder, ends=family in ("t5", *ENCODERS))
    return folder


def write_tokenizer(folder: Path, *, ends: bool) -> None:
    """Write a tokenizer of whole words, which puts ``</s>`` after a text where ``ends``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B </s>",
            special_tokens=[("<s>", 2), ("</s>", 3)],
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
    ).save_pretrained(folder)


def write_vit(folder: Path) -> Path:
    """Write a small ViT and its image processor."""
    import transformers as t

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    layers = {"num_attention_heads": 2, "num_hidden_layers": 2}
    config = t.ViTConfig(**sizes, **layers, num_labels=5)
    t.ViTForImageClassification(config).save_pretrained(folder)
    t.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def write_reviews(path: Path, count: int = 60) -> Path:
    """Write a CSV of a text and a label that a word of the text decides."""
    lines = ["text,label"]
    for number in range(count):
        good = number % 2 == 0
        subject = ("food", "film", "plot")[number % 3]
        word = (("good", "great", "fine") if good else ("bad", "poor", "dull"))[number // 2 % 3]
        again = " and" * (number // 6 % 4)
        lines.append(f"the {subject} was very {word}{again},{'pos' if good else 'neg'}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_e2e(path: Path, count: int = 40) -> Path:
    """Write E2E's format: slots, bars, a reference."""
    lines = []
    for number in range(count):
        price, food = ("cheap", "high")[number % 2], ("slow", "fast")[number // 2 % 2]
        lines.append(f"price {price} eat {food} || the pub is {price} and {food}")
    path.write_text("\n".join(lines) + "\n")
    return path


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

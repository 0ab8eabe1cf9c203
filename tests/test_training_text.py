"""How much of a text is tokenized."""

from __future__ import annotations

from typing import Any

import pytest

from lora_analysis.training import tasks as text_module
from lora_analysis.training.examples import Example


class Words:
    """A tokenizer of words, which counts the characters it is given."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.longest = 0

    def __call__(self, *texts: str, max_length: int | None = None, **_: Any) -> Any:
        self.longest = max(self.longest, *map(len, texts))
        ids = [len(word) for text in texts for word in text.split()][:max_length]
        return _Encoded(input_ids=ids)


class _Encoded(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


LONG = " ".join("abcdefgh"[: 1 + n % 8] for n in range(2_000_000))
EXAMPLES = [
    Example("short text", label=1),
    Example(LONG, label=1),
    Example(LONG, pair=LONG, label=1),
    Example(LONG),
    Example("prompt", completion=LONG),
    Example(LONG, completion="too late"),
]


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("encode", [text_module._encode_whole, text_module._encode_causal])
def test_a_long_text_is_cut_before_it_is_tokenized_to_the_same_tokens(
    example: Example, encode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Words()
    found = encode(example, cut, 64)
    assert cut.longest < 10_000
    monkeypatch.setattr(text_module, "_shorten", lambda text, *_: text)
    assert found == encode(example, Words(), 64)


def test_a_text_of_long_tokens_is_tokenized_as_far_as_it_takes() -> None:
    tokenizer = Words()
    text = " ".join(["x" * 500] * 3000)
    start = text_module._shorten(text, tokenizer, 64)
    assert text.startswith(start)
    assert len(start.split()) > 64
    assert len(start) < len(text) / 4
    assert text_module._shorten("x" * 100_000, tokenizer, 64) == "x" * 100_000

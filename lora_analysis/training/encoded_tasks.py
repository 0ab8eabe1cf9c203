"""Examples as a model's inputs: tokenized texts in padded batches, and processed images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from lora_analysis.errors import InputError
from lora_analysis.training.inputs import LOCAL
from lora_analysis.training.tasks import NO_TARGET, ArrayTask, Batch, Split, Target, TaskData

if TYPE_CHECKING:
    from lora_analysis.training.examples import Example, Examples

Encoded = Mapping[str, Any]  # lists of numbers by input name, and "labels"

_TEST_BATCH: Final = 32
_TARGETS: Final[Mapping[str, Target]] = {
    "classification": "class",
    "regression": "number",
    "causal-lm": "next token",
    "masked-lm": "masked token",
}
# A text with more characters per token than this is cut before it is tokenized.
_CHARACTERS: Final = 32
_SPARE_TOKENS: Final = 16
# Fraction of tokens to predict, as in BERT: 80 % are masked, 10 % random, 10 % unchanged.
_MASKED: Final = 0.15


@dataclass(frozen=True, slots=True, eq=False)
class TextTask:
    """Tokenized examples for a model of transformers.

    Parameters
    ----------
    train, test
        Examples, each a mapping of inputs and ``labels``.
    target
        Kind of the labels.
    padding
        Fill value for shorter examples, by input.
    mask, special, vocabulary
        For masked language models: the mask token, tokens that are never masked, and the number
        of tokens, from which random replacements are drawn.
    """

    train: Sequence[Encoded]
    test: Sequence[Encoded]
    target: Target
    padding: Mapping[str, int]
    mask: int | None = None
    special: frozenset[int] = frozenset()
    vocabulary: int = 0

    def __len__(self) -> int:
        return len(self.train)

    def training_batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """Return those rows, padded to the longest; newly masked for a masked language model."""
        return self._batch([self.train[row] for row in rows.tolist()], generator)

    def test_batches(self) -> Iterator[Batch]:
        """Yield the test split, with the same masks at every call."""
        generator = torch.Generator().manual_seed(0)
        for first in range(0, len(self.test), _TEST_BATCH):
            yield self._batch(self.test[first : first + _TEST_BATCH], generator)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = model(**inputs).logits
        return logits

    def _batch(self, examples: Sequence[Encoded], generator: torch.Generator) -> dict[str, Tensor]:
        batch = {name: self._padded(name, examples) for name in examples[0]}
        if self.target == "masked token":
            return self._masked(batch, generator)
        return batch

    def _padded(self, name: str, examples: Sequence[Encoded]) -> Tensor:
        values = [example[name] for example in examples]
        if not isinstance(values[0], list):
            return torch.tensor(values)
        longest = max(map(len, values))
        fill = self.padding.get(name, 0)
        return torch.tensor([value + [fill] * (longest - len(value)) for value in values])

    def _masked(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        tokens = batch["input_ids"]
        plain = ~torch.isin(tokens, torch.tensor(sorted(self.special)))
        plain &= batch["attention_mask"].bool()
        chosen = (torch.rand(tokens.shape, generator=generator) < _MASKED) & plain
        fate = torch.rand(tokens.shape, generator=generator)
        random = torch.randint(self.vocabulary, tokens.shape, generator=generator)
        inputs = tokens.where(~(chosen & (fate < 0.9)), random)
        inputs = inputs.where(~(chosen & (fate < 0.8)), torch.tensor(self.mask))
        return {**batch, "input_ids": inputs, "labels": tokens.where(chosen, NO_TARGET)}


def text_task(examples: Examples, tokenizer: Any, max_length: int) -> tuple[TextTask, list[str]]:
    """Return tokenized examples, and notes on those that are left out or truncated.

    Raises
    ------
    InputError
        No example is left, or the tokenizer for a masked language model has no mask.
    """
    masked = examples.objective == "masked-lm"
    if masked and tokenizer.mask_token_id is None:
        message = "The tokenizer has no mask token. Train this model as causal-lm."
        raise InputError(message)
    encode = _encode_causal if examples.objective == "causal-lm" else _encode_whole
    notes: list[str] = []
    splits = []
    for role, split in (("train", examples.train), ("test", examples.test)):
        all_encoded = (encode(example, tokenizer, max_length) for example in split)
        encoded = [inputs for inputs in all_encoded if inputs is not None]
        if not encoded:
            message = (
                f"No {role} example has a token to learn within {max_length} tokens (max_length)."
            )
            raise InputError(message)
        if missing := len(split) - len(encoded):
            notes.append(
                f"{missing} of {len(split)} {role} examples are left out: they have no token to "
                f"learn within max_length ({max_length} tokens)."
            )
        if full := sum(len(inputs["input_ids"]) >= max_length for inputs in encoded):
            notes.append(
                f"{full} of {len(encoded)} {role} examples reach max_length ({max_length})."
            )
        splits.append(encoded)
    task = TextTask(
        splits[0],
        splits[1],
        _TARGETS[examples.objective],
        {"input_ids": tokenizer.pad_token_id, "labels": NO_TARGET},
        mask=tokenizer.mask_token_id if masked else None,
        special=frozenset(tokenizer.all_special_ids) if masked else frozenset(),
        vocabulary=len(tokenizer) if masked else 0,
    )
    return task, notes


def _encode_whole(example: Example, tokenizer: Any, max_length: int) -> dict[str, Any] | None:
    """Return a text or a pair of texts with its label; masks and their labels are added later.

    None if the text has no tokens.
    """
    pair = () if example.pair is None else (_shorten(example.pair, tokenizer, max_length),)
    text = _shorten(example.text, tokenizer, max_length)
    inputs = tokenizer(text, *pair, truncation=True, max_length=max_length)
    label = {} if example.label is None else {"labels": example.label}
    return {**inputs, **label} if inputs["input_ids"] else None


def _encode_causal(example: Example, tokenizer: Any, max_length: int) -> dict[str, Any] | None:
    """Return a text for a causal language model: all tokens are targets, or the completion's.

    None if no token of the completion fits after the prompt.
    """
    prompt = tokenizer(_shorten(example.text, tokenizer, max_length)).input_ids
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if end and prompt[-1:] == end:  # some tokenizers end every text
        prompt = prompt[:-1]
    if example.completion is None:
        tokens = (prompt + end)[:max_length]
        labels = tokens
        if len(tokens) < 2:
            return None
    else:
        joint = "" if example.text[-1:].isspace() or example.completion[:1].isspace() else " "
        completion = _shorten(joint + example.completion, tokenizer, max_length)
        rest = tokenizer(completion, add_special_tokens=False).input_ids + end
        tokens = (prompt + rest)[:max_length]
        labels = ([NO_TARGET] * len(prompt) + rest)[:max_length]
        if len(prompt) >= max_length:
            return None
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def _shorten(text: str, tokenizer: Any, max_length: int) -> str:
    """Return a long text's beginning, with more tokens than needed; a short text unchanged."""
    size = _CHARACTERS * max_length + _CHARACTERS
    while len(text) > size:
        # Cut between words: a part of a word has different tokens.
        start = text[:size].rsplit(maxsplit=1)[0] if text[:size].strip() else text[:size]
        count = len(tokenizer(start, add_special_tokens=False, verbose=False).input_ids)
        if count > max_length + _SPARE_TOKENS:
            return start
        size *= 4
    return text


def image_task(examples: Examples, base: Path) -> tuple[ArrayTask, list[str]]:
    """Return images as inputs of a model, and notes on those that cannot be read.

    Raises
    ------
    InputError
        The base has no image processor, or no image can be read.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(base, backend="pil", **LOCAL)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        message = f"{base} has no image processor (preprocessor_config.json)."
        raise InputError(message) from error
    notes: list[str] = []
    splits = [
        _read_images(role, split, examples.folder, processor, notes)
        for role, split in (("train", examples.train), ("test", examples.test))
    ]
    return ArrayTask(TaskData(*splits)), notes


def _read_images(
    role: str, examples: list[Example], folder: Path, processor: Any, notes: list[str]
) -> Split:
    from PIL import Image, UnidentifiedImageError

    pixels, labels, bad = [], [], []
    for example in examples:
        path = folder / str(example.image)
        try:
            with Image.open(path) as image:
                inputs = processor(image.convert("RGB"), return_tensors="np")
        except (OSError, UnidentifiedImageError) as error:
            bad.append(f"{path}: {type(error).__name__}")
            continue
        pixels.append(np.asarray(inputs["pixel_values"][0], dtype=np.float32))
        labels.append(example.label)
    if bad:
        notes.append(f"{len(bad)} of {len(examples)} {role} images are left out ({bad[0]}).")
    if not pixels:
        message = f"No {role} image can be read. {' '.join(notes)}"
        raise InputError(message)
    return Split(np.stack(pixels), np.asarray(labels, dtype=np.int64))

"""Tokenized examples as a task: padded batches, and labels for classes, numbers and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from lora_analysis.errors import InputError
from lora_analysis.training.tasks import NO_TARGET, Batch, Target

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
# A text of so many characters a token is cut before it is tokenized, with some tokens to spare.
_CHARACTERS: Final = 32
_SPARE_TOKENS: Final = 16
_MASKED: Final = 0.15  # of the tokens, as BERT: of these 80 % masked, 10 % any, 10 % as they are


@dataclass(frozen=True, slots=True, eq=False)
class TextTask:
    """Tokenized examples for a model of transformers.

    Parameters
    ----------
    train, test
        Each a mapping of inputs and ``labels``.
    target
        What a label is of.
    padding
        What fills up shorter examples, by input.
    mask, special
        Of masked language models: the mask's token, and tokens that are never masked; the number
        of tokens ``vocabulary`` is what a token may be changed to.
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
        """Return the rows, padded to the longest; masked anew where tokens are to be found."""
        return self._batch([self.train[row] for row in rows.tolist()], generator)

    def test_batches(self) -> Iterator[Batch]:
        """Yield the test split, masked alike at every call."""
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
        other = torch.randint(self.vocabulary, tokens.shape, generator=generator)
        seen = tokens.where(~(chosen & (fate < 0.9)), other)
        seen = seen.where(~(chosen & (fate < 0.8)), torch.tensor(self.mask))
        return {**batch, "input_ids": seen, "labels": tokens.where(chosen, NO_TARGET)}


def text_task(found: Examples, tokenizer: Any, max_length: int) -> tuple[TextTask, list[str]]:
    """Return the examples tokenized, and a sentence on those that are left out or cut.

    Raises
    ------
    InputError
        No example is left, or a masked language model's tokenizer knows no mask.
    """
    masked = found.objective == "masked-lm"
    if masked and tokenizer.mask_token_id is None:
        message = "The tokenizer has no mask token. Train this model as causal-lm."
        raise InputError(message)
    encode = _completed if found.objective == "causal-lm" else _whole
    notes: list[str] = []
    splits = []
    for role, examples in (("train", found.train), ("test", found.test)):
        kept = [one for e in examples if (one := encode(e, tokenizer, max_length)) is not None]
        notes += _lengths(role, examples, kept, max_length)
        splits.append(kept)
    task = TextTask(
        splits[0],
        splits[1],
        _TARGETS[found.objective],
        {"input_ids": tokenizer.pad_token_id, "labels": NO_TARGET},
        mask=tokenizer.mask_token_id if masked else None,
        special=frozenset(tokenizer.all_special_ids) if masked else frozenset(),
        vocabulary=len(tokenizer) if masked else 0,
    )
    return task, notes


def _whole(example: Example, tokenizer: Any, max_length: int) -> dict[str, Any] | None:
    """Return a text, or a pair of texts, with its label; a masked model's is made later.

    None where the tokenizer makes no token of the text.
    """
    pair = () if example.pair is None else (_start_of(example.pair, tokenizer, max_length),)
    text = _start_of(example.text, tokenizer, max_length)
    made = tokenizer(text, *pair, truncation=True, max_length=max_length)
    label = {} if example.label is None else {"labels": example.label}
    return {**made, **label} if made["input_ids"] else None


def _completed(example: Example, tokenizer: Any, max_length: int) -> dict[str, Any] | None:
    """Return a text for a causal language model: all of it to learn, or its completion alone.

    None where the prompt leaves no room for a token of the completion.
    """
    prompt = tokenizer(_start_of(example.text, tokenizer, max_length)).input_ids
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
        completion = _start_of(joint + example.completion, tokenizer, max_length)
        rest = tokenizer(completion, add_special_tokens=False).input_ids + end
        tokens = (prompt + rest)[:max_length]
        labels = ([NO_TARGET] * len(prompt) + rest)[:max_length]
        if len(prompt) >= max_length:
            return None
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def _start_of(text: str, tokenizer: Any, max_length: int) -> str:
    """Return a start of a long text that has more tokens than are used; a short text as it is."""
    size = _CHARACTERS * max_length + _CHARACTERS
    while len(text) > size:
        # Between words: a word that is cut has other tokens.
        start = text[:size].rsplit(maxsplit=1)[0] if text[:size].strip() else text[:size]
        count = len(tokenizer(start, add_special_tokens=False, verbose=False).input_ids)
        if count > max_length + _SPARE_TOKENS:
            return start
        size *= 4
    return text


def _lengths(
    role: str, examples: Sequence[Example], kept: Sequence[Encoded], max_length: int
) -> list[str]:
    """Return sentences on what the length took away; raise where it took all."""
    if not kept:
        message = f"No {role} example has a token to learn within {max_length} tokens (max_length)."
        raise InputError(message)
    notes = []
    if lost := len(examples) - len(kept):
        notes.append(
            f"{lost} of {len(examples)} {role} examples are left out: they have no token to learn "
            f"within the {max_length} of max_length."
        )
    if full := sum(len(one["input_ids"]) >= max_length for one in kept):
        notes.append(f"{full} of {len(kept)} {role} examples reach max_length ({max_length}).")
    return notes

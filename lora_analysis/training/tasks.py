"""Tasks: batches to train and test on, the model's outputs for them, losses and scores.

A task has arrays (`ArrayTask`: digits, processed images) or tokenized texts (`TextTask`), padded
batch by batch. `text_task` and `image_task` make them from the examples of data files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_analysis.errors import InputError
from lora_analysis.training.inputs import LOCAL

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.training.examples import Example, Examples

Batch = Mapping[str, Tensor]
Transform = Callable[[Tensor, torch.Generator], Tensor]
# Kind of a label: classes and numbers belong to an example, tokens to a position.
Target = Literal["class", "number", "next token", "masked token"]

NO_TARGET = -100  # label of a position without target, as in torch and transformers
EVALUATION_BATCH = 512


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
class DataSplit:
    """Examples ``(n, ...)`` and their targets ``(n, ...)``.

    Raises
    ------
    InputError
        The lengths differ, or there is no example.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]

    def __post_init__(self) -> None:
        if not 0 < len(self.inputs) == len(self.targets):
            message = (
                f"A split needs as many targets as inputs, and at least one; "
                f"found {len(self.inputs)} inputs and {len(self.targets)} targets."
            )
            raise InputError(message)

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, slots=True, eq=False)
class TaskData:
    """Training and test split of a task."""

    train: DataSplit
    test: DataSplit


class Task(Protocol):
    """Examples of one task, and how to compute a model's outputs for them."""

    @property
    def target(self) -> Target:
        """Kind of the labels."""
        ...

    def __len__(self) -> int:
        """Return the number of training examples."""
        ...

    def training_batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """Return the examples in those rows; random choices are drawn from the generator."""
        ...

    def test_batches(self) -> Iterator[Batch]:
        """Yield the whole test split, the same at every call."""
        ...

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits or numbers for a batch."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ArrayTask:
    """Arrays and their classes, for a model that takes a batch and gives logits.

    Parameters
    ----------
    data
        Training and test split.
    transform
        Augmentation of a batch of inputs, called with the inputs and a generator.
    """

    data: TaskData
    transform: Transform | None = None
    target: Target = "class"

    def __len__(self) -> int:
        return len(self.data.train)

    def training_batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """Return the inputs of those rows, transformed, and their labels."""
        batch = _rows(self.data.train, rows)
        if self.transform is None:
            return batch
        return {**batch, "inputs": self.transform(batch["inputs"], generator)}

    def test_batches(self) -> Iterator[Batch]:
        """Yield the test split in its order."""
        for first in range(0, len(self.data.test), EVALUATION_BATCH):
            yield _rows(self.data.test, slice(first, first + EVALUATION_BATCH))

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits, also if it returns an output object of transformers."""
        output: Any = model(batch["inputs"])
        logits: Tensor = getattr(output, "logits", output)
        return logits


def _rows(split: DataSplit, rows: Tensor | slice) -> Batch:
    return {
        "inputs": torch.as_tensor(split.inputs)[rows],
        "labels": torch.as_tensor(split.targets)[rows],
    }


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
        batch: dict[str, Tensor] = {}
        for name in examples[0]:
            values = [example[name] for example in examples]
            if isinstance(values[0], list):
                longest, fill = max(map(len, values)), self.padding.get(name, 0)
                values = [value + [fill] * (longest - len(value)) for value in values]
            batch[name] = torch.tensor(values)
        if self.target != "masked token":
            return batch
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
    from PIL import Image, UnidentifiedImageError

    notes: list[str] = []
    splits = []
    for role, split in (("train", examples.train), ("test", examples.test)):
        pixels, labels, bad = [], [], []
        for example in split:
            path = examples.folder / str(example.image)
            try:
                with Image.open(path) as image:
                    inputs = processor(image.convert("RGB"), return_tensors="np")
            except (OSError, UnidentifiedImageError) as error:
                bad.append(f"{path}: {type(error).__name__}")
                continue
            pixels.append(np.asarray(inputs["pixel_values"][0], dtype=np.float32))
            labels.append(example.label)
        if bad:
            notes.append(f"{len(bad)} of {len(split)} {role} images are left out ({bad[0]}).")
        if not pixels:
            message = f"No {role} image can be read. {' '.join(notes)}"
            raise InputError(message)
        splits.append(DataSplit(np.stack(pixels), np.asarray(labels, dtype=np.int64)))
    return ArrayTask(TaskData(*splits)), notes


def align_targets(outputs: Tensor, labels: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Return one row of outputs per target: shapes ``(n, classes)`` and ``(n,)``.

    The output of a causal language model at a position is for the token after it.
    """
    if target == "number":
        return outputs.reshape(-1, 1), labels.reshape(-1)
    if target == "next token":
        outputs, labels = outputs[:, :-1], labels[:, 1:]
    flat = labels.reshape(-1)
    has_target = flat != NO_TARGET
    return outputs.reshape(-1, outputs.shape[-1])[has_target], flat[has_target]


def count_targets(labels: Tensor, target: Target) -> int:
    """Return the number of targets in a batch, by which its summed loss is divided."""
    if target == "next token":
        labels = labels[:, 1:]
    return labels.numel() if target == "number" else int((labels != NO_TARGET).sum())


def summed_loss(
    outputs: Tensor, labels: Tensor, target: Target, *, label_smoothing: float = 0.0
) -> Tensor:
    """Return the sum of the losses over the targets: cross-entropy, or squared error.

    With a sum, the mean over several batches or processes is the mean over all targets, even if
    their numbers differ.
    """
    rows, targets = align_targets(outputs, labels, target)
    if target == "number":
        return functional.mse_loss(rows[:, 0].float(), targets.float(), reduction="sum")
    return functional.cross_entropy(
        rows.float(), targets, reduction="sum", label_smoothing=label_smoothing
    )


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> dict[str, float]:
    """Evaluate a model on the test split, in evaluation mode.

    Returns
    -------
    dict
        ``loss``, the mean over targets without label smoothing; ``accuracy``, the fraction of
        targets with the largest logit; or for numbers ``correlation`` (Pearson's, absent if one
        side is constant).
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    numbers: list[tuple[Tensor, Tensor]] = []
    for cpu_batch in task.test_batches():
        batch = move_batch(cpu_batch, device)
        rows, targets = align_targets(task.outputs(model, batch), batch["labels"], task.target)
        loss += float(summed_loss(rows, targets, "number" if rows.shape[1] == 1 else "class"))
        count += len(targets)
        if task.target == "number":
            numbers.append((rows[:, 0].double().cpu(), targets.double().cpu()))
        else:
            right += int((rows.argmax(dim=-1) == targets).sum())
    model.train(was_training)
    result = {"loss": loss / max(count, 1)}
    if task.target != "number":
        return result | {"accuracy": right / max(count, 1)}
    outputs, targets = (torch.cat(side) for side in zip(*numbers, strict=True))
    value = float(torch.corrcoef(torch.stack([outputs, targets]))[0, 1]) if count > 1 else 0.0
    return result | ({"correlation": value} if math.isfinite(value) else {})


def accuracy(model: nn.Module, split: DataSplit) -> float:
    """Return the fraction of a split's examples whose largest logit is that of their class."""
    return evaluate(model, ArrayTask(TaskData(train=split, test=split)))["accuracy"]


def move_batch(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return a batch on a device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}

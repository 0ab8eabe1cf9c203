"""Image files and their classes as a task, prepared once by the base's own processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.errors import InputError, MissingExtraError
from lora_analysis.training.data import Split, TaskData
from lora_analysis.training.inputs import LOCAL
from lora_analysis.training.tasks import ArrayTask

if TYPE_CHECKING:
    from lora_analysis.training.examples import Example, Examples


def image_task(found: Examples, place: Path) -> tuple[ArrayTask, list[str]]:
    """Return the images as the model takes them, and a sentence on those that cannot be read.

    Raises
    ------
    InputError
        The base has no image processor, or no image can be read.
    MissingExtraError
        Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401 - to say what is missing
        from transformers import AutoImageProcessor
    except ImportError as error:
        message = "Images are read by Pillow. Run: pip install pillow"
        raise MissingExtraError(message) from error
    try:
        processor = AutoImageProcessor.from_pretrained(place, backend="pil", **LOCAL)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        message = f"{place} holds no image processor (preprocessor_config.json)."
        raise InputError(message) from error
    notes: list[str] = []
    splits = [
        _split(role, examples, found.folder, processor, notes)
        for role, examples in (("train", found.train), ("test", found.test))
    ]
    return ArrayTask(TaskData(*splits)), notes


def _split(
    role: str, examples: list[Example], folder: Path, processor: Any, notes: list[str]
) -> Split:
    from PIL import Image, UnidentifiedImageError

    pixels, labels, bad = [], [], []
    for example in examples:
        path = folder / str(example.image)
        try:
            with Image.open(path) as image:
                made = processor(image.convert("RGB"), return_tensors="np")
        except (OSError, UnidentifiedImageError) as error:
            bad.append(f"{path}: {type(error).__name__}")
            continue
        pixels.append(np.asarray(made["pixel_values"][0], dtype=np.float32))
        labels.append(example.label)
    if bad:
        notes.append(f"{len(bad)} of {len(examples)} {role} images are left out ({bad[0]}).")
    if not pixels:
        message = f"No {role} image can be read. {' '.join(notes)}"
        raise InputError(message)
    return Split(np.stack(pixels), np.asarray(labels, dtype=np.int64))

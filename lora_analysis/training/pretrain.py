"""Pretrain the demo's base model: ``python -m lora_analysis.training.pretrain data``."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_analysis.training.config import Seeds
from lora_analysis.training.demo_data import TASKS, TRAIN_IMAGES, digits_task
from lora_analysis.training.devices import cpu_threads
from lora_analysis.training.digits_vit import DigitsViT, VitConfig, read_base, write_base
from lora_analysis.training.inputs import MODEL_TYPE, WEIGHTS_NAME
from lora_analysis.training.loop import Training
from lora_analysis.training.options import LoopOptions
from lora_analysis.training.tasks import ArrayTask, accuracy

SEED = 0
OPTIONS = LoopOptions(
    steps=1500,
    batch_size=32,
    lr=1e-3,
    warmup_steps=100,
    weight_decay=0.1,
    beta2=0.98,
    max_grad_norm=1.0,
    evaluations=15,
)
SHIFTED = 0.4  # fraction of images that are shifted by a pixel
NOISE = 0.2  # standard deviation; pixels are in [-1, 1]

_LINEAR_STD = 0.02
_INPUT_STD = 0.5  # patches have only 4 pixels, so their embedding needs a larger scale


def main(arguments: list[str] | None = None) -> None:
    """Pretrain the base model, and write its folder into the one on the command line."""
    parser = argparse.ArgumentParser(prog="python -m lora_analysis.training.pretrain")
    parser.add_argument("folder", type=Path, help=f"folder into which to write {MODEL_TYPE}/")
    folder: Path = parser.parse_args(arguments).folder / MODEL_TYPE
    with cpu_threads(1):
        model = pretrain(OPTIONS)
        write_base(model, folder, {})
        rounded = read_base(folder)  # accuracies are those of the rounded weights
        train_accuracy = round(accuracy(rounded, digits_task().train), 4)
        test_accuracy = {t: round(accuracy(rounded, digits_task(t).test), 4) for t in TASKS}
    packages = ("torch", "numpy", "scikit-learn")
    manifest = {
        "name": MODEL_TYPE,
        "what": "vision transformer pretrained on upright 8x8 handwritten digits",
        "command": "python -m lora_analysis.training.pretrain data",
        "seed": SEED,
        "options": OPTIONS.to_dict(),
        "augmentation": {"shifted_share": SHIFTED, "noise_std": NOISE},
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
        "data": {
            "source": "scikit-learn, sklearn.datasets.load_digits: the test part of 'Optical "
            "Recognition of Handwritten Digits' (E. Alpaydin, C. Kaynak, 1998), UCI Machine "
            "Learning Repository, doi:10.24432/C50P49",
            "license": "CC BY 4.0",
            "split": f"in the file's order: first {TRAIN_IMAGES} train, the rest test",
        },
    }
    write_base(model, folder, manifest)
    scores = ", ".join(f"{task} {share:.3f}" for task, share in test_accuracy.items())
    sys.stderr.write(f"{folder / WEIGHTS_NAME}: test accuracy {scores}\n")


def pretrain(options: LoopOptions, config: VitConfig | None = None) -> DigitsViT:
    """Return a model trained on upright digits with small shifts and noise."""
    model = DigitsViT(config)
    initialize(model, SEED)
    task = ArrayTask(digits_task(), augment)
    for metrics in Training(model, task, options, seeds=Seeds(SEED, SEED, SEED)):
        if metrics.test_accuracy is not None:
            line = f"step {metrics.step}/{options.steps}: test accuracy {metrics.test_accuracy:.3f}"
            sys.stderr.write(line + "\n")
    return model


def initialize(model: DigitsViT, seed: int) -> None:
    """Initialize all weights from one generator: normal, biases zero, norms unchanged."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            std = _INPUT_STD if module is model.embed else _LINEAR_STD
            nn.init.normal_(module.weight, std=std, generator=generator)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.position, std=_INPUT_STD, generator=generator)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift some images ``(n, size, size)`` by a pixel in each direction; add noise to all."""
    count, size, _ = images.shape
    is_shifted = (torch.rand(count, 1, generator=generator) < SHIFTED).long()
    shift = 1 + torch.randint(-1, 2, (count, 2), generator=generator) * is_shifted
    padded = functional.pad(images, (1, 1, 1, 1), value=-1.0)
    span = torch.arange(size)
    rows = (shift[:, :1] + span)[:, :, None]
    columns = (shift[:, 1:] + span)[:, None, :]
    windows = padded[torch.arange(count)[:, None, None], rows, columns]  # (n, size, size)
    return windows + NOISE * torch.randn(images.shape, generator=generator)


if __name__ == "__main__":
    main()

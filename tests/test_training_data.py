"""The digits, their tasks, and the base model that is shipped."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training_bases import SHORT, TINY, write_tiny_base

from lora_analysis.errors import InputError, MalformedFileError, MissingExtraError
from lora_analysis.training import pretrain as pretraining
from lora_analysis.training.demo_data import TASKS, digits_task
from lora_analysis.training.digits_vit import DigitsViT, VitConfig, read_base
from lora_analysis.training.inputs import WEIGHTS_NAME, base_folder, file_sha256, write_json
from lora_analysis.training.pretrain import augment, initialize
from lora_analysis.training.tasks import DataSplit, accuracy


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    return write_tiny_base(tmp_path / "base", seed=5)


def test_every_task_shows_all_digits_once_in_the_same_split() -> None:
    upright = digits_task()
    assert upright.train.inputs.shape == (1347, 8, 8)
    assert upright.test.inputs.shape == (450, 8, 8)
    assert upright.train.inputs.dtype == np.float32
    assert (upright.train.inputs.min(), upright.train.inputs.max()) == (-1, 1)
    for task in TASKS:
        data = digits_task(task)
        np.testing.assert_array_equal(data.train.targets, upright.train.targets)
        np.testing.assert_array_equal(data.test.targets, upright.test.targets)


def test_no_test_image_is_a_training_image() -> None:
    data = digits_task()
    trained = {image.tobytes() for image in data.train.inputs}
    assert not trained & {image.tobytes() for image in data.test.inputs}


def test_rotate_invert_and_mirror_move_the_pixels_as_they_say() -> None:
    upright = digits_task().test.inputs
    rotated = digits_task("rotate").test.inputs
    # Counter-clockwise: what was the right column, read downwards, is the top row.
    np.testing.assert_array_equal(rotated[:, 0, :], upright[:, :, -1])
    np.testing.assert_array_equal(digits_task("invert").test.inputs, -upright)
    np.testing.assert_array_equal(digits_task("mirror").test.inputs[:, :, 0], upright[:, :, -1])


def test_an_unknown_task_is_refused_with_near_names() -> None:
    with pytest.raises(InputError, match=r"no digits task 'rotated'.*rotate"):
        digits_task("rotated")


@pytest.mark.slow
def test_the_digits_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    data, wanted = digits_task(), load_digits()
    images = np.concatenate([data.train.inputs, data.test.inputs])
    np.testing.assert_array_equal((images + 1) * 8, wanted.images)
    labels = np.concatenate([data.train.targets, data.test.targets])
    np.testing.assert_array_equal(labels, wanted.target)
    # Were the file elsewhere, scikit-learn itself would be asked.
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    np.testing.assert_array_equal(digits_task().train.inputs, data.train.inputs)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lora-analysis\[demo\]'"):
        digits_task()


def test_a_split_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(InputError, match="3 inputs and 2 targets"):
        DataSplit(np.zeros((3, 8)), np.zeros(2))
    with pytest.raises(InputError, match="0 inputs"):
        DataSplit(np.zeros((0, 8)), np.zeros(0))


@pytest.mark.parametrize("task", list(TASKS))
def test_the_shipped_base_has_the_accuracy_its_manifest_states(task: str) -> None:
    stated = json.loads((base_folder() / "manifest.json").read_text())["test_accuracy"]
    # Another processor may round one image to the other side.
    assert accuracy(read_base(), digits_task(task).test) == pytest.approx(stated[task], abs=0.005)


def test_the_shipped_base_knows_upright_digits_and_no_other() -> None:
    stated = json.loads((base_folder() / "manifest.json").read_text())["test_accuracy"]
    assert stated["upright"] > 0.95
    assert max(stated["rotate"], stated["invert"]) < 0.25
    assert stated["mirror"] < 0.5  # zeros, ones and eights are much their own mirror image


def test_the_shipped_base_is_small_and_is_the_file_of_its_manifest() -> None:
    folder = base_folder()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["weights_sha256"] == file_sha256(base_folder() / WEIGHTS_NAME)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4_000_000
    assert {p.dtype for p in read_base().parameters()} == {torch.float32}


def test_the_modules_of_the_base_bear_the_names_the_demo_adapts() -> None:
    names = dict(read_base().named_modules())
    for block in range(4):
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert names[f"blocks.{block}.attention.{projection}"].weight.shape == (192, 192)


def test_a_base_is_read_as_it_was_written_rounded_to_bfloat16(tiny_base: Path) -> None:
    model = DigitsViT(TINY)
    initialize(model, 5)
    found = read_base(tiny_base).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor.bfloat16().float())
    assert all(parameter.requires_grad for parameter in read_base(tiny_base).parameters())


def test_a_base_with_changed_weights_is_refused(tiny_base: Path) -> None:
    weights = tiny_base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        MalformedFileError, match=r"model\.safetensors: its SHA-256 is [0-9a-f]{64}"
    ):
        read_base(tiny_base)


def test_weights_of_another_architecture_are_refused(tiny_base: Path) -> None:
    wider = VitConfig(width=18, depth=2, heads=2, mlp_width=16)
    write_json(tiny_base / "config.json", wider.to_dict())
    with pytest.raises(MalformedFileError, match=r"blocks\.0.*\(18,\).*\(16,\)"):
        read_base(tiny_base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, "model_type 'vit', expected 'digits-vit'"),
        ({"width": "192"}, "an integer for each of image_size"),
        ({"dropout": 1}, "an integer for each of image_size"),
        ({"heads": 5}, "width by heads, found 8 / 2 and 16 / 5"),
        ({"depth": 0}, "at least 1"),
    ],
)
def test_a_wrong_architecture_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VitConfig.from_dict(TINY.to_dict() | change)


def test_augmentation_moves_by_a_pixel_and_brings_in_paper() -> None:
    images = torch.as_tensor(digits_task().train.inputs)
    noisy = augment(images, torch.Generator().manual_seed(0))
    assert noisy.shape == images.shape
    assert torch.equal(noisy, augment(images, torch.Generator().manual_seed(0)))
    shifted = torch.full_like(images, -1.0)
    shifted[:, 1:, :] = images[:, :-1, :]
    distance = torch.stack([(noisy - other).flatten(1).std(dim=1) for other in (images, shifted)])
    near = (distance < 0.3).float().mean(dim=1)  # noise of 0.2, and little else
    # 60 % stay, 40 % go one of nine ways, one of which is to stay; one is down.
    assert near[0] == pytest.approx(0.6 + 0.4 / 9, abs=0.05)
    assert near[1] == pytest.approx(0.4 / 9, abs=0.03)


@pytest.mark.slow
def test_the_pretraining_command_writes_a_base_that_says_how_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretraining, "OPTIONS", SHORT)
    whole = pretraining.pretrain
    monkeypatch.setattr(pretraining, "pretrain", lambda options: whole(options, TINY))
    pretraining.main([str(tmp_path)])
    folder = tmp_path / "digits-vit"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["options"] == SHORT.to_dict()
    assert manifest["weights_sha256"] == file_sha256(folder / WEIGHTS_NAME)
    assert manifest["data"]["license"] == "CC BY 4.0"
    # The accuracies are those of the weights as they are stored.
    right = accuracy(read_base(folder), digits_task("mirror").test)
    assert manifest["test_accuracy"]["mirror"] == round(right, 4)
    seen = capsys.readouterr()
    assert (seen.out, "step 4/4: test accuracy" in seen.err) == ("", True)


def test_attention_equals_the_formula() -> None:
    model = DigitsViT(TINY)
    attention = model.blocks[0].attention
    x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    heads = [
        torch.softmax(q[..., h] @ k[..., h].transpose(1, 2) / 8**0.5, dim=-1) @ v[..., h]
        for h in (slice(0, 8), slice(8, 16))
    ]
    torch.testing.assert_close(attention(x), attention.o_proj(torch.cat(heads, dim=-1)))

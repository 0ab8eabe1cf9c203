"""What the formats of image models have in common: how keys are sorted, and pairs made of them.

One file may mix the spellings of several trainers and eras. A format lists the spellings it
reads; each says how a factor's key is built, what the module is called in the base, and which
multiplier the format fixes where a module states no alpha.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from lora_analysis.adapter import Adapter, Provenance
from lora_analysis.errors import MalformedFileError
from lora_analysis.formats.factors import (
    UNKNOWN_SCALE,
    FactorRole,
    StatedScale,
    StoredPair,
    callers_scale,
    common_rank,
    complete_pairs,
    scale_finding,
    scale_from_alpha,
    stored_rank,
    update_loaders,
)
from lora_analysis.formats.image_findings import block_findings, copied_findings
from lora_analysis.formats.other_methods import refuse_other_methods
from lora_analysis.formats.sources import ReadOptions, label_of, run_facts
from lora_analysis.formats.stored import StoredFactor, contracted, tensor
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from lora_analysis.storage.tensors import NamedTensors

Part = Literal["A", "B", "mid", "alpha", "scalar", "norms"]

_ROLES: Final[dict[str, Part]] = {"down": "A", "up": "B", "mid": "mid", "A": "A", "B": "B"}
_EXTRA: Final = re.compile(
    r"(?P<module>.+?)(?:[._]lora)?\."
    r"(?P<what>alpha|scalar|dora_scale|lora_magnitude_vector(\.[^.]+)?)"
)
_EXTRAS: Final[dict[str, Part]] = {"alpha": "alpha", "scalar": "scalar"}
# What trainers store beside the factors: reported, not analysed.
_OTHERS: Final = (
    (re.compile(r".+\.(diff|diff_b|set_weight|w_norm|b_norm)"), "trained in full"),
    (re.compile(r".+\.(lora_B|lora_up)(\.[^.]+)?\.bias"), "biases of B"),
    (re.compile(r"<.+>"), "embeddings of new words"),
)

_ROLE: Final = re.compile(r"(down|up)(?=(\.weight)?$)|(?<=lora_)[AB](?=(\.[^.]+)?\.weight$)")
_PARTNERS: Final = {"down": "up", "up": "down", "A": "B", "B": "A"}

DORA: Final = "DoRA"


def _same(name: str) -> str:
    return name


@dataclass(frozen=True, slots=True)
class Spelling:
    """How one trainer, or one era of it, names the factors of a module.

    Parameters
    ----------
    pattern
        Matches the key of a factor; its groups are ``module`` and ``role`` (``down``, ``up``,
        ``mid``, ``A`` or ``B``).
    default
        Multiplier where the module states no alpha; None where it cannot be known then.
    reason
        Why it is that, or why it is not known: the end of the finding's sentence.
    renamed
        Gives the module's name in the base from that in the key.
    alpha_is_rank
        Whether the format says "alpha is r" where it is missing, and not "there is no alpha".
    """

    pattern: re.Pattern[str]
    default: float | None
    reason: str
    renamed: Callable[[str], str] = _same
    alpha_is_rank: bool = False

    def factor(self, key: str) -> tuple[str, Part] | None:
        """Return the module and the part a key names, None where it is spelled otherwise."""
        match = self.pattern.fullmatch(key)
        return None if match is None else (self.renamed(match["module"]), _ROLES[match["role"]])

    def scale(self, rank: int) -> StatedScale:
        """Return what the format says of a module without an alpha."""
        if self.default is None:
            return UNKNOWN_SCALE
        return StatedScale(self.default, float(rank) if self.alpha_is_rank else None, "format")


@dataclass(slots=True)
class SortedParts:
    """The tensor names of one file by module and part, and those that are nothing of these."""

    modules: dict[str, dict[Part, str]] = field(default_factory=dict)
    spellings: dict[str, Spelling] = field(default_factory=dict)
    rest: dict[str, list[str]] = field(default_factory=dict)


def spelled(keys: Iterable[str], spellings: Sequence[Spelling]) -> bool:
    """Say whether any key is that of a factor in one of the spellings."""
    return any(spelling.pattern.fullmatch(key) for key in keys for spelling in spellings)


def sort_parts(path: Path, keys: Iterable[str], spellings: Sequence[Spelling]) -> SortedParts:
    """Sort tensor names by module.

    Raises
    ------
    MalformedFileError
        Two tensors are the same part of a module.
    UnsupportedMethodError
        A key belongs to a method whose update is not ``s·B·A``.
    """
    names = list(keys)
    refuse_other_methods(path, names)
    found = SortedParts()
    others = []
    for key in names:
        for spelling in spellings:
            if factor := spelling.factor(key):
                _put(path, found, *factor, key)
                found.spellings.setdefault(factor[0], spelling)
                break
        else:
            others.append(key)
    for key in others:
        _sort_extra(path, found, key, spellings)
    return found


def _sort_extra(path: Path, found: SortedParts, key: str, spellings: Sequence[Spelling]) -> None:
    if match := _EXTRA.fullmatch(key):
        for name in dict.fromkeys(spelling.renamed(match["module"]) for spelling in spellings):
            if name in found.modules:
                _put(path, found, name, _EXTRAS.get(match["what"], "norms"), key)
                return
    what = next((what for mark, what in _OTHERS if mark.fullmatch(key)), "no factors")
    found.rest.setdefault(what, []).append(key)


def _put(path: Path, found: SortedParts, module: str, part: Part, key: str) -> None:
    before = found.modules.setdefault(module, {}).setdefault(part, key)
    if before != key:
        message = f"{path}: '{before}' and '{key}' are both {part} of '{module}'."
        raise MalformedFileError(message)


def read_image_adapter(
    path: Path,
    options: ReadOptions,
    *,
    format: str,
    spellings: Sequence[Spelling],
    stated: Callable[[str, int], StatedScale | None] = lambda _module, _rank: None,
    findings: Sequence[str] = (),
) -> Adapter:
    """Read one file whose keys are spelled in one or several of the given ways.

    Parameters
    ----------
    path
        The file.
    options
        The caller's.
    format
        Name in the provenance.
    spellings
        Ways to name factors, the first that matches a key counts.
    stated
        Gives the scale of a module of a rank, where something beside its own tensors states it.
    findings
        What the format's reader has noticed already.

    Raises
    ------
    MalformedFileError
        A module has one factor only, its factors do not fit, or its alpha is no number.
    UnsupportedMethodError
        The file holds a method whose update is not ``s·B·A``.
    """
    tensors = open_tensors(path, allow_pickle=options.allow_pickle)
    parts = sort_parts(path, tensors.infos, spellings)
    pairs = [_completed(tensors, pair, parts.modules[pair.module]) for pair in _pairs(path, parts)]
    ranks = {pair.module: stored_rank(tensors, pair) for pair in pairs}
    scales = {
        module: callers_scale(options, rank)
        or _own_scale(tensors, parts, module)
        or stated(module, rank)
        or parts.spellings[module].scale(rank)
        for module, rank in ranks.items()
    }
    label = options.label or label_of(path)
    return Adapter(
        update_loaders(tensors, pairs, scales, label=label),
        label=label,
        provenance=Provenance(
            path=path,
            format=format,
            files=tensors.files,
            scale_origin={module: one.origin for module, one in scales.items()},
            rank=common_rank(ranks),
            findings=(
                *findings,
                *_scale_findings(parts, scales),
                *_dora_findings(pairs),
                *block_findings(tensors, pairs),
                *copied_findings(tensors, pairs),
                *_rest_findings(parts),
            ),
            **_facts(path, tensors.metadata),
        ),
    )


def _pairs(path: Path, parts: SortedParts) -> list[StoredPair]:
    """Return the pairs of a file; the missing partner is named after the one that is there."""
    factors: dict[str, dict[FactorRole, str]] = {}
    for module, stored in parts.modules.items():
        if "A" not in stored and "B" not in stored:
            message = f"{path}: '{module}' has '{next(iter(stored.values()))}' but no factors."
            raise MalformedFileError(message)
        roles: tuple[FactorRole, ...] = ("A", "B")
        factors[module] = {role: stored[role] for role in roles if role in stored}
    return complete_pairs(path, factors, lambda module, _: _partner(factors[module]))


def _partner(factors: Mapping[FactorRole, str]) -> str:
    (have,) = factors.values()
    return _ROLE.sub(lambda role: _PARTNERS[role[0]], have)


def _completed(tensors: NamedTensors, pair: StoredPair, parts: Mapping[Part, str]) -> StoredPair:
    """Return a pair with its kernel, its core and what else its module stores."""
    shapes = pair.a.shape(tensors), pair.b.shape(tensors)
    kernel = shapes[0][2:]
    a, b = pair.a, pair.b
    if "mid" in parts:
        # ΔW = einsum("ij…,ip,jr->pr…", mid, upᵀ, down): up stays B, mid and down make A.
        kernel = tensors.infos[parts["mid"]].shape[2:]
        a = contracted(tensor(parts["mid"]), a.flattened())
    if "scalar" in parts:
        b = b.times(_number(tensors, parts["scalar"]))
    if kernel or any(len(shape) > 2 for shape in shapes):
        kernel = kernel or tuple(1 for _ in shapes[1][2:])
        pair = replace(pair, layout="conv", kernel=kernel)
        a, b = a.flattened(), b.flattened()
    return replace(pair, a=a, b=b, **_dora(tensors, b, parts))


def _dora(tensors: NamedTensors, b: StoredFactor, parts: Mapping[Part, str]) -> dict[str, Any]:
    """Return what a pair of DoRA says more; norms of columns are not those of PEFT's DoRA."""
    if "norms" not in parts:
        return {}
    name = parts["norms"]
    shape = tensors.infos[name].shape
    by_rows = math.prod(shape) == b.shape(tensors)[0]
    if name.endswith("dora_scale") and len(shape) > 1:
        by_rows = by_rows and shape[0] != 1
    return {"variant": DORA, "magnitude": tensor(name) if by_rows else None}


def _own_scale(tensors: NamedTensors, parts: SortedParts, module: str) -> StatedScale | None:
    """Return the scale from the module's own alpha, None without one that says anything."""
    stored = parts.modules[module]
    if "alpha" not in stored:
        return None
    alpha = _number(tensors, stored["alpha"])
    if alpha == 0 and parts.spellings[module].alpha_is_rank:
        return None  # in kohya's words, as if it were not there
    # Of a Tucker decomposition, alpha is divided by the rows of lora_down.
    return scale_from_alpha(alpha, tensors.infos[stored["A"]].shape[0], "tensor")


def _number(tensors: NamedTensors, name: str) -> float:
    shape = tensors.infos[name].shape
    values = np.asarray(tensors.read(name)).reshape(-1) if math.prod(shape) == 1 else None
    if values is None or not np.isfinite(float(values[0])):
        found = shape if values is None else values[0]
        message = f"{tensors.file_of(name)}: '{name}' must be one finite number, found {found}."
        raise MalformedFileError(message)
    return float(values[0])


def _scale_findings(parts: SortedParts, scales: Mapping[str, StatedScale]) -> list[str]:
    findings = []
    by_reason: dict[str, list[str]] = {}
    for module, one in scales.items():
        if one.origin in ("format", "unknown"):
            spelling = parts.spellings[module]
            by_reason.setdefault(spelling.reason, []).append(module)
    for reason, modules in by_reason.items():
        some = {module: scales[module] for module in modules}
        if unknown := scale_finding(some, reason):
            findings += unknown
        else:
            findings.append(f"{len(modules)} of {len(scales)} modules state no alpha: {reason}.")
    return findings


def _dora_findings(pairs: Sequence[StoredPair]) -> list[str]:
    odd = [pair for pair in pairs if pair.variant == DORA and pair.magnitude is None]
    if not odd:
        return []
    return [
        f"DoRA of {len(odd)} modules holds norms of the columns of W + ΔW, not of its rows (first: "
        f"'{odd[0].module}'): the low-rank part is analysed, the effective update is not computed."
    ]


def _rest_findings(parts: SortedParts) -> list[str]:
    return [
        f"{len(names)} tensors beside the factors: {what}, not analysed (first: '{names[0]}')."
        for what, names in parts.rest.items()
    ]


def _facts(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what a training run left about itself: beside the file, or in kohya's metadata."""
    facts: dict[str, Any] = dict(run_facts(path.parent))
    stated = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")
    bases = [metadata[key] for key in stated if metadata.get(key) not in (None, "", "None")]
    if bases:
        facts["base_model"] = bases[0]
    if "seed" not in facts and metadata.get("ss_seed", "").lstrip("-").isdecimal():
        facts["seed"] = int(metadata["ss_seed"])
    return facts

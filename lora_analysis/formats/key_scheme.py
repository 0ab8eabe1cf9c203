"""A format as a value: a regular expression over tensor keys, a scale rule, and a few hooks.

Most trainers store ``<module><something>A`` and ``<module><something>B``. Such a format is a
`KeyScheme`, which recognizes, lists and reads its files::

    KeyScheme("updown", (KeyPattern(re.compile(r"(?P<module>.+)/(?P<role>down|up)")),))

`complete` adds what only the format can know: the scale that a configuration states, modules that
are stored fused, other names, DoRA's norms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from lora_analysis.errors import MalformedFileError, SourceError
from lora_analysis.formats.build import AdapterParts, ScaleRule, build_adapter, unknown_scale
from lora_analysis.formats.factors import UNKNOWN_SCALE, StatedScale, StoredPair
from lora_analysis.formats.side_tensors import side_findings
from lora_analysis.formats.sources import AdapterFiles, Format, config_at, tensors_at

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.finding import Finding
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

Role = Literal["A", "B", "mid", "alpha", "scalar", "magnitude"]

# Words for A, and the word that stands for B in the same key.
_PARTNERS: Final = {
    "A": "B",
    "a": "b",
    "down": "up",
    "lora_A": "lora_B",
    "lora_a": "lora_b",
    "linear_in": "linear_out",
}
_ROLES: Final[Mapping[str, Role]] = {
    **dict.fromkeys(_PARTNERS, "A"),
    **dict.fromkeys(_PARTNERS.values(), "B"),
    "mid": "mid",
    "m": "magnitude",
    "magnitude": "magnitude",
}
_FACTORS: Final = frozenset({"A", "B", "mid"})


@dataclass(frozen=True, slots=True, eq=False)
class KeyPattern:
    """How one trainer, or one version of it, names the tensors of a module.

    Parameters
    ----------
    regex
        Matches a whole key; its groups are ``module``, ``role`` and, if one file holds several
        adapters, ``adapter``.
    rename
        Gives the module's name in the base model for that in the key.
    roles
        The role of each word that the group ``role`` matches, besides the common ones: A/B, a/b,
        down/up, linear_in/linear_out.
    scale
        Multiplier of a module for which the file states none; None: it is unknown then.
    reason
        Why it is that, or why it is unknown: the end of the finding's sentence.
    alpha_is_rank
        Whether a missing alpha means alpha = r in this format.
    """

    regex: re.Pattern[str]
    rename: Callable[[str], str] = str
    roles: Mapping[str, Role] = field(default_factory=dict)
    scale: float | None = None
    reason: str = ""
    alpha_is_rank: bool = False

    def match(self, key: str) -> tuple[str, Role] | None:
        """Return the module and the role that a key names, None if the pattern does not match."""
        match = self.regex.fullmatch(key)
        if match is None:
            return None
        word = match["role"]
        return self.rename(match["module"]), self.roles.get(word) or _ROLES[word]

    def adapter(self, key: str) -> str | None:
        """Return the name of the adapter that a key states, if the pattern has that group."""
        match = self.regex.fullmatch(key) if "adapter" in self.regex.groupindex else None
        return None if match is None else match["adapter"]

    def partner(self, key: str) -> str:
        """Return the key of the other factor of a module."""
        match = self.regex.fullmatch(key)
        if match is None or "role" not in self.regex.groupindex:
            return key
        start, stop = match.span("role")
        partners = _PARTNERS | {b: a for a, b in _PARTNERS.items()}
        return f"{key[:start]}{partners.get(match['role'], match['role'])}{key[stop:]}"

    def default_scale(self, rank: int) -> StatedScale:
        """Return the scale of a module for which the file states none."""
        if self.scale is None:
            return UNKNOWN_SCALE
        return StatedScale(self.scale, float(rank) if self.alpha_is_rank else None, "format")


@dataclass(slots=True)
class StoredModules:
    """The keys of one file, by module and role.

    Parameters
    ----------
    files, tensors, options
        The adapter's files, the opened tensors, and the caller's options.
    modules
        Module name → role → key.
    patterns
        Module name → the pattern that its first key matches.
    others
        Keys that belong to no module.
    """

    files: AdapterFiles
    tensors: NamedTensors
    options: ReadOptions
    modules: dict[str, dict[Role, str]] = field(default_factory=dict)
    patterns: dict[str, KeyPattern] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The file of tensors."""
        return self.files.weights

    def add(self, module: str, role: Role, key: str) -> None:
        """Add a key; refuse a second one for the same role of a module."""
        first = self.modules.setdefault(module, {}).setdefault(role, key)
        if first != key:
            message = f"{self.path}: '{first}' and '{key}' are both {role} of '{module}'."
            raise MalformedFileError(message)

    def pairs(self, *, transposed: bool = False) -> list[StoredPair]:
        """Return the two factors of every module; refuse a module with only one.

        Parameters
        ----------
        transposed
            Whether A is stored as ``(d_in, r)`` and B as ``(r, d_out)``.
        """
        pairs = []
        for module, keys in self.modules.items():
            factors = [keys[role] for role in ("A", "B") if role in keys]
            if not factors:
                message = (
                    f"{self.path}: '{module}' has '{next(iter(keys.values()))}' but no factors."
                )
                raise MalformedFileError(message)
            if len(factors) == 1:
                partner = self.patterns[module].partner(factors[0])
                message = (
                    f"{self.path}: '{module}' has '{factors[0]}' but no '{partner}'. A LoRA file "
                    "stores both; is it truncated, or from another method?"
                )
                raise MalformedFileError(message)
            pairs.append(StoredPair.of(module, *factors, flipped=transposed))
        return pairs

    def unanalyzed_findings(self) -> list[Finding]:
        """Return the finding about keys that belong to no module, if there are any."""
        return side_findings("not analyzed", self.others)


@dataclass(frozen=True, slots=True)
class KeyScheme(Format):
    """A format that is recognized by the keys of its tensors.

    Parameters
    ----------
    name
        Name in ``Provenance.format``.
    keys
        The patterns of its keys; the first that matches a key counts.
    complete
        Gives the adapter's parts for the keys of a file. By default every module is a plain pair.
    transposed
        Whether A is stored as ``(d_in, r)`` and B as ``(r, d_out)``.
    scale
        Gives the multiplier of every module for the opened tensors, if ``complete`` does not.
    ignored
        Matches keys that are neither factors nor worth a finding, such as that of the scale.
    is_marked
        Returns True for tensors that are of this format; by default those with a factor.
    weights, config, is_config
        Names of the file of tensors in an adapter's folder, and of the configuration next to it;
        the last returns True if a configuration's content is of this format.
    check
        Raises for files that are recognized and cannot be read.
    """

    name: str
    keys: tuple[KeyPattern, ...]
    complete: Callable[[StoredModules], AdapterParts] | None = None
    transposed: bool = False
    scale: Callable[[NamedTensors], float | None] | None = None
    ignored: str = ""
    is_marked: Callable[[NamedTensors], bool] | None = None
    weights: tuple[str, ...] = ()
    config: str = ""
    is_config: Callable[[Mapping[str, Any]], bool] = bool
    check: Callable[[AdapterFiles], None] | None = None

    def locate(self, path: Path, options: ReadOptions) -> AdapterFiles | None:
        """Return the files of the adapter at exactly this path.

        The path is a file of tensors, or the adapter's folder or its configuration.
        """
        if self.config and path.name == self.config and path.is_file():
            path = path.parent
        is_folder = path.is_dir()
        if is_folder and not self.weights:
            return None
        config_path = (path if is_folder else path.parent) / self.config if self.config else None
        config = None if config_path is None else config_at(config_path)
        if not config or not self.is_config(config):
            config_path = config = None
        weights = path
        if is_folder:
            stored = (path / name for name in self.weights if (path / name).is_file())
            weights = next(stored, path)
        if config is None or weights.name not in self.weights:
            tensors = None if options.pair is not None else tensors_at(weights, options)
            if tensors is None or not self.recognizes(tensors, options):
                return None
        return AdapterFiles(path, weights, config_path, config)

    def recognizes(self, tensors: NamedTensors, options: ReadOptions) -> bool:  # noqa: ARG002
        """Return True if the tensors have this format's marks or keys."""
        if self.is_marked is not None:
            return self.is_marked(tensors)
        return has_factors(tensors.infos, self.keys)

    def read(self, files: AdapterFiles, name: str | None, options: ReadOptions) -> Adapter:
        """Read the adapter in the files.

        Raises
        ------
        MalformedFileError
            A module has one factor only, or its factors do not fit together.
        SourceError
            The file holds several adapters, and none, or no such one, is named.
        UnsupportedMethodError
            The update is not ``s·B·A`` on matrices.
        """
        if self.check is not None:
            self.check(files)
        tensors = files.open(options)
        stored = sort_keys(StoredModules(files, tensors, options), self.keys, name)
        parts = self._parts(stored) if self.complete is None else self.complete(stored)
        return build_adapter(files.path, self.name, tensors, options, parts)

    def _parts(self, stored: StoredModules) -> AdapterParts:
        if self.ignored:
            ignored = re.compile(self.ignored)
            stored.others = [key for key in stored.others if not ignored.fullmatch(key)]
        multiplier = None if self.scale is None else self.scale(stored.tensors)
        rule: ScaleRule = unknown_scale
        if multiplier is not None:
            scale = StatedScale(float(multiplier), None, "tensor")

            def rule(_pair: StoredPair, _rank: int) -> StatedScale:
                return scale

        return AdapterParts(
            pairs=stored.pairs(transposed=self.transposed),
            scale=rule,
            findings=stored.unanalyzed_findings(),
        )


def has_factors(keys: Iterable[str], patterns: Iterable[KeyPattern]) -> bool:
    """Return True if any key is that of a factor in one of the patterns."""
    pool = tuple(patterns)
    return any(
        (match := pattern.match(key)) and match[1] in _FACTORS for key in keys for pattern in pool
    )


def sort_keys(
    stored: StoredModules, patterns: tuple[KeyPattern, ...], adapter: str | None = None
) -> StoredModules:
    """Sort the keys of a file by module and role.

    Parameters
    ----------
    stored
        The opened file; the keys are added to it.
    patterns
        Patterns of the keys.
    adapter
        Name of the adapter that is read, if keys state one.

    Raises
    ------
    MalformedFileError
        Two tensors have the same role in a module.
    SourceError
        Keys state names of adapters, and the one that is read is not clear or not among them.
    """
    chosen = _choose(stored, patterns, adapter)
    for key in stored.tensors.infos:
        for pattern in patterns:
            if (match := pattern.match(key)) is None:
                continue
            if (name := pattern.adapter(key)) is None or name == chosen:
                stored.add(*match, key)
                stored.patterns.setdefault(match[0], pattern)
            break
        else:
            stored.others.append(key)
    for module, keys in list(stored.modules.items()):
        if _FACTORS.isdisjoint(keys):  # norms of a module without factors
            stored.others += keys.values()
            del stored.modules[module]
    return stored


def _choose(
    stored: StoredModules, patterns: tuple[KeyPattern, ...], name: str | None
) -> str | None:
    """Return the name of the adapter that is read, None if keys state no names."""
    named = [pattern for pattern in patterns if "adapter" in pattern.regex.groupindex]
    if not named:
        return None
    names = {pattern.adapter(key) for key in stored.tensors.infos for pattern in named}
    choices = sorted(each for each in names if each is not None)
    if name is None and len(choices) == 1:
        return choices[0]
    if name in choices:
        return name
    listed = ", ".join(f"'{stored.files.path}#{each}'" for each in choices) or "none"
    message = f"{stored.path}: one adapter was asked for, it holds: {listed}."
    raise SourceError(message)

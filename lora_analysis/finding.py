"""Findings: what a reader, a check or a writer noticed, as a code with fields.

A finding is a code and the fields that fill its sentence; severity and text follow from the code
through the table `KINDS`. Decisions look at codes and fields, never into a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Final, Literal, NamedTuple

from lora_analysis.text import html_facts

# result: a statement about the adapters; artifact: a number with another cause than learning;
# limit: what cannot be said or was not used; damage: numbers that should not be relied on.
Severity = Literal["result", "artifact", "limit", "damage"]
# Names that a sentence lists before it says how many more there are.
_LISTED: Final = 4


class Kind(NamedTuple):
    """Severity and sentence of a code; the sentence has ``{field}`` where a field belongs."""

    severity: Severity
    template: str


KINDS: Final[dict[str, Kind]] = {
    "file-note": Kind("limit", "{text}"),
    "names-matched": Kind(
        "limit",
        "{count} of {total} modules have other names in other files and were matched: '{module}' "
        "is shown as '{shown}'.",
    ),
    "names-prefix": Kind(
        "limit",
        "module names differ by a prefix ({prefixes}); it was ignored, because counts and shapes "
        "of all modules agree without it.",
    ),
    "names-ambiguous": Kind(
        "limit",
        "several prefixes ({prefixes}) are followed by the same names and shapes, so these "
        "modules were not matched. Pass prefix= to choose one (command line: --prefix OLD=NEW).",
    ),
    "names-hidden": Kind(
        "limit",
        "the prefix that was passed gives other modules the names of these, so they were left "
        "out: {modules}.",
    ),
    "zero-a": Kind(
        "damage",
        "A is zero in {count} of {total} modules ({modules}). In linear layers A starts random, so "
        "these tensors were lost; ΔW of these modules is zero in this file.",
    ),
    "enlarged-entry": Kind(
        "damage",
        "{role} of '{module}' holds {value}, {ratio} times the rms of its other entries: a flipped "
        "bit or another error in the file. Affected: {modules} ({count} of {total} modules). Small "
        "errors are not noticed; compare the file's sha256 with the original's.",
    ),
    "single-entry": Kind(
        "damage",
        "{role} of '{module}' is zero except for one entry of {value}: a flipped bit or another "
        "error in the file. Affected: {modules} ({count} of {total} modules).",
    ),
    "large-values": Kind(
        "damage",
        "{role} of '{module}' holds {value} (limit 10,000): the training diverged or the file is "
        "damaged. Affected: {modules} ({count} of {total} modules).",
    ),
    "tiny-values": Kind(
        "damage",
        "{role} of '{module}' holds no entry above {value}; trained factors are not so small: the "
        "file is damaged or its type is wrong. Affected: {modules} ({count} of {total} modules).",
    ),
    "large-scale": Kind(
        "damage",
        "The scale of '{module}' is {value} (limit 10,000): its alpha may be damaged. Affected: "
        "{modules} ({count} of {total} modules).",
    ),
    "norm-outlier": Kind(
        "damage",
        "{quantity} of '{module}' is {value}, a factor of {ratio} outside the {bound} over the "
        "other {others} modules {scope} (limit {limit}): the training diverged there or the file "
        "is damaged. Affected: {modules} ({count} of {total} modules).",
    ),
    "unusual-norm": Kind(
        "limit",
        "{quantity} of '{module}' is {value}, a factor of {ratio} outside the {bound} over the "
        "other {others} modules {scope}; real adapters stay within a factor of 3. Affected: "
        "{modules} ({count} of {total} modules).",
    ),
    "file-hole": Kind(
        "damage",
        "{role} of '{module}' has {bytes:,} bytes of zeros that start and end on 512-byte blocks "
        "of the file or on tensor ends: a hole in the file, as an interrupted copy or download "
        "leaves it. Affected: {modules} ({count} of {total} modules).",
    ),
    "zeros-in-a-row": Kind(
        "limit",
        "{role} of '{module}' has {bytes:,} bytes of zeros in a row. Harmless causes are embedding "
        "rows that were never seen, a padded vocabulary, pruned or dead units, and block-diagonal "
        "factors of fused projections. Affected: {modules} ({count} of {total} modules).",
    ),
    "scattered-zeros": Kind(
        "limit",
        "{share:.0%} of the entries of {role} of '{module}' are zero: a sparse method, a "
        "block-diagonal factor, or underflow in {dtype}. Affected: {modules} ({count} of {total} "
        "modules).",
    ),
    "no-gradient": Kind(
        "limit",
        "B is zero in {count} of {total} modules, in whole types or layers ({modules}): they never "
        "received a gradient, for example the last layer of a text encoder, or experts that were "
        "never routed to.",
    ),
    "zero-b": Kind(
        "damage",
        "B is zero in {count} of {total} modules ({modules}), while others of their types and "
        "layers were trained: these tensors were probably lost. ΔW of these modules is zero in "
        "this file.",
    ),
    "twin-modules": Kind(
        "damage",
        "'{module}' and '{other}' have identical A and B: training does not leave this, so one was "
        "written over the other. Affected: {modules} ({count} of {total} modules).",
    ),
    "below-precision": Kind(
        "limit",
        "The smallest σ of {count} of {total} modules are below storage precision: rounding to "
        "{dtype} alone may have changed those of '{module}' by {ratio:.1g} times their size.",
    ),
    "copied-a": Kind(
        "artifact",
        "{count} modules share their A with another (for example {modules}): a fused projection "
        "was split and its A copied. An input overlap of 1 between them is an artifact.",
    ),
    "split-qkv": Kind(
        "limit",
        "{count} fused projections were trained as {parts} separate LoRAs (split_qkv): B is "
        "block-diagonal (seen in '{module}'). The scale is what every loader computes from the "
        "joint rank; training used {parts} times as much.",
    ),
    "fused-modules-split": Kind(
        "limit", "The grouped factors of {modules} are read block by block."
    ),
    "interleaved-blocks": Kind(
        "limit",
        "query_key_value interleaves q, k and v per head in every model that has it, so the blocks "
        "of rows that were trained are not q, k or v; they are named rows0, rows1, ...",
    ),
    "dora": Kind(
        "limit",
        "DoRA in {count} of {total} modules: ΔW is the low-rank part s·B·A; the weight in use is "
        "W + ΔW with each row or column scaled to a learned norm.",
    ),
    "dora-columns": Kind(
        "limit",
        "DoRA in {count} of {total} modules holds norms of the input columns of W + ΔW, not of its "
        "rows (first: {module}); PEFT has no such DoRA.",
    ),
    "side-tensors": Kind(
        "limit",
        "{tensors} next to the factors: {what} ({keys}).",
    ),
    "base-tensors": Kind(
        "limit", "{tensors} next to the factors: the base model's, not analyzed ({keys})."
    ),
    "side-tensors-not-written": Kind(
        "limit",
        "Not written, because a file of {format} has no place for it: {tensors} next to the "
        "factors ({keys}).",
    ),
    "metadata-not-written": Kind(
        "limit",
        "Not written, because it describes a file of another format than {format}: {entries} of "
        "metadata ({keys}).",
    ),
    "loaders-scale": Kind(
        "limit",
        "The scale of {count} of {total} modules is not stated; 1 was written, as loaders of the "
        "source assume. The scale in training may have been different.",
    ),
    "kasa": Kind(
        "limit",
        "KaSA: ΔW is the low-rank part s·B·diag·A; the smallest r singular directions were taken "
        "out of the base weight beforehand.",
    ),
    "config-missing": Kind(
        "limit",
        "There is no {config}: neither the scale nor the initialization is stated.",
    ),
    "config-type-missing": Kind(
        "limit",
        "{config} names no peft_type; it states r or lora_alpha and is read as PEFT's LoRA.",
    ),
    "config-rank-differs": Kind(
        "damage",
        "The rank in adapter_config.json is not that of the factors for {modules} of {of} modules "
        "(first: '{first}', {stated} in the config, {rank} in the file). The factors count.",
    ),
    "config-targets-missing": Kind(
        "limit",
        "target_modules names {count} of {of} targets for which the file holds no factors: "
        "{targets}. Either the model has no such module, or their factors are missing.",
    ),
    "config-targets-exceeded": Kind(
        "limit",
        "{modules} of {of} modules have factors and are not in target_modules (first: '{first}'). "
        "PEFT would not load them. Are config and weights of one adapter?",
    ),
    "config-targets-unchecked": Kind(
        "limit", "The modules of the file were not compared with target_modules: {reason}"
    ),
    "config-excluded": Kind(
        "limit",
        "{modules} of {of} modules have factors and are in exclude_modules (first: '{first}'). "
        "PEFT would not load them. Are config and weights of one adapter?",
    ),
    "config-layers-differ": Kind(
        "limit",
        "The layers with factors are not those of layers_to_transform. Without factors: "
        "[{missing}]; not in the config: [{beyond}].",
    ),
    "layers-missing": Kind(
        "limit",
        "{modules} modules are missing between layers that have them (first: '{first}'; layers "
        "{layers}). Either these layers were excluded from training, or their factors were lost.",
    ),
    "config-saved-missing": Kind(
        "limit",
        "modules_to_save names modules of which the file holds no tensor: {modules}. Either the "
        "model has no such module, or it was not saved.",
    ),
    "config-biases-missing": Kind(
        "limit",
        "The config says that biases were trained (bias = '{bias}'), and the file holds none.",
    ),
    "scale-unknown": Kind(
        "limit",
        "The scale of {modules} of {of} modules is not known ({reason}): spectra are in units of "
        "the scale. Pass scale= or alpha= (command line: --scale, --alpha) to set it.",
    ),
    "alpha-zero": Kind(
        "limit",
        "lora_alpha is 0 for {modules} of {of} modules: the factors are not applied as "
        "configured. They are analyzed as stored, in units of the scale. Pass alpha= or scale= "
        "(command line: --alpha, --scale) to set it.",
    ),
    "alora": Kind("limit", "aLoRA: the update acts only after the invocation tokens."),
    "mica": Kind(
        "limit",
        "MiCA: B is not trained, it holds the base weight's last left singular vectors; the "
        "output side says nothing about what was learned.",
    ),
    "pruned-to-rank-0": Kind(
        "limit",
        "{modules} modules were pruned to rank 0 and are left out (first: '{first}').",
    ),
    "layers-replicated": Kind(
        "limit",
        "Layers are numbered as replicated; each is compared with the base's own layer.",
    ),
    "grouped-convolutions": Kind(
        "limit",
        "{modules} grouped convolutions (first: '{first}'): ΔW acts on all input channels, the "
        "base weight on those of its group.",
    ),
    "expert-order": Kind(
        "limit",
        "Factors of {experts} experts are stored in one tensor ({parameters}). The columns of B "
        "are read {order}, {reason}. A wrong order gives different updates of the same size.",
    ),
    "expert-orientation-unknown": Kind(
        "limit",
        "'{parameter}': whether A of the experts acts on the inputs is not stated (PEFT before "
        "0.19 did not order the axes); this is assumed. Compare its shape with the base's.",
    ),
    "expert-stack": Kind(
        "limit",
        "Factors of {experts} experts are stored in one tensor each ({parameters}) and are read "
        "per expert.",
    ),
    "expert-factors-shared": Kind(
        "artifact",
        "All {experts} experts share one factor of each projection ({parameters}): their overlap "
        "on that side is 1 by construction.",
    ),
    "empty-placeholders": Kind(
        "limit",
        "{modules} modules have empty factors and are left out ({types}): the model has no such "
        "projection.",
    ),
    "kernel-assumed": Kind(
        "limit",
        "AdaLoRA on {modules} convolutions (first: '{first}'): the file does not tell the width of "
        "the kernels; {kernel} is assumed from the number of columns. ΔW as a matrix is exact. "
        "Pass kernel= (command line: --kernel) to set it.",
    ),
    "empty-saved-tensors": Kind(
        "damage",
        "{count} tensors of modules trained in full are empty (first: '{first}'): DeepSpeed "
        "ZeRO-3 saved them without gathering their parts. What was learned there is not in the "
        "file.",
    ),
    "tensors-beside": Kind(
        "limit",
        "{count} further tensors in the file: {what} (first: '{first}'). They are not analyzed.",
    ),
    "tensors-in-full": Kind("limit", "{count} tensors in the file are {what} (first: '{first}')."),
    "side-file": Kind(
        "limit",
        "'{file}' lies next to the adapter: modules trained in full (in LLaVA and its kin the "
        "projector). They are part of what was learned; they are not analyzed and not written.",
    ),
    "whole-change": Kind(
        "limit",
        "If a method rescales the weight or subtracts a part of it, ΔW is the total change of the "
        "weight, computed from {base}.",
    ),
    "config-not-written-with-weights": Kind(
        "damage",
        "{config} is not the one that {weights} was written with: rank, scale or targets may be "
        "those of another adapter. Restore the two files as they were written together, or write "
        "the adapter again.",
    ),
    "base-enlarged-entry": Kind(
        "damage",
        "{base}: {count} of {total} weights hold an entry more than 1000 times the rms of their "
        "others ({weights}; largest {value}, {ratio} times): a flipped bit or damaged bytes. Do "
        "not rely on results that involve them; download the file again.",
    ),
    "base-norm": Kind(
        "damage",
        "{base}: {count} of {total} weights have entries far from the size of trained ones "
        "({weights}; rms {rms}, linear layers have 0.001 to 5): scales that are missing or "
        "misread, bytes of another type, or a damaged file. Do not rely on results that involve "
        "them.",
    ),
    "base-hole": Kind(
        "damage",
        "{base}: {count} of {total} weights hold a long run of zeros ({weights}; longest {bytes} "
        "bytes, {share:.0%} of the weight): a hole in the file, or rows that were pruned or never "
        "trained. Find out which before you rely on results that involve them.",
    ),
    "base-zeros": Kind(
        "damage",
        "{base}: {count} of {total} weights hold more than 10 % zeros ({weights}; at most "
        "{share:.0%}), the others do not: a damaged file, or layers that were pruned.",
    ),
    "base-sparse": Kind(
        "limit",
        "{base} is a sparse model: {count} of {total} weights hold more than 10 % zeros (median "
        "{share:.0%}).",
    ),
    "base-transposed": Kind(
        "damage",
        "{base}: {count} matrices have the transposed shape of their update ({weights}), and no "
        "other has the shape of family '{family}' unless it is square: all weights seem to be "
        "transposed, square ones included. Do not rely on results for square ones; pass "
        "transposed=True (command line: --transposed) if the file is meant so.",
    ),
    "base-mixed-shards": Kind(
        "damage",
        "{base}: its shards store the same kind of tensor in two types ({tensor} is {dtype} in "
        "{file}, {other} is {other_dtype} in {other_file}): files of two models may be mixed.",
    ),
    "base-part": Kind(
        "limit",
        "{base} is shard {number} of {total} alone: modules of the other shards are not found. "
        "Pass the index or the folder of the whole model.",
    ),
    "run-note": Kind("limit", "{run}: {text}"),
    "run-retried": Kind("limit", "{run} failed and is tried again: {error}"),
    "label-misfit": Kind(
        "limit",
        "the name does not match the label pattern {pattern}, so task and seed are those that the "
        "files state.",
    ),
}


class _Sentence(Formatter):
    """Fill a template: numbers get three digits that matter, long lists are cut."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec:
            return format(value, format_spec)
        if isinstance(value, bool) or value is None:
            return str(value)
        if isinstance(value, float):
            return f"{value:.3g}" if math.isfinite(value) else str(value)
        if isinstance(value, (list, tuple)):
            return listed(value)
        return str(value)


_SENTENCE: Final = _Sentence()


def listed(names: list[Any] | tuple[Any, ...], at_most: int = _LISTED) -> str:
    """Return names in quotes, the first few of them and how many more there are.

    Examples
    --------
    >>> listed(["a", "b", "c"], at_most=2)
    "'a', 'b' and 1 more"
    """
    shown = ", ".join(f"'{name}'" for name in names[:at_most])
    return f"{shown} and {len(names) - at_most} more" if len(names) > at_most else shown


@dataclass(frozen=True, slots=True)
class Finding:
    """Something worth knowing about an adapter, a weight or a study.

    Parameters
    ----------
    code
        A key of `KINDS`, for example ``"label-misfit"``.
    fields
        What the sentence is about: names, counts and numbers, by field name.

    Raises
    ------
    KeyError
        The code is not in `KINDS`, or its sentence has a field that is missing.
    """

    code: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", dict(self.fields))
        self.text  # noqa: B018 - a missing field is an error here, not where it is printed

    @property
    def severity(self) -> Severity:
        """How the finding bears on the numbers next to it."""
        return KINDS[self.code].severity

    @property
    def text(self) -> str:
        """The sentence."""
        return _SENTENCE.vformat(KINDS[self.code].template, (), self.fields)

    def mapped(self, function: Callable[[str], str]) -> Finding:
        """Return the finding with a function applied to each field that is a string."""
        fields = {k: function(v) if isinstance(v, str) else v for k, v in self.fields.items()}
        return Finding(self.code, fields)

    def to_dict(self) -> dict[str, Any]:
        """Return code, severity, text and fields, as JSON output has them."""
        return {
            "code": self.code,
            "severity": self.severity,
            "text": self.text,
            "fields": dict(self.fields),
        }

    def __hash__(self) -> int:
        return hash((self.code, self.text))

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return html_facts(f"{self.severity}: {self.code}", self.fields.items(), self.text)


@dataclass(frozen=True, slots=True)
class Failure:
    """A source or a module that could not be analyzed, and why."""

    source: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """Return source and reason, as JSON output has them."""
        return {"source": self.source, "reason": self.reason}


def as_findings(findings: tuple[Finding | str, ...]) -> tuple[Finding, ...]:
    """Return findings; a sentence without a code becomes a ``"file-note"``."""
    return tuple(
        finding if isinstance(finding, Finding) else Finding("file-note", {"text": finding})
        for finding in findings
    )

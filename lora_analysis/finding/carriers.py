"""The types that carry a finding, or a failure, from where it is noticed to where it is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lora_analysis.finding.file_codes import FILE_CODES
from lora_analysis.finding.merge_codes import MERGE_CODES
from lora_analysis.finding.study_codes import STUDY_CODES
from lora_analysis.finding.summary_codes import SUMMARY_CODES
from lora_analysis.finding.templates import Code, Severity, Topic, fill
from lora_analysis.text import html_facts, join_names

CODES: Final[Mapping[str, Code]] = FILE_CODES | MERGE_CODES | STUDY_CODES | SUMMARY_CODES


@dataclass(frozen=True, slots=True)
class Finding:
    """Something worth knowing about an adapter, a weight or a study.

    Parameters
    ----------
    code
        A key of `CODES`, for example ``"label-misfit"``.
    fields
        What the sentence is about: names, counts and numbers, by field name.

    Raises
    ------
    KeyError
        The code is not in `CODES`, or its sentence has a field that is missing.
    """

    code: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", dict(self.fields))
        self.text  # noqa: B018 - a missing field is an error here, not where it is printed

    @property
    def severity(self) -> Severity:
        """How the finding bears on the numbers next to it."""
        return CODES[self.code].severity

    @property
    def topic(self) -> Topic:
        """What the finding is about."""
        return CODES[self.code].topic

    @property
    def subject(self) -> str:
        """What is compared, or the adapters that a finding about files applies to; often empty."""
        if "adapters" in self.fields:
            return join_names(self.fields["adapters"])
        return fill(CODES[self.code].subject, self.fields)

    @property
    def text(self) -> str:
        """The sentence."""
        return f"{self.subject}: {self.statement}" if self.subject else self.statement

    @property
    def statement(self) -> str:
        """The sentence without its subject."""
        code = CODES[self.code]
        text = fill(code.template, self.fields, code.items)
        if "adapters" in self.fields and self.severity == "damage":
            text += " Results that involve them are unreliable."
        return text

    def of_adapters(self, labels: Sequence[str]) -> Finding:
        """Return the finding about files as one about the adapters in them, which it names."""
        return Finding(self.code, {"adapters": list(labels), **self.fields})

    def map_fields(self, function: Callable[[str], str]) -> Finding:
        """Return the finding with a function applied to each field that is a string."""
        fields = {k: function(v) if isinstance(v, str) else v for k, v in self.fields.items()}
        return Finding(self.code, fields)

    def to_dict(self) -> dict[str, Any]:
        """Return code, severity, topic, text and fields, as JSON output has them."""
        return {
            "code": self.code,
            "severity": self.severity,
            "topic": self.topic,
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
    """A source that could not be analyzed or a run that could not be trained, and why.

    ``error`` and ``attempts`` are known if it failed in this program.
    """

    source: str
    reason: str
    error: Exception | None = field(default=None, compare=False)
    attempts: int = 1

    def __str__(self) -> str:
        return self.reason if self.source in self.reason else f"{self.source}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON output."""
        fields: dict[str, Any] = {"source": self.source, "reason": self.reason}
        if self.error is not None:
            fields |= {"kind": type(self.error).__name__, "attempts": self.attempts}
        return fields


def as_findings(findings: tuple[Finding | str, ...]) -> tuple[Finding, ...]:
    """Return findings; a sentence without a code becomes a ``"file-note"``."""
    return tuple(
        finding if isinstance(finding, Finding) else Finding("file-note", {"text": finding})
        for finding in findings
    )

"""Findings: what a reader, a check, a writer or a study noticed, as a code with fields.

Severity, topic and sentence of a finding follow from its code, through `CODES`. Decisions look at
codes and fields, never into a sentence. All sentences about files are in `file_codes`, those about
comparisons in `study_codes`.
"""

from lora_analysis.finding.carriers import CODES, Failure, Finding, as_findings
from lora_analysis.finding.file_codes import FILE_CODES
from lora_analysis.finding.templates import Code, Severity, Topic, quote_names

__all__ = [
    "CODES",
    "FILE_CODES",
    "Code",
    "Failure",
    "Finding",
    "Severity",
    "Topic",
    "as_findings",
    "quote_names",
]

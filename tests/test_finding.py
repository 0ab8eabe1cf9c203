"""Findings: a code with fields, from which severity, topic and sentence follow."""

from __future__ import annotations

import re
from string import Formatter
from typing import Any, get_args

import pytest

from lora_analysis.finding import CODES, FILE_CODES, Code, Finding, Severity, Topic, as_findings
from lora_analysis.finding.merge_codes import MERGE_CODES
from lora_analysis.finding.study_codes import STUDY_CODES
from lora_analysis.finding.summary_codes import SUMMARY_CODES
from lora_analysis.finding.templates import fill

NUMBER = 0.123456
# A value for every field by the format that its template asks for.
BY_SPEC: dict[str, Any] = {
    "and": ["a", "b"],
    "range": [0.1, 0.2],
    "quartiles": [0.1, 0.2, 0.3],
    "trend": [0.1, 0.3, 0.2],
    "plural": 2,
    "nonzero": 3,
}
# Fields that are lists, numbers or texts though their format does not tell.
BY_NAME: dict[str, Any] = {
    "count": 3,
    "modules": 4,
    "total": 5,
    "of": 5,
    "bytes": 4096,
    "share": 0.5,
    "ratio": 12.5,
    "value": 1e9,
}


def template_fields(template: str) -> dict[str, Any]:
    """Return a value for each field of a template."""
    fields = {}
    for _, name, spec, _ in Formatter().parse(template):
        if name:
            kind = (spec or "").partition(" ")[0]
            fields[name] = BY_SPEC.get(kind, NUMBER if spec else BY_NAME.get(name, f"<{name}>"))
    return fields


def sample_fields(code: Code) -> dict[str, Any]:
    """Return values for all fields of a code."""
    fields = template_fields(code.template) | template_fields(code.subject)
    return fields | {name: [template_fields(item)] * 2 for name, item in code.items.items()}


def optional_fields(template: str) -> set[str]:
    """Return the fields in ``[[ ]]``, without which a template has a sentence too."""
    parts = re.findall(r"\[\[(.*?)\]\]", template)
    return {name for part in parts for _, name, _, _ in Formatter().parse(part) if name}


@pytest.mark.parametrize("name", CODES)
def test_every_code_has_a_sentence_with_all_of_its_fields(name: str) -> None:
    code = CODES[name]
    assert code.severity in get_args(Severity)
    assert code.topic in get_args(Topic)
    finding = Finding(name, sample_fields(code))
    assert not re.search(r"\[\[|\]\]", finding.text)
    for field, value in finding.fields.items():
        assert f"{{{field}" not in finding.text
        if isinstance(value, str):
            assert value in finding.text, field
    assert finding.to_dict()["severity"] == code.severity
    assert finding.to_dict()["topic"] == code.topic


@pytest.mark.parametrize("name", CODES)
def test_optional_parts_of_a_sentence_can_be_missing(name: str) -> None:
    code = CODES[name]
    optional = optional_fields(code.template) | optional_fields(code.subject)
    required = {
        field
        for text in (code.template, code.subject)
        for _, field, _, _ in Formatter().parse(re.sub(r"\[\[.*?\]\]", "", text))
        if field
    }
    fields = sample_fields(code)
    missing = dict.fromkeys(optional - required)
    text = Finding(name, fields | missing).text
    assert not re.search(r"\bNone\b(?! of)", text)
    assert "  " not in text
    assert "()" not in text
    for field in required:
        with pytest.raises(KeyError):
            Finding(name, {key: value for key, value in fields.items() if key != field})


def test_codes_are_of_files_merges_studies_or_of_the_summary() -> None:
    tables = (FILE_CODES, MERGE_CODES, STUDY_CODES, SUMMARY_CODES)
    assert CODES.keys() == set().union(*tables)
    assert len(CODES) == sum(map(len, tables))
    with pytest.raises(KeyError):
        Finding("no-such-code")


@pytest.mark.parametrize(
    ("template", "value", "text"),
    [
        ("{x}", 0.123456, "0.123"),
        ("{x}", ["a", "b"], "'a', 'b'"),
        ("{x}", list("abcdef"), "'a', 'b', 'c', 'd' and 2 more"),
        ("{x:number}", 0.123456, "0.12"),
        ("{x:overlap}", -1e-5, "0.00"),
        ("{x:overlap}", -0.01, "-0.01"),
        ("{x:range}", [0.5, 0.5], "0.50"),
        ("{x:range}", [0.25, 0.5], "0.25 to 0.50"),
        ("{x:quartiles}", [0.25, 0.5, 0.75], "0.50 (quartiles 0.25 to 0.75)"),
        ("{x:p}", 0.031, "= 0.031"),
        ("{x:p}", 1e-9, "< 1e-4"),
        ("{x:and}", ["a"], "a"),
        ("{x:and}", list("abc"), "a, b and c"),
        ("{x:and}", list("abcdef"), "a, b, c, d and 2 more"),
        ("{x:and 12}", list("abcdef"), "a, b, c, d, e and f"),
        ("{x:plural pair}", 1, "1 pair"),
        ("{x:plural pair}", 2, "2 pairs"),
        ("a[[, {x}]]", None, "a"),
        ("a[[, {x:nonzero} b]]", 0, "a"),
        ("a[[, {x:nonzero} b]]", 2, "a, 2 b"),
        ("a[[, {x:number}]]", 0.0, "a, 0"),
        ("{x:.0%}", 0.5, "50%"),
    ],
)
def test_fields_are_formatted_by_their_spec(template: str, value: object, text: str) -> None:
    assert fill(template, {"x": value}) == text


def test_items_are_separated_by_what_does_not_occur_in_them() -> None:
    rows = [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    assert fill("{rows}", {"rows": rows}, {"rows": "{a}/{b}"}) == "1/2, 3/4"
    assert fill("{rows}", {"rows": rows}, {"rows": "{a}, {b}"}) == "1, 2; 3, 4"


def test_names_in_fields_are_never_templates() -> None:
    text = Finding("not-analyzed", {"sources": ["{x}", "[[y]]"], "reason": "{0}[[]]"}).text
    assert text == "{x} and [[y]] could not be analyzed: {0}[[]]"


def test_a_finding_about_files_names_the_adapters_that_have_it() -> None:
    note = Finding("zero-a", {"count": 1, "total": 2, "modules": ["q"]})
    both = note.of_adapters(["a", "b"])
    assert both.text == f"a and b: {note.text} Results that involve them are unreliable."
    assert both.fields["adapters"] == ["a", "b"]
    assert both.severity == "damage"
    kept = Finding("dora", {"count": 1, "total": 2}).of_adapters(["a"])
    assert kept.text.startswith("a: DoRA in 1 of 2 modules")
    assert "unreliable" not in kept.text


def test_findings_are_values() -> None:
    fields = {"count": 1, "total": 2}
    assert Finding("dora", fields) == Finding("dora", fields)
    assert len({Finding("dora", fields), Finding("dora", dict(fields))}) == 1
    assert as_findings(("a sentence.", Finding("alora")))[0].code == "file-note"
    upper = Finding("file-note", {"text": "a", "list": ["a"]}).map_fields(str.upper)
    assert upper.fields == {"text": "A", "list": ["a"]}

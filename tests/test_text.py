from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
from factories import adapter, low_rank_update
from test_studies import sweep  # noqa: F401  (a fixture)

from lora_analysis.adapter import Adapter, Provenance
from lora_analysis.amplify import amplification, weight_basis_energy
from lora_analysis.conclusions import findings
from lora_analysis.intruders import intruder_dimensions
from lora_analysis.similarity import subspace_similarity
from lora_analysis.spectra import spectrum, weight_svd
from lora_analysis.studies import study
from lora_analysis.text import html_table, number

HOSTILE = "<script>alert(1)</script>&"


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def results(rng: np.random.Generator) -> list[object]:
    made = low_rank_update(rng, name=HOSTILE, label=HOSTILE)
    one = Adapter({HOSTILE: made}, label=HOSTILE, provenance=Provenance(task=HOSTILE, rank=4))
    other = Adapter({HOSTILE: low_rank_update(rng, name=HOSTILE)}, label="other")
    W = rng.standard_normal(made.shape)
    found = study([one, other])
    return [
        one,
        spectrum(made),
        subspace_similarity(made, other[HOSTILE]),
        amplification(made, W),
        intruder_dimensions(made, W),
        weight_basis_energy(made, weight_svd(W, cache=False)),
        found,
        found.similarity_matrix,
        *findings(found),
    ]


def test_results_show_themselves_as_tables_with_every_text_escaped(
    rng: np.random.Generator,
) -> None:
    for one in results(rng):
        text = one._repr_html_()  # type: ignore[attr-defined]
        assert "script" not in Tags(text).seen, type(one)
        assert text.startswith("<table>")
        assert "nan" not in text.lower(), type(one)


def test_inference_over_runs_shows_its_smallest_p(sweep: list[Adapter]) -> None:  # noqa: F811
    text = study(sweep).run_inference(rank=4)._repr_html_()
    assert "smallest p" in text
    assert "<td>0.5</td>" in text


def test_an_untrained_update_shows_itself_too(rng: np.random.Generator) -> None:
    update = low_rank_update(rng)
    empty = type(update)(name="q", A=update.A, B=np.zeros_like(update.B), scale=1.0)
    assert "numerical rank" in spectrum(empty)._repr_html_()
    grid = subspace_similarity(empty, type(update)(name="q", A=update.A, B=update.B, scale=1.0))
    assert grid._repr_html_().startswith("<table>")


@pytest.mark.slow
def test_many_adapters_are_shown_in_part(rng: np.random.Generator) -> None:
    made = [adapter(rng, modules=1, rank=1, label=str(n)) for n in range(45)]
    found = study(made)
    assert "5 more adapters" in found._repr_html_()
    assert found.similarity_matrix is not None
    assert found.similarity_matrix._repr_html_().count("<tr>") == 1 + 24


def test_numbers_get_three_digits() -> None:
    text = html_table("t", ("a",), [[np.float64(0.123456)], [None], [float("inf")], [3]])
    assert [cell in text for cell in ("<td>0.123</td>", "<td>–</td>", "<td>3</td>")] == [True] * 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.613, "0.61"), (0.0394, "0.039"), (0.0013, "0.0013"), (1.5e-7, "1.5e-07"),
     (12.34, "12.3"), (3.14159, "3.14"), (float("nan"), "–"), (12345.0, "1.2e+04")],
)  # fmt: skip
def test_numbers_in_sentences_keep_two_significant_digits(value: float, text: str) -> None:
    assert number(value) == text

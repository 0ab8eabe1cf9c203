"""What the adapters of many authors use of their rank, on files whose answers are planted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from factories import orthonormal, planted_update

from lora_analysis import Adapter, write_adapter
from lora_analysis.adapter import Provenance
from lora_analysis.cli import run
from lora_analysis.errors import InputError, MalformedFileError
from lora_analysis.survey import Survey, read_author_list, survey_authors

NAMES = [f"layers.{layer}.{kind}_proj" for layer in range(3) for kind in "qv"]
D_OUT, D_IN = 96, 80


def write(
    folder: Path, values: list[float], seed: int, *, base: str = "org/model", top: int | None = None
) -> None:
    """Write an adapter with these singular values; ``top`` seeds a leading direction."""
    rng = np.random.default_rng(seed)
    updates = {}
    for index, name in enumerate(NAMES):
        U, V = orthonormal(rng, D_OUT, len(values)), orthonormal(rng, D_IN, len(values))
        if top is not None:
            shared = np.random.default_rng([top, index])
            U = np.linalg.qr(np.c_[shared.standard_normal(D_OUT), U[:, 1:]])[0]
            V = np.linalg.qr(np.c_[shared.standard_normal(D_IN), V[:, 1:]])[0]
        updates[name] = planted_update(U, np.array(values), V, name=name)
    config = {"base_model_name_or_path": base, "target_modules": ["q_proj", "v_proj"]}
    source = Provenance(rank=len(values))
    write_adapter(
        Adapter(updates, label=folder.name, provenance=source, config=config), folder, force=True
    )


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Two authors on one base, one on another; one author's two trainings share a direction."""
    write(tmp_path / "ann/small", [3, 1.5], 1, top=7)
    write(tmp_path / "ann/large", [4, 2, 1, 1], 2, top=7)
    write(tmp_path / "ben/flat", [1, 1, 1, 1], 3)
    write(tmp_path / "eve/other", [2, 2], 4, base="org/other")
    path = tmp_path / "authors.toml"
    path.write_text(
        '[ann]\nsources = ["ann/*"]\n[ben]\nsources = "ben/flat"\n[eve]\nsources = ["eve"]\n'
    )
    return path


def row(survey: Survey, author: str) -> dict[str, object]:
    (found,) = survey.authors[survey.authors["author"] == author].to_dict("records")
    return found


def test_ranks_are_the_planted_ones(listed: Path) -> None:
    ranks = survey_authors(listed).ranks.set_index(["author", "rank"])
    assert set(ranks.index) == {("ann", 2), ("ann", 4), ("ben", 4), ("eve", 2)}
    values = {("ann", 2): [3, 1.5], ("ann", 4): [4, 2, 1, 1], ("ben", 4): [1] * 4}
    for key, sigma in values.items():
        squares = np.square(sigma)
        assert ranks.loc[key, "stable_rank"] == pytest.approx(squares.sum() / squares[0], rel=1e-5)
    assert ranks["energy_rank_90"].to_dict() == {
        ("ann", 2): 2, ("ann", 4): 2, ("ben", 4): 4, ("eve", 2): 2,
    }  # fmt: skip


def test_pairs_are_of_one_base_and_say_whose_they_are(listed: Path) -> None:
    survey = survey_authors(listed)
    assert sorted(survey.pairs["author"]) == ["ann", "different authors", "different authors"]
    assert row(survey, "ann")["pairs"] == 1
    assert row(survey, "ann")["phi_1_1_output"] == pytest.approx(1, abs=1e-6)
    assert row(survey, "ann")["chance_r_r_output"] == pytest.approx(4 / D_OUT)
    strangers = row(survey, "different authors")
    assert strangers["pairs"] == 2
    assert strangers["phi_1_1_output"] < 0.2
    assert row(survey, "eve")["pairs"] == 0


def test_copies_and_untrained_files_are_not_trainings(listed: Path) -> None:
    folder = listed.parent
    write(folder / "ann/copy", [3, 1.5], 1, top=7)
    zero = folder / "ann/untrained"
    write(zero, [0.0, 0.0], 5)
    survey = survey_authors(listed)
    assert (row(survey, "ann")["adapters"], row(survey, "ann")["trainings"]) == (4, 2)
    assert row(survey, "ann")["pairs"] == 1
    assert "4 distinct trainings in 6 adapters of 3 authors" in survey.limits()


def test_a_shared_initialization_is_counted_and_left_out_on_the_input_side(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    A = {name: rng.standard_normal((8, D_IN)) for name in NAMES}
    for seed in (1, 2):
        own = np.random.default_rng(seed)
        updates = {
            name: planted_update(own.standard_normal((D_OUT, 8)), np.ones(8), A[name].T, name=name)
            for name in NAMES
        }
        source = Provenance(rank=8)
        write_adapter(Adapter(updates, label=f"s{seed}", provenance=source), tmp_path / f"s{seed}")
    (tmp_path / "list.toml").write_text('[ann]\nsources = ["s1", "s2"]\n')
    survey = survey_authors(tmp_path / "list.toml")
    ann = row(survey, "ann")
    assert (ann["pairs"], ann["shared_init"], ann["base"]) == (1, 1, "not stated")
    assert np.isnan(ann["phi_r_r_input"])
    assert 0 < ann["phi_r_r_output"] < 0.3
    assert "ann: the base is not stated" in survey.limits()


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("", "lists no author"),
        ("[ann]\n", "[ann] needs sources"),
        ("ann = 3\n", "[ann] needs sources"),
        ("[ann]\nsources = [3]\n", "[ann] needs sources"),
        ('[ann]\nsources = "a"\nscales = 1\n', "unknown key 'scales'"),
        ('[ann]\nsources = "a"\nscale = "one"\n', "scale is 'one'"),
        ('[ann]\nsources = "a"\npair = "w_a"\n', "two names separated by a comma"),
        ('[ann]\nsources = "a"\nallow_pickle = 1\n', "allow_pickle is 1"),
        ("[ann\n", "is not TOML"),
    ],
)
def test_a_malformed_list_is_refused_by_author_and_key(
    text: str, needs: str, tmp_path: Path
) -> None:
    path = tmp_path / "authors.toml"
    path.write_text(text)
    with pytest.raises(MalformedFileError) as refused:
        read_author_list(path)
    assert needs in str(refused.value)
    assert "authors.toml" in str(refused.value)


def test_what_cannot_be_read_is_named_and_the_rest_is_analyzed(
    listed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed.write_text(listed.read_text() + '[kim]\nsources = ["nowhere", "ben/flat"]\n')
    survey = survey_authors(listed)
    assert [failure.source.endswith("nowhere") for failure in survey.failures] == [True]
    assert row(survey, "kim")["adapters"] == 1
    assert run(["survey", str(listed), "--format", "json"]) == 4
    assert len(json.loads(capsys.readouterr().out)["failures"]) == 1
    listed.write_text('[kim]\nsources = "nowhere"\n')
    with pytest.raises(InputError, match="nowhere"):
        survey_authors(listed)


def test_the_command_prints_both_tables_and_the_limits(
    listed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["survey", str(listed)]) == 0
    printed = capsys.readouterr().out
    assert "How much of their rank they use" in printed
    assert "How alike two trainings are" in printed
    assert "not a sample of all" in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 80
    assert run(["survey", str(listed), "--format", "quiet"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ann 2 1", "ben 1 0", "different authors 0 2", "eve 1 0",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.real
def test_real_authors_by_the_list_of_the_notebook(real_adapters: Path, tmp_path: Path) -> None:
    notebooks = Path(__file__).parents[1] / "notebooks"
    (tmp_path / "authors.toml").write_text((notebooks / "authors.toml").read_text())
    (tmp_path / "adapters").symlink_to(real_adapters)
    survey = survey_authors(tmp_path / "authors.toml")
    assert not survey.failures
    trainings = survey.authors.set_index("author")["trainings"].to_dict()
    assert trainings == {
        "MathieuNlp": 4, "SARAELSAFTY": 1, "vqdung71104": 1, "catundchat": 2, "wyek1n": 1,
    }  # fmt: skip
    # What the page on these authors says.
    assert row(survey, "MathieuNlp")["phi_1_1_output"] == pytest.approx(0.669, abs=1e-3)
    assert survey.ranks["stable_rank"].max() < 2

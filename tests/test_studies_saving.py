"""A study survives pickling and saving: the same tables, and grids while the adapters exist."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from factories import adapter, low_rank_update
from safetensors.numpy import load_file, save_file

from lora_analysis.adapter import Adapter
from lora_analysis.conclusions import findings
from lora_analysis.errors import (
    LoraAnalysisError,
    MalformedFileError,
    OccupiedError,
    SourceError,
    UnfinishedError,
)
from lora_analysis.formats import read_adapter, write_adapter
from lora_analysis.spectra import SIDES
from lora_analysis.storage.records import record_path
from lora_analysis.studies import Study, study

TABLES = ("runs", "spectra", "pairs", "similarities", "amplifications", "changes")
LABELS = ("turn-r2-s0", "turn-r3-s1", "flip-r2-s2")


@pytest.fixture
def stored(rng: np.random.Generator, tmp_path: Path) -> Path:
    """Three adapters and their base in files."""
    for label in LABELS:
        one = adapter(rng, rank=int(label[6]))
        write_adapter(one, tmp_path / "adapters" / label)
    weights = {f"{name}.weight": rng.standard_normal((24, 20)).astype("float32") for name in one}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    return tmp_path


@pytest.fixture
def made(stored: Path) -> Study:
    """A study of them with all tables."""
    return study(
        [str(stored / "adapters" / label) for label in LABELS[:2]],
        reference=[str(stored / "adapters" / LABELS[2])],
        base=str(stored / "base"),
        label="{task}-r{rank}-s{seed}",
        weight_spectra=True,
    )


def assert_same(result: Study, expected: Study) -> None:
    """Compare everything that does not need the adapters, bit for bit."""
    for name in TABLES:
        table = getattr(expected, name)
        pd.testing.assert_frame_equal(getattr(result, name), table, check_exact=True)
    one, two = result.similarity_matrix, expected.similarity_matrix
    assert one is not None
    assert two is not None
    assert (one.labels, one.kinds) == (two.labels, two.kinds)
    for matrices in ((one.cosine, two.cosine), (one.shared, two.shared), (one.norms, two.norms),
                     *((one.overlap[side], two.overlap[side]) for side in SIDES)):  # fmt: skip
        assert matrices[0].tobytes() == matrices[1].tobytes()
    for a, b in zip(result.amplified(), expected.amplified(), strict=True):
        assert (a.label, a.module, a.weight_statistics) == (b.label, b.module, b.weight_statistics)
        assert a.core.tobytes() == b.core.tobytes()
        assert a.random.norms.tobytes() == b.random.norms.tobytes()
        assert (a.crossed is None) == (b.crossed is None)
        if a.crossed is not None and b.crossed is not None:
            assert a.crossed.partners == b.crossed.partners
            assert a.crossed.output.tobytes() == b.crossed.output.tobytes()
            assert a.crossed.input.tobytes() == b.crossed.input.tobytes()
        assert a.enrichment_through_weight is not None
        assert b.enrichment_through_weight is not None
        assert a.enrichment_through_weight.tobytes() == b.enrichment_through_weight.tobytes()
    for name in ("failures", "reference", "unmatched", "warnings", "fully_compared", "across_bases",
                 "options"):  # fmt: skip
        assert getattr(result, name) == getattr(expected, name)
    assert list(result.adapters) == list(expected.adapters)
    assert result.base_findings() == expected.base_findings()
    assert [one.text for one in findings(result)] == [one.text for one in findings(expected)]


def assert_same_grids(result: Study, expected: Study) -> None:
    module = next(iter(expected.adapters[LABELS[0]]))
    for side in SIDES:
        grids = [one.grid(*LABELS[:2], module, side=side) for one in (result, expected)]
        assert grids[0].values.tobytes() == grids[1].values.tobytes()
    assert result.spectrum(LABELS[2], module).S.tobytes() == (
        expected.spectrum(LABELS[2], module).S.tobytes()
    )
    assert result.base is not None
    assert expected.base is not None
    weights = [one.base.weight(module, shape=(24, 20)) for one in (result, expected)]
    np.testing.assert_array_equal(weights[0].array(), weights[1].array())


def test_a_study_pickles_with_its_base(made: Study) -> None:
    result = pickle.loads(pickle.dumps(made))
    assert_same(result, made)
    assert_same_grids(result, made)


def test_results_computed_from_a_study_pickle(made: Study) -> None:
    module = next(iter(made.adapters[LABELS[0]]))
    for value in (
        made.grid(*LABELS[:2], module),
        made.spectrum(LABELS[0], module),
        made.amplification(LABELS[0], module),
        made.similarity_matrix,
        findings(made),
    ):
        assert type(pickle.loads(pickle.dumps(value))) is type(value)


@pytest.mark.slow
def test_a_saved_study_is_restored_to_the_bit(made: Study, tmp_path: Path) -> None:
    folder = made.save(tmp_path / "saved")
    result = Study.load(folder)
    assert_same(result, made)
    assert_same_grids(result, made)
    again = Study.load(result.save(tmp_path / "again"))
    assert_same(again, made)
    assert_same_grids(again, made)
    assert_same(pickle.loads(pickle.dumps(result)), made)


def test_a_study_of_adapters_in_memory_keeps_its_tables(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    made = study([adapter(rng, label="a"), adapter(rng, label="b", rank=3)])
    result = Study.load(made.save(tmp_path / "saved"))
    assert_same(result, made)
    with pytest.raises(SourceError, match="'a' was in memory when the study was saved"):
        result.spectrum("a", next(iter(result.adapters["a"])))


def test_without_its_adapters_a_saved_study_has_its_tables_and_says_what_is_missing(
    made: Study, stored: Path
) -> None:
    folder = made.save(stored / "saved")
    names = {label: next(iter(one)) for label, one in made.adapters.items()}
    shutil.rmtree(stored / "adapters" / LABELS[1])
    shutil.rmtree(stored / "base")
    result = Study.load(folder)
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(result, name), getattr(made, name))
    assert [one.text for one in findings(result)]
    assert len(result.spectrum(LABELS[0], names[LABELS[0]]).S) == 2
    with pytest.raises(SourceError, match=rf"'{LABELS[1]}' of the saved study cannot be read"):
        result.grid(*LABELS[:2], names[LABELS[1]])
    assert result.base is not None
    assert result.base.label == "base"
    with pytest.raises(SourceError, match="The base base of the saved study cannot be opened"):
        result.base.weight(names[LABELS[0]])


def test_adapters_that_changed_are_not_taken_for_those_that_were_analyzed(
    made: Study, stored: Path
) -> None:
    folder = made.save(stored / "saved")
    file = stored / "adapters" / LABELS[0] / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    result = Study.load(folder)
    with pytest.raises(SourceError, match=r"is not the adapter that .* 'norm' of"):
        result.spectrum(LABELS[0], next(iter(result.adapters[LABELS[0]])))


def test_options_of_reading_are_saved_with_the_study(stored: Path, tmp_path: Path) -> None:
    sources = [stored / "adapters" / label for label in LABELS[:2]]
    made = study([read_adapter(sources[0], scale=3.0), read_adapter(sources[1], alpha=5.0)])
    result = Study.load(made.save(tmp_path / "saved"))
    module = next(iter(made.adapters[LABELS[0]]))
    assert result.spectrum(LABELS[0], module).norm == made.spectrum(LABELS[0], module).norm
    assert result.adapters[LABELS[0]][module].scale == 3.0


def test_modules_that_were_matched_are_read_under_their_names_in_the_file(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    plain = adapter(rng, label="plain")
    wrapped = {
        f"model.backbone.{name}": low_rank_update(rng, name=f"model.backbone.{name}")
        for name in plain
    }
    for one in (plain, Adapter(wrapped, label="wrapped")):
        write_adapter(one, tmp_path / one.label)
    made = study([tmp_path / "plain", tmp_path / "wrapped"], prefix="model.backbone")
    module = next(iter(made.adapters["wrapped"]))
    assert not module.startswith("model.")
    result = Study.load(made.save(tmp_path / "saved"))
    grids = [one.grid("plain", "wrapped", module) for one in (made, result)]
    assert grids[0].values.tobytes() == grids[1].values.tobytes()


def test_a_study_is_not_written_over_what_others_wrote(made: Study, stored: Path) -> None:
    folder = stored / "saved"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OccupiedError, match=r"holds 'notes\.txt'"):
        made.save(folder)
    made.save(folder, force=True)
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert_same(Study.load(made.save(folder)), made)
    with pytest.raises(OccupiedError, match="is inside the input"):
        made.save(stored / "adapters" / LABELS[0] / "saved")


def test_what_is_not_a_whole_study_is_refused(made: Study, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no saved study: there is no study\.json"):
        Study.load(tmp_path)
    folder = made.save(tmp_path / "saved")
    record = record_path(folder, "study")
    text = record.read_text(encoding="utf-8")
    record.write_text(text.replace('"finished"', '"writing"'), encoding="utf-8")
    with pytest.raises(UnfinishedError, match="saving the study was interrupted"):
        Study.load(folder)


def edited(change: Callable[[dict[str, object]], object]) -> Callable[[bytes], bytes]:
    """A change of the document's content."""

    def edit(content: bytes) -> bytes:
        document = json.loads(content)
        change(document["content"])
        return json.dumps(document).encode()

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda content: content[:-20], id="cut short"),
        pytest.param(lambda content: content.replace(b'"version":1', b'"version":9'), id="version"),
        pytest.param(lambda content: content.replace(b'"float64"', b'"float63"'), id="type"),
        pytest.param(lambda content: content.replace(b'"start":0', b'"start":-7'), id="offset"),
        pytest.param(edited(lambda c: c.update(runs={"#": "system", "fields": {}})), id="class"),
        pytest.param(edited(lambda c: c.update(runs="abc")), id="no table"),
        pytest.param(edited(lambda c: c.update(options=None)), id="no options"),
        pytest.param(edited(lambda c: c.pop("spectra")), id="no spectra"),
        pytest.param(edited(lambda c: c.update(more=1)), id="more"),
        pytest.param(
            edited(
                lambda c: c.update(runs={"#": "table", "rows": 10**13, "columns": [["adapter", 1]]})
            ),
            id="repeated scalar",
        ),
    ],
)
def test_a_damaged_document_is_refused(
    made: Study, tmp_path: Path, edit: Callable[[bytes], bytes]
) -> None:
    path = made.save(tmp_path / "saved") / "study.json"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(MalformedFileError, match=r"study\.json"):
        Study.load(path.parent)


def test_damaged_numbers_are_refused(made: Study, tmp_path: Path) -> None:
    path = made.save(tmp_path / "saved") / "study.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(LoraAnalysisError, match=r"study\.safetensors"):
        Study.load(path.parent)


def test_text_of_every_kind_is_restored(made: Study, tmp_path: Path) -> None:
    runs = made.runs.copy()
    runs["mixed"] = pd.Series([None, 1, "ä\x00\"'"], dtype=object)
    runs["nan"] = pd.Series(["x", np.nan, None], dtype=object)
    runs["numbers"] = [np.nan, np.inf, -0.0]
    result = Study.load(replace(made, runs=runs).save(tmp_path / "saved")).runs
    pd.testing.assert_frame_equal(result, runs, check_exact=True)
    assert [type(value) for value in result["mixed"]] == [type(None), int, str]
    assert np.signbit(result["numbers"][2])

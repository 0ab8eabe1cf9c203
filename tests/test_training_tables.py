"""Files of users: every format, its columns, and the rows that are left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_analysis.errors import InputError, MalformedFileError, MissingExtraError
from lora_analysis.training import DataOptions, RunConfig, data_files
from lora_analysis.training.data_files import read_datasets, read_rows
from lora_analysis.training.demo_data import docstring_rows
from lora_analysis.training.examples import Example, Examples, read_examples

FILES = {
    "rows.jsonl": ('{"text": "a", "label": 1}\n\n{"text": "b", "label": 2}\n', 2),
    "rows.csv": ('text,label\n"a, b",x\n"two\nlines",y\n', 2),
    "rows.tsv": ("text\tlabel\na\tx\nb\ty\n", 2),
    "rows.txt": ("first line\nsecond\n\n\nthird\n", 2),
}


@pytest.mark.parametrize("name", FILES)
def test_the_end_of_a_name_says_how_a_file_is_read(name: str, tmp_path: Path) -> None:
    text, count = FILES[name]
    (tmp_path / name).write_text(text)
    found = read_rows(tmp_path / name)
    assert len(found.rows) == count
    assert found.notes() == []


def test_rows_keep_their_lines_and_values(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(FILES["rows.csv"][0])
    assert read_rows(tmp_path / "rows.csv").rows == [
        (2, {"text": "a, b", "label": "x"}),
        (4, {"text": "two\nlines", "label": "y"}),
    ]
    (tmp_path / "rows.txt").write_text(FILES["rows.txt"][0])
    assert read_rows(tmp_path / "rows.txt").rows == [
        (1, {"text": "first line\nsecond"}),
        (5, {"text": "third"}),
    ]
    assert len(read_rows(tmp_path / "rows.txt", limit=1).rows) == 1


def test_e2e_is_a_prompt_and_a_completion(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("name : X , area : riverside || X is nice .\nno bars\n")
    found = read_rows(tmp_path / "train.txt", format="e2e")
    assert found.rows == [
        (1, {"prompt": "name : X , area : riverside ||", "completion": " X is nice ."})
    ]
    assert "line 2: not of the form 'slots || reference'" in found.notes()[0]


def test_e2e_is_told_by_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("name : X | type : pub||X is a pub .\nname : Y||Y .\n")
    assert set(read_rows(path).rows[0][1]) == {"prompt", "completion"}
    for text in ("a || b\n", "name : X | pub || X\n", "name : X ||\n", "name : X\n", "\n\nplain"):
        path.write_text(f"name : X || X\n{text}")
        assert set(read_rows(path).rows[0][1]) == {"text"}


GLUE = {
    "cola": ("gj04\t1\t\tOur friends won't buy this.\nbc01\t0\t*\tThey drank the pub.\n", 2),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe \"said\tIt's so\n", 1),
    "mnli": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\tneutral\n"
        "1\tc\td\tneutral\t-\n",
        1,
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n5\t1\t2\thow\twhy\t0\n", 1),
}


@pytest.mark.parametrize("task", GLUE)
def test_glue_is_read_by_its_columns_and_without_quoting(task: str, tmp_path: Path) -> None:
    text, count = GLUE[task]
    (tmp_path / f"{task}.tsv").write_text(text)
    found = read_rows(tmp_path / f"{task}.tsv")
    assert len(found.rows) == count
    roles = {"text", "label"} | ({"text_pair"} if task != "cola" else set())
    assert set(found.rows[0][1]) == roles
    if task == "mrpc":
        assert found.rows[0][1]["text"] == 'He "said'
    if task == "mnli":
        assert "line 3: no label that annotators agree on" in found.notes()[0]


def test_glues_qnli_has_its_question_first(tmp_path: Path) -> None:
    (tmp_path / "qnli.tsv").write_text("index\tquestion\tsentence\tlabel\n0\tq?\ts.\tentailment\n")
    (_, row), *_ = read_rows(tmp_path / "qnli.tsv", format="glue").rows
    assert row == {"text": "q?", "text_pair": "s.", "label": "entailment"}


def test_parquet_is_read_batch_by_batch(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "x.parquet"
    )
    found = read_rows(tmp_path / "x.parquet")
    assert found.rows == [(1, {"text": "a", "label": 0}), (2, {"text": "b", "label": 1})]
    (tmp_path / "x.parquet").write_text("no table")
    with pytest.raises(MalformedFileError, match=r"x\.parquet: not a Parquet file"):
        read_rows(tmp_path / "x.parquet")


def test_what_needs_another_package_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lora-analysis\[parquet\]'"):
        read_rows(tmp_path / "x.parquet")
    with pytest.raises(MissingExtraError, match=r"lora-analysis\[train\]"):
        read_datasets("glue:sst2", "train")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.xyz", b"a", "rows.xyz: how to read it is not clear.*--data-format.*jsonl"),
        ("rows.csv", b"", "rows.csv: no row of csv"),
        ("rows.csv", b"a,a\n1,2\n", "two columns of the header have the same name"),
        ("rows.csv", b"a,b\n\xff\xfe,2\n", "not UTF-8"),
        ("rows.jsonl", b"[1]\n{\n", r"no row of jsonl.*line 1: a list, not an object"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_rows(tmp_path / name)


def examples(
    tmp_path: Path, content: str, *, name: str = "rows.csv", **options: object
) -> Examples:
    (tmp_path / name).write_text(content)
    data = DataOptions(source=str(tmp_path / name), test_share=0.25, **options)  # type: ignore[arg-type]
    return read_examples(RunConfig("rows", 2, 0, data=data))


TABLE = "review,stars,mood\n" + "".join(
    f"text {n},{n / 2},{'good' if n % 2 else 'bad'}\n" for n in range(20)
)


def test_classes_are_numbered_in_natural_order_and_rows_held_back_by_content(
    tmp_path: Path,
) -> None:
    found = examples(tmp_path, TABLE, label="mood")
    assert (found.objective, found.labels) == ("classification", ("bad", "good"))
    assert (len(found.train), len(found.test)) == (15, 5)
    turned = "\n".join([TABLE.splitlines()[0], *reversed(TABLE.splitlines()[1:])])
    again = examples(tmp_path, turned, label="mood")
    assert set(again.test) == set(found.test)  # whatever the order
    assert found.facts()["columns"] == {"text": "review", "label": "mood"}


def test_a_label_written_with_points_is_a_number(tmp_path: Path) -> None:
    found = examples(tmp_path, TABLE, label="stars")
    assert found.objective == "regression"
    assert Example(text="text 3", label=1.5) in (*found.train, *found.test)


def test_a_prompt_and_its_completion_are_a_language_models(tmp_path: Path) -> None:
    lines = "".join(f'{{"instruction": "do {n}", "output": "done {n}"}}\n' for n in range(8))
    found = examples(tmp_path, lines, name="rows.jsonl")
    assert found.objective == "causal-lm"
    assert Example(text="do 1", completion="done 1") in (*found.train, *found.test)


def test_bad_rows_are_counted_and_shown_with_their_lines(tmp_path: Path) -> None:
    text = TABLE + "text,1.5\n,1.0,bad\nx,many,good\n"
    found = examples(tmp_path, text, label="stars", text="review")
    assert found.notes == [
        "rows.csv: 3 of 23 rows are left out (line 22: 2 fields where the header has 3; "
        "line 23: 'review' is empty; line 24: 'stars' is not a number: 'many')."
    ]
    assert len(found.train) + len(found.test) == 20
    assert found.facts()["left_out"] == found.notes


def test_a_class_that_only_the_test_has_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("review,stars,mood\na,1,bad\nb,1,strange\n")
    found = examples(tmp_path, TABLE, label="mood", test=str(tmp_path / "test.csv"))
    assert (len(found.train), len(found.test)) == (20, 1)
    assert "line 3: 'mood' is not a class of the training rows: 'strange'" in found.notes[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label": "mod"}, "no column 'mod' for label. Its columns: mood"),
        ({"label": "review"}, None),
        ({"test": "nowhere.csv"}, "no data file nowhere.csv"),
    ],
)
def test_columns_that_do_not_serve_are_refused(
    options: dict[str, str], words: str | None, tmp_path: Path
) -> None:
    many = TABLE + "".join(f"text {n},1,bad\n" for n in range(20, 50))
    with pytest.raises(InputError, match=words or "which column is the text|different values"):
        examples(tmp_path, many, **options)


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds one class, good"):
        examples(tmp_path, "text,label\na,good\nb,good\n")


@pytest.mark.slow
def test_the_docstrings_give_their_subpackage_away_nowhere() -> None:
    pytest.importorskip("sklearn")
    rows = docstring_rows("sklearn")
    assert len(rows.rows) > 500
    assert len({row["label"] for _, row in rows.rows}) == 11
    assert not [row for _, row in rows.rows if row["label"] in row["text"].lower()]
    assert not [row for _, row in rows.rows if "sklearn" in row["text"].lower()]
    with pytest.raises(InputError, match=r"no docstrings task 'sklern'. Tasks: sklearn"):
        docstring_rows("sklern")


def test_long_cells_are_cut_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "MAX_CELL_CHARACTERS", 10)
    path = tmp_path / "x.csv"
    path.write_text(f'text,label\n{"a" * 50},yes\n"{"b," * 20}",{"n" * 11}\nshort,no\n')
    rows = read_rows(path)
    assert [row["text"] for _, row in rows.rows] == ["a" * 10, "b," * 5, "short"]
    assert rows.notes() == ["x.csv: 3 cells are cut to 10 characters."]


def test_a_line_without_end_is_a_bad_row_and_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "MAX_LINE_CHARACTERS", 40)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "b" * 90 + '"}\n{"text": "c"}\n')
    rows = read_rows(path)
    assert [(line, row["text"]) for line, row in rows.rows] == [(1, "a"), (3, "c")]
    assert [line for line, _ in rows.bad] == [2]


@pytest.mark.parametrize(
    "text",
    ["a,1\n" + "b" * 90 + ",1\na,1\n", 'a,1\n"' + "\n".join(["b" * 20] * 4) + '",1\na,1\n'],
)
def test_a_table_with_a_line_or_field_without_end_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "MAX_LINE_CHARACTERS", 40)
    path = tmp_path / "x.csv"
    path.write_text("text,label\n" + text)
    with pytest.raises(MalformedFileError, match=r"x\.csv: line \d.*(longer|larger) than"):
        read_rows(path)


def test_a_line_of_text_without_end_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "MAX_LINE_CHARACTERS", 40)
    path = tmp_path / "x.txt"
    path.write_text("one\n\n" + "b" * 400 + "\n\ntwo\n")
    rows = read_rows(path)
    assert [(line, row["text"]) for line, row in rows.rows] == [(1, "one"), (5, "two")]
    assert [line for line, _ in rows.bad] == [3]


def test_nested_rows_and_rows_of_many_fields_are_bad_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "MAX_DATA_FIELDS", 3)
    path = tmp_path / "x.jsonl"
    deep = '{"text": ' + "[" * 5000 + "]" * 5000 + "}"
    path.write_text(f'{{"text": "a"}}\n{deep}\n{{"a": 1, "b": 2, "c": 3, "d": 4}}\n')
    rows = read_rows(path)
    assert [reason for _, reason in rows.bad] == [
        "not JSON (it nests too deeply (limit 64 levels))",
        "4 fields, too many",
    ]
    path = tmp_path / "x.csv"
    path.write_text("a,b,c,d\n1,2,3,4\n")
    with pytest.raises(MalformedFileError, match=r"4 columns \(limit 3\)"):
        read_rows(path)


@pytest.mark.parametrize("limit", ["MAX_DATA_ROWS", "MAX_DATA_CHARACTERS"])
def test_more_than_a_total_is_refused(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\n" + "abc,no\n" * 9)
    read_rows(path)
    monkeypatch.setattr(data_files, limit, 8)
    with pytest.raises(InputError, match=r"x\.csv: more than .* Pass a limit .*--limit"):
        read_rows(path)
    assert len(read_rows(path, limit=1).rows) == 1

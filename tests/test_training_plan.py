"""A sweep's file: its axes, the names of its runs, and what it is refused for."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from lora_analysis.errors import InputError, MalformedFileError, SourceError
from lora_analysis.training import ExecutionOptions, RunConfig, SweepPlan, read_plan


@pytest.fixture
def plan(tmp_path: Path):
    """Return a function that reads a sweep from its text."""

    def read(text: str) -> SweepPlan:
        path = tmp_path / "sweep.toml"
        path.write_text(text, encoding="utf-8")
        return read_plan(path)

    return read


def test_every_combination_of_the_listed_values_is_a_run(plan) -> None:
    found = plan(
        """
        task = ["rotate", "mirror"]
        rank = [1, 2, 8]
        seed = [0, 1]
        alpha = 4
        [loop]
        steps = 7
        """
    )
    wanted = {
        f"{task}-r{rank}-s{seed}": (task, rank, seed, 4.0, 7)
        for task, rank, seed in product(("rotate", "mirror"), (1, 2, 8), (0, 1))
    }
    assert {
        name: (one.task, one.rank, one.seed, one.alpha, one.loop.steps)
        for name, one in found.runs.items()
    } == wanted
    assert list(found.runs) == list(wanted)  # in the order of the file
    assert all(one.seeds.data == one.seed for one in found.runs.values())


def test_init_and_data_vary_apart(plan) -> None:
    found = plan('task = "rotate"\nseed.init = [0, 1]\nseed.data = [0, 5]').runs
    assert {name: (one.seeds.init, one.seeds.data) for name, one in found.items()} == {
        "rotate-r8-s0": (0, 0),
        "rotate-r8-s0-d5": (0, 5),
        "rotate-r8-s1-d0": (1, 0),
        "rotate-r8-s1-d5": (1, 5),
    }


def test_any_option_is_an_axis_and_then_in_the_name(plan) -> None:
    found = plan(
        """
        task = "rotate"
        use_rslora = [false, true]
        dropout = 0.5
        [loop]
        lr = [0.001, 0.003]
        schedule = ["linear", "constant"]
        """
    ).runs
    assert len(found) == 8
    one = found["rotate-r8-s0-use_rslora-true-lr0.003-schedule-linear"]
    assert (one.use_rslora, one.loop.lr, one.loop.schedule, one.dropout) == (
        True,
        0.003,
        "linear",
        0.5,
    )


def test_an_option_that_is_a_list_is_an_axis_as_a_list_of_lists(plan) -> None:
    (only,) = plan('task = "rotate"\ntargets = ["q_proj", "v_proj"]').runs.values()
    assert only.targets == ("q_proj", "v_proj")
    found = plan('task = "rotate"\ntargets = [["q_proj"], ["q_proj", "v_proj"], "all-linear"]')
    assert {name: one.targets for name, one in found.runs.items()} == {
        "rotate-r8-s0-targets-q_proj": ("q_proj",),
        "rotate-r8-s0-targets-q_proj+v_proj": ("q_proj", "v_proj"),
        "rotate-r8-s0-targets-all-linear": "all-linear",
    }


def test_a_table_of_patterns_is_a_value_and_a_list_of_them_an_axis(plan) -> None:
    (only,) = plan('task = "rotate"\nrank_pattern = { q_proj = 2 }').runs.values()
    assert only.rank_pattern == (("q_proj", 2),)
    found = plan('task = "rotate"\nrank_pattern = [{ q_proj = 2 }, { v_proj = 4 }]').runs
    assert list(found) == [
        "rotate-r8-s0-rank_pattern-q_proj=2",
        "rotate-r8-s0-rank_pattern-v_proj=4",
    ]


def test_grids_are_sweeps_over_what_stands_at_the_top(plan) -> None:
    found = plan(
        """
        task = "rotate"
        seed = [0, 1]
        loop.steps = 9
        [[grid]]
        rank = 8
        task = ["rotate", "mirror"]
        [[grid]]
        rank = 64
        alpha = 16
        seed = 3
        loop.lr = 0.1
        """
    ).runs
    assert list(found) == [
        "rotate-r8-s0",
        "rotate-r8-s1",
        "mirror-r8-s0",
        "mirror-r8-s1",
        "rotate-r64-s3-lr0.1-alpha16",
    ]
    assert {one.loop.steps for one in found.values()} == {9}


def test_a_preset_lies_under_what_the_file_says(plan) -> None:
    (only,) = plan(
        'preset = "gpt2-e2e"\ndata = "e2e.txt"\nbase = "gpt2"\nloop.epochs = 2'
    ).runs.values()
    assert (only.rank, only.alpha, only.targets) == (4, 32.0, ("c_attn",))
    assert (only.loop.epochs, only.loop.lr, only.loop.label_smoothing) == (2, 2e-4, 0.1)
    found = plan(
        """
        data = "sst2.tsv"
        base = "roberta-base"
        rank = [4, 8]
        [[grid]]
        preset = "roberta-base-sst2"
        [[grid]]
        preset = "roberta-base-rte"
        seed = 1
        """
    ).runs
    assert [(one.rank, one.data.max_length, one.loop.epochs) for one in found.values()] == [
        (4, 512, 60.0),
        (8, 512, 60.0),
        (4, 512, 80.0),
        (8, 512, 80.0),
    ]
    assert len(found) == 4


def test_a_whole_number_is_the_same_run_as_its_decimal(plan) -> None:
    (one,) = plan('task = "rotate"\nalpha = 8').runs.values()
    (two,) = plan('task = "rotate"\nalpha = 8.0').runs.values()
    assert one.key({}) == two.key({})


def test_a_run_that_two_grids_describe_is_one(plan) -> None:
    found = plan('task = "rotate"\n[[grid]]\nrank = [4, 8]\n[[grid]]\nrank = [8, 16]').runs
    assert list(found) == ["rotate-r4-s0", "rotate-r8-s0", "rotate-r16-s0"]


def test_data_files_name_their_tasks_and_are_found_beside_the_file(plan, tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").touch()
    found = plan('base = "owner/model"\ndata = ["reviews.csv", "elsewhere.csv"]').runs
    assert {name: (one.base.source, one.data.source) for name, one in found.items()} == {
        "reviews-r8-s0": ("owner/model", str(tmp_path / "reviews.csv")),
        "elsewhere-r8-s0": ("owner/model", "elsewhere.csv"),
    }


def test_bases_are_an_axis_named_by_their_last_part(plan) -> None:
    assert list(plan('task = "t"\nbase = ["owner/small", "models/large"]').runs) == [
        "t-r8-s0-base-small",
        "t-r8-s0-base-large",
    ]


def test_names_are_safe_and_differ_even_where_what_they_say_does_not(plan) -> None:
    found = plan('task = ["../../etc", "a b", "a/b"]\nbase = ["one/model", "two/model"]').runs
    assert len(found) == 6
    for name in found:
        assert Path(name).name == name
        assert not name.startswith(".")
    assert len({name.casefold() for name in found}) == 6


def test_where_to_train_is_said_apart(plan, tmp_path: Path) -> None:
    found = plan(
        'task = "rotate"\noutput = "out"\n[execution]\nexecutor = "ray"\nworkers = 3\ngpus = 0.5'
    )
    assert found.execution == ExecutionOptions(executor="ray", workers=3, gpus=0.5)
    assert found.output == tmp_path / "out"
    assert list(found.runs.values()) == [RunConfig(task="rotate", rank=8, seed=0)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('tusk = "rotate"', r"no option 'tusk'. Near names: task"),
        ("exekution = {}", r"no option 'exekution'. Near names: execution"),
        ("[loop]\nstep = 3", r"no option 'step' in loop. Near names: steps"),
        ("[seed]\ndate = 3", r"no option 'date' in seed. Near names: data"),
        ("[execution]\nworker = 3", r"no option 'worker' in execution. Near names: workers"),
        ("[[grid]]\nrang = 3", r"no option 'rang'. Near names: rank"),
        ('preset = "gpt2-e2f"', r"no preset 'gpt2-e2f'. Near names: gpt2-e2e"),
        ('preset = ["gpt2-e2e"]', r"preset must be one name"),
        ("rank = []", r"rank is an empty list"),
        ("rank = [4, 0]", r"rank must be at least 1, found 0"),
        ('rank = [4, "8"]', r"rank must be an integer, found '8'"),
        ("loop.lr = [0.1, -1.0]", r"lr must be a positive number, found -1.0"),
        ('[execution]\nexecutor = "slurm"', r"executor must be one of auto, serial, process, ray"),
        ("[execution]\nworkers = 0", r"workers must be at least 1, found 0"),
        ("grid = 3", r"grid must be one or more tables"),
        ("output = 3", r"output must be a folder's name, found 3"),
        ("seed = " + str(list(range(400))) + "\nrank = " + str(list(range(1, 400))), "100,000"),
    ],
)
def test_what_a_file_is_refused_for_is_said_with_its_name(plan, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        plan(text)
    assert "sweep.toml: " in str(caught.value)


def test_what_is_not_toml_is_refused(plan, tmp_path: Path) -> None:
    with pytest.raises(MalformedFileError, match=r"sweep.toml is not TOML: .*line 2"):
        plan("rank = 3\nrank 4")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(MalformedFileError, match="is not TOML"):
        read_plan(tmp_path / "bytes.toml")
    with pytest.raises(SourceError, match="does not exist"):
        read_plan(tmp_path / "missing.toml")

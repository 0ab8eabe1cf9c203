from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from factories import adapter, low_rank_update
from test_cli import call

from lora_analysis.adapter import Adapter, Provenance
from lora_analysis.bases import open_base
from lora_analysis.cli.reading import Reading
from lora_analysis.conclusions import findings
from lora_analysis.errors import InputError, SourceError
from lora_analysis.formats import expand_glob, read_adapter, write_adapter
from lora_analysis.formats.sources import run_facts
from lora_analysis.studies import (
    Relation,
    earlier_checkpoints,
    label_facts,
    relation,
    study,
)


@pytest.mark.parametrize(
    ("pattern", "text", "facts"),
    [
        ("{task}-r{rank}-s{seed}", "a-b-r8-s1", {"task": "a-b", "rank": 8, "seed": 1}),
        ("{task}/seed{seed}/checkpoint-{step}", "sst2/seed3/checkpoint-500",
         {"task": "sst2", "seed": 3, "step": 500}),
        ("*_{task}_*", "x_math_y", {"task": "math"}),
        ("{task}.v1", "moreXv1", None),
        ("{task}-s{seed}", "turn-sx", None),
    ],
)  # fmt: skip
def test_a_pattern_says_what_a_name_means(pattern: str, text: str, facts: object) -> None:
    assert label_facts(pattern, text) == facts


@pytest.mark.parametrize("pattern", ["{taks}-s{seed}", "{task}{task}", "plain", "{task", "", "*"])
def test_a_pattern_that_cannot_be_meant_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match=re.escape(repr(pattern))):
        label_facts(pattern, "x")


def test_names_fill_in_what_files_do_not_say(rng: np.random.Generator, tmp_path: Path) -> None:
    for name in ("math-s0", "math-s1", "code-s0", "stray"):
        write_adapter(adapter(rng, label=name), tmp_path / name / "final")
    result = study([str(tmp_path / "*")], label="{task}-s{seed}/final")
    runs = result.runs.set_index("adapter")
    assert list(runs["task"]) == ["code", "math", "math", None] or runs["task"].isna().sum() == 1
    assert sorted(runs["seed"].dropna()) == [0, 0, 1]
    relations = dict(zip(zip(result.pairs["a"], result.pairs["b"], strict=True),
                         result.pairs["relation"], strict=True))  # fmt: skip
    assert relations["math-s0/final", "math-s1/final"] == "same task, different seed"
    (misfit,) = [finding for finding in findings(result) if finding.code == "label-misfit"]
    assert misfit.text.startswith("stray/final: the name does not match the label pattern")


def test_a_rank_in_a_name_that_the_tensors_contradict_is_noted(rng: np.random.Generator) -> None:
    result = study([adapter(rng, label="t-r16-s0", rank=4)], label="{task}-r{rank}-s{seed}")
    assert list(result.runs["rank"]) == [4]
    assert any("says rank 16, its tensors have rank 4" in one.text for one in findings(result))


def test_globs_are_expanded_in_natural_order(tmp_path: Path) -> None:
    for name in ("r2", "r10", "other"):
        (tmp_path / name).mkdir()
    runs = expand_glob(str(tmp_path / "r*"))
    assert [Path(run).name for run in runs] == ["r2", "r10"]
    (tmp_path / "sweep.json").write_text("{}")  # next to a sweep's runs
    assert expand_glob(str(tmp_path / "sweep.json")) == []
    assert [Path(one).name for one in expand_glob(str(tmp_path / "*"))] == ["other", "r2", "r10"]
    assert expand_glob("hf://owner/name*") == ["hf://owner/name*"]
    with pytest.raises(SourceError, match="No file or folder fits"):
        expand_glob(str(tmp_path / "x*"))


def test_a_bracket_in_a_name_that_exists_is_no_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    assert expand_glob(str(tmp_path / "a[1]")) == [str(tmp_path / "a[1]")]


def test_an_adapter_that_is_named_twice_is_one(rng: np.random.Generator, tmp_path: Path) -> None:
    for name in ("one", "one/checkpoint-5", "two"):
        write_adapter(adapter(rng, label=name), tmp_path / name)
    sources = [tmp_path / "one", str(tmp_path / "one" / "checkpoint-5"), str(tmp_path / "*")]
    assert len(study(sources).adapters) == 3
    found = Reading().find(map(str, sources), [])
    assert [ref.path.name for ref in found] == ["one", "checkpoint-5", "two"]


def test_a_note_on_several_files_is_said_once(rng: np.random.Generator) -> None:
    made = [adapter(rng, label=name) for name in ("a", "b", "c")]
    noted = [
        made[0].with_provenance(findings=("two.", "odd.")),
        made[1].with_provenance(findings=("odd.",)),
        made[2],
    ]
    texts = [one.text for one in findings(study(noted)) if one.code == "file-note"]
    assert texts == ["a: two.", "a and b: odd."]


def test_of_several_at_one_source_a_damaged_one_is_a_failure(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    write_adapter(adapter(rng, label="good"), tmp_path / "good")
    write_adapter(adapter(rng, label="bad"), tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"no such thing")
    result = study([str(tmp_path)])
    assert list(result.adapters) == ["good"]
    assert len(result.failures) == 1
    with pytest.raises(InputError):
        study([str(tmp_path / "bad")])


@pytest.mark.parametrize(
    ("folder", "file", "content", "step"),
    [
        ("checkpoint-500", None, None, 500),
        ("run", "trainer_state.json", {"global_step": 30}, 30),
        ("run", "manifest.json", {"step": 7}, 7),
        ("checkpoint-500", "trainer_state.json", {"global_step": 501}, 501),
        ("run", "trainer_state.json", ["no object"], None),
        ("run", "manifest.json", {"step": "7"}, None),
    ],
)
def test_a_checkpoint_says_its_step(
    tmp_path: Path, folder: str, file: str | None, content: object, step: int | None
) -> None:
    place = tmp_path / folder
    place.mkdir()
    if file:
        (place / file).write_text(json.dumps(content))
    assert run_facts(place).get("step") == step


def checkpoint(one: Adapter, label: str, step: int, **facts: object) -> Adapter:
    known = {"rank": 4, "task": "t", "seed": 0} | facts
    return Adapter(dict(one), label=label, provenance=Provenance(step=step, **known))  # type: ignore[arg-type]


def test_checkpoints_of_one_run_are_one_sample(rng: np.random.Generator) -> None:
    last = adapter(rng)
    early = Adapter(
        {
            name: type(one)(name=name, A=one.A, B=one.B + 0.5 * rng.standard_normal(one.B.shape),
                            scale=one.scale)
            for name, one in last.items()
        },
        label="early",
    )  # fmt: skip
    other = adapter(rng)
    made = [
        checkpoint(early, "t0-100", 100),
        checkpoint(last, "t0-200", 200),
        checkpoint(other, "t1-200", 200, seed=1),
    ]
    assert relation(made[0], made[1]) == Relation.SAME_RUN
    assert earlier_checkpoints(made) == {"t0-100"}
    result = study(made)
    relations = result.pairs.set_index(["a", "b"])["relation"]
    assert relations["t0-100", "t0-200"] == Relation.SAME_RUN
    assert relations["t0-100", "t1-200"] == Relation.EARLIER
    assert relations["t0-200", "t1-200"] == "same task, different seed"
    said = next(one for one in findings(result) if one.code == "checkpoints")
    omega = result.select(Relation.SAME_RUN, "output")["omega"].median()
    assert f"step 100: {omega:.2f}" in said.text
    assert list(result.runs["earlier"]) == [True, False, False]


def test_adapters_of_other_bases_are_not_compared_unless_asked(rng: np.random.Generator) -> None:
    made = [
        Adapter(dict(adapter(rng)), label=label, provenance=Provenance(base_model=base))
        for label, base in (
            ("a", "meta-llama/Llama-3.1-8B"),
            ("b", "/models/llama-3.1-8b/"),
            ("c", "mistralai/Mistral-7B"),
            ("d", None),
        )
    ]
    assert relation(made[0], made[1]) == Relation.BASE_NOT_KNOWN_SAME
    assert relation(made[0], made[2]) == Relation.OTHER_BASE
    result = study(made)
    compared = set(zip(result.pairs["a"], result.pairs["b"], strict=True))
    assert compared == {("a", "d"), ("b", "d"), ("c", "d")}
    said = next(one.text for one in findings(result) if one.code == "several-bases")
    assert "1 pair across base models not compared" in said
    pairs, unnamed = (one.text for one in findings(result) if one.code == "base-not-known-same")
    assert "2 pairs not compared" in pairs
    assert "No base model is named by d" in unnamed
    assert len(study(made, across_bases=True).pairs) == 6


def test_peft_checkpoints_carry_their_step(rng: np.random.Generator, tmp_path: Path) -> None:
    place = write_adapter(adapter(rng), tmp_path / "checkpoint-40")
    assert read_adapter(place).provenance.step == 40


def test_names_that_others_have_without_a_first_segment_are_one(
    rng: np.random.Generator,
) -> None:
    def called(label: str, *names: str) -> Adapter:
        updates = {n: low_rank_update(rng, 30, 20, 2, name=n, label=label) for n in names}
        origins = dict.fromkeys(names, "config")
        return Adapter(updates, label=label, provenance=Provenance(scale_origin=origins))

    long = called("long", "unet.mid.0.q", "unet.mid.0.k", "text_encoder.0.q")
    short, again = called("short", "mid.0.q", "mid.0.v"), called("again", "mid.0.q")
    result = study([long, short, again])
    assert set(result.adapters["long"]) == set(long)
    assert set(result.adapters["short"]) == {"unet.mid.0.q", "mid.0.v"}
    assert result.adapters["short"]["unet.mid.0.q"].base_name == "mid.0.q"  # type: ignore[union-attr]
    assert set(result.adapters["short"].provenance.scale_origin) == {"unet.mid.0.q", "mid.0.v"}
    assert (result.pairs["modules"] == 1).all()
    texts = [one.text for one in findings(result) if one.code == "names-matched"]
    assert len(texts) == 2  # short has another count of modules than again
    assert texts[0].startswith("short: 1 of 2 modules have different names in different files")
    assert texts[0].endswith("'mid.0.q' is shown as 'unet.mid.0.q'.")
    W = rng.standard_normal((30, 20))
    held = study([long, short], base=open_base({"unet.mid.0.q": W, "unet.mid.0.v": W}))
    assert set(held.amplifications["adapter"]) == {"long", "short"}
    # Names in common as they are: nothing is guessed.
    both = called("both", "unet.mid.0.q", "mid.0.q")
    assert set(study([both, short]).adapters["both"]) == set(both)
    one = called("one", "layers.0.q", "layers.1.q")
    assert set(study([one, one.with_label("two")]).adapters["one"]) == set(one)


# --- patterns that are tried without one ---------------------------------------------------------


def labels_of(adapters: list[Adapter], **options: str) -> list[tuple[object, object]]:
    runs = study(adapters, **options).runs  # type: ignore[arg-type]
    pairs = zip(runs["task"], runs["seed"], strict=True)
    return [(task, None if seed is None or np.isnan(seed) else seed) for task, seed in pairs]


@pytest.mark.parametrize(
    "template",
    ["{t}-r4-s{s}", "{t}_r4_s{s}", "{t}-s{s}", "{t}_seed_{s}", "{t}-seed{s}", "{t}_rank4_seed{s}"],
)
def test_common_patterns_fill_in_unknown_labels(rng: np.random.Generator, template: str) -> None:
    adapters = [
        adapter(rng, label=template.format(t=task, s=seed))
        for task in ("add", "sub-two")
        for seed in (0, 11)
    ]
    expected = [("add", 0), ("add", 11), ("sub-two", 0), ("sub-two", 11)]
    assert labels_of(adapters) == expected
    (finding,) = (one for one in findings(study(adapters)) if one.code == "labels-from-names")
    assert "by the pattern {" in finding.text
    assert "--label none" in finding.text
    assert labels_of(adapters, label="none") == [(None, None)] * 4


@pytest.mark.parametrize(
    "names",
    [
        ("a-r4-s0", "b-r4-s1", "stray"),  # not all match
        ("a-r4-s0", "b_r4_s1"),  # not the same pattern
        ("a-r4-s0", "b-r16-s1"),  # a rank that the tensors contradict
        ("a-r4-s0", "b-s1"),  # a rank that would be part of a task
        ("a-r4-s0",),  # one name may match by accident
        ("final-v1", "final-v2"),
    ],
)
def test_a_common_pattern_needs_every_name(rng: np.random.Generator, names: tuple[str]) -> None:
    adapters = [adapter(rng, label=name, rank=4) for name in names]
    assert set(labels_of(adapters)) == {(None, None)}
    assert all(one.code != "labels-from-names" for one in findings(study(adapters)))


def test_a_common_pattern_overrides_no_file(rng: np.random.Generator) -> None:
    stated = adapter(rng, label="a-s0").with_provenance(task="sum", seed=7)
    others = [adapter(rng, label=name) for name in ("b-s0", "c-s1")]
    assert labels_of([stated, *others]) == [("sum", 7), ("b", 0), ("c", 1)]
    seeded = adapter(rng, label="d-s2").with_provenance(seed=5)
    assert labels_of([seeded, *others]) == [(None, 5), (None, None), (None, None)]


def test_a_folder_names_what_has_a_generic_name_in_it(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    for name in ("math-s0", "code-s1"):
        write_adapter(adapter(rng), tmp_path / name / "checkpoint-40")
    assert set(labels_of([tmp_path / "*"])) == {("math", 0), ("code", 1)}  # type: ignore[list-item]
    for name in ("x", "y"):
        write_adapter(adapter(rng), tmp_path / "more" / "exp-s1" / name)
    pair = [tmp_path / "more" / "exp-s1"]
    assert set(labels_of(pair)) == {(None, None)}  # type: ignore[arg-type]


# --- reference adapters ---------------------------------------------------------------------------


def test_reference_adapters_of_an_analyzed_task_are_refused(rng: np.random.Generator) -> None:
    made = [adapter(rng, label=f"rot-r4-s{seed}", rank=4) for seed in range(4)]
    with pytest.raises(InputError) as refused:
        study(made[:2], reference=made[2:])
    for text in ("rot-r4-s2", "rot-r4-s3", "'rot'", "--reference", "--label none"):
        assert text in str(refused.value)
    assert study(made[:2], reference=made[2:], label="none").reference == ("rot-r4-s2", "rot-r4-s3")


def test_a_reference_of_another_task_or_of_none_is_accepted(rng: np.random.Generator) -> None:
    pair = [adapter(rng, label=f"rot-s{seed}") for seed in range(2)]
    others = [adapter(rng, label="flip-s0"), adapter(rng, label="flip-s1")]
    assert len(study(pair, reference=others).reference) == 2
    assert len(study(pair, reference=[adapter(rng, label="stray")]).reference) == 1


def test_an_analyzed_adapter_is_no_reference(rng: np.random.Generator, tmp_path: Path) -> None:
    paths = [write_adapter(adapter(rng), tmp_path / name) for name in ("left", "right")]
    with pytest.raises(InputError, match="right is the analyzed adapter right itself"):
        study(paths, reference=[f"{tmp_path}/../{tmp_path.name}/right"])


def test_a_reference_on_a_different_base_is_refused(rng: np.random.Generator) -> None:
    a, b, other, copied, path, unnamed = (
        adapter(rng, label=label).with_provenance(base_model=base)
        for label, base in (
            ("a", "google/gemma-2b"),
            ("b", "google/gemma-2b"),
            ("other", "google/gemma-2b-it"),
            ("copied", "unsloth/gemma-2b-bnb-4bit"),
            ("path", "/models/gemma-2b"),
            ("unnamed", None),
        )
    )
    with pytest.raises(InputError, match="other was trained on a different base"):
        study([a, b], reference=[copied, other])
    assert len(study([a, b], reference=[copied, path, unnamed]).reference) == 3


# --- labels of two adapters on the command line ---------------------------------------------------


def stored_pair(rng: np.random.Generator, folder: Path, *names: str) -> list[str]:
    return [str(write_adapter(adapter(rng), folder / name)) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["compare", "heatmap"])
def test_task_and_seed_are_given_in_the_order_of_the_adapters(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    pair = stored_pair(rng, tmp_path, "a-s0", "b-s0")
    output = ["-o", str(tmp_path / "map.svg"), "--force"] if verb == "heatmap" else []

    def relation_with(*options: str) -> str:
        code, out, _ = call(capsys, verb, *pair, *output, *options, "--format", "json")
        assert code == 0
        document = json.loads(out)
        return str(document["relation"] if verb == "heatmap" else document["pair"]["relation"])

    assert relation_with() == Relation.SHARED_SEED
    assert relation_with("--label", "none") == Relation.UNKNOWN
    assert relation_with("--task", "t", "--seed", "1", "--seed", "2") == Relation.OTHER_SEED
    tasks = ("--task", "x", "--task", "y")
    assert relation_with(*tasks, "--label", "{task}-s{seed}") == Relation.SHARED_SEED
    assert call(capsys, verb, *pair, *output, *tasks, "--task", "z")[0] == 2


def test_compare_refuses_a_reference_of_the_task(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = stored_pair(rng, tmp_path, "a-s0", "a-s1", "a-s2")
    code, _, err = call(capsys, "compare", *paths[:2], "--reference", paths[2])
    assert code == 3
    assert "a-s2 has the task of a-s0 and a-s1 ('a')" in err

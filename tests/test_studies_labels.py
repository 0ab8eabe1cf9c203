from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from factories import adapter, low_rank_update

from lora_analysis.adapter import Adapter, Provenance
from lora_analysis.bases import open_base
from lora_analysis.cli.reading import Reading
from lora_analysis.conclusions import findings
from lora_analysis.errors import InputError, SourceError
from lora_analysis.formats import expanded, read_adapter, write_adapter
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
    noted = [one for one in findings(result) if one.code != "base-not-known-same"]
    said = [one.text for one in noted if "stray" in one.text]
    assert len(said) == 2  # once, and in the sentence about its pairs
    assert "stray/final: the name does not match the label pattern" in said[1]


def test_a_rank_in_a_name_that_the_tensors_contradict_is_noted(rng: np.random.Generator) -> None:
    result = study([adapter(rng, label="t-r16-s0", rank=4)], label="{task}-r{rank}-s{seed}")
    assert list(result.runs["rank"]) == [4]
    assert any("says rank 16, its tensors have rank 4" in one.text for one in findings(result))


def test_globs_are_expanded_in_natural_order(tmp_path: Path) -> None:
    for name in ("r2", "r10", "other"):
        (tmp_path / name).mkdir()
    found = expanded(str(tmp_path / "r*"))
    assert [Path(one).name for one in found] == ["r2", "r10"]
    (tmp_path / "sweep.json").write_text("{}")  # beside a sweep's runs
    assert expanded(str(tmp_path / "sweep.json")) == []
    assert [Path(one).name for one in expanded(str(tmp_path / "*"))] == ["other", "r2", "r10"]
    assert expanded("hf://owner/name*") == ["hf://owner/name*"]
    with pytest.raises(SourceError, match="No file or folder fits"):
        expanded(str(tmp_path / "x*"))


def test_a_bracket_in_a_name_that_exists_is_no_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    assert expanded(str(tmp_path / "a[1]")) == [str(tmp_path / "a[1]")]


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

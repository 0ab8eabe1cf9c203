"""Usable modules: one set for all pairs of a comparison, and T over them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from factories import RUN_NAMES, directions, low_rank_update, planted_run, reference_runs

from lora_analysis.adapter import Adapter, Update
from lora_analysis.studies import Study, study
from lora_analysis.studies.pair_classes import Exclusion, ModuleExclusion
from lora_analysis.studies.pair_tables import MOST_CHANCE
from lora_analysis.studies.reference_test import refused_references


def runs_of_task(rng: np.random.Generator, count: int, task: str = "x") -> list[Adapter]:
    shared = directions(rng)
    seeds = range(10 * ord(task), 10 * ord(task) + count)
    return [planted_run(rng, f"{task}{seed}", shared, task=task, seed=seed) for seed in seeds]


def with_modules(adapter: Adapter, **updates: Update) -> Adapter:
    """Return the adapter with more modules."""
    return Adapter({**dict(adapter), **updates}, label=adapter.label, provenance=adapter.provenance)


def without(adapter: Adapter, *names: str) -> Adapter:
    """Return the adapter without some modules."""
    updates = {name: update for name, update in adapter.items() if name not in names}
    return Adapter(updates, label=adapter.label, provenance=adapter.provenance)


def usable(result: Study, side: str) -> dict[tuple[str, str], set[str]]:
    """Return the usable modules of each pair."""
    rows = result.similarities[
        (result.similarities["side"] == side) & result.similarities["usable"]
    ]
    return {pair: set(of_pair["module"]) for pair, of_pair in rows.groupby(["a", "b"])}


def test_all_modules_of_like_adapters_are_usable(rng: np.random.Generator) -> None:
    result = study([*runs_of_task(rng, 2), *runs_of_task(rng, 2, "y")])
    assert result.left_out == {"input": {}, "output": {}}
    for side in ("output", "input"):
        assert set(result.pairs[f"usable_{side}"]) == {len(RUN_NAMES)}
        assert all(modules == set(RUN_NAMES) for modules in usable(result, side).values())


def test_a_head_with_one_output_has_no_room_on_that_side(rng: np.random.Generator) -> None:
    """It changes nothing on the output side, where all heads agree by necessity."""
    plain = [*runs_of_task(rng, 2), *runs_of_task(rng, 2, "y")]
    heads = [with_modules(run, score=low_rank_update(rng, 1, 80, name="score")) for run in plain]
    result, expected = study(heads), study(plain)
    assert result.left_out["output"] == {"score": ModuleExclusion.NO_ROOM}
    assert result.left_out["input"] == {}
    columns = ["a", "b", "mean_excess_output", "usable_output", "population_output"]
    assert result.pairs[columns].equals(expected.pairs[columns])
    assert set(result.pairs["usable_input"]) == {len(RUN_NAMES) + 1}
    rows = result.similarities[result.similarities["module"] == "score"]
    assert not rows.loc[rows["side"] == "output", "usable"].any()
    assert rows.loc[rows["side"] == "input", "usable"].all()


def test_one_crowded_pair_leaves_a_module_out_for_all_pairs(rng: np.random.Generator) -> None:
    """The random baseline depends on both spectra: the largest one over the pairs decides."""
    name = RUN_NAMES[0]
    runs = runs_of_task(rng, 3)
    full = replace(low_rank_update(rng, 96, 80, 70, name=name), label=runs[0].label)
    runs[:2] = [with_modules(run, **{name: full}) for run in runs[:1]] + [
        with_modules(runs[1], **{name: low_rank_update(rng, 96, 80, 70, name=name)})
    ]
    result = study(runs)
    chances = result.similarities.query("module == @name and side == 'output'")["chance_omega"]
    assert chances.max() > MOST_CHANCE > chances.min()
    assert set(result.left_out["output"]) == {name}
    assert len(set(map(frozenset, usable(result, "output").values()))) == 1


def test_a_module_that_one_adapter_lacks_is_usable_in_no_pair(rng: np.random.Generator) -> None:
    runs = [*runs_of_task(rng, 2), *runs_of_task(rng, 2, "y")]
    name = RUN_NAMES[-1]
    result = study([*runs[:3], without(runs[3], name)])
    reason = {name: "not trained in all adapters, or in different shapes"}
    assert result.left_out == {"input": reason, "output": reason}
    for modules in usable(result, "output").values():
        assert modules == set(RUN_NAMES) - {name}


def test_untrained_and_misshapen_modules_are_like_missing_ones(rng: np.random.Generator) -> None:
    runs = runs_of_task(rng, 4)
    zero, wide = RUN_NAMES[:2]
    runs[2] = with_modules(runs[2], **{zero: replace(runs[2][zero], B=0 * runs[2][zero].B)})  # type: ignore[union-attr, type-var]
    runs[3] = with_modules(runs[3], **{wide: low_rank_update(rng, 96, 60, name=wide)})
    result = study(runs)
    assert set(result.left_out["output"]) == {zero, wide}


def test_adapters_of_other_modules_do_not_empty_the_set(rng: np.random.Generator) -> None:
    runs = [*runs_of_task(rng, 2), *runs_of_task(rng, 2, "y")]
    names = ("other.a", "other.b")
    stranger = planted_run(rng, "stranger", names=names, task="z", seed=1)
    untrained = Adapter(
        {name: replace(update, B=0 * update.B) for name, update in runs[0].items()},  # type: ignore[union-attr, type-var]
        label="untrained",
        provenance=replace(runs[0].provenance, seed=4),
    )
    result = study([*runs, stranger, untrained])
    excluded = result.runs.set_index("adapter")["excluded"]
    assert excluded["stranger"] == Exclusion.OTHER_MODULES
    assert excluded["untrained"] == Exclusion.UNTRAINED
    assert result.left_out == {"input": {}, "output": {}}
    expected = study(runs).pairs.set_index(["a", "b"])["mean_excess_output"]
    values = result.pairs.set_index(["a", "b"])["mean_excess_output"]
    np.testing.assert_allclose(values[expected.index], expected, rtol=0, atol=1e-12)
    assert np.isnan(values["x1200", "stranger"])


def test_two_adapters_with_few_common_modules_are_compared_there(
    rng: np.random.Generator,
) -> None:
    runs = runs_of_task(rng, 2)
    names = RUN_NAMES[1:]
    result = study([runs[0], without(runs[1], *names)])
    assert set(result.runs["excluded"]) == {""}
    assert result.pairs["usable_output"].item() == 1


def test_references_of_other_modules_do_not_decide_what_is_compared(
    rng: np.random.Generator,
) -> None:
    """Five references of other modules are left out, however many more they are than the pair."""
    runs = runs_of_task(rng, 2)
    references = reference_runs(rng, 5, names=("other.a", "other.b"))
    good = planted_run(rng, "good", task="good", seed=7)
    result = study(runs, reference=[*references, good])
    excluded = result.runs.set_index("adapter")["excluded"]
    assert excluded.to_dict() == {
        **{adapter.label: "" for adapter in (*runs, good)},
        **{adapter.label: Exclusion.OTHER_MODULES for adapter in references},
    }
    assert result.left_out == {"input": {}, "output": {}}
    refused = {(r.reference, r.reason) for r in refused_references(result)}
    assert refused == {(a.label, Exclusion.OTHER_MODULES) for a in references}


def test_a_start_that_some_modules_share_leaves_them_out_of_the_input_side(
    rng: np.random.Generator,
) -> None:
    runs = [*runs_of_task(rng, 2), *runs_of_task(rng, 2, "y")]
    name = RUN_NAMES[0]
    # One module of one pair: rows of A agree, B was learned apart.
    start = low_rank_update(rng, 96, 80, name=name)
    first, second = (
        with_modules(run, **{name: replace(start, B=rng.standard_normal((96, 4)))})
        for run in (runs[0], runs[2])
    )
    result = study([first, runs[1], second, runs[3]])
    assert result.left_out == {"input": {name: "shared initialization"}, "output": {}}
    assert set(result.pairs["usable_input"]) == {len(RUN_NAMES) - 1}
    assert set(result.pairs["usable_output"]) == {len(RUN_NAMES)}
    pair = result.pairs.set_index(["a", "b"]).loc[(first.label, second.label)]
    assert pair["population_input"] == "unrelated"


def test_each_base_has_its_own_set(rng: np.random.Generator) -> None:
    runs = [*runs_of_task(rng, 2), *runs_of_task(rng, 2, "y")]
    name = RUN_NAMES[-1]
    bases = ["org/one", "org/one", "org/two", "org/two"]
    runs = [run.with_provenance(base_model=base) for run, base in zip(runs, bases, strict=True)]
    result = study([*runs[:3], without(runs[3], name)])
    # The adapter of the second base that has the module is alone with it: no pair, no row.
    sets = {pair: len(modules) for pair, modules in usable(result, "output").items()}
    assert sets == {("x1200", "x1201"): 6, ("y1210", "y1211"): 5}


@pytest.mark.parametrize("side", ["output", "input"])
def test_t_is_the_mean_excess_over_the_usable_modules(side: str, rng: np.random.Generator) -> None:
    runs = [
        with_modules(run, score=low_rank_update(rng, 1, 80, name="score"))
        for run in runs_of_task(rng, 3)
    ]
    result = study(runs, reference=reference_runs(rng, 2))
    for row in result.pairs.itertuples():
        rows = result.similarities.query("a == @row.a and b == @row.b and side == @side and usable")
        excess = (rows["omega"] - rows["chance_omega"]) / (1 - rows["chance_omega"])
        assert getattr(row, f"mean_excess_{side}") == pytest.approx(excess.mean())
        assert getattr(row, f"usable_{side}") == len(rows) == len(RUN_NAMES)

"""How often conclusions are false of simulated strangers, and found of related adapters.

Each trial draws a setting at random: modules, geometry of the base, spectra, design, ranks. A few
trials run in ``make test`` (of groups in ``make test-long``); ``make test-claims`` runs enough of
them to bound the rates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from claims.simulation import Base, Setting
from lora_analysis.conclusions import Comparison, Conclusion, Reason, comparisons
from lora_analysis.studies import GroupAnalysis, SharedPart, study

# Trials of each claim in `make test`, and in `make test-claims`.
FEW, MANY = 8, 400
_DESIGNS = [(2, 4), (3, 2), (3, 3), (4, 2), (4, 3)]
Rng = np.random.Generator


def _setting(
    rng: Rng, *, geometry: Sequence[float] = (0.0, 0.2, 0.4), shared: float = 0.0
) -> Setting:
    low = rng.uniform(0.5, 0.85)
    return Setting(
        modules=int(rng.choice([1, 2, 4, 8, 16])),
        dimension=int(rng.choice([40, 64])),
        geometry=float(rng.choice(geometry)),
        shared=shared,
        decay=(low, low + 0.1),
    )


def _design(rng: Rng) -> dict[str, Any]:
    tasks, seeds = _DESIGNS[rng.integers(len(_DESIGNS))]
    ranks = (4, 8) if rng.random() < 0.3 else (8,)
    names = [f"task{i}" for i in range(tasks)]
    return {"tasks": names, "seeds": seeds, "ranks": ranks, "crossed": bool(rng.random() < 0.5)}


def own_study(rng: Rng, *, shared: float = 0.0, ratio: float = 1.0) -> list[Comparison]:
    """Simulate a study with tasks and seeds; strengths of the tasks differ by up to the ratio."""
    design = _design(rng)
    if ratio > 1 and len(design["tasks"]) < 3:
        design["tasks"] = ["task0", "task1", "task2"]
    if shared:
        design |= {"tasks": ["task0", "task1", "task2"], "seeds": 3}
    geometry = (0.0, 0.05) if shared else (0.0, 0.2, 0.4)
    base = Base(rng, _setting(rng, geometry=geometry, shared=shared))
    strengths = ratio ** rng.uniform(-0.5, 0.5, len(design["tasks"]))
    adapters = base.study(**design, strengths=strengths)
    return [c for c in comparisons(study(adapters, workers=1)) if c.kind == "tasks"]


def two_adapters(rng: Rng, *, shared: float = 0.0, ratio: float = 1.0) -> list[Comparison]:
    """Simulate ``compare A B --reference`` with five to eight references of unknown labels."""
    geometry = (0.0, 0.05) if shared else (0.0, 0.2, 0.4)
    base = Base(rng, _setting(rng, geometry=geometry, shared=shared))
    count = int(rng.integers(5, 9))
    strengths = ratio ** rng.uniform(-0.5, 0.5, count + 2)
    pair = [
        base.adapter("asked" if shared else f"asked{i}", i, strength=strengths[i], label="AB"[i])
        for i in range(2)
    ]
    references = list(base.strangers(strengths[2:]))
    return list(comparisons(study(pair, reference=references, workers=1)))


def group(
    rng: Rng, *, shared: float = 0.0, geometry: float = 0.0, others: int = 0
) -> list[GroupAnalysis]:
    """Simulate 6 to 20 strangers, or runs of one task, next to adapters of other groups."""
    base = Base(rng, _setting(rng, geometry=(geometry,), shared=shared))
    count = int(rng.integers(6, 21))
    members = (
        [base.adapter("asked", i, rank=4) for i in range(count)]
        if shared
        else list(base.strangers([1.0] * (count + others), rank=4))[others:]
    )
    references = list(base.strangers([1.0] * others, rank=4))
    analysis = study(members, reference=references, workers=1).group_analysis(workers=1)
    return [analysis]


_RELATED = (Conclusion.MORE_ALIKE, SharedPart.MEAN, SharedPart.SUBSPACE)


def _is_called_related(found: Sequence[Comparison | GroupAnalysis]) -> bool:
    return any(c.conclusion in _RELATED for c in found)


def _is_tested(found: Sequence[Comparison | GroupAnalysis]) -> bool:
    return all(getattr(c, "reason", None) is not Reason.TRAINING_STRENGTH for c in found)


@dataclass(frozen=True)
class Claim:
    """A simulated kind of study, and how often it may, or must, be called related."""

    simulate: Callable[[Rng], Sequence[Comparison | GroupAnalysis]]
    at_most: float = 1.0
    at_least: float = 0.0
    # Trials that the rule on training strength leaves without a test do not count.
    tested_only: bool = False


CLAIMS = {
    "a group of random adapters": Claim(group, at_most=0.05),
    "a group of strangers next to others": Claim(
        lambda rng: group(rng, geometry=0.2, others=4), at_most=0.06
    ),
    "a group of one task next to others": Claim(
        lambda rng: group(rng, shared=0.5, others=4), at_least=0.95
    ),
    "strangers in a study": Claim(own_study, at_most=0.06),
    "strangers of unequal strength in a study": Claim(
        lambda rng: own_study(rng, ratio=3.0), at_most=0.15
    ),
    "two strangers": Claim(two_adapters, at_most=0.06),
    "two strangers of unequal strength": Claim(
        lambda rng: two_adapters(rng, ratio=3.0), at_most=0.15
    ),
    "runs of one task": Claim(lambda rng: own_study(rng, shared=0.7), at_least=0.95),
    "two runs of one task": Claim(
        lambda rng: two_adapters(rng, shared=0.7), at_least=0.85, tested_only=True
    ),
}


def check_claim(claim: Claim, trials: int, seed: int) -> str:
    """Return the rate in words; fail if the trials contradict the claim at 0.1 %."""
    called = counted = 0
    for trial in range(trials):
        found = claim.simulate(np.random.default_rng([seed, trial]))
        if claim.tested_only and not _is_tested(found):
            continue
        counted += 1
        called += _is_called_related(found)
    text = f"{called} of {counted} called related"
    assert binom.sf(called - 1, counted, claim.at_most) > 1e-3, text
    assert binom.cdf(called, counted, claim.at_least) > 1e-3, text
    return text


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name.startswith("a group") else [])
        for name in CLAIMS
    ],
)
def test_a_few_simulated_studies_agree_with_the_claim(name: str) -> None:
    check_claim(CLAIMS[name], FEW, seed=1)


@pytest.mark.claims
@pytest.mark.parametrize("name", CLAIMS)
def test_simulated_studies_agree_with_the_claim(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = check_claim(CLAIMS[name], int(os.environ.get("TRIALS", MANY)), seed=2)
    with capsys.disabled():
        print(f"\n{name}: {text}")  # noqa: T201 - the measured rate is the result

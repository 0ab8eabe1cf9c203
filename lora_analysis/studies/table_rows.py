"""Columns of a study's tables, and rows of spectra, amplifications and weight changes."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.adapter import DenseUpdate, LowRankUpdate
from lora_analysis.amplify import Amplification, WeightBasisEnergy
from lora_analysis.blocks import locate_module
from lora_analysis.intruders import IntruderReport
from lora_analysis.spectra import SIDES, Spectrum
from lora_analysis.weight_changes import Changes

if TYPE_CHECKING:
    from numpy.typing import NDArray


class DegeneracyLevel(StrEnum):
    """Degeneracy of the first direction of an update, or of the worse of two updates."""

    NONE = ""
    NEARLY = "nearly degenerate"  # noise may rotate it
    FULL = "degenerate"  # σ₁ = σ₂ to rounding: the direction is arbitrary


# Columns are listed here so that an empty table has them too.
PAIR_COLUMNS = (
    "a", "b", "relation", "pair_class", "population_output", "population_input", "modules",
    "mismatched_modules", "usable_output", "usable_input", "mean_excess_output",
    "mean_excess_input", "median_cosine", "total_cosine", "initialization", "shared_init_modules",
    "b_cosine", "copied", "negated", "containment", "inclusion",
)  # fmt: skip
SIMILARITY_COLUMNS = (
    "a", "b", "relation", "pair_class", "population", "module", "module_type", "layer", "side",
    "usable", "dimension", "rank_a", "rank_b", "phi_1_1", "chance_1_1", "degeneracy_1_1",
    "phi_r_r", "chance_r_r", "excess_r_r", "omega", "chance_omega", "excess_omega", "p_omega",
    "q_omega", "p_is_bound", "smallest_angle", "largest_angle", "signed_cosine",
    "initialization", "shared_init",
)  # fmt: skip
AMPLIFICATION_COLUMNS = (
    "adapter", "module", "module_type", "layer", "k", "at_rank", "projected", "projected_weight",
    "projected_random", "random_mean", "random_spread", "delta_norm", "weight_norm",
    "relative_norm", "amplification_factor", "chance_factor", "enrichment",
    "enrichment_crossed", "enrichment_through_weight", "storage", "noise",
)  # fmt: skip
CHANGE_COLUMNS = (
    "adapter", "module", "module_type", "layer", "side", "dimension", "k", "leading_energy",
    "trailing_energy", "chance_energy", "leading_p", "off_principal", "chance_off_principal",
    "directions", "intruders", "intruder_energy", "smallest_cosine", "chance_cosine",
    "largest_novelty", "span", "chance_novelty", "largest_rotation", "top_overlap",
    "chance_top_overlap", "largest_drift", "mean_drift", "magnitude_change", "direction_change",
    "relative_change", "changed_in_bfloat16", "noise_intruders", "noise_top_overlap",
    "noise_drift", "noise_in_bfloat16",
)  # fmt: skip


def spectrum_row(update: LowRankUpdate | DenseUpdate, value: Spectrum) -> dict[str, Any]:
    """Return the row of one module of one adapter."""
    low_rank = update if isinstance(update, LowRankUpdate) else None
    s = value.S
    return {
        "adapter": value.label,
        "module": value.name,
        "module_type": locate_module(value.name).name,
        "layer": locate_module(value.name).number,
        "d_out": value.shape[0],
        "d_in": value.shape[1],
        "rank": value.rank,
        "numerical_rank": value.numerical_rank,
        "effective_rank": value.effective_rank,
        "stable_rank": value.stable_rank,
        "energy_rank_90": value.energy_rank(0.9),
        "energy_rank_99": value.energy_rank(0.99),
        "participation_ratio": value.participation_ratio,
        "rounding_error": value.rounding_error,
        "norm": value.norm,
        "sigma_1": float(s[0]),
        "in_units_of_scale": value.in_units_of_scale,
        "scale": 1.0 if low_rank is None else low_rank.scale,
        "alpha": None if low_rank is None else low_rank.alpha,
        "stored_dtype": value.stored_dtype,
        "variant": "" if low_rank is None else low_rank.variant,
    }


def amplification_rows(result: Amplification) -> Iterator[dict[str, Any]]:
    """Yield one row per k."""
    crossed = None if result.crossed is None else result.crossed.median
    through = result.enrichment_through_weight
    for i, k in enumerate(result.k):
        yield {
            "adapter": result.label,
            "module": result.module,
            "module_type": locate_module(result.module).name,
            "layer": locate_module(result.module).number,
            "k": int(k),
            "at_rank": bool(k == len(result.S)),
            "projected": result.projected[i],
            "projected_weight": np.nan if result.weight_top is None else result.weight_top[i],
            "projected_random": result.random.rms[i],
            "random_mean": result.random.mean[i],
            "random_spread": result.random.spread[i],
            "delta_norm": float(np.linalg.norm(result.S[:k])),
            "weight_norm": result.weight_norm,
            "relative_norm": result.relative_norm,
            "amplification_factor": result.amplification_factor[i],
            "chance_factor": result.chance_factor[i],
            "enrichment": result.enrichment[i],
            "enrichment_crossed": np.nan if crossed is None else crossed[i],
            "enrichment_through_weight": np.nan if through is None else through[i],
            "storage": result.storage,
            "noise": np.nan if result.noise is None else result.noise,
        }


def change_rows(
    energy: WeightBasisEnergy,
    report: IntruderReport,
    changes: Changes,
    *,
    k: int,
    relative_change: float,
    changed_in_bfloat16: float,
    noise: IntruderReport,
    noise_in_bfloat16: float,
) -> Iterator[dict[str, Any]]:
    """Yield one row per side: ΔW in W's leading and trailing k directions, and changes of W."""
    drift, noise_drift = (values.drift[~np.isnan(values.drift)] for values in (report, noise))
    for side in SIDES:
        basis, changed = energy.sides[side], report.sides[side]
        yield {
            "adapter": report.label,
            "module": report.module,
            "module_type": locate_module(report.module).name,
            "layer": locate_module(report.module).number,
            "side": side,
            "dimension": basis.dimension,
            "k": k,
            "leading_energy": basis.leading[k - 1],
            "trailing_energy": basis.trailing[k - 1],
            "chance_energy": k / basis.dimension,
            "leading_p": energy.p_value(side)[k - 1],
            "off_principal": energy.off_principal[k - 1],
            "chance_off_principal": energy.chance_off_principal[k - 1],
            "directions": len(report.S),
            "intruders": report.count(side),
            "intruder_energy": report.energy_share(side),
            "smallest_cosine": changed.max_cosine.min(),
            "chance_cosine": changed.chance_maximum,
            "largest_novelty": changed.novelty.max(),
            "span": report.span,
            "chance_novelty": changed.chance_novelty,
            "largest_rotation": changed.rotation[-1],
            "top_overlap": _overlap(changed.rotation),
            "chance_top_overlap": len(report.S) / basis.dimension,
            "largest_drift": drift[np.argmax(np.abs(drift))] if drift.size else np.nan,
            "mean_drift": np.abs(drift).mean() if drift.size else np.nan,
            "magnitude_change": changes[side].mean_magnitude,
            "direction_change": changes[side].mean_direction,
            "relative_change": relative_change,
            "changed_in_bfloat16": changed_in_bfloat16,
            "noise_intruders": noise.count(side),
            "noise_top_overlap": _overlap(noise.sides[side].rotation),
            "noise_drift": np.abs(noise_drift).mean() if noise_drift.size else np.nan,
            "noise_in_bfloat16": noise_in_bfloat16,
        }


def _overlap(angles: NDArray[np.float64]) -> float:
    """Return φ(k, k) of two subspaces from their principal angles."""
    return float(np.mean(np.cos(angles) ** 2))

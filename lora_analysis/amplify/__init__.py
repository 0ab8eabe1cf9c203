"""ΔW against W: how strongly the update's directions are already present in the weight.

`streaming` passes over W once, `results` defines the numbers, `measure` computes them, `controls`
computes what they are compared with; `basis` holds ΔW against W's whole spectrum.
"""

from lora_analysis.amplify.basis import WeightBasisEnergy, weight_basis_energy
from lora_analysis.amplify.controls import RunEnrichment, run_enrichments
from lora_analysis.amplify.measure import amplification, amplifications
from lora_analysis.amplify.results import Amplification, CrossedEnrichment, RandomDirections

__all__ = [
    "Amplification",
    "CrossedEnrichment",
    "RandomDirections",
    "RunEnrichment",
    "WeightBasisEnergy",
    "amplification",
    "amplifications",
    "run_enrichments",
    "weight_basis_energy",
]

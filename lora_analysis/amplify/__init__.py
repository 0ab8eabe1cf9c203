"""ΔW against W: how strongly the update's directions are already present in the weight.

`streaming` passes over W once, `results` defines the numbers, `measure` computes them;
`basis` holds ΔW against W's whole spectrum.
"""

from lora_analysis.amplify.basis import WeightBasisEnergy, weight_basis_energy
from lora_analysis.amplify.measure import amplification, amplifications
from lora_analysis.amplify.results import Amplification, RandomDirections

__all__ = [
    "Amplification",
    "RandomDirections",
    "WeightBasisEnergy",
    "amplification",
    "amplifications",
    "weight_basis_energy",
]

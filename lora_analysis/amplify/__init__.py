"""ΔW against W: how strongly the update's directions are already present in the weight.

`streaming` passes over W once, `results` says what the numbers are, `measure` puts them together.
"""

from lora_analysis.amplify.measure import amplification, amplifications
from lora_analysis.amplify.results import Amplification, RandomDirections

__all__ = ["Amplification", "RandomDirections", "amplification", "amplifications"]

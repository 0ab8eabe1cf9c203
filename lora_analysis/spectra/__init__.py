"""The spectrum of an update: singular values and vectors of ΔW, and the ranks read from them."""

from lora_analysis.spectra.factoring import (
    delta_spectrum,
    leading_spectrum,
    partial_spectrum,
    singular_values,
    spectrum,
    stacked_spectra,
    update_norm,
    update_svd,
)
from lora_analysis.spectra.values import (
    NEARLY_DEGENERATE_GAP,
    SIDES,
    Side,
    Spectrum,
    VectorsOf,
    check_side,
    default_side,
)
from lora_analysis.spectra.weights import weight_svd

__all__ = [
    "NEARLY_DEGENERATE_GAP",
    "SIDES",
    "Side",
    "Spectrum",
    "VectorsOf",
    "check_side",
    "default_side",
    "delta_spectrum",
    "leading_spectrum",
    "partial_spectrum",
    "singular_values",
    "spectrum",
    "stacked_spectra",
    "update_norm",
    "update_svd",
    "weight_svd",
]

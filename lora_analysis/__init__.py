"""Analyze what a LoRA adapter learned, seen from its weights.

The public names below and the modules are loaded on first use: ``import lora_analysis`` alone
imports neither numpy nor torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter as Adapter
    from lora_analysis.adapter import DenseUpdate as DenseUpdate
    from lora_analysis.adapter import LowRankUpdate as LowRankUpdate
    from lora_analysis.amplify import amplification as amplification
    from lora_analysis.bases import as_weight as as_weight
    from lora_analysis.bases import open_base as open_base
    from lora_analysis.bases import read_fine_tune as read_fine_tune
    from lora_analysis.edit import approximate_fine_tune as approximate_fine_tune
    from lora_analysis.edit import resize_adapter as resize_adapter
    from lora_analysis.edit import truncate as truncate
    from lora_analysis.edit import without_directions as without_directions
    from lora_analysis.edit import without_subspace as without_subspace
    from lora_analysis.effective import effective_adapter as effective_adapter
    from lora_analysis.effective import effective_update as effective_update
    from lora_analysis.effective import initial_factors_from_base as initial_factors_from_base
    from lora_analysis.formats import as_adapter as as_adapter
    from lora_analysis.formats import as_update as as_update
    from lora_analysis.formats import find_adapters as find_adapters
    from lora_analysis.formats import read_adapter as read_adapter
    from lora_analysis.formats import write_adapter as write_adapter
    from lora_analysis.intruders import intruder_dimensions as intruder_dimensions
    from lora_analysis.lora import add_lora as add_lora
    from lora_analysis.lora import extract_adapter as extract_adapter
    from lora_analysis.lora import load_adapter_into as load_adapter_into
    from lora_analysis.lora import merge_lora as merge_lora
    from lora_analysis.lora import set_active as set_active
    from lora_analysis.lora import unmerge_lora as unmerge_lora
    from lora_analysis.merging import merge_check as merge_check
    from lora_analysis.merging import merge_forecast as merge_forecast
    from lora_analysis.plots import plot_amplification as plot_amplification
    from lora_analysis.plots import plot_similarity as plot_similarity
    from lora_analysis.plots import plot_spectrum as plot_spectrum
    from lora_analysis.report import write_report as write_report
    from lora_analysis.similarity import energy_overlap as energy_overlap
    from lora_analysis.similarity import principal_angles as principal_angles
    from lora_analysis.similarity import signed_cosine as signed_cosine
    from lora_analysis.similarity import subspace_similarity as subspace_similarity
    from lora_analysis.spectra import singular_values as singular_values
    from lora_analysis.spectra import spectrum as spectrum
    from lora_analysis.studies import Study as Study
    from lora_analysis.studies import study as study

_HOME = {
    "adapter": ("Adapter", "DenseUpdate", "LowRankUpdate"),
    "amplify": ("amplification",),
    "bases": ("as_weight", "open_base", "read_fine_tune"),
    "edit": (
        "approximate_fine_tune",
        "truncate",
        "resize_adapter",
        "without_directions",
        "without_subspace",
    ),
    "effective": ("effective_adapter", "effective_update", "initial_factors_from_base"),
    "formats": ("as_adapter", "as_update", "find_adapters", "read_adapter", "write_adapter"),
    "intruders": ("intruder_dimensions",),
    "lora": (
        "add_lora",
        "extract_adapter",
        "load_adapter_into",
        "merge_lora",
        "set_active",
        "unmerge_lora",
    ),
    "merging": ("merge_check", "merge_forecast"),
    "plots": ("plot_amplification", "plot_similarity", "plot_spectrum"),
    "report": ("write_report",),
    "similarity": ("energy_overlap", "principal_angles", "signed_cosine", "subspace_similarity"),
    "spectra": ("singular_values", "spectrum"),
    "studies": ("Study", "study"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])  # noqa: PLE0605  (a list of str, built)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        # Every module is an attribute, imported on use.
        if not name.startswith("_") and find_spec(f"lora_analysis.{name}"):
            return import_module(f"lora_analysis.{name}")
        message = f"module 'lora_analysis' has no attribute {name!r}"
        raise AttributeError(message)
    if _MODULE_OF[name] == "lora":
        from lora_analysis.errors import require_package

        require_package("torch", "gpu", f"lora_analysis.{name}")
    value = getattr(import_module(f"lora_analysis.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

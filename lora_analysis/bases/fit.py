"""Whether an adapter belongs to a base: what names and shapes of single modules do not tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lora_analysis.errors import IncompatibleError

if TYPE_CHECKING:
    from lora_analysis.adapter import Adapter
    from lora_analysis.bases.weights import BaseWeights

# Findings of adapters that hold the factors of all experts of a base together.
_STACKS: Final = ("expert-order", "expert-stack", "expert-factors-shared")


def check_experts(adapter: Adapter, base: BaseWeights) -> None:
    """Raise if an adapter stacks the factors of another number of experts than the base has.

    The file alone does not tell the number: rows of A can be 4 experts of rank 2 or 8 of rank 1,
    and read as the wrong one every update is wrong, with plausible shapes.

    Raises
    ------
    IncompatibleError
        The numbers differ; the message names both.
    """
    for finding in adapter.provenance.findings:
        if finding.code not in _STACKS:
            continue
        experts, expected = finding.fields["experts"], base.experts
        if expected is None or experts == expected:
            continue
        names = ", ".join(f"'{name}'" for name in finding.fields["parameters"])
        message = (
            f"{adapter.label} holds factors of {experts} experts ({names}), the base {base.label} "
            f"has {expected}. Is it another base? If the trainer scaled the rank per expert, so "
            "that the config's r is not the rank of one, pass the number of experts: "
            f"experts={expected} (command line: --experts {expected})."
        )
        raise IncompatibleError(message)

"""What a group of adapters shares: a mean, a subspace, or nothing.

The analysis is `Study.group_analysis`; here it takes adapters as they are. Pairs are compared in
``pairwise``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_analysis.studies import GroupAnalysis, SharedPart, Study, study

if TYPE_CHECKING:
    from lora_analysis.progress import Progress

__all__ = ["GroupAnalysis", "SharedPart", "group_analysis"]


def group_analysis(
    adapters: Sequence[Any],
    others: Sequence[Any] = (),
    *,
    k: int | None = None,
    modules: str | Sequence[str] | None = None,
    modules_per_type: int | None = None,
    prefix: str | Sequence[str] | Mapping[str, str] | None = None,
    remove_related: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
) -> GroupAnalysis:
    """Test what adapters of one base share: a mean, a subspace, or nothing.

    Parameters
    ----------
    adapters
        The group: adapters in any form that :func:`study` takes.
    others
        Adapters of other groups on the same base, one per task: what unrelated adapters share.
    prefix
        Prefixes of module names and their replacements, as for :func:`study`.
    k, modules, modules_per_type, remove_related, workers, progress
        As for `Study.group_analysis`.

    Raises
    ------
    InputError
        As for :func:`study` and `Study.group_analysis`.

    Notes
    -----
    Pairs are classified by a `study` first, so that copies and shared initializations are left out.

    Examples
    --------
    >>> import numpy as np
    >>> from lora_analysis import Adapter, LowRankUpdate
    >>> rng = np.random.default_rng(0)
    >>> def member(label):
    ...     B, A = rng.standard_normal((64, 2)), rng.standard_normal((2, 64))
    ...     return Adapter({"q": LowRankUpdate("q", A, B, 1.0, label=label)}, label=label)
    >>> group_analysis([member(f"m{i}") for i in range(8)]).conclusion
    <SharedPart.NOTHING: 'nothing'>
    """
    result: Study = study(
        adapters,
        reference=others,
        modules=modules,
        prefix=prefix,
        workers=workers,
        progress=progress,
    )
    return result.group_analysis(
        k=k,
        modules=modules,
        modules_per_type=modules_per_type,
        remove_related=remove_related,
        workers=workers,
        progress=progress,
    )

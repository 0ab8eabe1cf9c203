"""Ranks of many modules within one budget of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from lora_analysis.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_UNTRAINED: Final = (
    "Every module is untrained (ΔW = 0), so there is nothing to distribute the budget over."
)


def ranks_within(
    budget: int,
    values: Mapping[str, NDArray[np.float64]],
    costs: Mapping[str, int],
) -> dict[str, int]:
    """Return the rank of each module that retains most of Σσ² in ``budget`` parameters.

    The directions of all modules are sorted by the energy they add per parameter,
    ``σ²/(d_out + d_in)``; each is taken if it still fits. Within a module σ falls and the cost
    is the same, so leading directions are taken first.

    If all modules have one shape, or no direction had to be skipped, no choice of
    ranks retains more. Otherwise no choice retains more than this one and the first direction that
    was skipped together (the bound of the knapsack's relaxation).

    Parameters
    ----------
    budget
        Parameters of all factors together.
    values
        Per module its singular values, descending.
    costs
        Per module the parameters that one direction takes, ``d_out + d_in``.

    Returns
    -------
    dict
        Rank by module, in the order of ``values``; 0 for a module that is dropped.

    Raises
    ------
    InputError
        Every value is zero, or no direction fits.

    Examples
    --------
    >>> sigma = {"q": np.array([3.0, 2.0]), "v": np.array([4.0, 1.0])}
    >>> ranks_within(30, sigma, {"q": 10, "v": 10})
    {'q': 2, 'v': 1}
    """
    names = list(values)
    sizes = [len(values[name]) for name in names]
    gains = np.concatenate([values[name] / np.sqrt(costs[name]) for name in names])
    owners = np.repeat(np.arange(len(names)), sizes)
    if not gains.any():
        raise InputError(_UNTRAINED)
    ranks, remaining = np.zeros(len(names), dtype=int), budget
    for i in np.argsort(-gains, kind="stable"):
        cost = costs[names[owners[i]]]
        if gains[i] > 0 and cost <= remaining:
            ranks[owners[i]] += 1
            remaining -= cost
    if not ranks.any():
        message = (
            f"A budget of {budget:,} parameters holds no direction of any module: the smallest "
            f"takes {min(costs.values()):,}."
        )
        raise InputError(message)
    return dict(zip(names, ranks.tolist(), strict=True))


def error_by_parameters(
    values: Mapping[str, NDArray[np.float64]], costs: Mapping[str, int], *, uniform: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the error of a truncated adapter as a function of its number of parameters.

    The relative error is ``‖ΔW − ΔW′‖_F/‖ΔW‖_F`` over all modules at once. Directions are added
    one by one as in `ranks_within`, or (``uniform``) one to every module at a time.

    Parameters
    ----------
    values, costs
        As for `ranks_within`.
    uniform
        True to give every module the same rank, up to its own.

    Returns
    -------
    tuple of ndarray
        Parameters, ascending, and errors, descending; one entry per direction, or per rank.

    Raises
    ------
    InputError
        Every value is zero.

    Examples
    --------
    >>> error_by_parameters({"q": np.array([4.0, 3.0])}, {"q": 10})
    (array([10, 20]), array([0.6, 0. ]))
    """
    names = list(values)
    sizes = [len(values[name]) for name in names]
    cost = np.repeat([costs[name] for name in names], sizes)
    energy = np.concatenate([values[name] ** 2 for name in names])
    total = energy.sum()
    if not total > 0:
        raise InputError(_UNTRAINED)
    index = np.concatenate([np.arange(size) for size in sizes])  # within the module
    if uniform:
        order = np.argsort(index, kind="stable")
        ends = np.flatnonzero(np.diff(index[order], append=index.max() + 1))
    else:
        order = np.argsort(-energy / cost, kind="stable")
        ends = np.arange(len(order))
    rest = np.cumsum(energy[order][::-1])[::-1] - energy[order]  # no difference of large numbers
    parameters = np.cumsum(cost[order])[ends].astype(np.int64)
    return parameters, np.sqrt(np.maximum(rest[ends], 0.0) / total)

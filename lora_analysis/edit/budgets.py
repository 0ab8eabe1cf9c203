"""Ranks for many modules out of one number of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_analysis.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


def ranks_within(
    budget: int,
    values: Mapping[str, NDArray[np.float64]],
    costs: Mapping[str, int],
) -> dict[str, int]:
    """Return the rank of each module that keeps most of Σσ² in ``budget`` parameters.

    Every direction of every module stands in one queue by the energy it keeps per parameter,
    ``σ²/(d_out + d_in)``; each is taken if it still fits. Within a module σ falls and the cost
    is one and the same, so leading directions are taken first.

    Where all modules have one shape, and wherever no direction had to be passed over, no choice of
    ranks keeps more. Otherwise no choice keeps more than this one and the first direction that
    was passed over together (the bound of the knapsack's relaxation).

    Parameters
    ----------
    budget
        Numbers in all factors together.
    values
        Per module its singular values, descending.
    costs
        Per module the numbers that one direction takes, ``d_out + d_in``.

    Returns
    -------
    dict
        Rank by module, in the order of ``values``; 0 where nothing of a module is kept.

    Raises
    ------
    InputError
        Every value is zero, or not one direction fits.

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
    ranks, left = np.zeros(len(names), dtype=int), budget
    for at in np.argsort(-gains, kind="stable"):
        cost = costs[names[owners[at]]]
        if gains[at] > 0 and cost <= left:
            ranks[owners[at]] += 1
            left -= cost
    if not gains.any():
        message = "Every module is zero (untrained): a budget has nothing to be spent on."
        raise InputError(message)
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
    """Return how the error of a smaller adapter falls with its parameters.

    The relative error is ``‖ΔW − ΔW′‖_F/‖ΔW‖_F`` over all modules at once. Directions are taken
    one by one as in `ranks_within`, or (``uniform``) the same rank in every module.

    Parameters
    ----------
    values, costs
        As for `ranks_within`.
    uniform
        Whether every module gets the same rank, as far as its own goes.

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
        message = "Every module is zero (untrained): a budget has nothing to be spent on."
        raise InputError(message)
    place = np.concatenate([np.arange(size) for size in sizes])
    if uniform:
        order = np.argsort(place, kind="stable")
        ends = np.flatnonzero(np.diff(place[order], append=place.max() + 1))
    else:
        order = np.argsort(-energy / cost, kind="stable")
        ends = np.arange(len(order))
    left = np.cumsum(energy[order][::-1])[::-1] - energy[order]  # no difference of large numbers
    parameters = np.cumsum(cost[order])[ends].astype(np.int64)
    return parameters, np.sqrt(np.maximum(left[ends], 0.0) / total)

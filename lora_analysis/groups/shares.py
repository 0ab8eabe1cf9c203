"""Shares of energy that a fixed subspace explains, with their random baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_analysis import chance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """Share of each member's energy in subspaces that were built without that member.

    The random baseline is isotropic: random directions of the member, a fixed subspace. Unrelated
    adapters of one base exceed it too, so a small p-value means "not isotropic" and no more.

    Attributes
    ----------
    values
        ``(N,)`` or ``(N, K)``, in [0, 1]; NaN for an untrained member, and if the others have
        no such subspace.
    directions
        Dimension of the subspace, broadcasts with ``values``.
    dimension
        Dimension of the space: d_in or d_out.
    singular_values
        ``(N, n)``: of each member, divided by its norm and padded with zeros.
    """

    values: NDArray[np.float64]
    directions: NDArray[np.intp]
    dimension: int
    singular_values: NDArray[np.float64]

    @property
    def chance(self) -> NDArray[np.float64]:
        """Isotropic mean, directions/dimension (exact)."""
        return np.asarray(self.directions / self.dimension)

    @property
    def excess(self) -> NDArray[np.float64]:
        """``(share − chance)/(1 − chance)``: the form to average over modules."""
        return chance.excess(self.values, np.broadcast_to(self.chance, self.values.shape))

    @property
    def variance(self) -> NDArray[np.float64]:
        """Isotropic variance of each share (exact), by the member's own spectrum."""
        return self._by_member(
            lambda s, k, _: chance.one_sided_energy_variance(1.0, np.sum(s**4), self.dimension, k)
        )

    @property
    def p_value(self) -> NDArray[np.float64]:
        """P(share_null ≥ share); see `chance.one_sided_energy_p_value` for its accuracy."""
        return self._by_member(
            lambda s, k, share: chance.one_sided_energy_p_value(
                share / (k / self.dimension), s, self.dimension, k
            )
        )

    def quantile(self, level: ArrayLike) -> NDArray[np.float64]:
        """Return the share that random directions stay below with probability ``level``."""
        return self._by_member(
            lambda s, k, _: chance.one_sided_energy_quantile(s, self.dimension, k, level)
        )

    def _by_member(
        self,
        function: Callable[
            [NDArray[np.float64], NDArray[np.intp], NDArray[np.float64]], NDArray[np.float64]
        ],
    ) -> NDArray[np.float64]:
        directions = np.broadcast_to(self.directions, self.values.shape)
        result = np.full(self.values.shape, np.nan)
        for i, singular_values in enumerate(self.singular_values):
            defined = ~np.isnan(self.values[i])
            if defined.any():
                values = function(singular_values, directions[i], self.values[i])
                result[i] = np.where(defined, values, np.nan)
        return result

"""Follow a training of transformers' ``Trainer``: spectra, overlaps and drift of A, as it goes on.

Nothing of transformers is imported: the callback has the methods that a ``Trainer`` calls.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np

from lora_analysis import linalg
from lora_analysis.adapter import LowRankUpdate
from lora_analysis.blocks import choose_names, locate_module
from lora_analysis.errors import InputError
from lora_analysis.formats import as_adapter, read_factors
from lora_analysis.names import match_names
from lora_analysis.similarity import energy_overlap
from lora_analysis.spectra import SIDES, Spectrum, spectrum

if TYPE_CHECKING:
    from numpy.typing import NDArray


PREFIX: Final = "subspace"


class _InitialFactor(NamedTuple):
    """A of one module at the start: itself, its norm, and a basis of its row space."""

    A: NDArray[np.float64]
    norm: float
    basis: NDArray[np.float64]

    @classmethod
    def of(cls, update: LowRankUpdate) -> _InitialFactor:
        A = update.A.astype(np.float64)
        return cls(A, float(np.linalg.norm(A)), np.linalg.qr(A.T)[0])


class SubspaceCallback:
    """Log what an adapter learns during a training, at chosen steps, through the ``Trainer``.

    ``SubspaceCallback(every=50).attach(trainer)`` adds it to a trainer before ``trainer.train()``.
    At step 0 and at every look, these numbers are logged as ``subspace/<name>``, the median over
    the modules, and as ``subspace/<module type>/<name>``, the median over those of one type:

    - ``sigma_1``, ``norm``, ``stable_rank``, ``effective_rank`` of ΔW;
    - ``omega_last_output`` and ``omega_last_input``: the energy-weighted overlap ω of ΔW with that
      of the last look, 1 if the directions stayed the same;
    - ``omega_reference_output`` and ``omega_reference_input``: ω with a reference adapter;
    - ``A_drift``: ``‖A − A₀‖/‖A₀‖`` with A₀ of step 0;
    - ``A_rotation``: 1 minus the mean squared cosine of the principal angles between the row
      spaces of A and A₀; 0 if A spans what it spanned at step 0.

    Numbers that are not defined, such as an overlap of ΔW = 0 at step 0, are left out.

    Parameters
    ----------
    every
        Number of optimizer steps between two looks. The end of the training is a look too.
    modules
        Suffixes of module names, or one regular expression; all modules by default.
    reference
        An adapter to compare with, in any form that :func:`lora_analysis.as_adapter` takes.
    adapter_name
        Name of the adapter in the model; the active one by default.
    by_type
        Whether to log the medians over module types too.

    Attributes
    ----------
    history
        The logged numbers of every look, with the key ``"step"``.

    Raises
    ------
    InputError
        ``every`` is below 1. At the start of the training: the model has no such adapter, or no
        module matches. An adapter that cannot be read later (non-finite numbers) gives a warning,
        and the training goes on.

    Notes
    -----
    A callback knows the step and the model, but not its trainer, and ``Trainer.log`` is the only
    way to the log history, the progress bar and every reporter: reporters run before callbacks of
    the user, so that entries added to ``logs`` in ``on_log`` would come too late for them. Hence
    ``attach``. Without it the numbers are in ``history`` alone. Logging also clears the trainer's
    wish to log the loss at this step, which the callback restores.

    A look reads the factors and costs a QR decomposition of each, O((d_out + d_in)·r²) per module.
    """

    def __init__(
        self,
        *,
        every: int = 100,
        modules: str | Sequence[str] | None = None,
        reference: Any = None,
        adapter_name: str | None = None,
        by_type: bool = True,
    ) -> None:
        if every < 1:
            message = f"every is a number of optimizer steps, at least 1, got {every}."
            raise InputError(message)
        self.every = every
        self.modules = modules
        self.adapter_name = adapter_name
        self.by_type = by_type
        self.history: list[dict[str, float]] = []
        self._trainer: Any = None
        self._reference = (
            None
            if reference is None
            else {name: spectrum(update) for name, update in as_adapter(reference).items()}
        )
        self._reference_names: Mapping[str, str] = {}
        self._initial: dict[str, _InitialFactor] = {}
        self._last: dict[str, Spectrum] = {}

    def attach(self, trainer: Any) -> Self:
        """Add the callback to a trainer, and log to whatever it reports to."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a method that does nothing for every other event of a trainer."""
        if name.startswith("on_"):
            return _ignore_event
        raise AttributeError(name)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the trainer, which does not pickle."""
        return {**vars(self), "_trainer": None}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any
    ) -> None:
        """Look at the model before the first step; raise if it cannot be read."""
        self._initial, self._last = {}, {}
        self._log(self.look(model), args, state, control)

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any
    ) -> None:
        """Look at the model every so many optimizer steps."""
        if state.global_step % self.every == 0:
            self._try_look(model, args, state, control)

    def on_train_end(
        self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any
    ) -> None:
        """Look at the trained model, unless the last step was a look."""
        if not self.history or self.history[-1]["step"] != state.global_step:
            self._try_look(model, args, state, control)

    def look(self, model: Any) -> dict[str, float]:
        """Return the numbers of a model now; the next look is compared with this one.

        The first look sets A₀. For training loops without a ``Trainer``.
        """
        adapter = read_factors(model, adapter_name=self.adapter_name)
        names = choose_names(adapter, self.modules)
        if not names:
            message = (
                f"No module matches {self.modules!r}. The adapter has {len(adapter)}, as "
                f"'{next(iter(adapter))}'."
            )
            raise InputError(message)
        if self._reference is not None and not self._reference_names:
            self._reference_names = match_names(names, self._reference).pairs
        updates = {name: adapter[name] for name in names}
        spectra = {name: spectrum(update) for name, update in updates.items()}
        rows = {name: self._module_numbers(name, spectra[name], updates[name]) for name in names}
        self._last = spectra
        groups: dict[str, list[Mapping[str, float]]] = {PREFIX: list(rows.values())}
        if self.by_type:
            for module, numbers in rows.items():
                groups.setdefault(f"{PREFIX}/{locate_module(module).name}", []).append(numbers)
        medians = {}
        for group, members in groups.items():
            for name in dict.fromkeys(key for row in members for key in row):
                values = [row[name] for row in members if math.isfinite(row.get(name, math.nan))]
                if values:
                    medians[f"{group}/{name}"] = float(median(values))
        return medians

    def _module_numbers(self, name: str, current: Spectrum, update: Any) -> dict[str, float]:
        """Return the numbers of one module: its spectrum, overlaps, and the drift of A."""
        numbers = {
            "sigma_1": float(current.S[0]),
            "norm": current.norm,
            "stable_rank": current.stable_rank,
            "effective_rank": current.effective_rank,
        }
        if self._reference is not None and name in self._reference_names:
            others = {"reference": self._reference[self._reference_names[name]]}
        else:
            others = {}
        if name in self._last:
            others["last"] = self._last[name]
        for what, other in others.items():
            for side in SIDES:
                if current.shape == other.shape:
                    numbers[f"omega_{what}_{side}"] = energy_overlap(current, other, side=side)
        if isinstance(update, LowRankUpdate):
            now = _InitialFactor.of(update)
            first = self._initial.setdefault(name, now)
            # The A of an embedding starts at zero, without a row space.
            if first.A.shape == now.A.shape and first.norm and now.norm:
                angles = linalg.principal_angles(first.basis, now.basis)
                numbers["A_drift"] = float(np.linalg.norm(now.A - first.A)) / first.norm
                numbers["A_rotation"] = float(np.mean(np.sin(angles) ** 2))
        return numbers

    def _try_look(self, model: Any, args: Any, state: Any, control: Any) -> None:
        try:
            numbers = self.look(model)
        except InputError as error:
            message = f"SubspaceCallback: step {state.global_step} is not analyzed: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        else:
            self._log(numbers, args, state, control)

    def _log(self, numbers: Mapping[str, float], _args: Any, state: Any, control: Any) -> None:
        self.history.append({"step": state.global_step, **numbers})
        if self._trainer is not None:
            is_due = control.should_log
            self._trainer.log(dict(numbers))
            control.should_log = is_due


def _ignore_event(*_args: Any, **_kwargs: Any) -> None:
    """Leave the control of a trainer as it is."""

"""A full fine-tune as an adapter: the difference of two models, weight by weight."""

from __future__ import annotations

import os
from copy import copy
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from lora_analysis.adapter import Adapter, DenseUpdate, Provenance
from lora_analysis.bases.base_weights import BaseWeights
from lora_analysis.bases.opening import open_base
from lora_analysis.bases.tensor_names import module_of
from lora_analysis.blocks import choose_names
from lora_analysis.errors import BaseWeightError, InputError
from lora_analysis.finding import Finding
from lora_analysis.storage.source_names import existing_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Layout
    from lora_analysis.bases.weight import Weight

    # The error is the reason why a weight has no counterpart.
    Outcome = Literal["changed", "identical"] | BaseWeightError

# Tables that a model looks rows up in; LoRA adapts them as embeddings. By their whole names:
# GPT-NeoX calls its head "embed_out", vision models their patches' projection "embed", and both
# are linear layers.
_TABLES: Final = frozenset(
    {
        "wte", "wpe", "shared", "relative_attention_bias", "embed_tokens", "embed_positions",
        "embed_in", "embed_tokens_per_layer", "token_embd", "position_embd", "tok_embd",
    }
)  # fmt: skip
_TABLE_ENDINGS: Final = ("embedding", "embeddings")
# Two axes of channels, and up to three of the kernel.
_CONV_AXES: Final = 5


def read_fine_tune(
    tuned: Any,
    base: Any,
    *,
    modules: str | Sequence[str] | None = None,
    transposed: bool | None = None,
    label: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Adapter:
    """Read a full fine-tune as an adapter: ``ΔW = W_tuned - W_base`` for every weight matrix.

    Weights are matched by name and shape, like an adapter's modules. Both models are read once to
    find the weights that differ. A difference is computed when a module is accessed, in float32,
    from two streams, with one matrix of the weight's size in memory.

    Parameters
    ----------
    tuned, base
        The two models: anything :func:`lora_analysis.open_base` accepts or returns.
    modules
        Modules to read: the end of a name, a list of ends, or a regular expression. None for all.
    transposed
        As in ``BaseWeights.weight``, for both.
    label
        Short name for tables and figures; by default the fine-tune's.
    progress
        Function called with (name of the stage, done, total).

    Returns
    -------
    Adapter
        Dense updates, for every metric and for :func:`lora_analysis.resize_adapter`. Compare with
        :func:`lora_analysis.edit.noise_of_equal_norm` for effects of their size alone. Weights
        that are identical in both are left out. Their number, weights without a counterpart, and
        further tensors that differ (biases, norms, stacks of experts) are in
        ``provenance.findings``.

    Raises
    ------
    BaseWeightError
        No weight of one model matches one of the other, or an orientation cannot be determined.
    InputError
        No weight differs, or none matches ``modules``.
    """
    new, old = _of_one_family(_opened(tuned), _opened(base))
    name = label or new.label
    names = _select_modules(new, modules, name)
    outcomes = {}
    for done, module in enumerate(names, start=1):
        outcomes[module] = _compare(new, old, module, transposed)
        if progress:
            progress("weights", done, len(names))
    changed = [module for module, outcome in outcomes.items() if outcome == "changed"]
    if not changed:
        raise _no_difference(outcomes, name, old.label)
    return Adapter(
        {module: partial(_difference, new, old, module, name, transposed) for module in changed},
        label=name,
        provenance=Provenance(
            path=existing_path(tuned) if isinstance(tuned, str | os.PathLike) else None,
            also_read=(*new.inputs, *old.inputs),
            address=new.address,
            revision=None if new.snapshot is None else new.snapshot.commit,
            format="full fine-tune",
            base_model=_base_name(base, old),
            scale_origin=dict.fromkeys(changed, "tensor"),
            findings=tuple(
                _findings(
                    outcomes, _other_differences(new, old) if modules is None else [], old.label
                )
            ),
        ),
        config={} if old.snapshot is None else {"revision": old.snapshot.commit},
    )


def _base_name(base: Any, old: BaseWeights) -> str:
    """Return a name of the base that a loader of the adapter can use."""
    if old.snapshot is not None:
        return old.snapshot.repo
    return str(base) if isinstance(base, str | os.PathLike) else old.label


def _of_one_family(new: BaseWeights, old: BaseWeights) -> tuple[BaseWeights, BaseWeights]:
    """Take each model's family from the other one if its own config is missing."""
    new, old = copy(new), copy(old)
    new.model_type = new.model_type or old.model_type
    old.model_type = old.model_type or new.model_type
    return new, old


def _opened(model: Any) -> BaseWeights:
    return model if isinstance(model, BaseWeights) else open_base(model)


def _select_modules(new: BaseWeights, modules: str | Sequence[str] | None, label: str) -> list[str]:
    """Return the modules of the tuned model with a matrix that the caller selects."""
    matrices = (name for name in new.names if _is_matrix(name, new.stored_shape(name)))
    names = list(dict.fromkeys(filter(None, map(module_of, matrices))))
    chosen = choose_names(names, modules)
    if not chosen:
        problem = (
            "holds no weight matrix" if modules is None else f"has no weight named {modules!r}"
        )
        message = f"{label} {problem}; it has {len(new.names)} tensors."
        raise InputError(message)
    return chosen


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Return True if a tensor is a matrix, or kernels, which are flattened to one."""
    return len(shape) == 2 or _kernel(name, shape) != ()


def _kernel(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the kernel of a convolution's weight, else (); names of stacks lack ".weight"."""
    is_conv = name.endswith(".weight") and 2 < len(shape) <= _CONV_AXES and 0 not in shape
    return shape[2:] if is_conv else ()


def _pair(
    new: BaseWeights, old: BaseWeights, module: str, transposed: bool | None
) -> tuple[Weight, Weight]:
    tuned = new.weight(module, transposed=transposed)
    return tuned, old.weight(module, shape=tuned.shape, transposed=transposed)


def _compare(new: BaseWeights, old: BaseWeights, module: str, transposed: bool | None) -> Outcome:
    """Compare one weight of both models; reading stops at the first tile that differs."""
    try:
        tuned, base = _pair(new, old, module, transposed)
    except BaseWeightError as error:
        return error
    return "identical" if _are_equal(tuned, base) else "changed"


def _are_equal(tuned: Weight, base: Weight) -> bool:
    for tile, base_tile in zip_longest(tuned.blocks(), base.blocks(), fillvalue=None):
        if tile is None or base_tile is None or tile[:2] != base_tile[:2]:
            # Storages with different tiles: read one of the two whole.
            return not _subtract(tuned, base).any()
        if not np.array_equal(tile[2], base_tile[2]):
            return False
    return True


def _difference(
    new: BaseWeights, old: BaseWeights, module: str, label: str, transposed: bool | None
) -> DenseUpdate:
    tuned, base = _pair(new, old, module, transposed)
    table = _is_table(module)
    kernel = _kernel(tuned.name, new.stored_shape(tuned.name)) if tuned.name in new.names else ()
    layout: Layout = "conv1d" if tuned.transposed else "linear"
    if kernel or table:
        layout = "conv" if kernel else "embedding"
    delta = _subtract(tuned, base)
    return DenseUpdate(
        name=module,
        # A table is stored as [entries, features]; its ΔW maps entries to features.
        delta=delta.T if table else delta,
        stored_dtype=tuned.stored_dtype,
        label=label,
        layout=layout,
        kernel=kernel,
    )


def _subtract(tuned: Weight, base: Weight) -> NDArray[np.float32]:
    """Return the difference of two weights, in the memory of the second."""
    delta = base.array()
    for rows, columns, tile in tuned.blocks():
        np.subtract(tile, delta[rows, columns], out=delta[rows, columns])
    return delta


def _is_table(module: str) -> bool:
    last = module.rpartition(".")[2]
    return last in _TABLES or last.endswith(_TABLE_ENDINGS)


def _other_differences(new: BaseWeights, old: BaseWeights) -> list[str]:
    """Return the names of shared tensors that are not matrices and that differ."""
    old_names = set(old.names)
    return [
        name
        for name in new.names
        if name in old_names
        and not _is_matrix(name, shape := new.stored_shape(name))
        and shape == old.stored_shape(name)
        and not np.array_equal(new.stored_tensor(name), old.stored_tensor(name))
    ]


def _findings(
    outcomes: Mapping[str, Outcome], others: Sequence[str], base: str
) -> Iterator[Finding]:
    identical = [module for module, outcome in outcomes.items() if outcome == "identical"]
    unmatched = {m: error for m, error in outcomes.items() if isinstance(error, BaseWeightError)}
    counts = {"of": len(outcomes), "base": base}
    if identical:
        fields = {"count": len(identical), "modules": identical, **counts}
        yield Finding("unchanged-weights", fields)
    if unmatched:
        reason = str(next(iter(unmatched.values())))
        fields = {"count": len(unmatched), "modules": list(unmatched), "reason": reason, **counts}
        yield Finding("weights-without-counterpart", fields)
    if others:
        yield Finding("other-tensors-differ", {"count": len(others), "tensors": list(others)})


def _no_difference(outcomes: Mapping[str, Outcome], label: str, base: str) -> InputError:
    """Return the error if no weight differs."""
    reasons = [outcome for outcome in outcomes.values() if isinstance(outcome, BaseWeightError)]
    if len(reasons) == len(outcomes):
        return reasons[0]
    return InputError(
        f"No weight matrix of {label} differs from {base}: {len(outcomes) - len(reasons)} are "
        f"identical, {len(reasons)} have no counterpart. Is it the base itself?"
    )

"""A full fine-tune as an adapter: the difference of two models, weight by weight."""

from __future__ import annotations

import os
from copy import copy
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from lora_analysis.adapter import Adapter, DenseUpdate, Provenance
from lora_analysis.bases.naming import module_of
from lora_analysis.bases.opening import open_base
from lora_analysis.bases.weights import BaseWeights
from lora_analysis.errors import BaseWeightError, InputError
from lora_analysis.finding import as_findings
from lora_analysis.patterns import choose_names
from lora_analysis.storage.paths import existing_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Layout
    from lora_analysis.bases.weights import Weight

    # The error says why a weight has no counterpart.
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
_LISTED: Final = 6
# Those of the channels, and up to three of the kernel.
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
    """Return what a full fine-tune changed: ``ΔW = W_tuned - W_base`` for every weight matrix.

    Weights are matched by name and shape, as an adapter's modules are. Both models are gone
    through once to see which weights differ; a difference is formed when a module is asked for,
    in float32, from the two streams: one matrix of the weight's size is all that is held.

    Parameters
    ----------
    tuned, base
        The two models: anything :func:`lora_analysis.open_base` takes, or what it returned.
    modules
        Only these: the end of a name, a list of ends, or a regular expression.
    transposed
        As in ``BaseWeights.weight``, for both.
    label
        Short name for tables and figures; by default the fine-tune's.
    progress
        Called with (what, done, total).

    Returns
    -------
    Adapter
        Of dense updates, for every metric and for :func:`lora_analysis.resize_adapter`; what of
        them is due to their size alone, :func:`lora_analysis.edit.noise_of_equal_norm` shows.
        Weights that are identical in both are left out. Their number, weights without a
        counterpart, and other tensors that differ (biases, norms, stacks of experts) are in
        ``provenance.findings``.

    Raises
    ------
    BaseWeightError
        No weight of one model belongs to one of the other, or an orientation cannot be known.
    InputError
        No weight differs, or none is named so.
    """
    new, old = _of_one_family(_opened(tuned), _opened(base))
    name = label or new.label
    names = _chosen(new, modules, name)
    outcomes = {}
    for done, module in enumerate(names, start=1):
        outcomes[module] = _outcome(new, old, module, transposed)
        if progress:
            progress("weights", done, len(names))
    changed = [module for module, outcome in outcomes.items() if outcome == "changed"]
    if not changed:
        raise _nothing(outcomes, name, old.label)
    return Adapter(
        {one: partial(_difference, new, old, one, name, transposed) for one in changed},
        label=name,
        provenance=Provenance(
            path=existing_path(tuned) if isinstance(tuned, str | os.PathLike) else None,
            also_read=(*new.inputs, *old.inputs),
            address=new.address,
            revision=None if new.snapshot is None else new.snapshot.commit,
            format="full fine-tune",
            base_model=_base_name(base, old),
            scale_origin=dict.fromkeys(changed, "tensor"),
            findings=as_findings(
                tuple(_findings(outcomes, _others(new, old) if modules is None else [], old.label))
            ),
        ),
        config={} if old.snapshot is None else {"revision": old.snapshot.commit},
    )


def _base_name(base: Any, old: BaseWeights) -> str:
    """Return what a loader of the adapter may call the base."""
    if old.snapshot is not None:
        return old.snapshot.repo
    return str(base) if isinstance(base, str | os.PathLike) else old.label


def _of_one_family(new: BaseWeights, old: BaseWeights) -> tuple[BaseWeights, BaseWeights]:
    """Let each model know its family from the other, where one comes without its config."""
    pair = copy(new), copy(old)
    for one, other in zip(pair, pair[::-1], strict=True):
        one.model_type = one.model_type or other.model_type
    return pair


def _opened(model: Any) -> BaseWeights:
    return model if isinstance(model, BaseWeights) else open_base(model)


def _chosen(new: BaseWeights, modules: str | Sequence[str] | None, label: str) -> list[str]:
    """Return the modules of the tuned model that have a matrix, of which the caller means some."""
    matrices = (name for name in new.names if _is_matrix(name, new.stored_shape(name)))
    names = list(dict.fromkeys(filter(None, map(module_of, matrices))))
    chosen = choose_names(names, modules)
    if not chosen:
        what = "holds no weight matrix" if modules is None else f"has no weight named {modules!r}"
        message = f"{label} {what}; it has {len(new.names)} tensors."
        raise InputError(message)
    return chosen


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor is a matrix, or kernels, which are one once flattened."""
    return len(shape) == 2 or _kernel(name, shape) != ()


def _kernel(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the kernel of a convolution's weight, empty for others: a stack's has no ".weight"."""
    is_conv = name.endswith(".weight") and 2 < len(shape) <= _CONV_AXES and 0 not in shape
    return shape[2:] if is_conv else ()


def _pair(
    new: BaseWeights, old: BaseWeights, module: str, transposed: bool | None
) -> tuple[Weight, Weight]:
    one = new.weight(module, transposed=transposed)
    return one, old.weight(module, shape=one.shape, transposed=transposed)


def _outcome(new: BaseWeights, old: BaseWeights, module: str, transposed: bool | None) -> Outcome:
    """Return what became of one weight; reading stops at the first part that differs."""
    try:
        one, other = _pair(new, old, module, transposed)
    except BaseWeightError as error:
        return error
    return "identical" if _equal(one, other) else "changed"


def _equal(one: Weight, other: Weight) -> bool:
    parts = zip_longest(one.blocks(), other.blocks(), fillvalue=None)
    for part, against in parts:
        if part is None or against is None or part[:2] != against[:2]:
            # Two storages that are cut in other places: one of the two is held whole.
            return not _subtracted(one, other).any()
        if not np.array_equal(part[2], against[2]):
            return False
    return True


def _difference(
    new: BaseWeights, old: BaseWeights, module: str, label: str, transposed: bool | None
) -> DenseUpdate:
    one, other = _pair(new, old, module, transposed)
    table = _is_table(module)
    kernel = _kernel(one.name, new.stored_shape(one.name)) if one.name in new.names else ()
    delta = _subtracted(one, other)
    return DenseUpdate(
        name=module,
        # A table is stored as [entries, features]; its ΔW leads from entries to features.
        delta=delta.T if table else delta,
        stored_dtype=one.stored_dtype,
        label=label,
        layout=_layout(module, one, kernel),
        kernel=kernel,
    )


def _layout(module: str, weight: Weight, kernel: tuple[int, ...]) -> Layout:
    if kernel:
        return "conv"
    if _is_table(module):
        return "embedding"
    return "conv1d" if weight.transposed else "linear"


def _subtracted(one: Weight, other: Weight) -> NDArray[np.float32]:
    """Return the difference of two weights, in the memory of the second."""
    delta = other.array()
    for rows, columns, tile in one.blocks():
        np.subtract(tile, delta[rows, columns], out=delta[rows, columns])
    return delta


def _is_table(module: str) -> bool:
    last = module.rpartition(".")[2]
    return last in _TABLES or last.endswith(_TABLE_ENDINGS)


def _others(new: BaseWeights, old: BaseWeights) -> list[str]:
    """Return the names of other tensors than matrices that both have and that differ."""
    there = set(old.names)
    return [
        name
        for name in new.names
        if name in there
        and not _is_matrix(name, shape := new.stored_shape(name))
        and shape == old.stored_shape(name)
        and not np.array_equal(new.stored_tensor(name), old.stored_tensor(name))
    ]


def _findings(outcomes: Mapping[str, Outcome], others: Sequence[str], base: str) -> Iterator[str]:
    identical = [module for module, outcome in outcomes.items() if outcome == "identical"]
    lost = {m: outcome for m, outcome in outcomes.items() if isinstance(outcome, BaseWeightError)}
    if identical:
        yield (
            f"{len(identical)} of {len(outcomes)} weights are identical in {base} and left out: "
            f"{_listed(identical)}."
        )
    if lost:
        yield (
            f"{len(lost)} of {len(outcomes)} weights are left out, since nothing in {base} can be "
            f"held against them: {_listed(list(lost))}. The first: {next(iter(lost.values()))}"
        )
    if others:
        yield (
            f"{len(others)} tensors that are no matrices (biases, norms, stacks) differ too "
            f"and are not part of the update: {_listed(others)}."
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _nothing(outcomes: Mapping[str, Outcome], label: str, base: str) -> InputError:
    """Return the error where no weight is known to differ."""
    reasons = [outcome for outcome in outcomes.values() if isinstance(outcome, BaseWeightError)]
    if len(reasons) == len(outcomes):
        return reasons[0]
    return InputError(
        f"No weight matrix of {label} differs from {base}: {len(outcomes) - len(reasons)} are "
        f"identical, {len(reasons)} have no counterpart. Is it the base itself?"
    )

"""A full fine-tune as an adapter: the difference of two models, weight by weight."""

from __future__ import annotations

import os
from copy import copy
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from lora_analysis.adapter import (
    FULL_FINE_TUNE,
    Adapter,
    DenseUpdate,
    LazyUpdate,
    Provenance,
    UpdateOutline,
)
from lora_analysis.bases.base_weights import BaseWeights
from lora_analysis.bases.opening import open_base
from lora_analysis.bases.tensor_names import module_of
from lora_analysis.blocks import choose_names
from lora_analysis.errors import BaseWeightError, InputError
from lora_analysis.finding import Finding
from lora_analysis.storage.dtypes import round_float32
from lora_analysis.storage.source_names import existing_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

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
# Half-precision types by the spacing of their numbers at 1, and the root mean square of rounding in
# units of it and of the numbers, whose digits are taken as spread evenly over the logarithm.
_HALF: Final = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
_ROUNDING: Final = 0.196
# Two axes of channels, and up to three of the kernel.
_CONV_AXES: Final = 5


def read_fine_tune(
    tuned: Any,
    base: Any,
    *,
    modules: str | Sequence[str] | None = None,
    transposed: bool | None = None,
    label: str | None = None,
    allow_pickle: bool = False,
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
    allow_pickle
        As in :func:`lora_analysis.open_base`, for both.
    progress
        Function called with (name of the stage, done, total).

    Returns
    -------
    Adapter
        Dense updates, for every metric and for :func:`lora_analysis.resize_adapter`; zero for
        weights that are the base's, or the base's rounded to the type in which the fine-tune is
        stored. Compare with :func:`lora_analysis.edit.noise_of_equal_norm` for effects of their
        size alone. ``provenance.findings`` has the unchanged weights, those of either model
        without a counterpart, further tensors that differ (biases, norms, stacks of experts) with
        their relative change, and the rounding of the stored types.

    Raises
    ------
    BaseWeightError
        No weight of one model matches one of the other, or an orientation cannot be determined.
    InputError
        No weight differs, or none matches ``modules``.
    """
    new, old = (
        copy(model)
        if isinstance(model, BaseWeights)
        else open_base(model, allow_pickle=allow_pickle)
        for model in (tuned, base)
    )
    # A model without a config of its own is of the other's family.
    new.model_type = new.model_type or old.model_type
    old.model_type = old.model_type or new.model_type
    name = label or new.label
    names = _select_modules(new, modules, name)
    outcomes: dict[str, Outcome] = {}
    updates = {}
    for done, module in enumerate(names, start=1):
        try:
            pair = _pair(new, old, module, transposed)
        except BaseWeightError as error:
            outcomes[module] = error
        else:
            outcomes[module] = "identical" if _are_equal(*pair) else "changed"
            outline = _outline(new, module, pair[0])
            changed = outcomes[module] == "changed"
            read = partial(_difference, new, old, outline, name, transposed, changed=changed)
            updates[module] = LazyUpdate(outline, read)
        if progress:
            progress("weights", done, len(names))
    if "changed" not in outcomes.values():
        reasons = [error for error in outcomes.values() if isinstance(error, BaseWeightError)]
        if len(reasons) == len(outcomes):
            raise reasons[0]
        message = (
            f"No weight matrix of {name} differs from {old.label}: {len(outcomes) - len(reasons)} "
            f"are identical, {len(reasons)} have no counterpart. Is it the base itself?"
        )
        raise InputError(message)
    findings = list(_findings_on_weights(new, old, outcomes, transposed))
    if modules is None:
        findings += _findings_on_others(new, old)
    return Adapter(
        updates,
        label=name,
        provenance=Provenance(
            path=existing_path(tuned) if isinstance(tuned, str | os.PathLike) else new.path,
            also_read=(*new.inputs, *old.inputs),
            address=new.address,
            revision=None if new.snapshot is None else new.snapshot.commit,
            format=FULL_FINE_TUNE,
            base_model=_base_name(base, old),
            scale_origin=dict.fromkeys(updates, "tensor"),
            findings=tuple(findings),
        ),
        config={} if old.snapshot is None else {"revision": old.snapshot.commit},
    )


def _base_name(base: Any, old: BaseWeights) -> str:
    """Return a name of the base that a loader of the adapter can use."""
    if old.snapshot is not None:
        return old.snapshot.repo
    return str(base) if isinstance(base, str | os.PathLike) else old.label


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


def _are_equal(tuned: Weight, base: Weight) -> bool:
    """Return True if two weights are equal; reading stops at the first tile that differs.

    A fine-tune in a coarser type has W rounded where it changed nothing.
    """
    dtype = tuned.stored_dtype if tuned.stored_dtype in _HALF else "float32"
    for tile, base_tile in zip_longest(tuned.blocks(), base.blocks(), fillvalue=None):
        if tile is None or base_tile is None or tile[:2] != base_tile[:2]:
            # Storages with different tiles: read one of the two whole.
            whole = round_float32(base.array(), dtype)
            return all(
                np.array_equal(block, whole[rows, columns])
                for rows, columns, block in tuned.blocks()
            )
        if not np.array_equal(tile[2], round_float32(base_tile[2], dtype)):
            return False
    return True


def _outline(new: BaseWeights, module: str, tuned: Weight) -> UpdateOutline:
    """Return the outline of the update of a weight, whose numbers are not read for it."""
    kernel = _kernel(tuned.name, new.stored_shape(tuned.name)) if tuned.name in new.names else ()
    layout: Layout = "conv1d" if tuned.transposed else "linear"
    last = module.rpartition(".")[2]
    table = last in _TABLES or last.endswith(_TABLE_ENDINGS)
    if kernel or table:
        layout = "conv" if kernel else "embedding"
    return UpdateOutline(
        name=module,
        # A table is stored as [entries, features]; its ΔW maps entries to features.
        shape=tuned.shape[::-1] if table else tuned.shape,
        rank=min(tuned.shape),
        scale=1.0,
        stored_dtype=tuned.stored_dtype,
        layout=layout,
        kernel=kernel,
        dense=True,
    )


def _difference(
    new: BaseWeights,
    old: BaseWeights,
    outline: UpdateOutline,
    label: str,
    transposed: bool | None,
    *,
    changed: bool,
) -> DenseUpdate:
    """Return the update of a weight; the two models are read only if they differ in it."""
    if changed:
        tuned, base = _pair(new, old, outline.name, transposed)
        delta = base.array()  # becomes the difference, in the same memory
        for rows, columns, tile in tuned.blocks():
            np.subtract(tile, delta[rows, columns], out=delta[rows, columns])
        delta = delta.T if outline.layout == "embedding" else delta
    else:
        delta = np.zeros(outline.shape, dtype=np.float32)
    return DenseUpdate(
        name=outline.name,
        delta=delta,
        stored_dtype=outline.stored_dtype,
        label=label,
        layout=outline.layout,
        kernel=outline.kernel,
    )


def _findings_on_others(new: BaseWeights, old: BaseWeights) -> Iterator[Finding]:
    """Yield findings on matrices that the fine-tune lacks, and on shared tensors of other kinds."""
    missing: list[tuple[str, str]] = []
    for name in old.names:
        module, shape = module_of(name), old.stored_shape(name)
        if module is None or not _is_matrix(name, shape):
            continue
        try:
            new.weight(module)
        except BaseWeightError as error:
            missing += [(module, str(error))]
    if missing:
        fields = {"count": len(missing), "modules": [module for module, _ in missing]}
        yield Finding("missing-weights", {**fields, "base": old.label, "reason": missing[0][1]})
    old_names = set(old.names)
    changes: dict[str, float] = {}
    for name in new.names:
        shape = new.stored_shape(name)
        if name not in old_names or _is_matrix(name, shape) or shape != old.stored_shape(name):
            continue
        tuned, base = new.stored_tensor(name), old.stored_tensor(name)
        if not np.array_equal(tuned, base):
            tuned, base = (np.asarray(values, np.float64) for values in (tuned, base))
            size = float(np.linalg.norm(base))
            changes[name] = float(np.linalg.norm(tuned - base)) / size if size else float("inf")
    if changes:
        tensors = sorted(changes, key=lambda name: -changes[name])
        fields = {"count": len(changes), "tensors": tensors, "largest": changes[tensors[0]]}
        fields["relative_changes"] = [changes[name] for name in tensors]
        yield Finding("other-tensors-differ", fields)


def _findings_on_weights(
    new: BaseWeights,
    old: BaseWeights,
    outcomes: Mapping[str, Outcome],
    transposed: bool | None,
) -> Iterator[Finding]:
    """Yield findings on unchanged and unmatched weights, and on the stored types of the others."""
    identical: list[str] = []
    unmatched: dict[str, BaseWeightError] = {}
    types: dict[tuple[str, str], list[str]] = {}
    quantized: dict[str, list[str]] = {}
    for module, outcome in outcomes.items():
        if isinstance(outcome, BaseWeightError):
            unmatched[module] = outcome
            continue
        if outcome == "identical":
            identical.append(module)
            continue
        tuned, base = _pair(new, old, module, transposed)
        if tuned.storage != base.storage:
            quantized.setdefault(tuned.storage or base.storage, []).append(module)
        elif tuned.stored_dtype != base.stored_dtype:
            types.setdefault((tuned.stored_dtype, base.stored_dtype), []).append(module)
    counts = {"of": len(outcomes), "base": old.label}
    if identical:
        fields = {"count": len(identical), "modules": identical, **counts}
        yield Finding("unchanged-weights", fields)
    if unmatched:
        reason = str(next(iter(unmatched.values())))
        fields = {"count": len(unmatched), "modules": list(unmatched), "reason": reason, **counts}
        yield Finding("weights-without-counterpart", fields)
    for storage, modules in quantized.items():
        fields = {"count": len(modules), "of": len(outcomes), "modules": modules}
        yield Finding("difference-of-quantized", {**fields, "storage": storage})
    for (dtype, base_dtype), modules in types.items():
        coarse = max((_HALF.get(name, 0.0), name) for name in (dtype, base_dtype))
        if coarse[0]:
            fields = {"count": len(modules), "of": len(outcomes), "modules": modules}
            fields |= {"dtype": dtype, "base_dtype": base_dtype, "coarse": coarse[1]}
            yield Finding("difference-of-types", {**fields, "rounding": _ROUNDING * coarse[0]})

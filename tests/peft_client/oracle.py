"""What PEFT's live layers add to their weights, and how a folder read compares with it."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.formats import read_adapter
from lora_analysis.storage.limits import MAX_VALUE

# Layers whose update is s·B·A whatever the method around it: a refusal of these needs a reason.
PLAIN_LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding")
_FACTOR = re.compile(r"\.lora_(embedding_)?[AB](?=\.weight$|$)")


@dataclass
class LiveUpdate:
    """ΔW of one live layer as the base stores it, and what says how exact and how plain it is."""

    delta: torch.Tensor
    dtype: torch.dtype
    layer: str
    is_plain: bool

    @property
    def matrices(self) -> list[np.ndarray]:
        """Return ΔW as ``(d_out, d_in)``, once per expert; see `LowRankUpdate.layout`."""
        delta = self.delta.detach().double().cpu().numpy()
        if self.layer == "ParamWrapper":
            return list(delta) if delta.ndim == 3 else [delta]
        if self.layer in ("Embedding", "of Conv1D"):
            return [delta.T]
        return [delta.reshape(len(delta), -1)]


@dataclass
class Outcome:
    """What reading one folder gave: right, refused, wrong, crashed or unchecked."""

    kind: str
    method: str
    detail: str = ""
    folder: str = ""
    test: str = field(default="", compare=False)

    @property
    def is_failure(self) -> bool:
        return self.kind not in ("right", "refused")


def live_updates(model: Any, adapter: str, initial: Path | None = None) -> dict[str, LiveUpdate]:
    """Return ΔW of every live layer that has the adapter, by the name of its module.

    With ``initial``, the folder of the adapter before training, its s·B₀·A₀ is subtracted, as
    ``save_pretrained(path_initial_model_for_weight_conversion=)`` does.
    """
    updates = {}
    started = {} if initial is None else load_file(initial / "adapter_model.safetensors")
    root = getattr(model.base_model, "model", model.base_model)
    for path, layer in root.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not hasattr(layer, "get_delta_weight"):
            continue
        if not any(adapter in getattr(layer, names) for names in layer.adapter_layer_names):
            continue
        try:
            variant = getattr(layer, "lora_variant", {}).get(adapter)
            if hasattr(variant, "_get_bdlora_delta_weight"):  # whose blocks the layer stacks
                delta = variant._get_bdlora_delta_weight(layer, adapter)
            elif getattr(layer.get_base_layer(), "groups", 1) > 1 and hasattr(layer, "lora_A"):
                delta = _grouped_product(layer, adapter)
            else:
                delta = layer.get_delta_weight(adapter)
        except Exception:  # noqa: BLE001 - a method that has no ΔW; what is read is "unchecked"
            continue
        if adapter in getattr(layer, "lora_diag", {}):  # KaSA: s·B·diag·A, which that leaves out
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            delta = layer.scaling[adapter] * (B * layer.lora_diag[adapter]) @ A
        stem = f"base_model.model.{path}.lora_"
        if f"{stem}A.weight" in started:
            product = started[f"{stem}B.weight"].double() @ started[f"{stem}A.weight"].double()
            delta = delta.double() - layer.scaling[adapter] * product
        kind = type(layer).__name__
        base = type(layer.get_base_layer()).__name__
        variants = getattr(layer, "lora_variant", {})
        name = path.replace(".base_layer", "")
        if kind == "ParamWrapper" and layer.parameter_name != "weight":
            name = f"{name}.{layer.parameter_name}"
        updates[name] = LiveUpdate(
            delta,
            next(iter(layer.parameters())).dtype if delta.dtype == torch.float64 else delta.dtype,
            "of Conv1D" if base == "Conv1D" else kind,
            kind in PLAIN_LAYERS
            and type(layer).__module__ == "peft.tuners.lora.layer"
            and adapter not in variants,
        )
    return updates


def _grouped_product(layer: Any, adapter: str) -> torch.Tensor:
    """Return ΔW of a grouped convolution, for which PEFT's own ``get_delta_weight`` fails.

    B has the groups of the base and A none: group g of the outputs sees the g-th part of A's rows.
    """
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight.flatten(1)
    groups = layer.lora_B[adapter].groups
    products = [
        torch.tensordot(b, a, dims=1) for b, a in zip(B.chunk(groups), A.chunk(groups), strict=True)
    ]
    return torch.cat(products) * layer.scaling[adapter]


def _starts_from_base(config: Any) -> bool:
    """Return True if training starts from s·B₀·A₀ taken out of the base: ΔW is not s·B·A then."""
    start = getattr(config, "init_lora_weights", None)
    names = ("pissa", "olora", "corda", "lora_ga", "loftq", "milora")
    return isinstance(start, str) and start.lower().startswith(names)


def _is_damaged(factors: Mapping[str, torch.Tensor], layers: int) -> bool:
    """Return True if a factor is missing or holds what no file should: some of PEFT's tests do so.

    Modules are counted, not matched: PEFT may store a module under a name that the model lacks.
    """
    modules = Counter(_FACTOR.sub(".lora", name) for name in factors)
    if len(modules) < layers or any(count != 2 for count in modules.values()):
        return True
    return any(not factor.abs().max() <= MAX_VALUE for factor in factors.values())


def _factors(folder: Path) -> dict[str, torch.Tensor]:
    path, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    tensors: dict[str, torch.Tensor] = {}
    if path.is_file():
        tensors = load_file(path)
    elif pickled.is_file():
        tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    return {name: tensor for name, tensor in tensors.items() if _FACTOR.search(name)}


def check_folder(folder: Path, model: Any, adapter: str, initial: Path | None = None) -> Outcome:
    """Read a folder that PEFT has just saved, and compare it with the live layers."""
    config = model.peft_config[adapter]
    method = str(getattr(config.peft_type, "value", config.peft_type))
    with _undisturbed():
        try:
            kind, text = _compare(folder, model, adapter, initial)
        except Exception as error:  # noqa: BLE001 - whatever is not ours is a crash
            kind, text = "crashed", f"{type(error).__name__}: {error}"
    return Outcome(kind, method, text, str(folder))


def _compare(folder: Path, model: Any, adapter: str, initial: Path | None) -> tuple[str, str]:
    try:
        read = read_adapter(folder, allow_pickle=True)
        live = live_updates(model, adapter, initial)
        problems = list(_differences(read, live))
    except LoraAnalysisError as error:
        plain = _is_plain(folder, model, adapter)
        return "refused plain LoRA" if plain else "refused", f"{type(error).__name__}: {error}"
    if problems:
        return "wrong", "; ".join(problems[:3])
    if not live and len(read):
        return "unchecked", f"{len(read)} modules without a live ΔW"
    return "right", f"{len(read)} modules"


def _is_plain(folder: Path, model: Any, adapter: str) -> bool:
    """Return True if nothing speaks against reading a folder: ΔW is s·B·A, and B and A are sound.

    Layers of other methods are not asked for ΔW: constrained OFT projects its weights to answer.
    """
    config = model.peft_config[adapter]
    if config.peft_type != PeftType.LORA or _starts_from_base(config):
        return False
    live = live_updates(model, adapter)
    plain = bool(live) and all(update.is_plain for update in live.values())
    return plain and not _is_damaged(_factors(folder), len(live))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the random state and the warnings of PEFT's test as they are."""
    with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _differences(read: Adapter, live: dict[str, LiveUpdate]) -> Iterator[str]:
    expected = {}
    for name, update in live.items():
        matrices = update.matrices
        owner, _, parameter = name.rpartition(".")
        for expert, matrix in enumerate(matrices):
            key = f"{owner}.{expert}.{parameter}" if len(matrices) > 1 else name
            expected[key] = (matrix, update)
    if set(read) != set(expected) and live:
        missing, extra = sorted(set(expected) - set(read)), sorted(set(read) - set(expected))
        yield f"modules differ: missing {missing[:4]}, unexpected {extra[:4]}"
    for name in sorted(set(read) & set(expected)):
        matrix, update = expected[name]
        ours, bound = read[name].delta_weight(), _rounding(read[name], update)
        if update.layer == "ParamWrapper" and ours.shape != matrix.shape:
            matrix = matrix.T  # how the base stores a parameter is the base's affair
        if ours.shape != matrix.shape:
            yield f"'{name}' has shape {ours.shape}, PEFT's {matrix.shape}"
            continue
        same = np.abs(ours - matrix) <= bound
        if update.layer == "ParamWrapper" and matrix.shape[0] == matrix.shape[1]:
            same = same if same.all() else np.abs(ours - matrix.T) <= bound
        if not same.all():
            error = np.abs(ours - matrix).max()
            yield f"'{name}' ({update.layer}) differs by {error:.3g} of {np.abs(matrix).max():.3g}"


def _rounding(update: LowRankUpdate | DenseUpdate, live: LiveUpdate) -> np.ndarray:
    """Return how far PEFT's ΔW may lie from the exact product of the same factors.

    PEFT multiplies in float32 at least: (r + 3) roundings of each sum of r products, the scale
    among them; then the result is rounded to the type of the layer. AdaLoRA rounds to that type
    after each of its steps: A·E, its product with B, the scale, the rank, and the division.
    """
    exact = np.abs(update.delta_weight())
    single, stored = (torch.finfo(dtype).eps for dtype in (torch.float32, live.dtype))
    if isinstance(update, DenseUpdate):  # products of products, ranks unknown: its width instead
        return np.full(exact.shape, min(exact.shape) * single * exact.max(initial=0.0) + 1e-12)
    terms = np.abs(update.B.astype(np.float64)) @ np.abs(update.A.astype(np.float64))
    terms *= abs(update.known_scale())
    steps = stored / 2 * (terms + 3 * exact) if live.layer.startswith("SVD") else 0.0
    return (update.rank + 3) * single * terms + stored * exact + steps + 1e-12

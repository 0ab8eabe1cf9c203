"""Where a module is in its model: component, block, layer and part, and choosing modules by them.

Image models are read by blocks. :func:`locate_module` finds a module's block from its name,
whichever program wrote it, and everything that groups, orders or shortens names asks it. Names of
language models keep the generic rule: the layer number and the last part of the name.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from lora_analysis.names import identify, is_flattened, split_component, strip_wrappers
from lora_analysis.patterns import (
    NO_TYPE,
    layer_index,
    matches_target,
    module_type,
    natural_key,
    pattern_budget,
)

UNET: Final = "U-Net"
TRANSFORMER: Final = "transformer"
_TEXT_ENCODER: Final = "text encoder"

# Components by their name in `lora_analysis.names`, in the order of tables and figures.
_COMPONENTS: Final = {
    "": "",
    "denoiser_2": f"{TRANSFORMER} 2",
    "prior": "prior",
    "controlnet": "ControlNet",
    "vae": "VAE",
    "text_encoder": f"{_TEXT_ENCODER} 1",
    "text_encoder_2": f"{_TEXT_ENCODER} 2",
    "text_encoder_3": f"{_TEXT_ENCODER} 3",
    "text_encoder_4": f"{_TEXT_ENCODER} 4",
    "text_encoder_t5": f"{_TEXT_ENCODER} T5",
}
_COMPONENT_ORDER: Final = {name: i for i, name in enumerate(_COMPONENTS.values())} | {
    UNET: 0,
    TRANSFORMER: 0,
}

# Layers of a U-Net under the names of diffusers and of the original code (LDM).
_DOWN_UP: Final = re.compile(
    r"(?P<way>down|up)_blocks_(?P<level>\d)_"
    r"(?P<kind>attentions|resnets|downsamplers|upsamplers)_(?P<position>\d)_(?P<rest>.+)"
)
_MIDDLE: Final = re.compile(r"mid_block_(?P<kind>attentions|resnets)_\d_(?P<rest>.+)")
_INPUT_OUTPUT: Final = re.compile(
    r"(?P<way>input|output)_blocks_(?P<block>\d{1,2})_(?P<position>\d)(_(?P<rest>.+))?"
)
_MIDDLE_BLOCK: Final = re.compile(r"middle_block_\d_(?P<rest>.+)")
_TRANSFORMER_LAYER: Final = re.compile(r"transformer_blocks_(?P<layer>\d{1,3})_(?P<rest>.+)")
# Layers of a residual block: names in diffusers and in the original code.
_RESIDUAL: Final = {
    "conv1": ("conv", "conv1"),
    "in_layers_2": ("conv", "conv1"),
    "conv2": ("conv", "conv2"),
    "out_layers_3": ("conv", "conv2"),
    "conv_shortcut": ("conv", "conv_shortcut"),
    "skip_connection": ("conv", "conv_shortcut"),
    "time_emb_proj": ("time embedding", "time_emb_proj"),
    "emb_layers_1": ("time embedding", "time_emb_proj"),
}
# Layers of a U-Net outside its blocks: (before or after them, part, name).
_OUTSIDE_UNET: Final = {
    "time_embedding_linear_1": (-2, "time embedding", "time_embedding.linear_1"),
    "time_embed_0": (-2, "time embedding", "time_embedding.linear_1"),
    "time_embedding_linear_2": (-2, "time embedding", "time_embedding.linear_2"),
    "time_embed_2": (-2, "time embedding", "time_embedding.linear_2"),
    "add_embedding_linear_1": (-1, "label embedding", "add_embedding.linear_1"),
    "label_emb_0_0": (-1, "label embedding", "add_embedding.linear_1"),
    "add_embedding_linear_2": (-1, "label embedding", "add_embedding.linear_2"),
    "label_emb_0_2": (-1, "label embedding", "add_embedding.linear_2"),
    "conv_out": (9, "conv", "conv_out"),
    "out_2": (9, "conv", "conv_out"),
}
# FLUX under the names of its authors and of diffusers (also SD3 and Qwen-Image, whose blocks have
# two streams as well).
_FLUX: Final = re.compile(r"(?P<kind>double|single)_blocks_(?P<block>\d{1,3})_(?P<rest>.+)")
_FLUX_DIFFUSERS: Final = re.compile(
    r"(?P<single>single_)?transformer_blocks_(?P<block>\d{1,3})_(?P<rest>"
    r"attn_.+|ff_(context_)?net_.+|norm1(_context)?_linear|(img|txt)_(mlp|mod)_.+"
    r"|(norm_linear|proj_mlp|proj_out)(?=$))"
)
_DOUBLE_NAMES: Final = (
    (re.compile(r"attn_(add_([qkv])_proj)"), r"txt_attn.\1"),
    (re.compile(r"attn_to_add_out"), "txt_attn.proj"),
    (re.compile(r"attn_to_out(_0)?"), "img_attn.proj"),
    (re.compile(r"attn_(.+)"), r"img_attn.\1"),
    (re.compile(r"ff_net_0_proj"), "img_mlp.0"),
    (re.compile(r"ff_net_2"), "img_mlp.2"),
    (re.compile(r"ff_context_net_0_proj"), "txt_mlp.0"),
    (re.compile(r"ff_context_net_2"), "txt_mlp.2"),
    (re.compile(r"norm1_linear"), "img_mod.lin"),
    (re.compile(r"norm1_context_linear"), "txt_mod.lin"),
    (re.compile(r"(img|txt)_(mlp)_net_0_proj"), r"\1_\2.0"),
    (re.compile(r"(img|txt)_(mlp)_net_2"), r"\1_\2.2"),
)
_SINGLE_NAMES: Final = (
    (re.compile(r"attn_(.+)"), r"linear1.\1"),
    (re.compile(r"(proj_mlp)"), r"linear1.\1"),
    (re.compile(r"proj_out"), "linear2"),
    (re.compile(r"norm_linear"), "modulation.lin"),
)
# Layers of FLUX outside its blocks: before (-1) or after them.
_OUTSIDE_FLUX: Final = (
    {"img_in": (-1, "img_in"), "x_embedder": (-1, "img_in")}
    | {"txt_in": (-1, "txt_in"), "context_embedder": (-1, "txt_in")}
    | {
        spelling: (-1, f"{part}_in.{layer}_layer")
        for part, embedder in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for layer, number in (("in", 1), ("out", 2))
        for spelling in (
            f"{part}_in_{layer}_layer",
            f"time_text_embed_{embedder}_embedder_linear_{number}",
        )
    }
    | dict.fromkeys(["final_layer_linear", "proj_out"], (9, "final_layer.linear"))
    | dict.fromkeys(
        ["final_layer_adaLN_modulation_1", "norm_out_linear"], (9, "final_layer.modulation")
    )
)
# Groups of layers at the start of the rest of a name: what follows is the layer in the group.
_GROUP: Final = re.compile(
    r"(?P<part>(img_|txt_|self_|cross_|context_|x_block_|context_block_)?attn\d?|(img_|txt_)?mod"
    r"|(img_|txt_)?mlp|ffn?|linear\d|modulation|SelfAttention|EncDecAttention|DenseReluDense)_"
    r"(?P<layer>.+)"
)
# Any other name that lost its dots: the first number is the layer; T5 numbers its parts too.
_NUMBERED: Final = re.compile(
    r"(?:(?P<head>.+?)_)?(?P<layer>\d{1,9})(?:_(?:layer_\d_)?(?P<rest>.+))?"
)


class ModuleLocation(NamedTuple):
    """Where a module is in its model.

    Attributes
    ----------
    component
        ``"U-Net"``, ``"transformer"``, ``"text encoder 1"``, …; empty for a language model.
    block
        ``"IN04"``, ``"MID"``, ``"OUT03"`` of a U-Net, ``"double 3"`` and ``"single 12"`` of FLUX,
        else ``"layer 5"``; empty outside the blocks.
    layer
        Number of the transformer layer in a U-Net's block; None for other modules.
    part
        Group of layers in the block: ``"attn1"``, ``"ff"``, ``"conv"``, ``"img_attn"``, ….
    name
        The layer in the block: ``"attn1.to_q"``, ``"proj_in"``, ``"conv1"``.
    order
        Sorts by component, then in the order of the forward pass.
    """

    component: str
    block: str
    layer: int | None
    part: str
    name: str
    order: tuple[int, ...]

    @property
    def number(self) -> int | None:
        """The number of the block, but of a U-Net's, which are counted in three sequences."""
        last = self.block.rpartition(" ")[2]
        return int(last) if last.isdecimal() else None

    @property
    def short_component(self) -> str:
        """What stands before the block in a title: ``"TE1"``; empty for the denoiser."""
        if self.component.startswith(_TEXT_ENCODER):
            return f"TE{self.component.removeprefix(_TEXT_ENCODER).strip()}".replace("TET5", "T5")
        return "" if _COMPONENT_ORDER[self.component] == 0 else self.component

    def title(self, *, layer: bool) -> str:
        """Return ``"IN04 attn1.to_q"``, with the layer in the block ``"IN04.1 attn1.to_q"``.

        ``"q_proj, layer 2"`` for a language model.
        """
        if not self.component:
            return f"{self.name}, {self.block}"
        block = f"{self.block}.{self.layer}" if layer and self.layer is not None else self.block
        return " ".join(filter(None, (self.short_component, block, self.name)))


@lru_cache(maxsize=1 << 16)
def locate_module(name: str) -> ModuleLocation:
    """Return the component, the block and the part of a module, from its name.

    Spellings of one layer (kohya's, diffusers', those of the model's authors) have one location. A
    U-Net's blocks have the numbers of the original code, as tools for block weights count them:
    block n of ``input_blocks`` is INn, of ``output_blocks`` OUTn, and with two residual blocks per
    level, in Stable Diffusion 1, 2 and XL, diffusers' ``down_blocks.i.{resnets,attentions}.j`` is
    IN(3i + j + 1), ``downsamplers`` of level i IN(3i + 3), ``up_blocks.i.{resnets,attentions}.j``
    OUT(3i + j), ``upsamplers`` of level i OUT(3i + 2), ``conv_in`` IN00. So attention is in IN01,
    02, 04, 05, 07, 08, MID and OUT03 to OUT11 of Stable Diffusion 1, and in IN04, 05, 07, 08, MID
    and OUT00 to OUT05 of XL, whose blocks have 2 or 10 transformer layers each.

    FLUX's ``double_blocks.n`` (diffusers: ``transformer_blocks.n``) is ``"double n"``, its
    ``single_blocks.n`` (``single_transformer_blocks.n``) ``"single n"``. In all other models the
    first number in a name is the layer and the last part of the name the part.

    Examples
    --------
    >>> locate_module("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q")[:5]
    ('U-Net', 'IN04', 0, 'attn1', 'attn1.to_q')
    >>> locate_module("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q").block
    'IN04'
    >>> locate_module("model.layers.12.self_attn.q_proj")[:5]
    ('', 'layer 12', None, 'q_proj', 'q_proj')
    """
    component, path = identify(name, flat=True)
    first, _, inner = component.partition(".")
    known_component = _COMPONENTS.get(first)
    # Numbers alone (cloneofsimo's files) count adapted layers, not the model's.
    if known_component is not None and not inner and not path.isdecimal():
        # Any model may call a layer so.
        is_vague = path in ("out_2", "proj_out") and not (is_flattened(name) or _has_prefix(name))
        if not known_component.startswith(_TEXT_ENCODER) and not is_vague:
            location = _locate_in_unet(path) or _locate_in_flux(path)
            if location is not None:
                return _locate_in_component(location, known_component)
        # Language models of the GPT family are in "transformer" as well.
        is_denoiser = _has_prefix(name) and not strip_wrappers(name).startswith("transformer.")
        if known_component or is_flattened(name) or is_denoiser:
            # In a component of any other kind, the first number is the layer.
            match = _NUMBERED.fullmatch(path)
            location = ModuleLocation(TRANSFORMER, "", None, path, path, (-1,))
            if match is not None:
                number = int(match["layer"])
                part, title = _split_part(match["rest"] or match["head"] or path)
                order = (0, number)
                location = ModuleLocation(TRANSFORMER, f"layer {number}", None, part, title, order)
            return _locate_in_component(location, known_component)
    index = layer_index(name)
    kind = module_type(name)
    return ModuleLocation("", "" if index is None else f"layer {index}", None, kind, kind, ())


def _has_prefix(name: str) -> bool:
    """Return True for a name behind the prefix of a denoiser."""
    component, path = split_component(name)
    return not component and path != strip_wrappers(name)


def _locate_in_component(location: ModuleLocation, component: str) -> ModuleLocation:
    component = component or location.component
    return location._replace(
        component=component, order=(_COMPONENT_ORDER[component], *location.order)
    )


def _locate_in_unet(path: str) -> ModuleLocation | None:
    """Return the location of a layer of a U-Net; None for other names."""
    if path in _OUTSIDE_UNET:
        stage, part, name = _OUTSIDE_UNET[path]
        return ModuleLocation(UNET, "", None, part, name, (stage,))
    if path == "conv_in":
        return _unet_block(0, 0, path)
    if match := _DOWN_UP.fullmatch(path):
        down, sampler = match["way"] == "down", "samplers" in match["kind"]
        level, position = int(match["level"]), int(match["position"])
        if position > (1 if down else 2) or (
            sampler and not match["kind"].startswith(match["way"])
        ):
            return None  # a U-Net with other numbers of layers per level
        number = 3 * level + (2 if sampler else position) + down
        return _unet_block(0 if down else 2, number, match["rest"])
    if match := _INPUT_OUTPUT.fullmatch(path):
        way, number, rest = match["way"], int(match["block"]), match["rest"]
        if way == "input" and number == 0 and rest is None:
            return _unet_block(0, 0, "conv_in")
        return _unet_block(0 if way == "input" else 2, number, rest) if rest else None
    match = _MIDDLE.fullmatch(path) or _MIDDLE_BLOCK.fullmatch(path)
    return _unet_block(1, 0, match["rest"]) if match else None


def _unet_block(way: int, number: int, rest: str) -> ModuleLocation | None:
    """Return the location of ``rest`` in a block of the input, the middle or the output."""
    block = ("IN{:02}", "MID", "OUT{:02}")[way].format(number)
    layer = None
    if match := _TRANSFORMER_LAYER.fullmatch(rest):
        layer = int(match["layer"])
        part, name = _split_part(match["rest"])
        stage = 2
    elif rest in ("proj_in", "proj_out"):
        part = name = rest
        stage = 1 if rest == "proj_in" else 3
    elif rest in _RESIDUAL:
        (part, name), stage = _RESIDUAL[rest], 0
    elif rest == "conv_in":
        part, name, stage = "conv", rest, 0
    elif rest in ("conv", "op"):
        part, name, stage = "conv", "upsample" if way == 2 else "downsample", 4
    else:
        part, name = _split_part(rest)
        stage = 2
    return ModuleLocation(UNET, block, layer, part, name, (way, number, stage, layer or 0))


def _locate_in_flux(path: str) -> ModuleLocation | None:
    """Return the location of a layer of FLUX or a model with such blocks; None for other names."""
    if match := _FLUX.fullmatch(path):
        single, rest = match["kind"] == "single", match["rest"]
        part, name = _split_part(rest)
    elif match := _FLUX_DIFFUSERS.fullmatch(path):
        single, rest = bool(match["single"]), match["rest"]
        part, name = _split_part(_rename_rest(rest, _SINGLE_NAMES if single else _DOUBLE_NAMES))
    elif path in _OUTSIDE_FLUX:
        stage, name = _OUTSIDE_FLUX[path]
        return ModuleLocation(TRANSFORMER, "", None, name.partition(".")[0], name, (stage,))
    else:
        return None
    number = int(match["block"])
    block = f"{'single' if single else 'double'} {number}"
    return ModuleLocation(TRANSFORMER, block, None, part, name, (int(single), number))


def _rename_rest(rest: str, names: Sequence[tuple[re.Pattern[str], str]]) -> str:
    """Return the rest of a name in another spelling; unchanged if no pattern matches."""
    return next(
        (match.expand(name) for pattern, name in names if (match := pattern.fullmatch(rest))), rest
    )


def _split_part(rest: str) -> tuple[str, str]:
    """Return part and name of the rest of a flattened name: ``attn1``, ``attn1.to_q``."""
    if "." in rest:
        return rest.partition(".")[0], rest
    match = _GROUP.fullmatch(rest)
    if match is None:
        return rest, rest
    layer = {"to_out_0": "to_out", "net_0_proj": "net.0.proj", "net_2": "net.2"}
    return match["part"], f"{match['part']}.{layer.get(match['layer'], match['layer'])}"


def is_image(names: Iterable[str]) -> bool:
    """Return True if any of the modules is in a component of an image model."""
    return any(locate_module(name).component for name in names)


def forward_order(names: Iterable[str]) -> list[str]:
    """Return the modules of an image model in the order of the forward pass, others as they are.

    The denoiser first (a U-Net's input, middle and output; FLUX's double, then single blocks), then
    the text encoders.
    """
    given = list(names)
    if not is_image(given):
        return given
    return sorted(given, key=lambda name: (locate_module(name).order, natural_key(name)))


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return a short, unique title of every module: ``"IN04 attn1.to_q"``, ``"q_proj, layer 2"``.

    A U-Net's blocks that have several transformer layers are numbered with them (``IN07.3``). Names
    that would be the same stay whole.

    Parameters
    ----------
    names
        All modules of the adapters, so that one module has one title in all tables and figures.
    """
    stored = list(dict.fromkeys(names))
    locations = {name: locate_module(name) for name in stored}
    several = {where[:2] for where in locations.values() if where.layer}
    titles = {
        name: where.title(layer=where[:2] in several)
        if where.component or (where.block and where.name != NO_TYPE)
        else name
        for name, where in locations.items()
    }
    counts = Counter(titles.values())
    return {name: title if counts[title] == 1 else name for name, title in titles.items()}


# Lines that the numbered blocks of one kind take, and the layers of one text encoder.
_MOST_RUNS: Final = 8
_MOST_TEXT_RUNS: Final = 4


def group_modules(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the modules in groups that fit a screen, by title, in the order of the forward pass.

    An image model's by block; long sequences of numbered blocks in runs (``"double 0 to 2"``). A
    language model's by type.
    """
    ordered = forward_order(names)
    groups: dict[str, list[str]] = {}
    if not is_image(ordered):
        for name in ordered:
            groups.setdefault(locate_module(name).name, []).append(name)
        return groups
    numbers: dict[tuple[str, str], set[int]] = {}
    for where in map(locate_module, ordered):
        if where.number is not None:
            kind = where.block.partition(" ")[0]
            numbers.setdefault((where.component, kind), set()).add(where.number)
    runs = {key: _runs(sorted(values), *key) for key, values in numbers.items()}
    for name in ordered:
        where = locate_module(name)
        block = where.block or where.part
        if where.number is not None:
            kind = where.block.partition(" ")[0]
            block = runs[where.component, kind][where.number]
        groups.setdefault(" ".join(filter(None, (where.short_component, block))), []).append(name)
    return groups


def _runs(numbers: Sequence[int], component: str, kind: str) -> dict[int, str]:
    """Return the title of the run that each number is in."""
    most = _MOST_TEXT_RUNS if component.startswith(_TEXT_ENCODER) else _MOST_RUNS
    step = -(-len(numbers) // most)
    titles = {}
    for start in range(0, len(numbers), step):
        run = numbers[start : start + step]
        title = f"{kind} {run[0]}"
        if len(run) > 1:
            title = f"{'layers' if kind == 'layer' else kind} {run[0]} to {run[-1]}"
        titles.update(dict.fromkeys(run, title))
    return titles


def choose_names(names: Iterable[str], pattern: str | Sequence[str] | None) -> list[str]:
    """Return the names that a pattern means: all for None, an empty list if nothing matches.

    A string is the end of a name (whole segments) if any name ends so, else a regular expression
    that must match in full; a list holds ends of names. If neither fits, modules are chosen that
    another file would call so (`lora_analysis.names.identify`), then those of a component, block or
    part of an image model: ``"IN04"``, ``"attn2"``, ``"text encoder"``, ``"IN04 attn1.to_q"``.
    Modules of image models are returned in `forward_order`.
    """
    pool = forward_order(names)
    if pattern is None:
        return pool
    ends = [pattern] if isinstance(pattern, str) else pattern
    chosen = [name for name in pool if matches_target(name, ends)]
    if not chosen and isinstance(pattern, str):
        with pattern_budget():
            chosen = [name for name in pool if matches_target(name, pattern)]
    if not chosen:
        flat = any(map(is_flattened, (*pool, *ends)))
        identities = {identify(end, flat=flat) for end in ends}
        chosen = [name for name in pool if identify(name, flat=flat) in identities]
    if not chosen:
        selected = {" ".join(end.lower().split()) for end in ends}
        chosen = [
            name for name in pool if not selected.isdisjoint(_selections(locate_module(name)))
        ]
    return chosen


def _selections(where: ModuleLocation) -> set[str]:
    """Return all texts that select a module, in lower case."""
    if not where.component:
        return {where.block.lower()} - {""}
    components = ["", where.component, where.component.replace("-", ""), where.short_component]
    if where.component.startswith(_TEXT_ENCODER):
        components += [_TEXT_ENCODER, "TE"]
    blocks = ["", where.block, where.block.rstrip("0123456789 ")]
    if where.layer is not None:
        blocks.append(f"{where.block}.{where.layer}")
    parts = ["", where.part, where.name]
    texts = itertools.product(components, blocks, parts)
    return {" ".join(filter(None, words)).lower() for words in texts} - {""}

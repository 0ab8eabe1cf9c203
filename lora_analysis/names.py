"""Canonical module names: the module of a model that a stored name means, whoever wrote it.

A trainer, a framework and a file name one module in different ways: wrappers put segments into
the path (``_orig_mod.``), a model class puts its body behind an attribute (``bert.``, ``model.``,
``model.language_model.``), a pipeline puts a component in front (``unet.``, ``text_encoder.``), and
kohya's keys join the path by underscores (``lora_te1_…``). :func:`identify` takes these away.
Identities are for matching only: what is printed, what seeds a random draw and what is written to
a file is the stored name.

What the names alone do not decide (``thinker.model.layers.0`` or ``talker.model.layers.0`` for
``layers.0``) is decided by :func:`match_names` for all modules at once, by counts and shapes, or by
the caller's ``prefix``; never module by module.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from lora_analysis.errors import InputError

Prefixes = Mapping[str, str]

# Segments that torch.compile, FSDP, activation checkpointing and PEFT put anywhere into a path.
_WRAPPERS: Final = frozenset(
    {
        "_orig_mod",
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_forward_module",
        "base_layer",
    }
)
# Prefixes of PEFT and data parallelism; each may stand inside the other.
_LEADING_WRAPPERS: Final = (("base_model", "model"), ("module",))

# Layers that Gemma's vision and audio towers wrap, with the layer itself at ``.linear``.
_WRAPPED_LINEAR: Final = re.compile(
    r"(?:\w*_proj|(?:\w+[._])?(?:qkv|fc\d|post|ffw_layer_\d|linear_(?:start|end)))"
    r"(?P<layer>[._]linear)$"
)

# Beginnings of dotted paths, and the component that each is in; "" is the main model: the
# denoiser of a pipeline, the decoder of a vision-language model, or a model alone.
_COMPONENTS: Final = tuple(
    (re.compile(pattern), component)
    for pattern, component in (
        (r"(?:(?:model\.)?diffusion_model|unet|transformer|dit)\.(?!\d+(?:\.|$))", ""),
        (r"(?:unet|transformer|diffusion_model)_2\.", "denoiser_2"),
        (r"prior\.(?:unet\.)?", "prior"),
        (r"controlnet\.|control_model\.", "controlnet"),
        (r"vae\.|first_stage_model\.", "vae"),
        (r"conditioner\.embedders\.0\.(?:transformer|model)\.", "text_encoder"),
        (r"conditioner\.embedders\.1\.(?:transformer|model)\.", "text_encoder_2"),
        (r"cond_stage_model\.(?:transformer|model)\.", "text_encoder"),
        (r"(?:text_encoders\.)?(?:clip_l|te1?)\.(?:transformer\.)?", "text_encoder"),
        (r"(?:text_encoders\.)?(?:clip_g|te2)\.(?:transformer\.)?", "text_encoder_2"),
        (r"(?:text_encoders\.)?(?:t5xxl|te3)\.(?:transformer\.)?", "text_encoder_3"),
        (r"text_encoder(?:_1)?\.", "text_encoder"),
        (r"text_encoder_2\.", "text_encoder_2"),
        (r"text_encoder_3\.", "text_encoder_3"),
        (r"text_encoder_4\.", "text_encoder_4"),
    )
)
# The first segment of such paths, which most names do not have.
_STARTS: Final = re.compile(
    r"(model\.diffusion_model|diffusion_model|unet|transformer|dit|prior|controlnet|control_model|vae|conditioner"
    r"|first_stage_model|cond_stage_model|clip_[lg]|t5xxl|te[1-3]?|text_encoders?"
    r"|(unet|transformer|diffusion_model)_2|text_encoder_[1-4])\."
)
# The same for names whose dots have become underscores.
_FLAT: Final = re.compile(
    r"(?:lora_(?P<part>unet_2|unet|te_?[1-4]|te|text_encoder_[2-4]|text_encoder"
    r"|transformer_2|transformer(?!_blocks_)|prior_unet|prior|llm|dit)_"
    r"|lycoris_(?:(?P<lycoris>unet|te[1-4]?|text_encoder(?:_[2-4])?|transformer(?!_blocks_))_)?)"
    r"(?=\w)"
)
_FLAT_COMPONENTS: Final = {
    "unet_2": "denoiser_2",
    "transformer_2": "denoiser_2",
    "prior_unet": "prior",
    "prior": "prior",
    "te": "text_encoder",
    "te1": "text_encoder",
    "text_encoder": "text_encoder",
}

# Attributes at which model classes hold their body. They say which class was used, not which
# module is meant.
_BODY_WORDS: Final = (
    "model base_model transformer backbone language_model text_model llm lm net body core "
    "auto_model pretrained_model inner_model wrapped_model student policy causal_lm albert "
    "bart beit bert biogpt camembert codegen convbert data2vec_text deberta deit dinov2 "
    "dinov3 distilbert electra ernie esm flaubert funnel gpt_neox gpt2 hubert ibert layoutlm "
    "layoutlmv2 layoutlmv3 lilt longformer luke mamba megatron_bert mobilebert modernbert "
    "mpnet mra nezha nomic_bert nystromformer rembert roberta roberta_prelayernorm roformer "
    "rwkv sew squeezebert swin swinv2 tapas unispeech vit vit_mae wav2vec2 wavlm xlm_roberta "
    "xlnet xmod yoso"
)
_BODIES: Final = frozenset(_BODY_WORDS.split())
# Attributes that hold a part of its own: its layer 0 is not the decoder's.
_PARTS: Final = (
    (re.compile(r"(vision|visual|image)(_(tower|model|encoder|backbone|transformer))*"), "vision"),
    (re.compile(r"(audio|speech)(_(tower|model|encoder|backbone))*"), "audio"),
    (re.compile(r"mtp"), "mtp"),
)
_SENTENCE_TRANSFORMER: Final = re.compile(r"0\.auto_model\.")
# T5 is the second text encoder of one pipeline and the third of another; its path tells it apart.
_T5: Final = re.compile(r"(encoder|decoder)[._]block[._]\d")
# The two ends of a model that share one weight if its embeddings are tied.
_TIED: Final = frozenset(
    {
        "embed_tokens",
        "lm_head",
        "wte",
        "word_embeddings",
        "shared",
        "embed_in",
        "embed_out",
        "decoder",
        "output_embeddings",
        "input_embeddings",
    }
)
# Words of a prefix that name one of several parts of a model.
_SIDES: Final = frozenset(
    {"encoder", "decoder", "vision", "visual", "image", "audio", "speech", "text", "mtp"}
)


# Names are asked for again and again: as a part of a set, with and without a prefix.
_REMEMBERED: Final = 1 << 16


class ModuleName(NamedTuple):
    """Which module a name means: the component of the model, and the path in it.

    ``component`` is empty for the main model; ``"vision"``, ``"audio"``, ``"mtp"``,
    ``"text_encoder"``, ``"text_encoder_2"``, ``"denoiser_2"``, ``"prior"``, ``"controlnet"``,
    ``"vae"`` for others, joined by a dot where one is inside another.
    """

    component: str
    name: str


@lru_cache(maxsize=_REMEMBERED)
def strip_wrappers(stored: str) -> str:
    """Return a module's path without the segments that wrappers put into it.

    ``_orig_mod``, ``_checkpoint_wrapped_module``, ``_fsdp_wrapped_module`` and ``base_layer`` go
    wherever they stand, ``module.`` and ``base_model.model.`` in front, in any order.

    Examples
    --------
    >>> strip_wrappers("module._orig_mod.base_model.model.layers.0.q_proj.base_layer")
    'layers.0.q_proj'
    """
    segments = [segment for segment in stored.split(".") if segment not in _WRAPPERS]
    while lead := next(
        (w for w in _LEADING_WRAPPERS if len(segments) > len(w) and segments[: len(w)] == list(w)),
        None,
    ):
        segments = segments[len(lead) :]
    return ".".join(segments) or stored


@lru_cache(maxsize=_REMEMBERED)
def split_component(stored: str) -> ModuleName:
    """Return a name's component and the path in it, as the component's own class has it.

    Wrappers and what says the component are taken away, nothing else: the path is what a writer
    puts behind its own prefix. A flattened name keeps its underscores.

    Examples
    --------
    >>> split_component("diffusion_model.blocks.0.attn.to_q")
    ModuleName(component='', name='blocks.0.attn.to_q')
    >>> split_component("lora_te2_text_model_encoder_layers_0_mlp_fc1")
    ModuleName(component='text_encoder_2', name='text_model_encoder_layers_0_mlp_fc1')
    """
    path = strip_wrappers(stored)
    if match := _flat_match(path):
        part = match["part"] or match["lycoris"] or ""
        component = _FLAT_COMPONENTS.get(part, "")
        if part.startswith("te") and not component:
            component = f"text_encoder_{part[-1]}"
            component = "text_encoder" if part[-1] == "1" else component
        return ModuleName(component, path[match.end() :])
    for pattern, component in _COMPONENTS if _STARTS.match(path) else ():
        if (match := pattern.match(path)) and match.end() < len(path):
            return ModuleName(component, path[match.end() :])
    return ModuleName("", path)


@lru_cache(maxsize=_REMEMBERED)
def identify(stored: str, *, flat: bool = False) -> ModuleName:
    """Return the component and the canonical name of the module that a stored name means.

    Two names with one identity mean the same module of the same model, whichever wrapper, model
    class or pipeline they come from. The identity of an identity's name is itself.

    Parameters
    ----------
    stored
        A module's name as a file, a live model or a base has it.
    flat
        Return the path with underscores for dots and with the class's own prefix: the only form
        in which names that lost their dots (kohya) can be compared with those that did not.

    Examples
    --------
    >>> identify("base_model.model.model.language_model.layers.0.self_attn.q_proj").name
    'layers.0.self_attn.q_proj'
    >>> identify("model.vision_tower.encoder.layers.0.self_attn.q_proj.linear")
    ModuleName(component='vision', name='encoder.layers.0.self_attn.q_proj')
    >>> identify("transformer.layers.0.attn.to_q", flat=True).name
    'layers_0_attn_to_q'
    """
    component, path = split_component(stored)
    parts = [component] if component else []
    while True:
        before = path
        if not flat and "." in path:
            path = _strip_bodies(_SENTENCE_TRANSFORMER.sub("", path), parts)
        component, path = split_component(path)
        if component and component not in parts:
            parts.append(component)
        path = path.replace(".", "_") if flat else path
        if path.endswith("linear") and (match := _WRAPPED_LINEAR.search(path)):
            path = path[: match.start("layer")]
        if path == before:
            break
    if parts and parts[0].startswith("text_encoder") and _T5.match(path):
        parts[0] = "text_encoder_t5"
    return ModuleName(".".join(parts), path)


def is_flattened(stored: str) -> bool:
    """Return True if a name has lost its dots: it begins with kohya's or LyCORIS' prefix."""
    return _flat_match(stored) is not None


def may_be_tied(stored: str) -> bool:
    """Return True if a module is one of the ends of a model that may share one weight.

    Examples
    --------
    >>> may_be_tied("model.embed_tokens"), may_be_tied("model.layers.0.mlp.up_proj")
    (True, False)
    """
    return stored.rpartition(".")[2] in _TIED


def identify_all(
    names: Iterable[str], *, flat: bool = False, prefix: Prefixes | None = None
) -> dict[str, ModuleName]:
    """Return the identity of every module of one adapter or one model, by stored name.

    Two modules never share an identity: if what is taken away is all that tells two apart, it
    stays in front of all names that begin with it. Names that ``prefix`` renames keep theirs.

    Parameters
    ----------
    names
        Stored names.
    flat
        As for :func:`identify`.
    prefix
        Beginning of names → what stands for it in the comparison, often nothing.
    """
    stored = list(dict.fromkeys(names))
    renamed = {name: rename_prefix(name, prefix) for name in stored}
    identities = {name: identify(renamed[name], flat=flat) for name in stored}
    counts = Counter(identities.values())
    if len(counts) == len(stored):
        return identities
    shared = [name for name in stored if counts[identities[name]] > 1]
    heads = {_head(name, identities[name]) for name in shared if renamed[name] == name}
    for name in stored:
        if renamed[name] == name and _head(name, identities[name]) in heads:
            identities[name] = ModuleName("", name)
    taken: set[ModuleName] = set()
    for name, identity in identities.items():
        if identity in taken:  # the caller's prefixes join two modules
            identities[name] = ModuleName("", name)
        taken.add(identities[name])
    return identities


def parse_prefixes(values: str | Iterable[str] | Prefixes | None) -> dict[str, str]:
    """Return the caller's prefixes: ``"OLD=NEW"`` as pairs, ``"OLD"`` with an empty replacement.

    Raises
    ------
    InputError
        A prefix is empty, or stands for two others.
    """
    if isinstance(values, Mapping):
        pairs = list(values.items())
    else:
        texts = [values] if isinstance(values, str) else list(values or ())
        pairs = [(old, new) for old, _, new in (text.partition("=") for text in texts)]
    prefixes: dict[str, str] = {}
    for old, new in pairs:
        clean = old.strip().rstrip(".")
        if not clean:
            message = f"A prefix must not be empty, found '{old}={new}'. Write OLD=NEW or OLD."
            raise InputError(message)
        target = new.strip().rstrip(".")
        if prefixes.setdefault(clean, target) != target:
            message = f"The prefix '{clean}' stands for '{prefixes[clean]}' and for '{target}'."
            raise InputError(message)
    return prefixes


@dataclass(frozen=True, slots=True)
class NameMatch:
    """The modules that two sets of names share.

    Attributes
    ----------
    pairs
        Name in the first set → name of the same module in the second.
    decided
        Prefixes that differ and that counts and shapes decided for all modules at once.
    ambiguous
        Prefixes of which several fit alike; none was taken.
    """

    pairs: Mapping[str, str]
    decided: tuple[str, ...] = ()
    ambiguous: tuple[str, ...] = ()


def match_names(
    names: Iterable[str],
    others: Iterable[str],
    *,
    fits: Callable[[str, str], bool] | None = None,
    prefix: Prefixes | None = None,
    spellings: Sequence[Callable[[str], str]] = (),
) -> NameMatch:
    """Match the modules of one adapter with those of another, or of a base, as a whole.

    Equal names match, then equal identities. Where names differ by more than that, a prefix that
    one set has and the other lacks is left out if every module that it would match fits, and no
    other prefix matches as many.

    Parameters
    ----------
    names, others
        Stored names.
    fits
        Returns True if two modules, by their names in the two sets, have one shape. Called for
        names that differ only; every pair fits by default.
    prefix
        As for :func:`identify_all`, applied to both sets.
    spellings
        Functions that rewrite a name in another family's spelling, tried on what is left in the
        order given; the first one that matches most modules counts.
    """
    first, second = list(dict.fromkeys(names)), list(dict.fromkeys(others))
    equal = set(first) & set(second) if not prefix else set()
    pairs = {name: name for name in first if name in equal}
    left = [name for name in first if name not in equal]
    right = [name for name in second if name not in equal]
    if not left or not right:
        return NameMatch(pairs)
    flat = any(map(is_flattened, (*left, *right)))
    identities = identify_all(first, flat=flat, prefix=prefix)
    targets = identify_all(second, flat=flat, prefix=prefix)
    by_identity = {targets[name]: name for name in right}
    for name in left:
        if identities[name] in by_identity:
            pairs[name] = by_identity[identities[name]]
    rest = _Rest(identities, targets, pairs, fits or (lambda *_: True), flat=flat)
    pairs |= rest.match_by_spelling(spellings)
    pairs |= rest.match_by_prefix()
    return NameMatch(pairs, tuple(rest.decided), tuple(rest.ambiguous))


class _Rest:
    """Modules of two sets that no identity matches, and what decides their spelling and prefix."""

    def __init__(
        self,
        names: Mapping[str, ModuleName],
        others: Mapping[str, ModuleName],
        pairs: Mapping[str, str],
        fits: Callable[[str, str], bool],
        *,
        flat: bool,
    ) -> None:
        used = set(pairs.values())
        self._names = {name: names[name] for name in names if name not in pairs}
        self._others = {name: others[name] for name in others if name not in used}
        self._every = set(names.values()), set(others.values())
        self._fits = fits
        self._flat = flat
        self._separator = "_" if flat else "."
        self.decided: list[str] = []
        self.ambiguous: list[str] = []

    def match_by_spelling(self, spellings: Sequence[Callable[[str], str]]) -> dict[str, str]:
        """Return the pairs under the spelling, used for both sets, that matches most modules."""
        best: dict[str, str] = {}
        for rewrite in spellings:
            targets = {identify(rewrite(name), flat=self._flat): name for name in self._others}
            pairs = {}
            for name in self._names:
                other = targets.get(identify(rewrite(name), flat=self._flat))
                if other is not None and self._fits(name, other):
                    pairs[name] = other
            if len(pairs) > len(best) and len(set(pairs.values())) == len(pairs):
                best = pairs
        self._remove(best)
        return best

    def match_by_prefix(self) -> dict[str, str]:
        """Return the pairs whose names differ by a prefix, each decided for all modules."""
        pairs: dict[str, str] = {}
        while groups := self._fitting_groups():
            best = max(groups, key=lambda prefix: (len(groups[prefix]), -len(prefix.head)))
            group = groups[best]
            rivals = [p for p in groups if groups[p] != group and _compete(groups[p], group)]
            alike = [p for p in rivals if len(groups[p]) == len(group)]
            if alike:
                shortest: dict[frozenset[tuple[str, str]], _Prefix] = {}
                for prefix in sorted((best, *alike), key=lambda prefix: len(prefix.head)):
                    shortest.setdefault(frozenset(groups[prefix].items()), prefix)
                self.ambiguous += [prefix.spell(self._separator) for prefix in shortest.values()]
            else:
                pairs |= group
                self.decided.append(best.spell(self._separator))
            # The modules of one adapter do not divide among prefixes.
            siblings = [p for p in groups if not alike and p[:2] == best[:2]]
            for prefix in (best, *rivals, *siblings):
                self._remove(groups[prefix])
        return pairs

    def _fitting_groups(self) -> dict[_Prefix, dict[str, str]]:
        """Return the groups of `_group_by_prefix` in which every pair of modules fits."""
        if not self._names or not self._others:
            return {}
        return {
            prefix: group
            for prefix, group in self._group_by_prefix().items()
            if all(self._fits(*pair) for pair in group.items())
        }

    def _group_by_prefix(self) -> dict[_Prefix, dict[str, str]]:
        """Return the pairs of every prefix that stands in one of the sets alone."""
        groups: dict[_Prefix, dict[str, str]] = {}
        sets = (self._names, self._others)
        for longer in (0, 1):
            ends = {identity: name for name, identity in sets[1 - longer].items()}
            for name, identity in sets[longer].items():
                for head, rest in possible_prefixes(identity.name, self._separator):
                    inner = identify(rest, flat=self._flat)
                    parts = [part for part in (identity.component, inner.component) if part]
                    target = ModuleName(".".join(parts), inner.name)
                    for goal in dict.fromkeys((target, ModuleName("", inner.name))):
                        short = ends.get(goal)
                        prefix = _Prefix(longer, identity.component, head, goal != target)
                        if short is not None and self._is_open(prefix, short):
                            pair = (short, name) if longer else (name, short)
                            groups.setdefault(prefix, {})[pair[0]] = pair[1]
        # No name of the other set may begin with the prefix.
        foreign = {}
        for prefix, group in groups.items():
            start = prefix.head + self._separator if prefix.head else ""
            if not any(
                component == prefix.component and name.startswith(start)
                for component, name in self._every[1 - prefix.longer]
            ):
                foreign[prefix] = group
        return foreign

    def _is_open(self, prefix: _Prefix, short: str) -> bool:
        """Return True if the name without the prefix may mean a module behind it."""
        outer = [part for part in prefix.head.split(".") if part not in _BODIES]
        words = {word for part in outer for word in part.split("_")}
        if not prefix.drops_component and not words & _SIDES:
            return bool(prefix.head)
        # A part of a model is not its main part; a model alone may be either.
        parts = words | set(prefix.component.split("."))
        return "mtp" not in parts and strip_wrappers(short) == identify(short, flat=False).name

    def _remove(self, pairs: Mapping[str, str]) -> None:
        for name, other in pairs.items():
            self._names.pop(name, None)
            self._others.pop(other, None)


class _Prefix(NamedTuple):
    """A prefix that the names of one set have (``longer``: 0 the first, 1 the second)."""

    longer: int
    component: str
    head: str
    drops_component: bool

    def spell(self, separator: str) -> str:
        return separator.join(part for part in (self.component, self.head) if part)


def _compete(group: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return True if two groups of pairs want one module for two."""
    return bool(group.keys() & other.keys() or set(group.values()) & set(other.values()))


def possible_prefixes(name: str, separator: str) -> Iterator[tuple[str, str]]:
    """Yield what may be a prefix and the rest; the segment before the first number stays there."""
    segments = name.split(separator)
    first = next((i for i, part in enumerate(segments) if part.isdecimal()), len(segments))
    for count in range(max(first, 1)):
        yield separator.join(segments[:count]), separator.join(segments[count:])


def rename_prefix(name: str, prefix: Prefixes | None) -> str:
    """Replace the longest matching prefix in a name; ``prefix`` maps old ones to new ones."""
    for old in sorted(prefix or (), key=len, reverse=True):
        new = (prefix or {})[old]
        for path in (name, strip_wrappers(name)):
            for mark in ".", "_":
                start = old if old.endswith(mark) else old + mark
                if path.startswith(start) and (mark == "." or is_flattened(path)):
                    rest = path.removeprefix(start)
                    return f"{new}{mark}{rest}" if new else rest
    return name


def _head(name: str, identity: ModuleName) -> str:
    """Return the part of a stored name in front of the module's canonical name."""
    return strip_wrappers(name).removesuffix(identity.name)


def _flat_match(path: str) -> re.Match[str] | None:
    return None if "." in path else _FLAT.match(path)


def _strip_bodies(path: str, parts: list[str]) -> str:
    """Return a path without the attributes in front that name a body; add parts to ``parts``."""
    segments = path.split(".")
    while len(segments) > 1 and not segments[1].isdecimal():
        part = next((part for pattern, part in _PARTS if pattern.fullmatch(segments[0])), None)
        if part is None and segments[0] not in _BODIES:
            break
        if part is not None and part not in parts:
            parts.append(part)
        segments = segments[1:]
    return ".".join(segments)

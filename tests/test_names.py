"""One identity of a module over wrappers, model classes, components and kohya's flat names."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_analysis.errors import InputError
from lora_analysis.names import (
    ModuleName,
    identify,
    identify_all,
    is_flattened,
    match_names,
    parse_prefixes,
    split_component,
    strip_wrappers,
)

# Names that mean one module, and its identity.
SAME = {
    ModuleName("", "layers.0.self_attn.q_proj"): (  # Llama, Qwen, Gemma, alone and in their VLMs
        "layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.q_proj",
        "language_model.model.layers.0.self_attn.q_proj",
        "model.text_model.layers.0.self_attn.q_proj",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer",
        "pretrained_model.model.layers.0.self_attn.q_proj",
    ),
    ModuleName("vision", "encoder.layers.3.self_attn.q_proj"): (
        "vision_tower.vision_model.encoder.layers.3.self_attn.q_proj",
        "model.vision_tower.encoder.layers.3.self_attn.q_proj.linear",
        "model.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj",
    ),
    ModuleName("vision", "blocks.0.attn.qkv"): (
        "visual.blocks.0.attn.qkv",
        "model.visual.blocks.0.attn.qkv",
    ),
    ModuleName("mtp", "layers.0.self_attn.q_proj"): (
        "mtp.layers.0.self_attn.q_proj",
        "model.mtp.layers.0.self_attn.q_proj",
    ),
    ModuleName("", "h.0.attn.c_attn"): ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
    ModuleName("", "encoder.layer.0.attention.self.query"): (
        "bert.encoder.layer.0.attention.self.query",
        "roberta.encoder.layer.0.attention.self.query",
        "0.auto_model.encoder.layer.0.attention.self.query",
        "encoder.layer.0.attention.self.query",
    ),
    ModuleName("", "encoder.block.0.layer.0.SelfAttention.q"): (
        "encoder.block.0.layer.0.SelfAttention.q",
        "base_model.model.encoder.block.0.layer.0.SelfAttention.q",
    ),
    ModuleName("", "layer.0.attention.q_lin"): (
        "distilbert.transformer.layer.0.attention.q_lin",
        "transformer.layer.0.attention.q_lin",
    ),
    ModuleName("", "layers.2.mlp.experts.3.down_proj"): (
        "model.layers.2.mlp.experts.3.down_proj",
        "module.model.layers.2.mlp.experts.3.down_proj",
    ),
    ModuleName("", "layers.0.mixer.in_proj"): (
        "backbone.layers.0.mixer.in_proj",
        "layers.0.mixer.in_proj",
    ),
    ModuleName("", "down_blocks.0.attentions.0.proj_in"): (
        "unet.down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.attentions.0.proj_in",
    ),
    ModuleName("", "double_blocks.0.img_attn.qkv"): (
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "model.diffusion_model.double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_attn.qkv",
    ),
    ModuleName("text_encoder", "encoder.layers.0.mlp.fc1"): (
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "te1.text_model.encoder.layers.0.mlp.fc1",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    ),
}
# Modules that other names resemble and that are not the same.
DIFFERENT = (
    ("mtp.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    ("encoder.layers.0.fc1", "decoder.layers.0.fc1"),
    ("visual.blocks.0.attn.qkv", "model.blocks.0.attn.qkv"),
    (
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    ),
    ("transformer.blocks.0.attn.to_q", "transformer_2.blocks.0.attn.to_q"),
    ("thinker.model.layers.0.mlp.up_proj", "talker.model.layers.0.mlp.up_proj"),
    ("norm1.linear", "norm1"),
    ("model.0.conv", "model.1.conv"),
)
# Names of kohya and its kin, and a dotted name of the same module.
FLAT = (
    ("lora_unet_layers_0_attention_to_out_0", "diffusion_model.layers.0.attention.to_out.0"),
    ("lora_unet_layers_0_attention_to_out_0", "transformer.layers.0.attention.to_out.0"),
    (
        "lora_transformer_transformer_blocks_0_attn_to_q",
        "transformer.transformer_blocks.0.attn.to_q",
    ),
    ("lycoris_transformer_blocks_0_attn_to_q", "transformer.transformer_blocks.0.attn.to_q"),
    (
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ),
    (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ),
    (
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    ),
    (
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    ),
    ("lora_unet_down_blocks_0_attentions_0_proj_in", "unet.down_blocks.0.attentions.0.proj_in"),
    ("lora_prior_unet_down_blocks_0_x", "prior.down_blocks.0.x"),
)
STORED = sorted(
    {name for names in SAME.values() for name in names} | {n for pair in DIFFERENT for n in pair}
)
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer")


@pytest.mark.parametrize(
    ("stored", "identity"), [(name, identity) for identity, names in SAME.items() for name in names]
)
def test_names_of_one_module_have_one_identity(stored: str, identity: ModuleName) -> None:
    assert identify(stored) == identity


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_modules_that_resemble_each_other_have_identities_of_their_own(
    one: str, other: str
) -> None:
    assert identify(one) != identify(other)
    assert not match_names([one], [other]).pairs


@pytest.mark.parametrize(("flat", "dotted"), FLAT)
def test_a_name_without_dots_is_matched_with_the_path_it_was_made_from(
    flat: str, dotted: str
) -> None:
    assert is_flattened(flat)
    assert identify(flat, flat=True) == identify(dotted, flat=True)
    assert match_names([flat], [dotted]).pairs == {flat: dotted}
    assert match_names([dotted], [flat]).pairs == {dotted: flat}


@pytest.mark.parametrize(
    ("stored", "component", "path"),
    [
        ("diffusion_model.blocks.0.adaLN_modulation.1", "", "blocks.0.adaLN_modulation.1"),
        ("transformer.blocks.0.attn.to_q", "", "blocks.0.attn.to_q"),
        ("base_model.model.transformer_2.blocks.0.x", "denoiser_2", "blocks.0.x"),
        ("text_encoder.text_model.encoder.x", "text_encoder", "text_model.encoder.x"),
        ("lora_te2_text_model_encoder_x", "text_encoder_2", "text_model_encoder_x"),
        ("lora_unet_blocks_0_x", "", "blocks_0_x"),
        ("model.vision_tower.q_proj.linear", "", "model.vision_tower.q_proj.linear"),
        ("transformer.0.weight", "", "transformer.0.weight"),
    ],
)
def test_a_component_is_split_off_and_the_path_behind_it_stays(
    stored: str, component: str, path: str
) -> None:
    assert split_component(stored) == ModuleName(component, path)


@given(st.sampled_from(STORED), st.lists(st.sampled_from(WRAPPERS), max_size=4), st.data())
def test_wrappers_change_no_identity_wherever_they_stand(
    stored: str, wrappers: list[str], data: st.DataObject
) -> None:
    segments = stored.split(".")
    for wrapper in wrappers:
        segments.insert(data.draw(st.integers(0, len(segments))), wrapper)
    for lead in data.draw(st.permutations(["module", "base_model.model"])):
        segments.insert(0, lead)
    assert identify(".".join(segments)) == identify(stored)


@given(st.sampled_from(STORED), st.booleans())
def test_an_identity_is_its_own_identity(stored: str, flat: bool) -> None:
    identity = identify(stored, flat=flat)
    assert identify(identity.name, flat=flat).name == identity.name


def test_wrappers_alone_are_a_name() -> None:
    assert strip_wrappers("base_layer") == "base_layer"
    assert strip_wrappers("module") == "module"


def test_two_modules_of_one_adapter_never_share_an_identity() -> None:
    names = ["model.layers.0.q", "language_model.layers.0.q", "model.layers.1.q", "lm_head"]
    identities = identify_all(names)
    assert len(set(identities.values())) == len(names)
    # The whole prefix stays, also in front of the module that nothing else is called like.
    assert identities["model.layers.1.q"].name == "model.layers.1.q"
    assert identities["lm_head"].name == "lm_head"


@given(st.lists(st.sampled_from(STORED), unique=True), st.booleans())
def test_identities_of_any_names_are_as_many_as_the_names(names: list[str], flat: bool) -> None:
    assert len(set(identify_all(names, flat=flat).values())) == len(names)


@given(
    st.lists(st.sampled_from(STORED), unique=True), st.lists(st.sampled_from(STORED), unique=True)
)
def test_matching_gives_no_module_away_twice_and_equal_names_first(
    a: list[str], b: list[str]
) -> None:
    pairs = match_names(a, b).pairs
    assert len(set(pairs.values())) == len(pairs)
    assert all(pairs[name] == name for name in set(a) & set(b))


LAYERS = [f"layers.{i}.{p}" for i, p in itertools.product(range(3), ("q_proj", "up_proj"))]


def put(prefix: str, names: list[str]) -> list[str]:
    """Return the names with a prefix."""
    return [prefix + name for name in names]


def test_an_unknown_prefix_is_decided_by_the_only_modules_it_can_mean() -> None:
    match = match_names(LAYERS, put("thinker.model.", LAYERS))
    assert match.pairs == dict(zip(LAYERS, put("thinker.model.", LAYERS), strict=True))
    assert match.decided == ("thinker",)


def test_an_ambiguous_prefix_is_not_decided() -> None:
    others = put("thinker.model.", LAYERS) + put("talker.model.", LAYERS)
    match = match_names(LAYERS, others)
    assert not match.pairs
    assert sorted(match.ambiguous) == ["talker", "thinker"]
    assert match_names(LAYERS, others, prefix={"talker.model": ""}).pairs == dict(
        zip(LAYERS, put("talker.model.", LAYERS), strict=True)
    )


def test_counts_decide_a_prefix_for_the_adapter_as_a_whole() -> None:
    others = put("thinker.model.", LAYERS[:-1]) + put("talker.model.", LAYERS[-2:])
    match = match_names(LAYERS, others)
    # The last module could be the talker's alone; it stays unmatched.
    assert match.pairs == dict(zip(LAYERS, put("thinker.model.", LAYERS[:-1]), strict=False))


def test_shapes_decide_a_prefix_for_the_adapter_as_a_whole() -> None:
    others = put("thinker.model.", LAYERS) + put("talker.model.", LAYERS)

    def fits(name: str, other: str) -> bool:
        return other.startswith("talker") or name.endswith("q_proj")

    match = match_names(LAYERS, others, fits=fits)
    assert set(match.pairs.values()) == set(put("talker.model.", LAYERS))


@pytest.mark.parametrize("others", ["mtp.", "model.mtp.", "model.mtp_block."])
def test_layers_of_the_mtp_head_never_take_the_place_of_the_models(others: str) -> None:
    assert not match_names(LAYERS, put(others, LAYERS)).pairs
    assert not match_names(put("model.", LAYERS), put(others, LAYERS)).pairs


def test_a_wrapper_class_of_several_parts_is_decided_for_all_parts() -> None:
    names = ["model.layers.0.q", "visual.blocks.0.qkv"]
    match = match_names(put("thinker.", names), names)
    assert match.pairs == dict(zip(put("thinker.", names), names, strict=True))
    assert match.decided == ("thinker",)


def test_a_tower_alone_is_matched_with_a_bare_model_and_not_with_a_decoder() -> None:
    tower = put("vision_model.", LAYERS)
    assert len(match_names(tower, LAYERS).pairs) == len(LAYERS)
    assert not match_names(tower, put("model.", LAYERS)).pairs


def test_a_prefix_that_occurs_in_both_sets_is_no_matter_of_spelling() -> None:
    assert match_names(["head.proj", "head.up"], ["head.proj", "up"]).pairs == {
        "head.proj": "head.proj"
    }


def test_t5_is_the_third_encoder_of_kohya_and_the_second_of_diffusers() -> None:
    names = ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_x"]
    others = [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.encoder.block.0.x",
    ]
    assert match_names(names, others).pairs == dict(zip(names, others, strict=True))


def test_a_class_prefix_behind_flat_names_is_decided_by_the_names_without() -> None:
    names = [f"lora_te_text_model_encoder_layers_{i}_mlp_fc1" for i in range(2)]
    others = [f"text_encoder.encoder.layers.{i}.mlp.fc1" for i in range(2)]
    assert match_names(names, others).pairs == dict(zip(names, others, strict=True))


def test_spellings_of_a_family_are_tried_on_what_is_left() -> None:
    names = ["enc.0.attention.query", "enc.1.attention.query"]
    others = ["enc.0.attention.q_proj", "enc.1.attention.q_proj"]

    def rewrite(name: str) -> str:
        return name.replace("query", "q_proj")

    assert not match_names(names, others).pairs
    assert match_names(names, others, spellings=[rewrite]).pairs == dict(
        zip(names, others, strict=True)
    )


@pytest.mark.parametrize(
    ("values", "prefixes"),
    [
        (None, {}),
        ("thinker.model", {"thinker.model": ""}),
        (["a.=b.", "c"], {"a": "b", "c": ""}),
        ({"a.b.": "c"}, {"a.b": "c"}),
    ],
)
def test_prefixes_are_written_as_old_and_new(values: object, prefixes: dict[str, str]) -> None:
    assert parse_prefixes(values) == prefixes  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [[""], ["=x"], ["a=b", "a=c"]])
def test_prefixes_that_mean_nothing_or_two_things_are_refused(values: list[str]) -> None:
    with pytest.raises(InputError, match="prefix"):
        parse_prefixes(values)

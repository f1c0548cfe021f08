import pytest
import tiny

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import family_of
from vlmq.exporter.recipe import make_recipe, read_recipe
from vlmq.exporter.walk import walk
from vlmq.kernels.grid import Grid


@pytest.fixture(scope="module")
def found():
    model = tiny.tiny("blip2-opt")
    return walk(model, family_of(model.config))


def assign(found, **content):
    return make_recipe({"group_size": 32, **content}).assign(found)


def test_components_change_the_defaults_and_rules_change_both(found):
    assignment = assign(
        found,
        components={"vision": {"bits": 8}, "connector": {"bits": 16}},
        rules=[{"match": r"layers\.1\.fc2", "bits": 3}],
    )
    bits = {name: scheme.grid.bits for name, scheme in assignment.schemes.items()}
    assert bits["vision_model.encoder.layers.0.mlp.fc1"] == 8
    assert bits["language_model.model.decoder.layers.0.fc2"] == 4
    assert bits["language_model.model.decoder.layers.1.fc2"] == 3
    assert assignment.kept["language_projection"] == "16 bits asked for"


def test_every_site_has_a_scheme_or_a_reason(found):
    assignment = assign(found, components={"vision": {"bits": 16}})
    assert set(assignment.schemes) | set(assignment.kept) == {site.name for site in found.sites} | set(found.kept)
    assert not set(assignment.schemes) & set(assignment.kept)


def test_what_happens_to_a_fused_projection_is_chosen_by_name(found):
    fused = "vision_model.encoder.layers.0.self_attn.qkv"
    assert assign(found).schemes[fused].rows is None
    assert assign(found, qkv="split").schemes[fused].rows == (slice(0, 64), slice(64, 128), slice(128, 192))
    assert assign(found, qkv="v-only").schemes[fused].rows == (slice(128, 192),)
    assert "skip" in assign(found, qkv="skip").kept[fused]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bits": 7}, "bits: 7 bits; choose one of 2, 3, 4, 5, 6, 8, or 16"),
        ({"method": "magic"}, "unknown method 'magic'; choose one of rtn, awq"),
        ({"bit": 4}, "bit: Extra inputs are not permitted"),
        ({"components": {"visoin": {"bits": 4}}}, "components.visoin"),
        ({"rules": [{"match": "("}]}, "not a regular expression"),
        ({"rules": [{"match": "nothing_like_this", "bits": 8}]}, "matches no linear"),
        ({"group_size": 128}, "64 columns do not divide into groups of 128; choose --group-size 16, 32, 64 or -1"),
        ({"bits": 16}, "every linear is left at 16 bits"),
        ({"qkv": "fuse"}, "qkv"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_before_any_work(found, content, message):
    with pytest.raises(VlmqError, match=message.replace("(", r"\(")):
        make_recipe({"group_size": 32, **content}).assign(found)


def test_a_recipe_file_says_what_flags_would(found, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("bits: 3\ngroup_size: 32\ncomponents:\n  vision: {bits: 8, symmetric: false}\n")
    schemes = read_recipe(file).assign(found).schemes
    assert schemes["vision_model.encoder.layers.0.mlp.fc1"].grid == Grid(8, 32, symmetric=False)
    assert schemes["language_projection"].grid == Grid(3, 32)


@pytest.mark.parametrize("text", ["bits: [", "- a list", "bits: four"])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(VlmqError, match=r"broken\.yaml"):
        read_recipe(file)

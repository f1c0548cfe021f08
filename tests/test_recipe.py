from pathlib import Path

import pytest
import tiny
import yaml

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import family_of
from vlmq.exporter.recipe import Recipe, make_recipe, read_recipe
from vlmq.exporter.scheme import Options
from vlmq.exporter.walk import Block, Input, Site, Walk, walk
from vlmq.kernels.grid import ROW, TENSOR, Grid

QKV = "vision_model.encoder.layers.0.self_attn.qkv"
FC1 = "vision_model.encoder.layers.0.mlp.fc1"
FC2 = "language_model.model.decoder.layers.0.fc2"
LAST_Q = "language_model.model.decoder.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def found():
    model = tiny.tiny("blip2-opt")
    return walk(model, family_of(model.config))


def assign(found, **content):
    return make_recipe({"group_size": 32, **content}).assign(found)


def stages(*counts, columns=64, component="connector"):
    """A walk of stages of so many blocks, each of one linear `STAGE.BLOCK`."""

    def block(stage, index):
        site = Site(f"{stage}.{index}", component, index, "feedforward", 64, columns)
        return Block(site.name, component, index, (Input((site,), None),))

    return Walk(tuple(tuple(block(stage, index) for index in range(count)) for stage, count in enumerate(counts)), {})


def selected(found, **selectors):
    """The sites that one rule changes."""
    schemes = assign(found, rules=[{**selectors, "bits": 8}]).schemes
    return {name for name, scheme in schemes.items() if scheme.grid.bits == 8}


def test_components_change_the_defaults_and_rules_change_both(found):
    assignment = assign(
        found,
        components={"vision": {"bits": 8}, "connector": {"bits": 16}},
        rules=[{"match": r"layers\.1\.fc2", "bits": 3}, {"match": r"vision.*layers\.1\.mlp", "bits": 2}],
    )
    bits = {name: scheme.grid.bits for name, scheme in assignment.schemes.items()}
    assert bits[FC1] == 8
    assert bits["vision_model.encoder.layers.1.mlp.fc1"] == 2
    assert bits[FC2] == 4
    assert bits["language_model.model.decoder.layers.1.fc2"] == 3
    assert assignment.kept["language_projection"] == "16 bits asked for"


def test_the_later_of_two_rules_wins(found):
    rules = [{"match": "fc2", "bits": 3, "symmetric": False}, {"component": "language", "bits": 8}]
    assert assign(found, rules=rules).schemes[FC2].grid == Grid(8, 32, symmetric=False)
    assert assign(found, rules=rules[::-1]).schemes[FC2].grid == Grid(3, 32, symmetric=False)


def test_every_site_has_a_scheme_or_a_reason(found):
    assignment = assign(found, components={"vision": {"bits": 16}})
    assert set(assignment.schemes) | set(assignment.kept) == {site.name for site in found.sites} | set(found.kept)
    assert not set(assignment.schemes) & set(assignment.kept)


def test_what_happens_to_a_fused_projection_is_chosen_by_name(found):
    assert assign(found).schemes[QKV].rows is None
    assert assign(found, qkv="split").schemes[QKV].rows == (slice(0, 64), slice(64, 128), slice(128, 192))
    assert assign(found, qkv="v-only").schemes[QKV].rows == (slice(128, 192),)
    assert "skip" in assign(found, qkv="skip").kept[QKV]


@pytest.mark.parametrize(
    ("count", "thirds"),
    [
        (1, ([], [], [0])),
        (2, ([], [0], [1])),
        (3, ([0], [1], [2])),
        (4, ([0], [1], [2, 3])),
        (5, ([0], [1, 2], [3, 4])),
        (6, ([0, 1], [2, 3], [4, 5])),
        (7, ([0, 1], [2, 3], [4, 5, 6])),
        (8, ([0, 1], [2, 3, 4], [5, 6, 7])),
    ],
)
def test_every_block_is_in_one_third(count, thirds):
    for name, expected in zip(("front", "middle", "end"), thirds, strict=True):
        if expected:
            assert selected(stages(count), blocks=name) == {f"0.{index}" for index in expected}
        else:
            with pytest.raises(VlmqError, match=f"the rule blocks '{name}' matches no linear"):
                selected(stages(count), blocks=name)


def test_thirds_are_counted_in_each_stage_by_itself():
    assert selected(stages(3, 1, 6), component="connector", blocks="end") == {"0.2", "1.0", "2.4", "2.5"}
    assert selected(stages(3, 1, 6), blocks="front") == {"0.0", "2.0", "2.1"}


def test_a_rule_selects_what_all_its_selectors_select(found):
    language = {name for name in (site.name for site in found.sites) if name.startswith("language_model")}
    last = {name for name in language if ".layers.1." in name}
    attention = {name for name in language if ".self_attn." in name}
    everywhere = {site.name for site in found.sites if site.name.endswith("q_proj")}
    all_four = {"match": "q_proj$", "component": "language", "blocks": "end", "kind": "attention"}
    assert selected(found, **all_four) == {LAST_Q}
    assert selected(found, component="language") == language
    assert selected(found, component="language", blocks="end") == last
    assert selected(found, component="language", kind="attention") == attention
    assert selected(found, component="language", blocks="end", kind="attention") == last & attention
    assert selected(found, match="q_proj$", blocks="middle") == everywhere - {LAST_Q}
    assert selected(found, kind="projection") == {"language_projection"}


def test_none_switches_rounded_inputs_off_wherever_it_is_said(found):
    assert make_recipe({"activations": {"bits": "none"}}) == make_recipe({"activations": "none"}) == make_recipe({})
    off = {"activations": {"bits": 8}, "components": {"vision": {"activations": {"bits": "none"}}}}
    assert assign(found, **off).schemes[FC1].inputs is None
    assert assign(found, **off).schemes[FC2].inputs == Grid(8, ROW)


def test_groups_are_numbers_or_words(found):
    assert assign(found, group_size="row") == assign(found, group_size=ROW)
    tensors = assign(found, components={"vision": {"group_size": "tensor"}})
    assert tensors.schemes[FC1].grid == Grid(4, TENSOR)
    assert tensors.schemes[FC2].grid == Grid(4, 32)
    tokens = assign(found, activations={"bits": 8, "group_size": "token"})
    assert tokens == assign(found, activations={"bits": 8})
    assert tokens.schemes[FC1].inputs == Grid(8, ROW)
    ranges = assign(found, activations={"bits": 6, "group_size": "tensor", "symmetric": False})
    assert ranges.schemes[FC1].inputs == Grid(6, TENSOR, symmetric=False)


def test_activations_and_options_change_key_by_key(found):
    schemes = assign(
        found,
        activations={"bits": 8, "group_size": "tensor"},
        options={"damp": 0.05, "alpha": 0.5},
        components={"language": {"activations": {"bits": 4}, "options": {"damp": 0.1}}, "vision": {"method": "rtn"}},
        rules=[{"match": "fc1", "component": "vision", "activations": "none", "options": {"alpha": "search"}}],
    ).schemes
    assert schemes[FC2].inputs == Grid(4, TENSOR)
    assert schemes[FC2].options == Options(damp=0.1, alpha=0.5)
    assert schemes[FC1].inputs is None
    assert schemes[FC1].options == Options(damp=0.05, alpha="search")
    assert schemes[QKV].inputs == Grid(8, TENSOR)


def test_activations_switched_on_again_have_the_group_they_had(found):
    switched = assign(
        found,
        activations={"bits": 8, "group_size": 16},
        components={"language": {"activations": "none"}},
        rules=[{"match": "fc2", "activations": {"bits": 4}}],
    )
    assert switched.schemes[FC2].inputs == Grid(4, 16)
    assert switched.schemes[LAST_Q].inputs is None


def test_sixteen_bits_leave_a_linear_and_its_input_alone(found):
    assignment = assign(found, activations={"bits": 8}, components={"vision": {"bits": 16}})
    assert FC1 not in assignment.schemes
    assert assignment.kept[FC1] == "16 bits asked for"


def test_uniform_has_one_grid_whatever_it_inherits(found):
    schemes = assign(found, components={"vision": {"method": "uniform", "bits": 3}}, activations={"bits": 8}).schemes
    assert schemes[FC1].grid == Grid(3, TENSOR, symmetric=False)
    assert schemes[FC1].inputs == Grid(8, ROW)
    assert schemes[FC2].grid == Grid(4, 32)
    recipe = make_recipe({"method": "uniform", "components": {"vision": {"method": "rtn", "group_size": 32}}})
    assert recipe.assign(found).schemes[FC2].grid == Grid(4, TENSOR, symmetric=False)
    assert recipe.assign(found).schemes[FC1].grid == Grid(4, 32)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"method": "uniform", "group_size": 32}, "recipe: uniform"),
        ({"method": "uniform", "group_size": "tensor", "symmetric": True}, "recipe: uniform"),
        ({"components": {"vision": {"method": "uniform", "group_size": "row"}}}, "recipe: components.vision: uniform"),
        (
            {
                "components": {"vision": {"method": "uniform"}},
                "rules": [{"match": "opt|fc1", "component": "vision", "symmetric": True}],
            },
            "recipe: rules.0: uniform",
        ),
    ],
)
def test_another_grid_said_for_a_uniform_linear_is_refused_where_it_is_said(found, content, place):
    with pytest.raises(VlmqError, match=f"^{place} has one grid, asymmetric and for the whole tensor"):
        make_recipe(content).assign(found)


@pytest.mark.parametrize(
    ("columns", "asked", "given"),
    [(588, 128, ROW), (3420, 64, ROW), (4304, 128, 16), (96, 64, 32), (192, 256, 64), (384, 256, 128), (128, 128, 128)],
)
def test_an_indivisible_linear_gets_the_widest_group_that_divides_it_or_is_refused(columns, asked, given):
    awkward = stages(3, columns=columns)
    content = {"group_size": asked, "activations": {"bits": 8, "group_size": asked}}
    scheme = make_recipe({**content, "indivisible": "shrink"}).assign(awkward).schemes["0.0"]
    assert (scheme.grid, scheme.inputs) == (Grid(4, given), Grid(8, given))
    if given != asked:
        with pytest.raises(VlmqError, match=rf"^0\.0: {columns} .* groups of {asked}; choose --group-size"):
            make_recipe(content).assign(awkward)
        with pytest.raises(VlmqError, match=r"choose --activation-group .* or --indivisible shrink$"):
            make_recipe({**content, "group_size": "row"}).assign(awkward)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bits": 7}, "bits: 7 bits; choose one of 2, 3, 4, 5, 6, 8, or 16"),
        ({"method": "magic"}, "unknown method 'magic'; choose one of uniform, rtn, awq"),
        ({"bit": 4}, "bit: unknown key; docs/recipes.md lists them"),
        (
            {"components": {"visoin": {"bits": 4}}},
            "recipe: components.visoin: 'visoin'; choose 'vision', 'connector' or 'language'",
        ),
        ({"vision": {"bits": 8}}, "recipe: vision: unknown key; write it under components"),
        ({"bit": None}, "recipe: bit: unknown key"),
        ({"rules": None}, "recipe: rules: nothing is said; give it a value, or leave the key out"),
        ({"rules": {"match": "fc1", "bits": 8}}, "recipe: rules: not a list; write [...]"),
        ({"rules": ["fc1"]}, "recipe: rules.0: no keys; write {key: value}"),
        ({"rules": [{"kind": "head", "bits": 8}]}, "rules.0.kind: 'head'; choose 'attention', 'feedforward' or 'proje"),
        ({"rules": [{"match": "fc1"}]}, "recipe: rules.0: a rule must change something; give one of method, bits, gro"),
        ({"rules": [{"match": 1, "bits": 8}]}, "recipe: rules.0.match: no text; put it in quotes"),
        ({"rules": [{"match": "("}]}, "rules.0.match: not a regular expression"),
        (
            {"rules": [{"match": "nothing_like_this", "bits": 8}]},
            "the rule match 'nothing_like_this' matches no linear",
        ),
        (
            {"rules": [{"component": "vision", "kind": "projection", "bits": 8}]},
            "the rule component 'vision', kind 'projection' matches no linear; `vlmq inspect` lists their names",
        ),
        ({"rules": [{"bits": 8}]}, "rules.0: a rule must say what it is for; give match, component, blocks or kind"),
        ({"rules": [{"blocks": "last", "bits": 8}]}, "rules.0.blocks: 'last'; choose 'front', 'middle' or 'end'"),
        ({"rules": [{"kind": "mlp", "bits": 8}]}, "rules.0.kind: 'mlp'; choose 'attention', 'feedforward'"),
        ({"group_size": 128}, "64 columns do not divide into groups of 128; choose --group-size 16, 32, 64 or row"),
        (
            {"activations": {"bits": 8, "group_size": 128}},
            "64 columns do not divide into groups of 128; choose --activation-group 16, 32, 64 or token, or --indiv",
        ),
        (
            {"group_size": "rows"},
            "recipe: group_size: 'rows'; choose a multiple of 16 from 16 to 256, or row, or tensor",
        ),
        (
            {"group_size": 50},
            "recipe: group_size: a group of 50 columns; choose a multiple of 16 from 16 to 256, or row, or tensor",
        ),
        (
            {"activations": {"group_size": "row"}},
            "recipe: activations.group_size: 'row'; choose a multiple of 16 from 16 to 256, or token, or tensor",
        ),
        (
            {"activations": {"group_size": 50}},
            "activations.group_size: a group of 50 columns; choose a multiple of 16 from 16 to 256, or token, or",
        ),
        ({"bits": "four"}, "recipe: bits: 'four'; choose one of 2, 3, 4, 5, 6, 8, or 16 to leave alone"),
        ({"bits": 4.5}, "recipe: bits: 4.5; choose one of"),
        ({"method": 8}, "recipe: method: unknown method '8'; choose one of uniform"),
        ({"symmetric": "maybe"}, "recipe: symmetric: 'maybe'; choose true or false"),
        ({"bits": 16}, "recipe: every linear is left at 16 bits, so nothing would change; give --bits 8 or fewer, or"),
        ({"qkv": "fuse"}, "qkv"),
        ({"indivisible": "maybe"}, "indivisible: 'maybe'; choose 'refuse' or 'shrink'"),
        ({"rotate": ["connector"]}, "rotate.0: 'connector'; choose 'language' or 'vision'"),
        ({"rotate": "language"}, "recipe: rotate: not a list; write [...]"),
        ({"activations": 8}, "recipe: activations: 8; write none, or {bits: 8, group_size: token}"),
        ({"activations": None}, "recipe: activations: nothing is said; give it a value, or leave the key out"),
        ({"activations": {"bits": "eight"}}, "activations.bits: 'eight'; choose 4, 6, 8, or none to leave alone"),
        ({"activations": {"bits": 3}}, "activations.bits: 3 bits for inputs; choose 4, 6, 8, or none to leave alone"),
        ({"activations": {"group_size": "tensor"}}, "activations without bits; give --activation-bits 8, 6 or 4"),
        ({"activations": {"bits": 8, "group": 32}}, "activations.group: unknown key"),
        ({"options": {"dampen": 1}}, "options.dampen: unknown key"),
        ({"options": {"damp": 0}}, "recipe: options.damp: 0; choose a number above 0"),
        ({"options": {"alpha": "0.5x"}}, "recipe: options.alpha: '0.5x'; choose a number or 'search'"),
        ({"options": {"alpha": 2}}, "recipe: options.alpha: 2; choose a number up to 1 or 'search'"),
        ({"method": "smoothquant"}, f"{QKV}: smoothquant prepares inputs for quantization; give --activation-bits 8"),
        ({"method": "qvlm"}, f"{QKV}: qvlm prepares inputs for quantization; give --activation-bits 8"),
        ({"components": {"vision": {"method": "awq+smoothquant"}}}, "awq+smoothquant prepares inputs"),
        (
            {"method": "awq+gptq", "options": {"static_groups": False}},
            f"{QKV}: act_order without static_groups needs g_idx, which no reader takes; set static_groups: true",
        ),
        ({"qkv": "v-only", "activations": {"bits": 8}}, f"{QKV}: --qkv v-only stores it dense"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_before_any_work_in_one_line(found, content, message):
    with pytest.raises(VlmqError) as refused:
        make_recipe({"group_size": 32, **content}).assign(found)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_act_order_needs_no_static_groups_where_there_is_one_group_or_another_method(found):
    assign(found, method="gptq", group_size="row", options={"static_groups": False})
    assign(found, method="rtn", options={"static_groups": False})
    assign(found, method="gptq", options={"static_groups": False, "act_order": False})


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"method": "uniform", "components": {"vision": {"method": "rtn", "group_size": "row"}}},
        {"method": "uniform", "group_size": "tensor", "symmetric": False, "components": {"vision": {"method": "rtn"}}},
        {"activations": {"bits": 8, "group_size": "tensor"}, "components": {"vision": {"activations": "none"}}},
        {"activations": {"bits": 8}, "components": {"vision": {"activations": {"symmetric": False}}}},
        {"activations": {"bits": "none", "group_size": 64}, "components": {"vision": {"activations": {"bits": 4}}}},
        {"head": {"bits": 8}, "embedding": {"bits": 8, "group_size": "row"}},
        {"options": {"damp": 0.5, "threshold": 0.2}, "components": {"vision": {"options": {"threshold": None}}}},
        {"rules": [{"match": r"fc1$|'\d", "blocks": "end", "kind": "feedforward", "options": {"alpha": 0.25}}]},
        {"rotate": ["vision", "language"], "indivisible": "shrink", "qkv": "split", "group_size": 96},
    ],
)
def test_what_a_recipe_shows_reads_back_to_the_same_recipe(found, content):
    recipe = make_recipe(content)
    again = make_recipe(yaml.safe_load(yaml.safe_dump(recipe.content())))
    assert again == recipe
    assert again.content() == recipe.content()
    shrunk = {"indivisible": "shrink"}
    assert again.model_copy(update=shrunk).assign(found) == recipe.model_copy(update=shrunk).assign(found)


def test_a_recipe_is_shown_in_full():
    shown = make_recipe({"activations": {"bits": 8}}).content()
    assert set(shown) == set(Recipe.model_fields)
    assert shown["activations"] == {"bits": 8, "group_size": "token", "symmetric": True}
    assert set(shown["options"]) == set(Options.model_fields)
    assert (shown["head"], shown["embedding"], shown["options"]["threshold"]) == (None, None, None)


def test_the_reference_has_every_option_with_its_default():
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    table = text.split("| option | default |")[1].split("\n\n")[0]
    rows = [[cell.replace("`", "") for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
    said = {name.strip(): yaml.safe_load(default) for names, default in rows for name in names.split(",")}
    assert said == Options().model_dump()


def test_a_recipe_file_says_what_flags_would(found, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("bits: 3\ngroup_size: 32\ncomponents:\n  vision: {bits: 8, symmetric: false}\n")
    schemes = read_recipe(file).assign(found).schemes
    assert schemes[FC1].grid == Grid(8, 32, symmetric=False)
    assert schemes["language_projection"].grid == Grid(3, 32)


@pytest.mark.parametrize("text", ["bits: [", "- a list", "bits: four", "text", "bits: 4\n\x00"])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(VlmqError, match=r"broken\.yaml"):
        read_recipe(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "no keys; write {key: value}"),
        ("[]", "no keys; write {key: value}"),
        ("- {model_part: VIT}", "no keys; write {key: value}"),
        ("vision: {bits: 8}\nlanguage: {bits: 4}", "vision: unknown key; write it under components"),
        ("vit_layers: {fc1: 4}", "vit_layers: unknown key; docs/recipes.md lists them"),
        ("bits: 4\nmethod: rtn\nbits: 8", "line 3: bits: said twice; keep one"),
        ("rules: []\nrules: []", "line 2: rules: said twice; keep one"),
        ("rules:\n- {match: a, bits: 4}\n- {match: b, bits: 4, 'bits': 8}", "line 3: bits: said twice; keep one"),
    ],
)
def test_a_yaml_file_that_cannot_be_meant_says_what_to_write(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(VlmqError) as refused:
        read_recipe(file)
    assert str(refused.value) == f"{file}: {message}"


def test_an_empty_file_is_the_default_recipe_and_a_merged_key_is_said_once(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("# bits: 3\n")
    assert read_recipe(file) == make_recipe({})
    file.write_text("components: {vision: &eight {bits: 8, method: rtn}, language: {<<: *eight, bits: 3}}")
    language = {"bits": 3, "method": "rtn"}
    assert read_recipe(file) == make_recipe(
        {"components": {"vision": {"bits": 8, "method": "rtn"}, "language": language}}
    )

import importlib.util
import itertools
import json
import shutil
import sys
from queue import SimpleQueue

import pytest
import torch
import yaml
from elsewhere import DEVICES
from PIL import Image

from vlmq.exporter import simulate
from vlmq.exporter.calibration import prepare
from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.devices import device_of
from vlmq.exporter.evaluation import vqa
from vlmq.exporter.evaluation.answers import answer_all
from vlmq.exporter.families import COMPONENTS
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.runtime import TorchVlm, open_processor
from vlmq.exporter.search import engines
from vlmq.exporter.search import sweep as sweeping
from vlmq.exporter.search.bench import Bench
from vlmq.exporter.search.grid import Configuration, configurations, read_grid
from vlmq.exporter.search.pieces import canonical, plan
from vlmq.exporter.search.scores import read_scores
from vlmq.exporter.search.sweep_plots import _said, front
from vlmq.exporter.search.tables import Row
from vlmq.exporter.search.tasks import asked_of, divergences, log_softmax
from vlmq.exporter.walk import walk

FAMILIES = ("blip2-opt", "llava-llama")
BASE = {"group_size": 32}
WHOLE = {"method": "uniform", "group_size": "tensor", "symmetric": False}
WIDTHS = [2, 3, 4, 5, 6, 8, 16]


def planned(folder, recipe):
    checkpoint = open_checkpoint(str(folder))
    skeleton = checkpoint.skeleton()
    return plan(Configuration("it", "it", recipe), checkpoint, skeleton, walk(skeleton, checkpoint.family))


def pieces_of(folder, recipe):
    return {piece.component: piece for piece in planned(folder, recipe).pieces}


def only(recipe, component):
    """The recipe with every other component at 16 bits, as a person would write it."""
    others = {other: {"bits": 16} for other in COMPONENTS if other != component}
    return recipe | {"components": recipe.get("components", {}) | others}


def equal(model, other, names=None):
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return [name for name in names or mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.fixture
def bench(tiny_folders, random_samples, tmp_path):
    def make(variant):
        return Bench(str(tiny_folders[variant]), None, (), random_samples, tmp_path)

    return make


RECIPES = (
    {"method": "awq", "bits": 3, **BASE},
    {"method": "gptq", "bits": 2, "symmetric": False, **BASE},
    {"method": "smoothquant", "bits": 8, "activations": {"bits": 8}, **BASE},
)


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["method"])
def test_a_piece_is_what_an_export_of_that_component_alone_would_hold(bench, variant, recipe, random_samples):
    made = bench(variant)
    batches = prepare(random_samples, open_processor(made.checkpoint.folder), made.checkpoint.family)
    for component, piece in pieces_of(made.checkpoint.folder, recipe).items():
        made.make(piece)
        made.compose([piece])
        expected, _ = simulate.simulate_batches(made.checkpoint, make_recipe(only(recipe, component)), batches)
        assert equal(made.model, expected)
        assert not equal(made.model, made.checkpoint.model())
        answers = [model(**batches[0]).logits for model in (made.model, expected)]  # inputs are rounded alike
        torch.testing.assert_close(*answers, rtol=0, atol=0)


def test_a_composition_has_of_every_component_its_piece_and_nothing_of_those_before(bench):
    made = bench("blip2-opt")
    first, second = (pieces_of(made.checkpoint.folder, recipe) for recipe in RECIPES[:2])
    sites = walk(made.checkpoint.skeleton(), made.checkpoint.family).sites
    for piece in (*first.values(), *second.values()):
        made.make(piece)
    of = {}
    for piece in (*first.values(), *second.values()):
        made.compose([piece])
        of[piece.key] = {name: parameter.clone() for name, parameter in made.model.named_parameters()}
    mixed = [first["vision"], second["connector"], first["language"]]
    made.compose(list(second.values()))  # all of it must go but the connector
    made.compose(mixed)
    for piece in mixed:
        for site in sites:
            if site.component == piece.component:
                name = f"{site.name}.weight"
                assert torch.equal(made.model.get_parameter(name), of[piece.key][name])
    made.compose([])
    assert equal(made.model, made.checkpoint.model())


def test_in_sequence_each_component_is_calibrated_on_what_the_quantized_ones_put_out(bench, random_samples):
    made = bench("blip2-opt")
    asked = made.ask("vqa", asked_of("vqa", random_samples))
    recipe = {"method": "gptq", "bits": 2, **BASE}
    pieces = pieces_of(made.checkpoint.folder, recipe)
    for piece in pieces.values():
        made.make(piece)
    exported, _ = simulate.simulate_batches(made.checkpoint, make_recipe(recipe), made.batches)
    assert made.score_in_sequence(recipe, asked) == asked.score(exported)
    made.compose(list(pieces.values()))
    assert equal(made.model, exported, [f"{site.name}.weight" for site in _sites(made, "vision")])
    assert not equal(made.model, exported, [f"{site.name}.weight" for site in _sites(made, "language")])


@pytest.mark.parametrize("elsewhere", DEVICES)
@pytest.mark.parametrize("variant", FAMILIES)
def test_on_another_device_compositions_score_as_they_do_here(
    variant, elsewhere, tiny_folders, random_samples, tmp_path
):
    """Alike but for the last bits of sums; rounding to nearest asks none, and 8 bits hardly."""
    folder = str(tiny_folders[variant])
    recipes = {"method": "rtn", "bits": 3, **BASE}, {"method": "gptq", "bits": 8, **BASE}

    def scores(device, place):
        place.mkdir()
        made = Bench(folder, None, (), random_samples, place, device)
        asked = made.ask("vqa", asked_of("vqa", random_samples))
        found = [made.score_in_sequence(recipe, asked) for recipe in recipes]
        for recipe in recipes:
            pieces = list(pieces_of(folder, recipe).values())
            for piece in pieces:
                made.make(piece)
            found.append(made.score(pieces, asked))
        assert made.model.device == device
        return found

    here = scores(torch.device("cpu"), tmp_path / "here")
    with elsewhere() as device:
        there = scores(device, tmp_path / "there")
    assert here[0]["divergence"] > 10 * here[1]["divergence"] > 0
    for mine, theirs in zip(here, there, strict=True):
        assert theirs == pytest.approx(mine, rel=0.02, abs=1e-6)


def _sites(made, component):
    return [
        site for site in walk(made.checkpoint.skeleton(), made.checkpoint.family).sites if site.component == component
    ]


@pytest.mark.parametrize("variant", FAMILIES)
def test_scores_are_what_asking_one_prompt_at_a_time_gives(bench, variant, random_samples):
    made = bench(variant)
    vlm = TorchVlm(made.checkpoint.model(), open_processor(made.checkpoint.folder))
    said = answer_all(vlm, random_samples, made.checkpoint.family)
    answered = tuple(
        type(sample)(sample.id, sample.image, "question", sample.text, (answer.text,) if number % 3 else ("w9",))
        for number, (sample, answer) in enumerate(zip(random_samples, said, strict=True))
    )
    asked = made.ask("vqa", asked_of("vqa", answered))
    found = made.score((), asked)
    expected = [vqa.accuracy(answer.text, sample.answers) for answer, sample in zip(said, answered, strict=True)]
    assert found["accuracy"] == pytest.approx(100 * sum(expected) / len(expected))
    assert found["divergence"] == pytest.approx(0, abs=1e-9)
    piece = pieces_of(made.checkpoint.folder, {"method": "rtn", "bits": 2, **BASE})["language"]
    made.make(piece)
    assert made.score([piece], asked)["divergence"] > 1e-3


def test_the_divergence_is_that_of_kullback_and_leibler():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.nn.functional.kl_div(
        logits[1].log_softmax(-1), logits[0].log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    found = divergences(*(log_softmax(each.numpy()) for each in logits))
    torch.testing.assert_close(torch.from_numpy(found), expected)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"qkv": "split"}, {}, True),  # rows have grids of their own
        ({**WHOLE, "qkv": "split"}, WHOLE, False),  # a whole tensor's range is not that of its parts
        ({"qkv": "v-only"}, {}, False),
        (WHOLE, WHOLE | {"method": "rtn"}, True),
        ({"method": "rtn", "options": {"damp": 0.5}}, {"method": "rtn"}, True),  # read by none
        ({"options": {"damp": 0.5}}, {}, False),
        ({"method": "rtn", "options": {"biases": True}}, {"method": "rtn"}, False),
        (
            {"bits": 8, "components": {"vision": {"bits": 4}, "connector": {"bits": 4}, "language": {"bits": 4}}},
            {},
            True,
        ),
        ({"rules": [{"match": ".", "bits": 3}]}, {"bits": 3}, True),
        ({"rules": [{"match": r"layers\.0\.", "bits": 3}]}, {"bits": 3}, False),
        ({"symmetric": False}, {}, False),
        ({"group_size": 64}, {}, False),
        ({"activations": {"bits": 8}}, {}, False),
    ],
)
def test_configurations_are_one_where_they_quantize_the_same_tensors_the_same_way(tiny_folders, one, other, same):
    keys = [
        planned(tiny_folders["blip2-opt"], {"method": "awq", "bits": 4, **BASE, **recipe}).key
        for recipe in (one, other)
    ]
    assert (keys[0] == keys[1]) is same


def write(folder, **content):
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def expanded(folder, file):
    checkpoint = open_checkpoint(str(folder))
    skeleton = checkpoint.skeleton()
    found = walk(skeleton, checkpoint.family)
    named = configurations(read_grid(file), found, file)
    return [plan(each, checkpoint, skeleton, found) for each in named]


@pytest.mark.parametrize("variant", FAMILIES)
def test_seven_widths_of_three_components_are_343_configurations_of_18_pieces(tiny_folders, tmp_path, variant):
    file = write(tmp_path, recipe={"method": "awq", **BASE}, each={"bits": WIDTHS})
    found = expanded(tiny_folders[variant], file)
    assert [tuple(each.bits.values()) for each in found] == list(itertools.product(WIDTHS, repeat=3))
    assert len({each.key for each in found}) == 343
    assert len({piece.key for each in found for piece in each.pieces}) == 18  # at 16 bits there is nothing to do


def test_algorithm_1_names_every_subset_and_measures_what_differs(tiny_folders, tmp_path):
    """Two blocks have no front, so many of the subsets are one."""
    found = expanded(tiny_folders["blip2-opt"], write(tmp_path, uniform={"bits": [2, 8]}))
    assert len(found) == 1 + 2 * 7 * 7 * 3
    checkpoint = open_checkpoint(str(tiny_folders["blip2-opt"]))
    sites = walk(checkpoint.skeleton(), checkpoint.family).sites

    def touched(bits, components, blocks, kinds):
        # The projection is a block by itself, and so an end; it counts as feed-forward.
        third = {site.name: "end" if site.kind == "projection" or site.block else "middle" for site in sites}
        return frozenset(
            (bits, site.name)
            for site in sites
            if site.component in components
            and third[site.name] in blocks
            and ("attention" if site.kind == "attention" else "feedforward") in kinds
        )

    def subsets(values):
        return itertools.chain.from_iterable(itertools.combinations(values, size) for size in range(1, len(values) + 1))

    expected = {
        touched(*each)
        for each in itertools.product(
            (2, 8),
            list(subsets(COMPONENTS)),
            list(subsets(("front", "middle", "end"))),
            list(subsets(("attention", "feedforward"))),
        )
    } | {frozenset()}
    assert len({each.key for each in found}) == len(expected)


def test_bits_of_a_component_are_the_mean_over_its_weights(tiny_folders):
    rules = [{"match": r"^language_model.*\.fc1$", "bits": 4}]
    found = planned(tiny_folders["blip2-opt"], {"method": "rtn", "bits": 16, **BASE, "rules": rules})
    attention, feedforward = 4 * 64 * 64, 64 * 128
    assert found.bits["language"] == pytest.approx(
        (16 * (attention + feedforward) + 4 * feedforward) / (attention + 2 * feedforward)
    )
    assert found.bits["vision"] == 16


@pytest.fixture
def questions(random_samples, tmp_path_factory):
    """Two files about different pictures: to calibrate on, and to ask."""
    folder = tmp_path_factory.mktemp("questions")
    for name, samples in (("seen", random_samples[:4]), ("asked", random_samples[4:])):
        lines = []
        for sample in samples:
            shutil.copy(sample.image, folder)
            lines.append({"image": sample.image.name, "question": sample.text, "answer": "red", "id": sample.id})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def arguments(tiny_folders, questions):
    """Of a sweep of a tiny model."""

    def of(file, output):
        seen, asked = questions / "seen.jsonl", questions / "asked.jsonl"
        model = tiny_folders["blip2-opt"]
        return (model, "--grid", file, "--out", output, "--calibration", seen, "--data", asked, "--samples", 4)

    return of


@pytest.fixture
def product(tmp_path):
    """Twelve rows of four pieces, the last of them the reference."""
    return write(
        tmp_path,
        recipe={"method": "awq", **BASE},
        each={"bits": [2, 16]},
        components={"vision": {"bits": [2, 4, 16]}},
    )


def tables(folder):
    return {name: (folder / name).read_bytes() for name in ("scores.csv", "rows.json")}


def test_a_sweep_leaves_a_table_that_importance_reads(vlmq, arguments, product, tmp_path):
    code, out, err = vlmq("sweep", *arguments(product, tmp_path / "out"))
    assert code == 0, err
    assert "12 rows, 12 distinct configurations of 4 quantized components" in out
    header = (tmp_path / "out/scores.csv").read_text().splitlines()[0]
    assert header == "vit_bits,qformer_bits,llm_bits,accuracy,divergence,model_size"
    found = read_scores(tmp_path / "out/scores.csv", "divergence")
    assert found.components == ("vit", "qformer", "llm")
    assert [tuple(bits) for bits in found.bits.tolist()] == list(itertools.product((2, 4, 16), (2, 16), (2, 16)))
    assert found.values[-1] == pytest.approx(0, abs=1e-9)  # nothing was changed
    rows = json.loads((tmp_path / "out/rows.json").read_text())
    assert rows[-1]["recipe"] is not None
    assert rows[0]["bytes"] < rows[-1]["bytes"]
    for name in ("pareto.png", "alone.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_a_row_says_the_bytes_that_an_export_has(vlmq, arguments, tiny_folders, product, tmp_path):
    assert vlmq("sweep", *arguments(product, tmp_path / "out"))[0] == 0
    first = json.loads((tmp_path / "out/rows.json").read_text())[0]
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(first["recipe"]))
    flags = ("--recipe", tmp_path / "first.yaml", "--calibration", arguments(product, "")[6], "--samples", 4)
    exported = tmp_path / "exported"
    code, _, err = vlmq(
        "export", tiny_folders["blip2-opt"], *flags, "--format", "safetensors", "--no-verify", "-o", exported
    )
    assert code == 0, err
    file = exported / "model.safetensors"
    assert file.stat().st_size - int.from_bytes(file.read_bytes()[:8], "little") - 8 == first["bytes"]


def test_a_sweep_that_was_stopped_goes_on_and_ends_in_the_same_tables(vlmq, arguments, product, tmp_path, monkeypatch):
    assert vlmq("sweep", *arguments(product, tmp_path / "whole"))[0] == 0
    perform, done = sweeping.perform, []

    def stopping(job, task):
        if len(done) in (2, 6):  # in the middle of the pieces, then of the rows
            done.append("stopped")
            raise SystemExit(143)
        done.append(task)
        return perform(job, task)

    monkeypatch.setattr(sweeping, "perform", stopping)
    for _ in range(2):
        assert vlmq("sweep", *arguments(product, tmp_path / "out"))[0] == 143
    with (tmp_path / "out/rows.jsonl").open("ab") as rows:
        rows.write(b'{"key": "cut sho')  # as a kill may leave it
    assert vlmq("sweep", *arguments(product, tmp_path / "out"))[0] == 0
    assert len(done) == 2 + 4 + 12  # every piece and every row once
    assert tables(tmp_path / "out") == tables(tmp_path / "whole")


def test_what_fails_is_tried_once_more_and_said(vlmq, arguments, product, tmp_path, monkeypatch):
    perform, tried = sweeping.perform, []

    def failing(job, task):
        if isinstance(task, sweeping.Make):
            return perform(job, task)
        tried.append(task.key)
        if tried.count(task.key) == 1 and len(tried) == 3:
            raise RuntimeError("once")
        if task.key == tried[0]:
            raise RuntimeError("out of\nmemory")
        return perform(job, task)

    monkeypatch.setattr(sweeping, "perform", failing)
    code, out, err = vlmq("sweep", *arguments(product, tmp_path / "out"))
    assert code == 1
    assert "11 rows" in out
    assert err == "vlmq: warning: awq: vision 2 bits, connector 2 bits, language 2 bits: RuntimeError: out of memory\n"
    assert len(tried) == 12 + 2
    assert len((tmp_path / "out/scores.csv").read_text().splitlines()) == 1 + 11
    assert vlmq("sweep", *arguments(product, tmp_path / "out"))[0] == 1
    assert len(tried) == 12 + 2  # no third time


def test_a_piece_that_fails_fails_what_it_is_part_of_and_nothing_else(vlmq, arguments, product, tmp_path, monkeypatch):
    make = Bench.make

    def failing(self, piece):
        if piece.component == "connector":
            raise RuntimeError("no")
        make(self, piece)

    monkeypatch.setattr(Bench, "make", failing)
    code, out, err = vlmq("sweep", *arguments(product, tmp_path / "out"))
    assert (code, err.count("connector: RuntimeError: no")) == (1, 6)
    assert "6 rows" in out


@pytest.mark.parametrize(
    "engine",
    [
        "process",
        pytest.param(
            "ray",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"
            ),
        ),
    ],
)
def test_two_workers_give_the_rows_of_one_process(vlmq, arguments, product, tmp_path, engine):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert vlmq("sweep", *arguments(product, tmp_path / "one"))[0] == 0
    finally:
        torch.set_num_threads(threads)
    code, _, err = vlmq("sweep", *arguments(product, tmp_path / "two"), "--engine", engine, "--workers", 2)
    assert code == 0, err
    assert tables(tmp_path / "two") == tables(tmp_path / "one")


def test_of_several_gpus_every_worker_has_its_own_and_cuda_1_is_for_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "")  # so that it is put back
    threads, ranks, found = torch.get_num_threads(), SimpleQueue(), []
    for rank in range(3):
        ranks.put(str(rank))
        engines._one_of(ranks)
        found.append([str(device_of(name)) for name in ("auto", "cuda", "cuda:1", "cpu")])
    torch.set_num_threads(threads)
    own = ["cuda:0", "cuda:1", "cuda:0"]
    assert found == [[gpu, gpu, "cuda:1", "cpu"] for gpu in own]


def test_without_ray_one_line_says_what_to_install(vlmq, arguments, product, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = vlmq("sweep", *arguments(product, tmp_path / "out"), "--engine", "ray")
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install 'vlmq[ray]'" in err
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_sweep_is_refused_and_left_as_it_was(vlmq, arguments, product, tmp_path, questions):
    assert vlmq("sweep", *arguments(product, tmp_path / "out"))[0] == 0
    before = tables(tmp_path / "out")
    other = write(tmp_path, recipe={"method": "rtn", **BASE}, each={"bits": [2, 16]})
    code, _, err = vlmq("sweep", *arguments(other, tmp_path / "out"))
    assert (code, err.count("\n")) == (2, 1)
    assert "holds a sweep with another calibration, grid; finish that one" in err
    other = write(
        tmp_path, recipe={"method": "awq", **BASE}, each={"bits": [2, 16]}, components={"vision": {"bits": [2, 4, 16]}}
    )
    for more, words in ((("--questions", 3), "another data"), (("--seed", 1, "--samples", 3), "another calibration")):
        code, _, err = vlmq("sweep", *arguments(other, tmp_path / "out"), *more)
        assert (code, err.count("\n")) == (2, 1)
        assert words in err
    assert tables(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    code, _, err = vlmq("sweep", *arguments(other, tmp_path / "mine"))
    assert code == 2
    assert "exists already and is no sweep's" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "grid.yaml: an empty grid"),
        ({"recipe": {"method": "awq"}}, "an empty grid"),
        ({"each": {"bits": []}}, "each.bits: an empty list"),
        (
            {"components": {"audio": {"bits": [4]}}},
            "components.audio: no such component; choose vision, connector, language",
        ),
        ({"uniform": {"components": ["audio"]}}, "uniform.components.0: no such component"),
        ({"uniform": {"bits": []}}, "uniform.bits: an empty list"),
        ({"uniform": {"bits": [7]}}, "7 bits; choose one of"),
        ({"uniform": {}, "each": {"bits": [4]}}, "uniform and a product in one grid"),
        ({"widths": [2]}, "widths: unknown key"),
        ({"each": {"bits": 4}}, "each.bits: 4 is no list"),
        ({"each": {"width": [4]}}, "components.vision: unknown key 'width'"),
        ({"each": {"bits": [4, 7]}}, "7 bits; choose one of"),
        ({"together": {"method": ["none"]}, "each": {"bits": [4]}}, "unknown method 'none'"),
        ({"recipe": {"group_size": 96}, "each": {"bits": [4]}}, "64 columns do not divide into groups of 96"),
        ({"recipes": {"mine": ["absent.yaml"]}}, "absent.yaml: cannot be read"),
        ({"together": {"rotate": [[], ["language"]]}, "each": {"bits": [4]}, "recipe": BASE}, "rotate different"),
    ],
)
def test_bad_grids_get_one_line_and_nothing_is_written(vlmq, arguments, tmp_path, content, words):
    code, out, err = vlmq("sweep", *arguments(write(tmp_path, **content), tmp_path / "out"))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--task", "chess"), "--task chess: unknown; choose vqa"),
        (("--workers", 0), "--workers 0: at least one"),
        (("--ray-address", "auto"), "no use without --engine ray"),
        (("--samples", 0), "0 samples"),
        (("--device", "cuda:99"), "--device cuda:99: "),
        (("--engine", "ray", "--device", "cuda:1"), "--device cuda:1: Ray gives each task a GPU of its own"),
    ],
)
def test_bad_flags_get_one_line_and_nothing_is_written(vlmq, arguments, product, tmp_path, flags, words):
    code, out, err = vlmq("sweep", *arguments(product, tmp_path / "out"), *flags)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert not (tmp_path / "out").exists()


def test_the_front_is_what_no_smaller_and_no_better_point_beats():
    points = [(3, 5.0), (1, 2.0), (2, 1.0), (2, 4.0), (4, 5.0), (5, 6.0), (1, 1.0)]
    expected = sorted(
        point
        for point in points
        if not any((size <= point[0] and score >= point[1]) and (size, score) != point for size, score in points)
    )
    assert front(points) == expected


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_subset_has_one_name_in_the_plot_whatever_order_its_rules_came_in(tiny_folders, tmp_path, variant):
    checkpoint = open_checkpoint(str(tiny_folders[variant]))
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({"uniform": {"bits": [2]}}))
    found = configurations(read_grid(grid), walk(checkpoint.skeleton(), checkpoint.family), grid)
    rows = [Row(each.name, "uniform", {}, 1, {"divergence": 1.0}, each.recipe) for each in found if each.recipe]
    for key in ("component", "kind", "blocks"):
        said = {_said(row, key) for row in rows if row.recipe.get("rules")}
        assert len(said) == len({frozenset(label.split("+")) for label in said}) > 2, key


def test_the_canonical_form_names_every_quantized_site(tiny_folders):
    checkpoint = open_checkpoint(str(tiny_folders["llava-llama"]))
    found = walk(checkpoint.skeleton(), checkpoint.family)
    assignment = make_recipe({"method": "rtn", **BASE}).assign(found)
    forms = canonical(assignment, found)
    assert {name for form in forms.values() for name, _ in form} == set(assignment.schemes)

"""The scorer of sweeps: trees of questions, features found once, and tasks scored as `vlmq evaluate` scores them."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import Blip2QFormerModel, Blip2VisionModel

from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.data import demo_folder
from vlmq.exporter.evaluation.answers import answer_all
from vlmq.exporter.evaluation.metrics.cider import cider
from vlmq.exporter.runtime import TorchVlm, open_processor
from vlmq.exporter.samples import Sample
from vlmq.exporter.search.bench import Bench
from vlmq.exporter.search.fisher import answered, divergence, log_probabilities
from vlmq.exporter.search.grid import Configuration
from vlmq.exporter.search.kept import Kept
from vlmq.exporter.search.packing import Path, grow, pack
from vlmq.exporter.search.pieces import plan
from vlmq.exporter.search.tasks import ask, asked_of
from vlmq.exporter.sources import read
from vlmq.exporter.walk import walk

TRUNK = (7, 7, 1)


def random_paths(seed, count):
    """Questions of few words, so that they share beginnings, and some the whole."""
    dice = np.random.default_rng(seed)

    def words(most):
        return tuple(dice.integers(2, 4, dice.integers(1, most)).tolist())

    return [Path(place, (*TRUNK, *words(5)), (*words(4), 0)) for place in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_every_token_of_a_tree_sees_its_own_question_up_to_itself_and_nothing_else(seed):
    images = [random_paths(seed, 5), random_paths(100 + seed, 2)]
    (batch,) = pack(images, 2, padding=9)
    seen = batch.mask(-1.0)[:, 0] == 0
    said = {}
    for row, image in enumerate(batch.images):
        for place, in_row, told in zip(batch.places, batch.rows, batch.told, strict=True):
            if in_row != row:
                continue
            path = images[image][place]
            draft = path.draft[:-1]
            for step in range(len(path.draft)):
                looked_at = seen[row, told[step]].nonzero()[:, 0]
                in_order = looked_at[batch.positions[row, looked_at].argsort()]
                assert batch.tokens[row, in_order].tolist() == [*path.prompt, *draft[:step]]
                assert batch.positions[row, in_order].tolist() == list(range(len(in_order)))
            assert set(told[len(path.draft) :].tolist()) <= {int(told[len(path.draft) - 1])}
            said[image, place] = True
        assert (seen[row].any(1)).all()  # or attention has nothing to share out
    assert len(said) == 7


def test_what_questions_begin_with_is_in_a_tree_once():
    paths = random_paths(3, 8)
    beginnings = {path.tokens[:length] for path in paths for length in range(1, len(path.tokens) + 1)}
    assert len(grow(paths).tokens) == len(beginnings)


def pieces_of(checkpoint, **bits):
    recipe = {"method": "rtn", "group_size": 32, "components": {name: {"bits": width} for name, width in bits.items()}}
    skeleton = checkpoint.skeleton()
    plain = walk(skeleton, checkpoint.family)
    return plan(Configuration("it", "it", recipe), checkpoint, skeleton, plain).pieces


def captions(samples, texts):
    return tuple(
        Sample(sample.id, sample.image, "caption", None, (text, f"so {text}"))
        for sample, text in zip(samples, texts, strict=True)
    )


@pytest.mark.parametrize("task", ["vqa", "captions"])
def test_scores_of_a_composition_are_those_of_a_bench_that_measures_nothing_else(
    tiny_folders, random_samples, tmp_path, task
):
    """Bit for bit: whatever is kept from one configuration to the next, none of it changes a score."""
    folder = str(tiny_folders["blip2-opt"])

    def fresh():
        bench = Bench(folder, None, (), random_samples, tmp_path)
        samples = random_samples if task == "vqa" else captions(random_samples, ["a red circle"] * len(random_samples))
        return bench, bench.ask(task, asked_of(task, samples))

    bench, asked = fresh()
    scores = {}
    for widths in itertools.product((2, 16), repeat=3):
        pieces = pieces_of(bench.checkpoint, **dict(zip(("vision", "connector", "language"), widths, strict=True)))
        for piece in pieces:
            if not (tmp_path / piece.key).exists():
                bench.make(piece)
        scores[widths] = (pieces, bench.score(pieces, asked))
    assert len({found["divergence"] for _, found in scores.values()}) == 8
    for widths in ((16, 2, 2), (2, 2, 16), (2, 16, 2)):
        pieces, expected = scores[widths]
        bench, asked = fresh()
        assert bench.score(pieces, asked) == expected


def test_the_vision_encoder_runs_once_for_each_of_its_forms_and_the_qformer_for_each_pair(
    tiny_folders, random_samples, tmp_path, monkeypatch
):
    bench = Bench(str(tiny_folders["blip2-opt"]), None, (), random_samples, tmp_path)
    asked = bench.ask("vqa", asked_of("vqa", random_samples))
    ran = []
    for kind in (Blip2VisionModel, Blip2QFormerModel):
        forward = kind.forward
        monkeypatch.setattr(
            kind,
            "forward",
            lambda self, *args, forward=forward, **kwargs: (
                ran.append(type(self)),
                forward(self, *args, **kwargs),
            )[1],
        )
    for widths in itertools.product((2, 16), (2, 4, 16), (2, 16)):
        pieces = pieces_of(bench.checkpoint, **dict(zip(("vision", "connector", "language"), widths, strict=True)))
        for piece in pieces:
            if not (tmp_path / piece.key).exists():
                bench.make(piece)
        ran_before = len(ran)
        bench.score(pieces, asked)
        assert len(ran) - ran_before <= 2
    # The reference's features, 16 and 16 bits, were found when the questions were prepared.
    assert ran.count(Blip2VisionModel) == 1
    assert ran.count(Blip2QFormerModel) == 5


def test_what_was_used_longest_ago_goes_when_bytes_run_out():
    kept = Kept(len, limit=5)
    made = []

    def value(key, size):
        return kept.get(key, lambda: made.append(key) or "x" * size)

    assert [value("a", 2), value("b", 2), value("a", 0), value("c", 3)] == ["xx", "xx", "xx", "xxx"]
    value("a", 2), value("c", 3)
    assert made == ["a", "b", "c"]
    value("b", 2)
    assert made == ["a", "b", "c", "b"]
    assert value("large", 6) == "xxxxxx"
    assert not kept.values
    assert [value(None, 1), value(None, 1)] == ["x", "x"]
    assert made[-2:] == [None, None]


def bare(caption):
    return caption.replace(",", "").replace(":", "").split()


@pytest.mark.parametrize("demo", ["blip2-mini", "llava-mini"])
def test_captions_of_a_demo_are_what_asking_one_prompt_at_a_time_gives_and_score_as_vlmq_evaluate_scores(demo):
    checkpoint = open_checkpoint(demo)
    model = checkpoint.model()
    generator = torch.Generator().manual_seed(0)
    damaged = checkpoint.model()
    with torch.no_grad():  # so that some captions are wrong, and go on where no draft foretold it
        for parameter in damaged.parameters():
            parameter.mul_(1 + 0.4 * torch.randn(parameter.shape, generator=generator))
    everything = read(demo_folder("evaluation"), None).samples
    asked = asked_of("captions", everything)[:24]
    samples = [one.sample for one in asked]
    prepared = ask("captions", checkpoint, model, asked)
    said = answer_all(TorchVlm(damaged, open_processor(checkpoint.folder)), samples, checkpoint.family, 64, 30)
    found = prepared.scorer.score(damaged)
    assert found.texts == [answer.text for answer in said]
    right = [text == sample.answers[0] for text, sample in zip(found.texts, samples, strict=True)]
    assert 0 < sum(right) < len(right)
    words = [bare(text) for text in found.texts]
    references = [list(map(bare, sample.answers)) for sample in samples]
    scores = prepared.score(damaged)
    assert list(scores) == ["CIDEr", "divergence"]
    assert scores["CIDEr"] == pytest.approx(np.mean(cider(words, references)))
    assert prepared.score(model)["CIDEr"] > scores["CIDEr"]


@pytest.mark.parametrize("demo", ["blip2-mini", "llava-mini"])
def test_the_divergence_of_captions_is_that_of_all_tokens_of_the_annotated_one(demo):
    checkpoint = open_checkpoint(demo)
    model, other = checkpoint.model(), checkpoint.model()
    with torch.no_grad():
        other.get_parameter("language_model.lm_head.weight" if "blip2" in demo else "lm_head.weight").mul_(0.8)
    asked = asked_of("captions", read(demo_folder("evaluation"), None).samples)[:6]
    found = ask("captions", checkpoint, model, asked).score(other)["divergence"]
    processor = open_processor(checkpoint.folder)
    whole = []  # with the end, which is told too
    for inputs, answer in answered([one.sample for one in asked], processor, checkpoint):
        longer = {name: torch.cat([value, value[:, -1:]], 1) for name, value in inputs.items() if value.ndim == 2}
        longer["input_ids"][:, -1] = processor.tokenizer.eos_token_id
        whole.append((inputs | longer, answer + 1))
    assert found == pytest.approx(divergence(*(log_probabilities(each, whole) for each in (model, other))), rel=1e-4)


@pytest.fixture
def gqa(random_samples, tmp_path):
    """GQA's own files."""
    folder = tmp_path / "gqa"
    (folder / "images").mkdir(parents=True)
    asked = {}
    for number, sample in enumerate(random_samples):
        shutil.copy(sample.image, folder / "images" / f"{number}.png")
        kind = "query" if number % 2 else "verify"
        asked[str(number)] = {
            "question": sample.text,
            "imageId": str(number),
            "answer": "w9",
            "types": {"structural": kind, "semantic": None},
        }
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(asked))
    return folder


@pytest.fixture
def grid(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("recipe: {method: rtn, group_size: 32}\ntogether: {bits: [2, 8]}\n")
    return file


def test_a_benchmark_is_read_from_its_own_files_and_scored_by_its_groups(vlmq, tiny_folders, gqa, grid, tmp_path):
    flags = (tiny_folders["blip2-opt"], "--grid", grid, "--task", "gqa")
    code, _, err = vlmq("sweep", *flags, "--data", gqa, "--out", tmp_path / "out", "--calibration", gqa)
    assert code == 0, err
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert list(rows[0]["scores"]) == ["accuracy", "divergence", "structural: query", "structural: verify"]
    assert rows[0]["scores"]["divergence"] > rows[1]["scores"]["divergence"] > 0
    code, _, err = vlmq("sweep", *flags, "--out", tmp_path / "other")
    assert (code, err.count("\n")) == (2, 1)
    assert "name their folder with --data" in err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("task", "name"), [("captions", "CIDEr"), ("vqa", "accuracy")])
def test_a_task_takes_the_samples_of_its_kind(vlmq, tiny_folders, random_samples, grid, tmp_path, task, name):
    lines = [{"image": str(sample.image), "answers": ["a red circle", "one circle"]} for sample in random_samples[:6]]
    lines += [{"image": str(sample.image), "question": "how many?", "answer": "2"} for sample in random_samples[:2]]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    flags = (tiny_folders["blip2-opt"], "--grid", grid, "--data", file, "--out", tmp_path / "out")
    code, _, err = vlmq("sweep", *flags, "--task", task, "--calibration", file)
    assert code == 0, err
    assert next(iter(json.loads((tmp_path / "out" / "rows.json").read_text())[0]["scores"])) == name
    file.write_text("\n".join(map(json.dumps, lines[6:] if task == "captions" else lines[:6])))
    code, _, err = vlmq("sweep", *flags, "--task", task, "--calibration", file)
    assert (code, err.count("\n")) == (2, 1)
    assert f"--task {task}: no sample is a" in err

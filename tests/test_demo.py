"""The demo world and its two models: what is asked has the right answer, and what is shipped gives it."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmq.exporter.demo import splits
from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.demo.dataset import write_split
from vlmq.exporter.demo.models import DEMOS, build_tokenizer
from vlmq.exporter.demo.outliers import CHANNELS, READERS, make_outliers, rescale
from vlmq.exporter.demo.packing import exact_matches, logits_of, pack
from vlmq.exporter.demo.questions import captions_of, questions_about
from vlmq.exporter.demo.world import COLORS, SHAPES, picture_of, scene_of

both = pytest.mark.parametrize("name", CHECKPOINTS)
ORACLE_IDS = range(200)


@pytest.fixture(scope="module")
def load():
    """A fresh copy of a shipped model in float32, and its processor."""

    def fresh(name):
        model = AutoModelForImageTextToText.from_pretrained(CHECKPOINTS[name], dtype=torch.float32)
        return model.eval(), AutoProcessor.from_pretrained(CHECKPOINTS[name])

    return fresh


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Path:
    return write_split("evaluation", tmp_path_factory.mktemp("world") / "evaluation")


# The world


def test_the_picture_of_an_id_is_always_the_same_bytes():
    pictures = b"".join(picture_of(scene_of(id)).tobytes() for id in range(64))
    assert hashlib.sha256(pictures).hexdigest() == "2e57e00561a2c4737b026b17c7337a46d1e5461322b2a781e4dbd1e61a7d7a70"


def test_the_questions_about_a_picture_are_always_the_same():
    asked = [(question.text, question.answer) for id in range(64) for question in questions_about(scene_of(id), 8)]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    assert digest == "19debc02b36d1a814927c0913708a9fa00da867d62c9db63c33defd420d5ef4f"


def seen_in(picture: np.ndarray) -> list[dict]:
    """What is in a picture, from its pixels alone: a thing fills its part of a quarter with one of the colours."""
    things = []
    palette = np.array(list(COLORS.values()))
    for row in (0, 1):
        for column in (0, 1):
            quarter = picture[32 * row : 32 * row + 32, 32 * column : 32 * column + 32].astype(int)
            distance = np.linalg.norm(quarter[:, :, None] - palette, axis=-1)
            solid = distance.min(-1) < 5
            if not solid.any():
                continue
            color = list(COLORS)[np.bincount(distance.argmin(-1)[solid]).argmax()]
            mask = distance[:, :, list(COLORS).index(color)] < 75
            ys, xs = np.nonzero(mask)
            box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            things.append(
                {
                    "color": color,
                    "shape": shape_of(box),
                    "row": row,
                    "column": column,
                    "size": "large" if max(box.shape) > 16 else "small",
                }
            )
    return things


def shape_of(box: np.ndarray) -> str:
    height, width = box.shape
    if not box[height // 2, width // 2]:
        return "ring"
    if box[: height // 4].sum() < 0.5 * box[-(height // 4) :].sum():
        return "triangle"
    return "square" if box.mean() > 0.92 else "circle" if box.mean() > 0.65 else "cross"


def answer_from(things: list[dict], question: str) -> str:
    """The answer, worked out from the words of the question alone."""

    def named(text):
        return [thing for thing in things if all(word in (*thing.values(), "thing") for word in text.split())]

    def one(text):
        (thing,) = named(text)
        return thing

    def yes(truth):
        return "yes" if truth else "no"

    def singular(plural):
        return next(shape for shape in SHAPES if plural in (shape + "s", shape + "es"))

    rules: dict[str, Callable[..., str]] = {
        r"Is there a ([\w ]+)\?": lambda name: yes(named(name)),
        r"Is the ([\w ]+) large\?": lambda name: yes(one(name)["size"] == "large"),
        r"Is the (\w+) (\w+)\?": lambda shape, color: yes(
            [thing["color"] for thing in things if thing["shape"] == shape] == [color]
        ),
        r"Is the ([\w ]+) left of the ([\w ]+)\?": lambda a, b: yes(one(a)["column"] < one(b)["column"]),
        r"Is the ([\w ]+) right of the ([\w ]+)\?": lambda a, b: yes(one(a)["column"] > one(b)["column"]),
        r"Is the ([\w ]+) above the ([\w ]+)\?": lambda a, b: yes(one(a)["row"] < one(b)["row"]),
        r"Is the ([\w ]+) below the ([\w ]+)\?": lambda a, b: yes(one(a)["row"] > one(b)["row"]),
        r"How many shapes are there\?": lambda: str(len(things)),
        r"How many (\w+) shapes are there\?": lambda color: str(sum(thing["color"] == color for thing in things)),
        r"How many (\w+) are there\?": lambda shapes: str(sum(t["shape"] == singular(shapes) for t in things)),
        r"What color is the (\w+)\?": lambda shape: " ".join(t["color"] for t in things if t["shape"] == shape),
        r"What shape is the (\w+) thing\?": lambda color: " ".join(t["shape"] for t in things if t["color"] == color),
        r"What size is the ([\w ]+)\?": lambda name: one(name)["size"],
        r"Where is the ([\w ]+)\?": lambda name: (
            f"{('top', 'bottom')[one(name)['row']]} {('left', 'right')[one(name)['column']]}"
        ),
    }
    for pattern, rule in rules.items():
        if match := re.fullmatch(pattern, question):
            return rule(*match.groups())
    raise AssertionError(f"no rule for {question!r}")


def test_every_answer_is_what_the_pixels_show():
    wrong = []
    for id in ORACLE_IDS:
        scene = scene_of(id)
        things = seen_in(picture_of(scene))
        wrong += [
            (id, question.text)
            for question in questions_about(scene, 8)
            if answer_from(things, question.text) != question.answer
        ]
    assert wrong == []


def test_every_caption_names_what_the_pixels_show():
    for id in ORACLE_IDS:
        scene = scene_of(id)
        names = sorted(f"{thing['color']} {thing['shape']}" for thing in seen_in(picture_of(scene)))
        for caption in captions_of(scene):
            assert sorted(re.findall(rf"(?:{'|'.join(COLORS)}) \w+", caption)) == names, caption


def test_splits_share_no_id_and_no_picture():
    ranges = (splits.CALIBRATION, splits.EVALUATION, splits.VALIDATION, splits.TRAINING)
    ordered = sorted(ranges, key=lambda ids: ids.start)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(ordered))
    ids = [*splits.CALIBRATION, *splits.EVALUATION]
    assert len({picture_of(scene_of(id)).tobytes() for id in ids}) == len(ids)


def test_without_the_image_the_best_answer_is_right_less_than_half_of_the_time():
    assert 35 < splits.prior_accuracy("evaluation", pictures=10_000) < 50


def test_no_question_or_caption_has_a_word_that_the_tokenizer_does_not_know():
    tokenizer = build_tokenizer()
    texts = [text for id in range(300) for text in captions_of(scene_of(id))]
    texts += [
        text
        for id in range(300)
        for question in questions_about(scene_of(id), 8)
        for text in (question.text, question.answer)
    ]
    texts += [prompt for demo in DEMOS.values() for prompt in (demo.question.format(question=""), demo.caption)]
    assert not [text for text in texts if tokenizer.unk_token_id in tokenizer.encode(text)]


def test_a_caption_survives_the_tokenizer():
    tokenizer = build_tokenizer()
    for id in range(50):
        for caption in captions_of(scene_of(id))[:3]:
            assert tokenizer.decode(tokenizer.encode(caption), skip_special_tokens=True) == caption


# The files


def test_questions_and_annotations_are_what_the_official_vqa_code_reads(evaluation):
    questions = json.loads((evaluation / "questions.json").read_text())["questions"]
    annotations = json.loads((evaluation / "annotations.json").read_text())["annotations"]
    by_id = {question["question_id"]: question for question in questions}
    assert len(by_id) == len(questions) == len(annotations) >= 2400
    for annotation in annotations:
        assert by_id[annotation["question_id"]]["image_id"] == annotation["image_id"]
        assert annotation["question_type"] in by_id[annotation["question_id"]]["question"].lower()
        assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))
        assert {answer["answer"] for answer in annotation["answers"]} == {annotation["multiple_choice_answer"]}
    shares = Counter(annotation["answer_type"] for annotation in annotations)
    assert set(shares) == {"yes/no", "number", "other"}
    assert min(shares.values()) > 400


def test_captions_name_the_pictures_that_lie_beside_them(evaluation):
    captions = json.loads((evaluation / "captions.json").read_text())
    ids = {image["id"] for image in captions["images"]}
    assert Counter(caption["image_id"] for caption in captions["annotations"]) == Counter({id: 4 for id in ids})
    assert len({caption["id"] for caption in captions["annotations"]}) == len(captions["annotations"])
    assert {path.name for path in (evaluation / "images").iterdir()} == {
        image["file_name"] for image in captions["images"]
    }
    first = captions["images"][0]
    stored = np.array(Image.open(evaluation / "images" / first["file_name"]))
    assert np.array_equal(stored, picture_of(scene_of(first["id"])))


# The models


@both
def test_a_checkpoint_is_small_and_holds_only_data(name):
    files = list(CHECKPOINTS[name].iterdir())
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    assert sum(file.stat().st_size for file in files) <= 12e6
    with safe_open(CHECKPOINTS[name] / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"F16"}  # noqa: SIM118


@both
def test_every_tensor_of_a_checkpoint_is_found_by_the_auto_class(name):
    _, report = AutoModelForImageTextToText.from_pretrained(
        CHECKPOINTS[name], local_files_only=True, output_loading_info=True
    )
    assert not any(report.values()), report


@both
def test_a_model_answers_nine_of_ten_questions(name, load):
    model, _ = load(name)
    demo = DEMOS[name]
    batch = pack(demo, [scene_of(id) for id in splits.EVALUATION[:40]], questions=8)
    with torch.inference_mode():
        matches = exact_matches(logits_of(demo, model, batch, demo.look(model, batch.pixels)[-1]), batch)
    answers = [match for match, kind in zip(matches, batch.kinds, strict=True) if kind != "caption"]
    assert np.mean(answers) >= 0.9


@both
def test_packed_prompts_have_the_logits_of_single_samples(name, load):
    model, processor = load(name)
    demo = DEMOS[name]
    scene = scene_of(splits.EVALUATION[0])
    batch = pack(demo, [scene], questions=5)
    with torch.inference_mode():
        packed = logits_of(demo, model, batch, demo.look(model, batch.pixels)[-1])[0]
        for segment, question in enumerate(questions_about(scene, 5), start=1):
            prompt = demo.question.format(question=question.text)
            alone = processor(images=[Image.fromarray(picture_of(scene))], text=[prompt], return_tensors="pt")
            asked = (batch.segments[0] == segment) & ~batch.answers[0]
            # LLaVA's prompt begins before the image, so its own part is only the end of the sample.
            logits = model(**alone).logits[0, -int(asked.sum()) :]
            torch.testing.assert_close(packed[asked], logits, atol=3e-5, rtol=0)


@both
def test_a_batch_is_answered_as_its_samples_are_one_by_one(name, load):
    model, processor = load(name)
    demo = DEMOS[name]
    prompts, pictures = [], []
    for id in splits.EVALUATION[:4]:
        scene = scene_of(id)
        texts = [demo.question.format(question=question.text) for question in questions_about(scene, 2)]
        prompts += [*texts, demo.caption]
        pictures += [Image.fromarray(picture_of(scene))] * 3

    def answers(prompts, pictures):
        inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(tokens, skip_special_tokens=True)

    together = answers(prompts, pictures)
    assert together == [answers([prompt], [picture])[0] for prompt, picture in zip(prompts, pictures, strict=True)]
    assert len(set(map(len, prompts))) > 1, "no padding was needed"


# The outlier variants


def logits_and_inputs(name, model):
    """Logits of a few samples, and the largest input of every channel of each linear that reads a norm."""
    largest = {}
    hooks = []
    for path, makers in READERS[name].items():
        for number, block in enumerate(model.get_submodule(path).children()):
            for readers in makers.values():
                hooks.append(
                    block.get_submodule(readers[0]).register_forward_pre_hook(
                        lambda _, inputs, key=f"{path}.{number}.{readers[0]}": largest.__setitem__(
                            key, inputs[0].flatten(0, -2).abs().amax(0)
                        )
                    )
                )
    demo = DEMOS[name]
    batch = pack(demo, [scene_of(id) for id in splits.CALIBRATION[:4]], questions=4)
    with torch.inference_mode():
        logits = logits_of(demo, model, batch, demo.look(model, batch.pixels)[-1])
    for hook in hooks:
        hook.remove()
    return logits, largest


@both
@pytest.mark.parametrize("seed", [0, 1])
def test_making_outliers_by_a_rescale_leaves_the_logits_as_they_were(name, seed, load):
    model, _ = load(name)
    before, calm = logits_and_inputs(name, model)
    rescale(name, model, seed)
    after, wild = logits_and_inputs(name, model)
    torch.testing.assert_close(after, before, atol=3e-5, rtol=0)
    for site, inputs in wild.items():
        grown = (inputs / calm[site].clamp_min(1e-6)) > 10
        assert grown.sum() <= CHANNELS, site
        assert inputs.max() > 5 * calm[site].max() or "fc2" in site or "down_proj" in site, site


@both
def test_an_outlier_variant_is_a_checkpoint_that_its_seed_decides(name, tmp_path):
    one, same, other = (
        make_outliers(CHECKPOINTS[name], tmp_path / folder, seed, finetune_steps=0) / "model.safetensors"
        for folder, seed in (("one", 3), ("same", 3), ("other", 4))
    )
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()

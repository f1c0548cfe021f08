"""Sources of samples, the seeded draw, and the refusal of leaked images and of bad data in one line."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.images import digest, open_image
from vlmq.exporter.samples import Sample, draw, image_digests, prompt_of, refuse_leakage
from vlmq.exporter.sources import read

BLIP2 = SimpleNamespace(question="Question: {} Answer:", caption="a photo of")
LLAVA = SimpleNamespace(question="USER: <image>\n{} ASSISTANT:", caption="USER: <image>\nDescribe. ASSISTANT:")


def picture(path, seed=0, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def vqa_folder(
    folder, questions="questions.json", annotations="annotations.json", image="images/{}.png", ids=(7, 42), **header
):
    """Two questions about each image, in VQAv2's format."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, answered = [], []
    for id_ in ids:
        picture(folder / image.format(id_), seed=id_)
        for number in range(2):
            question_id = id_ * 10 + number
            asked.append({"image_id": id_, "question_id": question_id, "question": f"Is it {number}?"})
            answers = [{"answer": "yes" if place else "no", "answer_id": place} for place in range(10)]
            answered.append({"question_id": question_id, "image_id": id_, "answer_type": "yes/no", "answers": answers})
    (folder / questions).write_text(json.dumps({**header, "questions": asked}))
    (folder / annotations).write_text(json.dumps({**header, "annotations": answered}))
    return folder


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------------- sources


def test_a_vqa_folder_is_read_with_questions_answers_and_images(tmp_path):
    samples = read(vqa_folder(tmp_path), count=None).samples
    first = next(sample for sample in samples if sample.id == "question-70")
    said = ("no", *["yes"] * 9)
    assert first == Sample("question-70", tmp_path / "images/7.png", "question", "Is it 0?", said, "yes/no")
    assert len(samples) == 4


@pytest.mark.parametrize("place", ["val2014/", "images/", "", "../val2014/"])
def test_official_vqa_files_are_found_by_their_names(tmp_path, place):
    folder = vqa_folder(
        tmp_path / "vqa",
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
        place + "COCO_val2014_{:012d}.jpg",
        data_subtype="val2014",
    )
    samples = read(folder, count=None).samples
    names = {sample.image.name for sample in samples}
    assert names == {"COCO_val2014_000000000007.jpg", "COCO_val2014_000000000042.jpg"}
    assert all(len(sample.answers) == 10 for sample in samples)
    assert read(folder / "v2_OpenEnded_mscoco_val2014_questions.json", count=None).samples == samples


def test_coco_captions_give_one_request_an_image_with_all_captions(tmp_path):
    picture(tmp_path / "images/3.png")
    content = {
        "images": [{"id": 3, "file_name": "3.png"}],
        "annotations": [{"image_id": 3, "caption": "a cat"}, {"image_id": 3, "caption": "one cat"}],
    }
    (tmp_path / "captions_val2014.json").write_text(json.dumps(content))
    expected = (Sample("caption-3", tmp_path / "images/3.png", "caption", answers=("a cat", "one cat")),)
    assert read(tmp_path).samples == expected
    assert read(tmp_path / "captions_val2014.json").samples == expected


def test_a_jsonl_has_prompts_questions_and_captions_with_images_beside_it(tmp_path):
    picture(tmp_path / "a/cat.png")
    lines = [
        {"image": "a/cat.png", "prompt": "the cat is"},
        {"image": "a/cat.png", "question": "What is it?", "answer": "cat", "answer_type": "other"},
        {"image": "a/cat.png", "answers": ["a cat", "one cat"]},
    ]
    (tmp_path / "mine.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    prompt, question, caption = sorted(read(tmp_path / "mine.jsonl", count=None).samples, key=lambda sample: sample.id)
    assert (prompt.kind, prompt.text, prompt.image) == ("prompt", "the cat is", tmp_path / "a/cat.png")
    assert (question.kind, question.answers, question.answer_type) == ("question", ("cat",), "other")
    assert (caption.kind, caption.text, caption.answers) == ("caption", None, ("a cat", "one cat"))


def test_a_folder_of_images_takes_prompts_from_text_files_of_the_same_name(tmp_path):
    picture(tmp_path / "cat.png")
    picture(tmp_path / "dog.JPG")
    (tmp_path / "cat.txt").write_text("the cat is\n")
    (tmp_path / "notes.md").write_text("no image")
    cat, dog = sorted(read(tmp_path).samples, key=lambda sample: sample.id)
    assert (cat.kind, cat.text) == ("prompt", "the cat is")
    assert (dog.kind, dog.text) == ("caption", None)


def test_the_demos_own_data_is_read_with_every_image_and_answer(tmp_path):
    dataset = pytest.importorskip("vlmq.exporter.demo.dataset")
    dataset.write_split("calibration", tmp_path)
    samples = read(tmp_path, count=None).samples
    kinds = [sample.kind for sample in samples]
    images = len(list((tmp_path / "images").iterdir()))
    assert kinds.count("caption") == images
    assert kinds.count("question") >= images
    assert all(sample.answers for sample in samples)


# ------------------------------------------------------------------------------------- prompts and the draw


def test_a_question_goes_into_the_familys_template():
    sample = Sample("1", Path("x.png"), "question", "What is it?")
    assert prompt_of(sample, BLIP2) == "Question: What is it? Answer:"
    assert prompt_of(sample, LLAVA) == "USER: <image>\nWhat is it? ASSISTANT:"


def test_a_prompt_is_used_as_written_unless_the_family_needs_to_know_where_the_image_goes():
    bare, marked = (
        Sample("1", Path("x.png"), "prompt", "the cat is"),
        Sample("2", Path("x.png"), "prompt", "<image> the cat is"),
    )
    assert prompt_of(bare, BLIP2) == "the cat is"
    assert prompt_of(bare, LLAVA) == "USER: <image>\nthe cat is ASSISTANT:"
    assert prompt_of(marked, LLAVA) == "<image> the cat is"


def test_text_alone_marks_no_place_for_an_image():
    assert prompt_of(Sample("1", None, "question", "what is it?"), LLAVA) == "USER: what is it? ASSISTANT:"


def test_braces_in_a_question_are_only_text():
    assert prompt_of(Sample("1", None, "question", "What is {x}?"), BLIP2) == "Question: What is {x}? Answer:"


def test_a_draw_does_not_depend_on_the_order_and_grows_without_changing():
    samples = [Sample(str(number), None, "prompt", "x") for number in range(500)]
    shuffled = random.Random(3).sample(samples, len(samples))
    drawn = draw(samples, 128, seed=5)
    assert draw(shuffled, 128, seed=5) == drawn
    assert draw(samples, 64, seed=5) == drawn[:64]
    assert len(set(drawn)) == 128
    assert draw(samples, 128, seed=6) != drawn
    assert set(draw(samples, 1000)) == set(samples)


def test_a_draw_favours_no_sample():
    samples = [Sample(str(number), None, "prompt", "x") for number in range(10)]
    times = sum(sample.id == "3" for seed in range(2000) for sample in draw(samples, 3, seed))
    assert 510 < times < 690  # 600 expected; the standard deviation is 20


# ----------------------------------------------------------------------------------------------- leakage


def test_an_evaluation_image_that_was_calibrated_on_is_refused_by_name_even_when_saved_anew(tmp_path):
    used = picture(tmp_path / "used.png", seed=1)
    Image.open(used).save(tmp_path / "again.bmp")
    fresh = picture(tmp_path / "fresh.png", seed=2)
    calibration = image_digests([Sample("c", used, "caption")]).values()
    refuse_leakage(calibration, [Sample("new", fresh, "caption")])
    with pytest.raises(VlmqError, match="sample old was calibrated on") as error:
        refuse_leakage(calibration, [Sample("new", fresh, "caption"), Sample("old", tmp_path / "again.bmp", "caption")])
    one_line(error)


def test_a_digest_sees_the_size_and_not_only_the_pixels(tmp_path):
    Image.new("RGB", (4, 6)).save(tmp_path / "tall.png")
    Image.new("RGB", (6, 4)).save(tmp_path / "wide.png")
    assert digest(tmp_path / "tall.png") != digest(tmp_path / "wide.png")


# --------------------------------------------------------------------------------------------- bad input


def test_missing_images_are_one_line_with_the_file_the_first_id_and_how_many(tmp_path):
    vqa_folder(tmp_path)
    (tmp_path / "images/42.png").unlink()
    with pytest.raises(VlmqError) as error:
        read(tmp_path)
    assert "42" in one_line(error)
    assert "sample question-420 (1 more are missing)" in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_text_without_an_image_is_refused_unless_asked_for(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"prompt": "once upon a time"}\n')
    with pytest.raises(VlmqError, match="--text-only"):
        read(tmp_path / "text.jsonl")
    assert read(tmp_path / "text.jsonl", text_only=True).samples[0].image is None


@pytest.mark.parametrize("line", ["{", "3", '{"text": "a"}', '{"image": 3}'])
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    picture(tmp_path / "a.png")
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n' + line)
    with pytest.raises(VlmqError, match=r"bad\.jsonl:2: ") as error:
        read(tmp_path / "bad.jsonl")
    one_line(error)


def test_repeated_ids_are_refused(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "twice.jsonl").write_text('{"image": "a.png", "id": "x"}\n' * 2)
    with pytest.raises(VlmqError, match="id x occurs 2 times"):
        read(tmp_path / "twice.jsonl")


def test_answers_without_a_question_are_refused(tmp_path):
    vqa_folder(tmp_path)
    questions = json.loads((tmp_path / "questions.json").read_text())
    questions["questions"] = questions["questions"][1:]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    with pytest.raises(VlmqError, match="question 70"):
        read(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"questions": 3}', '{"other": []}', '{"questions": [{}]}', "\0\0"])
def test_a_json_that_is_no_data_set_is_one_line(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(VlmqError, match=r"data\.json") as error:
        read(tmp_path / "data.json")
    one_line(error)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(VlmqError, match="no samples"):
        read(tmp_path)


@pytest.mark.parametrize("source", ["no/such/folder/here", "nowhere.jsonl", "/nowhere"])
def test_a_source_that_is_neither_a_file_nor_a_name_is_one_line(source):
    with pytest.raises(VlmqError, match="no such file or folder") as error:
        read(source)
    one_line(error)


def test_a_hub_name_without_the_extra_says_what_to_install_or_pass(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(VlmqError, match=r"vlmq\[datasets\].*--calibration") as error:
        read("owner/name")
    one_line(error)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of one data set, and a record of what it was asked for."""
    asked = SimpleNamespace(revisions=[], fault=None)
    rows = [{"image": Image.new("RGBA", (4, 4), (number, 0, 0, 255)), "caption": ["a", "b"]} for number in range(9)]

    def load_dataset(name, revision, split, streaming):
        if asked.fault:
            raise asked.fault
        asked.revisions.append((name, revision, split, streaming))
        return SimpleNamespace(take=lambda count: rows[:count])

    library = SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=lambda name, revision: ["test"])
    monkeypatch.setitem(sys.modules, "datasets", library)
    commit = SimpleNamespace(sha="abc123")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, revision: commit)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def test_a_hub_data_set_is_read_at_one_revision_which_its_source_records(hub):
    found = read("owner/name@main", count=5)
    assert found.source == "owner/name@abc123"
    assert hub.revisions == [("owner/name", "abc123", "test", True)]
    assert len(found.samples) == 5
    assert found.samples == read("owner/name", count=5).samples
    for sample in found.samples:
        assert (sample.kind, sample.answers) == ("caption", ("a", "b"))
        assert open_image(sample.image).getpixel((0, 0)) == (int(sample.id.removeprefix("row-")), 0, 0)


def test_a_hub_that_cannot_be_reached_is_one_line_that_says_what_to_pass(hub):
    hub.fault = ConnectionError("no route\nto host")
    with pytest.raises(VlmqError, match=r"no route\); pass a folder") as error:
        read("owner/name")
    one_line(error)


def test_an_image_cut_short_is_named(tmp_path):
    path = picture(tmp_path / "cut.jpg", size=(64, 64))
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(VlmqError, match=r"cut\.jpg: damaged image") as error:
        open_image(path)
    one_line(error)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "not.png").write_text("hello")
    with pytest.raises(VlmqError, match=r"not\.png: not an image"):
        open_image(tmp_path / "not.png")


def test_an_image_too_large_to_be_safe_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = picture(tmp_path / "large.png", size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL only warns up to twice that
    with pytest.raises(VlmqError, match=r"large\.png: more than 1,000 pixels"):
        open_image(path)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    Image.new(mode, (3, 3)).save(tmp_path / "image.tif")
    assert open_image(tmp_path / "image.tif").mode == "RGB"

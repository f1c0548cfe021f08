"""Every task read from files as the data sets have them, and scored against oracles that are written here anew."""

import itertools
import json
import random

import numpy as np
import pytest
from PIL import Image

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation.odd import circles, odd
from vlmq.exporter.evaluation.questionnaire import gather
from vlmq.exporter.evaluation.records import Record
from vlmq.exporter.evaluation.summary import grouped
from vlmq.exporter.evaluation.tasks.registry import TASKS
from vlmq.exporter.evaluation.tasks.scienceqa import letter


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(path)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def vqav2_files(folder, answers=(("yes",) * 10, ("2",) * 7 + ("two",) * 3), prefix="v2_", split="val2014"):
    """A question with each of the lists of answers about each of images 7 and 42."""
    asked, noted = [], []
    for image in (7, 42):
        picture(folder / f"{split}/COCO_{split}_{image:012}.jpg", image)
        for number, said in enumerate(answers):
            id_ = 10 * image + number
            asked.append({"image_id": image, "question_id": id_, "question": f"Question {number}?"})
            kind = ("yes/no", "number", "other")[number % 3]
            listed = [
                {"answer": text, "answer_confidence": "yes", "answer_id": place} for place, text in enumerate(said, 1)
            ]
            noted.append({"image_id": image, "question_id": id_, "answer_type": kind, "answers": listed})
    write(folder / f"{prefix}OpenEnded_mscoco_{split}_questions.json", {"data_subtype": split, "questions": asked})
    write(folder / f"{prefix}mscoco_{split}_annotations.json", {"data_subtype": split, "annotations": noted})
    return folder


def gqa_files(folder):
    types = {"structural": "query", "semantic": "attr", "detailed": "chooseAttr"}
    questions = {
        "201": {"question": "What color is it?", "imageId": "n16", "answer": "dark blue", "types": types},
        "202": {
            "question": "Is it big?",
            "imageId": "99",
            "answer": "no",
            "types": {"structural": "verify", "semantic": "attr"},
        },
    }
    for image in ("n16", "99"):
        picture(folder / f"images/{image}.jpg")
    write(folder / "questions/testdev_balanced_questions.json", questions)
    return folder


def vizwiz_files(folder):
    unsure = [{"answer": text, "answer_confidence": "maybe"} for text in ("unanswerable",) * 6 + ("a can",) * 4]
    sure = [{"answer": text, "answer_confidence": "yes"} for text in ("coke",) * 10]
    images = ("VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg")
    for seed, image in enumerate(images):
        picture(folder / "val" / image, seed)
    content = [
        {
            "image": images[0],
            "question": "What is it?",
            "answers": unsure,
            "answer_type": "unanswerable",
            "answerable": 0,
        },
        {"image": images[1], "question": "Which one?", "answers": sure, "answer_type": "other", "answerable": 1},
    ]
    write(folder / "Annotations/val.json", content)
    return folder


def scienceqa_files(folder):
    def problem(subject, grade, hint="", image=None):
        return {
            **{"question": "Which?", "choices": ["a cat", "a dog", "a cow"], "answer": 1, "hint": hint, "image": image},
            **{
                "grade": f"grade{grade}",
                "subject": f"{subject} science",
                "split": "test",
                "lecture": "",
                "solution": "",
            },
        }

    problems = {
        "1": problem("natural", 2, image="image.png"),
        "2": problem("social", 8, hint="A text."),
        "3": problem("language", 7),
        "4": problem("natural", 6, hint="A text.", image="image.png"),
        "5": problem("natural", 1) | {"split": "train"},
    }
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["5"], "test": ["1", "2", "3", "4"]})
    for id_ in ("1", "4"):
        picture(folder / f"images/test/{id_}/image.png")
    return folder


def karpathy_files(folder, name="flickr30k"):
    def image(number, split):
        file = f"COCO_val2014_{number:012}.jpg" if name == "coco" else f"{number}.jpg"
        picture(folder / ("val2014" if name == "coco" else "flickr30k-images") / file, number)
        sentences = [{"raw": f"A dog {text}.", "tokens": ["a", "dog", text]} for text in ("runs", "sits")]
        place = {"cocoid": number, "filepath": "val2014"} if name == "coco" else {}
        return {"filename": file, "split": split, "imgid": number, "sentences": sentences, **place}

    images = [image(3, "test"), image(4, "test"), image(5, "val")]
    write(folder / f"dataset_{name}.json", {"dataset": name, "images": images})
    return folder


def ids(found):
    return [one.sample.id for one in found.asked]


# --------------------------------------------------------------------------------------- official files


def test_vqav2_is_read_from_its_official_files(tmp_path):
    found = gather(TASKS["vqav2"], str(vqav2_files(tmp_path)))
    assert ids(found) == ["question-70", "question-71", "question-420", "question-421"]
    assert [one.groups for one in found.asked] == [("yes/no",), ("number",)] * 2
    assert found.asked[3].sample.answers == ("2",) * 7 + ("two",) * 3
    assert found.asked[2].sample.image == tmp_path / "val2014/COCO_val2014_000000000042.jpg"


def test_of_two_splits_in_a_folder_one_must_be_named(tmp_path):
    vqav2_files(vqav2_files(tmp_path), split="train2014")
    with pytest.raises(VlmqError, match="--split"):
        gather(TASKS["vqav2"], str(tmp_path))
    found = gather(TASKS["vqav2"], str(tmp_path), split="val2014")
    assert {one.sample.image.parent.name for one in found.asked} == {"val2014"}


def test_gqa_is_read_with_its_structural_and_semantic_types(tmp_path):
    found = gather(TASKS["gqa"], str(gqa_files(tmp_path)))
    first, second = found.asked
    assert (first.sample.text, first.sample.answers) == ("What color is it?", ("dark blue",))
    assert first.sample.image == tmp_path / "images/n16.jpg"
    assert first.groups == ("structural: query", "semantic: attr")
    assert second.groups == ("structural: verify", "semantic: attr")


def test_vizwiz_is_read_with_unanswerable_as_a_kind_of_its_own(tmp_path):
    found = gather(TASKS["vizwiz"], str(vizwiz_files(tmp_path)))
    assert [one.groups for one in found.asked] == [("unanswerable",), ("other",)]
    assert found.asked[0].sample.image == tmp_path / "val/VizWiz_val_00000000.jpg"
    assert len(found.asked[0].sample.answers) == 10


def test_scienceqa_is_read_split_by_split_with_subject_context_and_grade(tmp_path):
    found = gather(TASKS["scienceqa"], str(scienceqa_files(tmp_path)))
    assert [one.groups for one in found.asked] == [
        ("NAT", "IMG", "G1-6"),
        ("SOC", "TXT", "G7-12"),
        ("LAN", "NO", "G7-12"),
        ("NAT", "TXT", "IMG", "G1-6"),
    ]
    assert found.asked[1].sample.text == (
        "A text.\nWhich?\nA. a cat\nB. a dog\nC. a cow\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert found.asked[0].sample.answers == ("B",)
    assert [one.sample.image is None for one in found.asked] == [False, True, True, False]
    assert ids(gather(TASKS["scienceqa"], str(tmp_path), with_image=True)) == ["problem-1", "problem-4"]
    with pytest.raises(VlmqError, match="choose --split from train, test"):
        gather(TASKS["scienceqa"], str(tmp_path), split="val")


@pytest.mark.parametrize(("name", "id_"), [("coco", "caption-3"), ("flickr30k", "caption-3")])
def test_karpathys_splits_are_read_the_test_split_unless_another_is_named(tmp_path, name, id_):
    folder = karpathy_files(tmp_path, name)
    found = gather(TASKS[name], str(folder))
    assert ids(found) == [id_, "caption-4"]
    assert found.asked[0].sample.answers == ("A dog runs.", "A dog sits.")
    assert found.asked[0].sample.image.is_file()
    assert ids(gather(TASKS[name], str(folder), split="val")) == ["caption-5"]


def test_coco_captions_are_read_from_the_official_annotations_too(tmp_path):
    picture(tmp_path / "val2017/000000000009.jpg")
    content = {
        "images": [{"id": 9, "file_name": "000000000009.jpg"}],
        "annotations": [{"id": 1, "image_id": 9, "caption": "A dog."}, {"id": 2, "image_id": 9, "caption": "One dog."}],
    }
    write(tmp_path / "annotations/captions_val2017.json", content)
    found = gather(TASKS["coco"], str(tmp_path / "annotations"))
    assert found.asked[0].sample.answers == ("A dog.", "One dog.")
    assert found.asked[0].sample.image == tmp_path / "val2017/000000000009.jpg"


def test_a_limit_draws_the_same_questions_and_fewer_are_among_more(tmp_path):
    folder = str(vqav2_files(tmp_path, answers=(("yes",) * 10,) * 9))
    everything = ids(gather(TASKS["vqav2"], folder))
    five, nine = (ids(gather(TASKS["vqav2"], folder, limit=limit)) for limit in (5, 9))
    assert len(five) == 5
    assert set(five) < set(nine) < set(everything)
    assert [id_ for id_ in everything if id_ in nine] == nine


# ----------------------------------------------------------------------------------------------- scores


def record(answer, references, groups=(), choices=(), id_="x"):
    return Record(id=id_, references=references, groups=groups, choices=choices, answer=answer)


def test_the_vqa_score_is_the_mean_over_every_nine_of_ten_annotators():
    """An oracle from the paper's words alone: of every nine, how many said the same, a third each, at most one."""
    source = random.Random(0)
    for _ in range(200):
        said = tuple(source.choices(["red", "blue", "green", "two"], weights=[4, 3, 2, 1], k=10))
        answer = source.choice(["red", "Blue.", "the green", "2", "pink"])
        plain = {"red": "red", "Blue.": "blue", "the green": "green", "2": "two", "pink": "pink"}[answer]
        nines = [min(1, nine.count(plain) / 3) for nine in itertools.combinations(said, 9)]
        (found,) = TASKS["vqav2"].score([record(answer, said)])
        assert found == pytest.approx(sum(nines) / 10)


def test_saying_unanswerable_is_right_where_the_annotators_could_not_answer():
    said = ("unanswerable",) * 6 + ("a can",) * 4
    assert TASKS["vizwiz"].score([record("Unanswerable.", said), record("coke", said)]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Dark Blue", 1.0), (" dark  blue. ", 1.0), ("blue", 0.0), ("the dark blue", 0.0), ("", 0.0)],
)
def test_gqa_wants_the_very_words(answer, right):
    assert TASKS["gqa"].score([record(answer, ("dark blue",))]) == [right]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        *[
            ("B", "B"),
            ("b", "B"),
            (" B. ", "B"),
            ("(B)", "B"),
            ("B) a dog", "B"),
            ("B: a dog", "B"),
            ("(B) a dog", "B"),
        ],
        *[("The answer is B.", "B"), ("the answer is (C)", "C"), ("Answer: A", "A"), ("B because it barks", "B")],
        *[("A cat", None), ("a", "A"), ("The answer is a cat", None), ("The answer is A cat", None), ("dog", None)],
        *[("D", None), ("A or B", None), ("A, B", None), ("(A) and (B)", None), ("", None), ("I think so", None)],
        *[("The answer is A. The answer is B.", None), ("Cats", None), ("B2", None), ("BC", None)],
    ],
)
def test_a_letter_is_read_only_where_one_is_plainly_said(answer, read):
    assert letter(answer, ("A", "B", "C")) == read


def test_an_unparsed_answer_counts_as_wrong_and_is_counted():
    task, choices = TASKS["scienceqa"], ("A", "B", "C")
    records = [record(text, ("A",), (), choices, text) for text in ("A", "A cat", "B", "who knows")]
    assert task.score(records) == [1.0, 0.0, 0.0, 0.0]
    assert odd(task, records).unparsed == 2


def test_the_table_has_the_papers_rows_in_the_papers_order(tmp_path):
    found = gather(TASKS["scienceqa"], str(scienceqa_files(tmp_path)))
    records = [record("B", one.sample.answers, one.groups, one.choices, one.sample.id) for one in found.asked]
    rows = {name: len(members) for name, members in grouped(TASKS["scienceqa"], records).items()}
    assert list(rows.items()) == [
        *[("overall", 4), ("NAT", 2), ("SOC", 1), ("LAN", 1), ("TXT", 2), ("IMG", 2), ("NO", 1)],
        *[("G1-6", 2), ("G7-12", 2)],
    ]


# ------------------------------------------------------------------------------------------ odd answers


@pytest.mark.parametrize(
    ("text", "does"),
    [
        *[("a dog a dog a dog", True), ("the the the the", True), ("a cat and a cat sits a cat sits a cat sits", True)],
        *[("a very very big dog", False), ("no no no", False), ("a dog and a dog and a cat", False), ("", False)],
        ("a man in a red shirt stands on a street and waits for a bus bus bus", False),
    ],
)
def test_a_text_that_goes_in_circles_is_told_from_one_that_repeats_a_word(text, does):
    assert circles(text) is does


def test_one_answer_to_every_question_is_seen_unless_the_set_has_one_answer():
    task = TASKS["vqav2"]
    varied = [record("no", ("yes" if place % 2 else "no",) * 10, id_=str(place)) for place in range(20)]
    alike = [record("no", ("no",) * 10, id_=str(place)) for place in range(20)]
    assert odd(task, varied).is_one_for_all
    assert not odd(task, alike).is_one_for_all
    assert not odd(task, varied[:5]).is_one_for_all


def test_empty_answers_are_counted():
    assert odd(TASKS["vqav2"], [record(text, ("no",), id_=text) for text in ("", " ", "no")]).empty == 2


# --------------------------------------------------------------------------------------------- bad data


def damaged(folder, kind):
    """A VQAv2 folder with one fault: (what the line must say, the id that is counted with --skip-bad)"""
    questions = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    annotations = folder / "v2_mscoco_val2014_annotations.json"
    asked, noted = json.loads(questions.read_text()), json.loads(annotations.read_text())
    if kind == "missing image":
        (folder / "val2014/COCO_val2014_000000000042.jpg").unlink()
        return r"no image .*42 of sample question-420", "question-420"
    if kind == "repeated id":
        asked["questions"].append(asked["questions"][0])
        write(questions, asked)
        return "id question-70 occurs more than once", "question-70#2"
    if kind == "answers without a question":
        asked["questions"].pop(0)
        write(questions, asked)
        return "answers to question 70, not in", "question-70"
    noted["annotations"].pop(0)
    write(annotations, noted)
    return "no answers for question-70", "question-70"


@pytest.mark.parametrize(
    "kind", ["missing image", "repeated id", "answers without a question", "a question without answers"]
)
def test_a_fault_is_one_line_with_file_and_id_or_counted_where_asked(tmp_path, kind):
    folder = vqav2_files(tmp_path)
    said, id_ = damaged(folder, kind)
    with pytest.raises(VlmqError, match=said) as error:
        gather(TASKS["vqav2"], str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    found = gather(TASKS["vqav2"], str(folder), skip_bad=True)
    assert id_ in found.faults
    assert len(found.asked) + len(found.faults) == (5 if kind == "repeated id" else 4)


@pytest.mark.parametrize("task", ["gqa", "scienceqa"])
def test_an_id_that_is_a_repeated_key_is_not_lost_in_silence(tmp_path, task):
    folder = {"gqa": gqa_files, "scienceqa": scienceqa_files}[task](tmp_path)
    file = next(
        path for path in folder.rglob("*.json") if path.name in ("problems.json", "testdev_balanced_questions.json")
    )
    content = json.loads(file.read_text())
    first = next(iter(content))
    file.write_text(f'{json.dumps(content)[:-1]}, "{first}": {json.dumps(content[first])}}}')
    with pytest.raises(VlmqError, match=f"id {first} occurs more than once"):
        gather(TASKS[task], str(folder))
    assert f"{first}#2" in gather(TASKS[task], str(folder), skip_bad=True).faults


@pytest.mark.parametrize("task", list(TASKS))
def test_an_empty_folder_is_one_line_that_says_what_belongs_there(tmp_path, task):
    with pytest.raises(VlmqError, match=f"{tmp_path}: no .*; put .* there"):
        gather(TASKS[task], str(tmp_path))


def test_an_empty_set_is_refused(tmp_path):
    write(tmp_path / "questions.json", {"questions": []})
    write(tmp_path / "annotations.json", {"annotations": []})
    with pytest.raises(VlmqError, match="no samples of VQAv2"):
        gather(TASKS["vqav2"], str(tmp_path))


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("content", ["{", "[3]", '{"1": 3}', '{"images": [{}]}', "\0"])
def test_a_file_of_another_kind_is_one_line(tmp_path, task, content):
    file = tmp_path / "dataset_x.json"
    file.write_text(content)
    with pytest.raises(VlmqError, match=str(tmp_path)) as error:
        gather(TASKS[task], str(file))
    assert "\n" not in str(error.value)


def test_a_problem_whose_answer_is_no_choice_is_named(tmp_path):
    folder = scienceqa_files(tmp_path)
    problems = json.loads((folder / "problems.json").read_text())
    problems["3"]["answer"] = 3
    write(folder / "problems.json", problems)
    with pytest.raises(VlmqError, match=r"problems\.json: 3: .*answer 3 of 3 choices"):
        gather(TASKS["scienceqa"], str(folder))

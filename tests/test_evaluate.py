"""A whole evaluation: ended and gone on, in both engines, with bad data, and compared with another."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_tasks import karpathy_files, scienceqa_files, vizwiz_files, vqav2_files

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import evaluate as evaluation
from vlmq.exporter.evaluation import records, tables
from vlmq.exporter.evaluation.comparison import compare
from vlmq.exporter.evaluation.evaluate import Request, evaluate
from vlmq.exporter.evaluation.records import Header, Record, Results
from vlmq.exporter.evaluation.statistics import McNemar, mcnemar
from vlmq.exporter.evaluation.summary import scored, summarise
from vlmq.exporter.evaluation.tasks.registry import TASKS
from vlmq.exporter.evaluation.tasks.task import Metric
from vlmq.exporter.runtime import OnnxVlm, TorchVlm


@pytest.fixture
def questions(tmp_path):
    """Eight questions about two images."""
    return vqav2_files(tmp_path / "data", answers=(("yes",) * 10, ("2",) * 10, ("red",) * 10, ("w40",) * 10))


@pytest.fixture
def request_of(tiny_folders, questions, tmp_path):
    """A request with some fields changed."""

    def make(**changes):
        fields = {"model": tiny_folders["blip2-opt"], "task": "vqav2", "data": questions, "out": tmp_path / "out.jsonl"}
        fields |= {"batch_size": 2, "max_new_tokens": 5} | changes
        return Request(**{name: str(value) if name in ("model", "data") else value for name, value in fields.items()})

    return make


def test_answers_are_those_of_the_engine_and_scores_those_of_the_task(request_of, tiny_folders, questions):
    results = evaluate(request_of())
    vlm = evaluation.open_vlm(tiny_folders["blip2-opt"], "torch")
    for record in results.records:
        prompt = f"Question: {record.question} Answer:"
        image = Image.open(questions / record.image).convert("RGB")
        (answer,) = vlm.generate([image], [prompt], 5)
        assert (record.answer, list(record.tokens)) == (answer.text, answer.tokens)
        assert record.score == TASKS["vqav2"].score([record])[0]
    lines = request_of().out.read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines[1:]] == [record.id for record in results.records]


class Ended(BaseException):
    """A run that is killed."""


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("torn", [False, True])
def test_a_run_that_was_ended_goes_on_where_its_file_ends_to_the_same_bytes(request_of, batches, torn, tmp_path):
    unbroken = request_of(out=tmp_path / "unbroken.jsonl")
    evaluate(unbroken)
    broken, asked = request_of(), []

    def kill(what, done, of):
        if done >= 2 * batches:
            raise Ended

    with pytest.raises(Ended):
        evaluate(broken, kill)
    lines = broken.out.read_text().splitlines()
    assert len(lines) == 1 + 2 * batches
    if torn:  # in the middle of the last batch's second line
        broken.out.write_text("\n".join(lines)[:-20])
    evaluate(broken, lambda what, done, of: asked.append(done))
    assert asked[0] == 2 * (batches - torn)
    assert broken.out.read_bytes() == unbroken.out.read_bytes()


def test_a_finished_file_is_not_asked_for_again(request_of, monkeypatch):
    first = evaluate(request_of())
    monkeypatch.setattr(evaluation, "open_vlm", lambda *_: pytest.fail("the model was opened"))
    assert evaluate(request_of()) == first


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "llava-llama"}, "model, weights"),
        ({"limit": 3}, "samples, samples_sha256"),
        ({"instruction": "Be short."}, "samples_sha256"),
        ({"max_new_tokens": 6}, "max_new_tokens"),
        ({"batch_size": 3}, "batch_size"),
        ({"task": "coco"}, "task"),
    ],
)
def test_a_file_of_another_run_is_refused_and_left_as_it_is(request_of, tiny_folders, tmp_path, changed, said):
    evaluate(request_of())
    before = request_of().out.read_bytes()
    if "model" in changed:
        changed = {"model": tiny_folders[changed["model"]]}
    if "task" in changed:
        changed |= {"data": karpathy_files(tmp_path / "captions", "coco")}
    with pytest.raises(VlmqError, match=f"another {said}.*--fresh") as error:
        evaluate(request_of(**changed))
    assert "\n" not in str(error.value)
    assert request_of().out.read_bytes() == before
    evaluate(request_of(**changed, fresh=True))
    assert request_of().out.read_bytes() != before


def test_other_weights_under_the_same_name_are_another_model(request_of, tiny_folders, tmp_path):
    model = shutil.copytree(tiny_folders["blip2-opt"], tmp_path / "model")
    evaluate(request_of(model=model))
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(VlmqError, match="another weights"):
        evaluate(request_of(model=model))


@pytest.mark.parametrize(
    "content", ["", "{}\n", "hello\n", '{"vlmq_results": 1}\n', '{"vlmq_results": 2, "task": "gqa"}\n']
)
def test_a_file_that_is_no_results_is_not_overwritten(request_of, content):
    request_of().out.write_text(content)
    if not content:
        evaluate(request_of())
        return
    with pytest.raises(VlmqError, match=r"out\.jsonl"):
        evaluate(request_of())
    assert request_of().out.read_text() == content


def test_nothing_is_left_where_the_model_cannot_be_run(request_of, tiny_folders, tmp_path):
    model = shutil.copytree(tiny_folders["blip2-opt"], tmp_path / "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(Exception, match="no safetensors"):
        evaluate(request_of(model=model))
    assert not request_of().out.exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# ---------------------------------------------------------------------------------------------- bad images


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


def huge(path):
    Image.new("1", (10_000, 10_000)).save(path)  # 100 megapixels, a few kilobytes


@pytest.mark.parametrize(("spoil", "said"), [(cut_short, "damaged image"), (huge, "more than 89,478,485 pixels")])
def test_a_bad_image_stops_the_run_in_one_line_or_is_counted_where_asked(request_of, questions, spoil, said):
    image = questions / "val2014/COCO_val2014_000000000042.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(image)
    spoil(image)
    with pytest.raises(VlmqError, match=f"sample question-420: .*000042.jpg: {said}.*--skip-bad") as error:
        evaluate(request_of())
    assert "\n" not in str(error.value)
    results = evaluate(request_of(skip_bad=True))  # and what was answered before is not asked again
    failed = {record.id for record in results.records if record.failed}
    assert failed == {"question-420", "question-421", "question-422", "question-423"}
    found = summarise(results)
    assert (found.odd.failed, found.odd.answered, found.groups[0].samples) == (4, 4, 4)


def test_faults_of_the_files_are_in_the_results_too(request_of, questions):
    (questions / "val2014/COCO_val2014_000000000042.jpg").unlink()
    results = evaluate(request_of(skip_bad=True))
    assert sum(record.failed is not None for record in results.records) == 4
    assert evaluate(request_of(skip_bad=True)) == results
    with pytest.raises(VlmqError, match="no image"):
        evaluate(request_of())


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_images_that_are_not_rgb_are_asked_about_all_the_same(request_of, questions, mode):
    for image in (questions / "val2014").iterdir():
        Image.open(image).convert(mode).save(image.with_suffix(".tif"))
        image.unlink()
    results = evaluate(request_of())
    assert all(record.failed is None for record in results.records)


# ------------------------------------------------------------------------------------- text without an image


@pytest.fixture(scope="module")
def llava_graphs(tmp_path_factory):
    from graphs import exported

    return exported("llava-llama")


def test_questions_without_an_image_are_answered_from_their_text_alone(tiny_folders, tmp_path):
    """LLaVA's language model by itself is the oracle."""
    import torch

    from vlmq.exporter.load import load

    out = tmp_path / "out.jsonl"
    data = scienceqa_files(tmp_path / "data")
    results = evaluate(Request(str(tiny_folders["llava-llama"]), "scienceqa", str(data), out, max_new_tokens=4))
    alone = [record for record in results.records if record.image is None]
    assert [record.id for record in alone] == ["problem-2", "problem-3"]
    model = load(tiny_folders["llava-llama"])
    tokenizer = evaluation.open_vlm(tiny_folders["llava-llama"], "torch").processor.tokenizer
    for record in alone:
        tokens = torch.tensor([tokenizer(f"USER: {record.question} ASSISTANT:")["input_ids"]])
        said = []
        for _ in range(4):
            with torch.inference_mode():
                best = model.lm_head(model.model.language_model(input_ids=tokens).last_hidden_state)[0, -1].argmax()
            if best == 2:  # </s>
                break
            said.append(int(best))
            tokens = torch.cat([tokens, best[None, None]], dim=1)
        assert list(record.tokens) == said


def test_text_alone_has_the_same_answers_in_onnxruntime(llava_graphs):
    from transformers import AutoProcessor

    dense = TorchVlm(llava_graphs.dense, AutoProcessor.from_pretrained(llava_graphs.folder))
    prompts = ["USER: what is the colour of the circle? ASSISTANT:", "USER: how many? ASSISTANT:"]
    expected = dense.generate([], prompts, 8)
    assert OnnxVlm(llava_graphs.folder, threads=1).generate([], prompts, 8) == expected
    assert expected[0].tokens


def test_a_family_that_needs_an_image_says_how_to_leave_such_questions_out(tiny_folders, tmp_path):
    data = scienceqa_files(tmp_path / "data")
    request = Request(str(tiny_folders["blip2-opt"]), "scienceqa", str(data), tmp_path / "out.jsonl", max_new_tokens=3)
    with pytest.raises(VlmqError, match=r"problem-2 has no image.*--with-image"):
        evaluate(request)
    results = evaluate(Request(**{**request.__dict__, "with_image": True, "fresh": True}))
    assert [record.id for record in results.records] == ["problem-1", "problem-4"]


# ----------------------------------------------------------------------------------------------- `datasets`


def test_a_saved_data_set_is_read_row_by_row_as_the_files_are(tmp_path, monkeypatch, tiny_folders):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = vizwiz_files(tmp_path / "official")
    content = json.loads((folder / "Annotations/val.json").read_text())
    rows = [
        {
            **{"question_id": str(place), "image": str(folder / "val" / row["image"]), "question": row["question"]},
            **{"answers": [answer["answer"] for answer in row["answers"]], "category": row["answer_type"]},
        }
        for place, row in enumerate(content)
    ]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    embedded = table.map(lambda row: row)  # images as bytes
    datasets.DatasetDict({"val": embedded}).save_to_disk(tmp_path / "saved")
    model = str(tiny_folders["blip2-opt"])
    official = evaluate(Request(model, "vizwiz", str(folder), tmp_path / "a.jsonl", max_new_tokens=4))
    saved = evaluate(Request(model, "vizwiz", str(tmp_path / "saved"), tmp_path / "b.jsonl", "val", max_new_tokens=4))
    same = [(record.question, record.references, record.groups, record.tokens) for record in official.records]
    assert [(record.question, record.references, record.groups, record.tokens) for record in saved.records] == same
    assert len({record.image for record in saved.records}) == 2
    with pytest.raises(VlmqError, match="no split None; choose --split from val"):
        evaluate(Request(model, "vizwiz", str(tmp_path / "saved"), tmp_path / "c.jsonl"))


def test_rows_without_an_image_are_text_alone_and_rows_of_another_task_are_named(tmp_path, monkeypatch):
    from vlmq.exporter.evaluation.questionnaire import gather

    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "grade": "grade3"}
    rows = [problem | {"image": Image.new("RGB", (4, 4)), "subject": "natural science"}]
    rows.append(problem | {"image": None, "subject": "social science"})
    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in ("question", "hint", "grade", "subject")},
            **{"choices": datasets.List(datasets.Value("string")), "answer": datasets.Value("int64")},
            "image": datasets.Image(),
        }
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    asked = gather(TASKS["scienceqa"], str(tmp_path / "saved")).asked
    assert [one.groups for one in asked] == [("NAT", "IMG", "G1-6"), ("SOC", "NO", "G1-6")]
    assert asked[0].sample.image.read_bytes()[1:4] == b"PNG"
    assert asked[1].sample.image is None
    with pytest.raises(VlmqError, match="row 0: answers: Field required"):
        gather(TASKS["vqav2"], str(tmp_path / "saved"))


def test_the_extra_is_named_where_it_is_not_installed(tmp_path, monkeypatch):
    import sys

    from vlmq.exporter.evaluation.questionnaire import gather

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(VlmqError, match=r"vlmq\[datasets\]"):
        gather(TASKS["vqav2"], "owner/name")


# ---------------------------------------------------------------------------------------------- comparisons


def results_of(scores, model="a", failed=(), task="vqav2", references=None):
    """Results whose answers score 1 or 0 as asked; two questions an image."""
    made = [
        Record(id=str(place), failed="gone")
        if place in failed
        else Record(
            id=str(place),
            image=str(place // 2),
            question="what?",
            references=references or ("yes",) * 10,
            groups=("yes/no",),
            answer="yes" if score else "no",
        )
        for place, score in enumerate(scores)
    ]
    header = Header(
        **{"task": task, "data": "d", "model": model, "weights": "", "engine": "torch", "samples": len(made)},
        **{"samples_sha256": "", "batch_size": 1, "max_new_tokens": 1, "versions": {}},
    )
    return Results(header=header, records=scored(TASKS[task], made))


def test_mcnemar_is_the_two_sided_sign_test_of_the_questions_that_changed():
    first, second = [1] * 9 + [0] * 2 + [1] * 20, [0] * 9 + [1] * 2 + [1] * 20
    tail = sum(math.comb(11, few) for few in range(3)) / 2**11  # two or fewer of eleven
    assert mcnemar(first, second) == McNemar(9, 2, pytest.approx(2 * tail))
    assert mcnemar([1, 0], [1, 0]) == McNemar(0, 0, 1.0)
    assert mcnemar([0.6, 0.3], [0.3, 0.6]).only_first == 1


def test_a_comparison_says_whether_a_difference_is_within_noise():
    generator = np.random.default_rng(0)
    right = generator.random(400) < 0.8
    flipped = right.copy()  # ten that were right are wrong, and nine that were wrong are right
    flipped[generator.choice(np.flatnonzero(right), 10, replace=False)] = False
    flipped[generator.choice(np.flatnonzero(~right), 9, replace=False)] = True
    found = compare(results_of(flipped), results_of(right)).changes[0]
    assert found.word == "within noise"
    assert found.difference.points == pytest.approx(100 * (flipped.mean() - right.mean()))
    worse = compare(results_of(right & (generator.random(400) < 0.8)), results_of(right)).changes[0]
    assert worse.word == "worse, beyond noise"
    assert worse.difference.high < 0 < worse.mcnemar.only_first
    assert compare(results_of(right), results_of(right)).changes[0].word == "no difference"


def test_samples_that_either_model_failed_on_are_left_out_of_both_sides():
    found = compare(results_of([1, 1, 0, 1], failed=(0,)), results_of([1, 0, 0, 1], failed=(3,)))
    assert (found.samples, found.left_out) == (2, 2)
    assert (found.changes[0].reference, found.changes[0].value) == (0.0, 50.0)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: results_of([1, 0, 1]), "other samples"),
        (lambda: results_of([1, 0], task="gqa"), "results are of gqa, not vqav2"),
        (lambda: results_of([1, 0], references=("no",) * 10), "asked otherwise about 0"),
    ],
)
def test_results_of_other_questions_are_not_compared(other, said):
    with pytest.raises(VlmqError, match=said):
        compare(results_of([1, 0]), other())


def test_a_captions_difference_is_of_ciders_of_the_same_images(tmp_path, tiny_folders):
    folder = karpathy_files(tmp_path / "data")
    model = str(tiny_folders["llava-llama"])
    evaluate(Request(model, "flickr30k", str(folder), tmp_path / "out.jsonl", max_new_tokens=4))
    one = records.read(tmp_path / "out.jsonl")
    perfect = [record.model_copy(update={"answer": record.references[0]}) for record in one.records]
    best = Results(header=one.header, records=scored(TASKS["flickr30k"], perfect))
    found = compare(best, one).changes[0]
    assert found.reference == pytest.approx(sum(record.score for record in one.records) / 2)
    assert found.value == pytest.approx(sum(record.score for record in best.records) / 2)
    assert found.difference.points == pytest.approx(found.value - found.reference)
    assert found.mcnemar is None


def test_a_figure_that_cannot_be_had_is_a_dash_with_its_reason_below():
    known, lacking = Metric("BLEU-4", 0.5), Metric("SPICE", None, "not available: needs Java")
    found = dataclasses.replace(summarise(results_of([1, 0])), task="coco", metrics=(known, lacking))
    assert tables.summary_rows(found)[-2:] == [("BLEU-4", "", "0.5000"), ("SPICE", "", "-")]
    assert "SPICE: not available: needs Java" in tables.summary_notes(found)


# ------------------------------------------------------------------------------------------ command line


def test_evaluate_prints_a_table_and_compares_two_files(vlmq, request_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = request_of()
    flags = ("--task", "vqav2", "--data", request.data, "--max-new-tokens", 4)
    code, out, err = vlmq("evaluate", request.model, *flags, "--out", "one.jsonl")
    assert code == 0, err
    assert "accuracy, overall" in out
    code, out, err = vlmq("evaluate", request.model, *flags, "--out", "two.jsonl", "--against", "one.jsonl")
    assert code == 0, err
    assert "every score is the same; 100.0 % of the answers are the same" in out
    code, out, _ = vlmq("evaluate", "two.jsonl", "--against", "one.jsonl", "--json")
    said = json.loads(out)
    assert said["against"]["changes"][0]["word"] == "no difference"
    assert said["results"]["groups"][0]["samples"] == 8
    monkeypatch.setattr(evaluation, "open_vlm", lambda *_: SimpleNamespace())
    code, _, err = vlmq("evaluate", request.model, *flags, "--out", "three.jsonl", "--against", "none.jsonl")
    assert code == 2
    assert "none.jsonl" in err  # before the model is asked anything


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("blip2-mini",), "no --task"),
        (("blip2-mini", "--task", "vqav2"), "no --data"),
        (("blip2-mini", "--task", "vqa", "--data", "demo"), "no such task; choose vqav2"),
        (("blip2-mini", "--task", "vqav2", "--data", "nowhere"), "no such file or folder"),
        (("nowhere", "--task", "vqav2", "--data", "demo"), "nowhere: no such folder"),
        (("nowhere.jsonl",), "nowhere.jsonl"),
        (("x.jsonl", "--task", "vqav2"), "results are there already"),
        (("blip2-mini", "--task", "vqav2", "--data", "demo", "--out", "no/such/x.jsonl"), "no folder no/such"),
    ],
)
def test_what_a_person_did_wrong_is_one_line_and_exit_code_2(vlmq, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = vlmq("evaluate", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_file_is_not_compared(tmp_path):
    results = results_of([1, 0, 1])
    records.finish(tmp_path / "a.jsonl", results.header, results.records[:2])
    with pytest.raises(VlmqError, match="ended after 2 of 3 samples"):
        records.read(tmp_path / "a.jsonl")


def test_answers_may_hold_any_character(tmp_path):
    said = 'a\u2028b\x85c\n"d"\\'
    results = results_of([1])
    changed = [results.records[0].model_copy(update={"answer": said})]
    records.finish(tmp_path / "a.jsonl", results.header, changed)
    assert records.read(tmp_path / "a.jsonl").records[0].answer == said


def test_the_demos_own_set_is_asked_in_both_formats(tmp_path):
    answered = evaluate(Request("blip2-mini", "vqav2", "demo", tmp_path / "a.jsonl", limit=40))
    assert summarise(answered).groups[0].value > 85  # trained on such pictures, and tested on others
    captioned = evaluate(Request("blip2-mini", "coco", "demo", tmp_path / "b.jsonl", limit=10))
    assert summarise(captioned).groups[0].value > 2
    assert not summarise(captioned).odd.is_one_for_all


def test_a_sample_of_results_keeps_what_it_is_scored_by(request_of):
    """The file is enough: scored anew from it, nothing changes."""
    results = evaluate(request_of())
    bare = [record.model_copy(update={"score": None}) for record in records.read(request_of().out).records]
    assert scored(TASKS["vqav2"], bare) == results.records

"""Bad data is one line with file and id and exit code 2, before any model runs where that can be known, and nothing is
written; `vlmq evaluate --skip-bad` counts the sample as failed and goes on."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from test_tasks import vqav2_files, write
from transformers.utils import logging
from verified_here import measure_here

from vlmq.exporter.evaluation import evaluate, verify
from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.recipe import make_recipe

QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
IMAGE = "val2014/COCO_val2014_000000000042.jpg"


@pytest.fixture(autouse=True)
def without_bars():
    """As the command line has it: main() says so before transformers is imported, which the tests have done before."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def exported(tiny_folders, tmp_path_factory):
    """An export that calibrated on nothing, so that no image of the data has been looked at."""
    folder = tmp_path_factory.mktemp("bad-data") / "out"
    recipe = make_recipe({"method": "rtn", "group_size": 32})
    request = Request(str(tiny_folders["llava-llama"]), folder, recipe, formats="safetensors", verify=False)
    return export(request).folder


@pytest.fixture
def data(tmp_path):
    """Two questions about each of images 7 and 42."""
    folder = vqav2_files(tmp_path / "data")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / IMAGE)
    return folder


def changed(name, change):
    """Spoils one of the JSON files."""

    def spoil(folder):
        content = json.loads((folder / name).read_text())
        change(next(value for value in content.values() if isinstance(value, list)))
        write(folder / name, content)

    return spoil


def cut_short(folder):
    (folder / IMAGE).write_bytes((folder / IMAGE).read_bytes()[:-900])


def huge(folder):
    Image.new("1", (10_000, 10_000)).save(folder / IMAGE, "PNG")  # 100 megapixels, a few kilobytes


def no_image(folder):
    (folder / IMAGE).write_text("<html>404</html>")


FAULTS = {
    "missing image": (lambda folder: (folder / IMAGE).unlink(), ("no image ", "42", "question-420")),
    "repeated question": (changed(QUESTIONS, lambda asked: asked.append(asked[0])), ("id question-70 occurs ",)),
    "answers twice": (changed(ANNOTATIONS, lambda noted: noted.append(noted[2])), (ANNOTATIONS, "question-420")),
    "answers without a question": (changed(QUESTIONS, lambda asked: asked.pop(0)), (ANNOTATIONS, "question 70")),
    "truncated image": (cut_short, ("sample question-420: ", IMAGE, "damaged image")),
    "100 megapixels": (huge, ("sample question-420: ", IMAGE, "pixels")),
    "no image at all": (no_image, ("sample question-420: ", IMAGE, "not an image")),
}
EMPTY = (changed(QUESTIONS, list.clear), changed(ANNOTATIONS, list.clear))


def refused(vlmq, folder, *arguments):
    """The one line."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, out, err = vlmq(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("vlmq: ")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return err


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(verify, "measure", lambda *_, **__: pytest.fail("a model was run"))


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_refuses_bad_data_before_a_model_runs(fault, vlmq, exported, data, no_model):
    spoil, said = FAULTS[fault]
    spoil(data)
    line = refused(vlmq, exported, "verify", exported, "--data", data)
    assert all(part in line for part in said), line


def test_verify_refuses_an_empty_set(vlmq, exported, data, no_model):
    for spoil in EMPTY:
        spoil(data)
    assert f"{data}: no samples in it" in refused(vlmq, exported, "verify", exported, "--data", data)


def test_verify_converts_images_that_are_not_rgb(vlmq, exported, tiny_folders, data, monkeypatch):
    monkeypatch.setattr(verify, "measure", measure_here)
    Image.open(data / IMAGE).convert("CMYK").save(data / IMAGE)
    Image.open(data / IMAGE.replace("42", "07")).convert("L").save(data / IMAGE.replace("42", "07"))
    code, _, err = vlmq("verify", exported, "--data", data, "--threshold", "max-drop=100")
    assert code in (0, 1), err  # random weights of 4 bits may miss a threshold
    report = json.loads((exported / "report.json").read_text())
    assert report["samples"] == 4
    source = load_file(tiny_folders["llava-llama"] / "model.safetensors")
    vision = sum(tensor.nbytes for name, tensor in source.items() if "vision_" in name)
    connector = sum(tensor.nbytes for name, tensor in source.items() if "projector" in name)
    assert (report["source_disk"]["vision"], report["source_disk"]["connector"]) == (vision, connector)
    assert sum(report["source_disk"].values()) == sum(tensor.nbytes for tensor in source.values())


def evaluation(model, data, out, *flags):
    return ("evaluate", model, "--task", "vqav2", "--data", data, "--out", out, "--max-new-tokens", 3, *flags)


@pytest.mark.parametrize("fault", FAULTS)
def test_evaluate_refuses_bad_data_or_counts_it_where_asked(fault, vlmq, tiny_folders, data, tmp_path):
    spoil, said = FAULTS[fault]
    spoil(data)
    command = evaluation(tiny_folders["llava-llama"], data, tmp_path / "out.jsonl")
    line = refused(vlmq, data, *command)
    assert all(part in line for part in said), line
    code, out, err = vlmq(*command, "--skip-bad", "--json")
    assert code == 0, err
    failed = 2 if spoil in (cut_short, huge, no_image) or fault == "missing image" else 1
    assert json.loads(out)["results"]["odd"]["failed"] == failed


@pytest.mark.parametrize("flags", [(), ("--skip-bad",)])
def test_evaluate_refuses_an_empty_set(flags, vlmq, tiny_folders, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "open_vlm", lambda *_: pytest.fail("a model was run"))
    for spoil in EMPTY:
        spoil(data)
    line = refused(vlmq, tmp_path, *evaluation(tiny_folders["llava-llama"], data, tmp_path / "out.jsonl", *flags))
    assert f"{data}: no samples of VQAv2" in line

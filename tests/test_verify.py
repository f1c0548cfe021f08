"""The verdict: what is compared, what is a miss, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import report, verify
from vlmq.exporter.evaluation.measure import Measurement, Memory
from vlmq.exporter.images import digest
from vlmq.exporter.samples import Sample
from vlmq.formats import manifest
from vlmq.formats.errors import FormatError


def measurement(texts, engine="torch", tokens=None, **outputs):
    return Measurement(
        engine,
        list(texts),
        tokens or [[len(text)] for text in texts],
        Memory(100, 150, 170),
        0.02,
        2,
        {name: np.asarray(value, np.float32) for name, value in outputs.items()},
    )


def describe(folder, bits=(), calibration=None, recipe=None):
    """A manifest of the folder as it is, with made-up quantized tensors of so many bits."""
    tensors = {
        f"layer{place}": manifest.TensorRecord(
            method="rtn", bits=count, group=64, symmetric=True, shape=(64, 64), bytes=1, sha256=""
        )
        for place, count in enumerate(bits)
    }
    used = calibration and manifest.Calibration(dataset="x", count=1, ids_sha256="", images_sha256=calibration)
    manifest.write(
        folder,
        manifest.Manifest(
            vlmq="0",
            source=manifest.Source(name="x", parameters=1, files={}),
            family="blip-2",
            recipe=recipe or {},
            tensors=tensors,
            kept={},
            files=manifest.describe(folder),
            calibration=used,
        ),
    )


@pytest.fixture
def samples(tmp_path):
    """Four questions about two images, of two answer types; the right answers are yes, yes, 2 and 2."""
    made = []
    for number in range(4):
        path = tmp_path / f"{number // 2}.png"
        Image.new("RGB", (4, 4), (number // 2 * 90, 0, 0)).save(path)
        right, kind = (("yes", "yes/no"), ("2", "number"))[number // 2]
        made.append(Sample(f"q{number}", path, "question", "?", (right,) * 10, kind))
    return made


@pytest.fixture
def folders(tmp_path):
    """A reference of 900 bytes of weights, and an export of 300 in safetensors and 400 in ONNX, of 4 bits."""
    reference, export = tmp_path / "reference", tmp_path / "export"
    (export / "onnx").mkdir(parents=True)
    reference.mkdir()
    (reference / "model.safetensors").write_bytes(bytes(900))
    (export / "model.safetensors").write_bytes(bytes(300))
    (export / "onnx/decoder.onnx").write_bytes(bytes(400))
    return reference, export


@pytest.fixture
def models(monkeypatch):
    """What the measured models would say: (folder name, engine) -> measurement; and the order of the calls."""
    said, calls = {}, []

    def measure(folder, engine, samples, answer=True, progress=None):
        calls.append((folder.name, engine, answer))
        if progress:
            progress(len(samples), len(samples))
        return said[folder.name, engine]

    monkeypatch.setattr(verify, "measure", measure)
    monkeypatch.setattr(verify, "_coverage", lambda folder: [])
    said.update(
        {
            ("reference", "torch"): measurement(
                ["yes", "yes", "2", "3"], vision=[[1, 0]], connector=[[1, 0]], language=[[1, 0]]
            ),
            ("export", "onnx"): measurement(["Yes.", "no", "2", "two"], "onnx", connector=[[3, 4]], language=[[2, 0]]),
            ("export", "torch"): measurement([], vision=[[0, 1]], connector=[[3, 4]], language=[[2, 0]]),
        }
    )
    return said, calls


def test_accuracy_agreement_cosines_sizes_and_times_are_those_of_the_two_models(samples, folders, models):
    reference, export = folders
    describe(export, bits=(8, 4))
    verdict = verify.verify(export, reference, samples)
    assert {kind: (score.reference, score.export) for kind, score in verdict.accuracy.items()} == {
        "overall": (75.0, 75.0),
        "yes/no": (100.0, 50.0),
        "number": (50.0, 100.0),
    }
    overall = verdict.accuracy["overall"].difference
    assert (overall.points, overall.low, overall.high) == (0.0, -50.0, 50.0)  # two images: -50 and +50
    assert verdict.token_agreement == 0.25  # only the third answer has as many letters in both
    assert verdict.cosine["onnx"] == pytest.approx({"connector": 0.6, "language": 1.0})
    assert verdict.cosine["torch"] == pytest.approx({"vision": 0.0, "connector": 0.6, "language": 1.0})
    assert verdict.reference.disk == {"safetensors": 900, "onnx": 0}
    assert verdict.export.disk == {"safetensors": 300, "onnx": 400}
    assert (verdict.bits, verdict.samples, verdict.images, verdict.max_drop) == (4, 4, 2, 2.0)
    assert verdict.ok


@pytest.mark.parametrize(("rotated", "compared"), [("vision", "connector language"), ("language", "language vision")])
def test_outputs_that_a_rotation_turns_are_not_compared(samples, folders, models, rotated, compared):
    """They lie in another basis, so their cosine says nothing, and must not fail an export whose answers agree."""
    reference, export = folders
    describe(export, bits=(8,), recipe={"rotate": [rotated]})
    verdict = verify.verify(export, reference, samples)
    assert sorted(verdict.cosine["torch"]) == compared.split()


def test_each_model_is_measured_by_itself_and_the_export_in_the_engine_it_is_meant_for(samples, folders, models):
    reference, export = folders
    describe(export)
    verify.verify(export, reference, samples)
    assert models[1] == [("reference", "torch", True), ("export", "onnx", True), ("export", "torch", False)]
    models[1].clear()
    (export / "model.safetensors").unlink()
    verify.verify(export, reference, samples)
    assert models[1] == [("reference", "torch", True), ("export", "onnx", True)]


@pytest.mark.parametrize(
    ("bits", "allowed", "ok"),
    [(8, None, False), (4, None, False), (3, None, False), (2, None, True), (4, 24.9, False), (4, 25.0, True)],
)
def test_a_drop_beyond_what_the_bits_allow_is_a_miss(samples, folders, models, bits, allowed, ok):
    reference, export = folders
    describe(export, bits=(bits,))
    models[0]["export", "onnx"] = measurement(["yes", "no", "2", "3"], "onnx")  # 25 points less
    verdict = verify.verify(export, reference, samples, max_drop=allowed)
    assert verdict.ok is ok
    if not ok:
        assert "accuracy fell by 25.00 points" in verdict.misses[0]


@pytest.mark.parametrize(("bits", "points"), [(2, 100.0), (3, 5.0), (4, 2.0), (8, 2.0), (16, 2.0)])
def test_fewer_bits_may_lose_more(bits, points):
    assert verify.max_drop_at(bits) == points


def test_a_better_export_is_no_miss(samples, folders, models):
    reference, export = folders
    describe(export, bits=(4,))
    models[0]["export", "onnx"] = measurement(["yes", "yes", "2", "2"], "onnx")
    assert verify.verify(export, reference, samples, max_drop=0).ok


def test_without_answers_an_export_whose_components_point_elsewhere_is_a_miss(samples, folders, models):
    reference, export = folders
    describe(export, bits=(4,))
    bare = [dataclasses.replace(sample, answers=()) for sample in samples]
    verdict = verify.verify(export, reference, bare)
    assert verdict.accuracy == {}
    assert [miss.split(":")[0] for miss in verdict.misses] == ["connector", "vision", "connector"]


def test_only_questions_with_answers_are_asked_where_there_are_any(samples, folders, models):
    reference, export = folders
    describe(export, bits=(4,))
    caption = Sample("c", samples[0].image, "caption", answers=("a cat",))
    bare = Sample("n", samples[0].image, "question", "why?")
    assert verify.verify(export, reference, [caption, bare, *samples]).samples == 4


def test_an_image_that_was_calibrated_on_is_refused_before_anything_runs(samples, folders, models):
    reference, export = folders
    describe(export, calibration={"c0": digest(samples[2].image)})
    with pytest.raises(VlmqError, match="evaluation sample q2 was calibrated on"):
        verify.verify(export, reference, samples)
    assert models[1] == []


def test_a_file_that_is_not_what_the_manifest_says_is_a_miss(folders):
    _, export = folders
    (export / "model.safetensors").unlink()
    describe(export)
    assert verify._coverage(export) == []
    (export / "onnx/decoder.onnx").write_bytes(bytes(399) + b"1")
    assert "decoder.onnx" in verify._coverage(export)[0]


def test_a_folder_that_is_no_export_is_refused(samples, folders):
    reference, _ = folders
    with pytest.raises(FormatError, match=r"vlmq\.json"):
        verify.verify(reference, reference, samples)


def test_no_samples_are_refused(folders):
    reference, export = folders
    describe(export)
    with pytest.raises(VlmqError, match="no samples"):
        verify.verify(export, reference, [])


def test_the_table_says_what_the_verdict_says(samples, folders, models):
    reference, export = folders
    describe(export, bits=(4,))
    table = {row.label: row for row in report.rows(verify.verify(export, reference, samples))}
    assert table["accuracy, overall (4)"] == report.Row(
        "accuracy, overall (4)", "75.00 %", "75.00 %", "+0.00 (-50.00 to +50.00)"
    )
    assert table["same greedy tokens"].export == "25.0 %"
    assert table["cosine, connector (onnx)"].export == "0.6000"
    assert table["weights on disk, safetensors"].difference == "3.00 x smaller"
    assert table["weights on disk, onnx"].difference == "2.25 x smaller"
    assert table["time per answer (torch / onnx)"].difference == "1.00 x faster"


def test_the_report_is_json_and_has_everything(samples, folders, models):
    reference, export = folders
    describe(export, bits=(4,))
    verdict = verify.verify(export, reference, samples)
    written = json.loads(report.write(verdict, export).read_text())
    assert written["ok"] is True
    assert written["accuracy"]["yes/no"]["difference"]["points"] == -50.0
    assert written["export"]["memory"] == {"imported": 100, "loaded": 150, "peak": 170}
    assert written.keys() == {"ok", *(field.name for field in dataclasses.fields(verdict))}


def test_a_model_verified_against_itself_agrees_in_everything(tmp_path, tiny_folders, random_samples):
    export = shutil.copytree(tiny_folders["llava-mistral"], tmp_path / "same")
    describe(export)
    stages = []
    verdict = verify.verify(
        export, tiny_folders["llava-mistral"], random_samples, progress=lambda stage, done, of: stages.append(stage)
    )
    assert verdict.ok
    assert verdict.token_agreement == 1.0
    assert verdict.cosine["torch"] == pytest.approx({"vision": 1.0, "connector": 1.0, "language": 1.0})
    assert verdict.accuracy["overall"].difference.points == 0.0
    assert sorted(set(stages)) == ["export", "reference"]

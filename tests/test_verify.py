"""The verdict: what is compared, what is a miss, and what is refused."""

import dataclasses
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.evaluation import report, thresholds, verify
from vlmq.exporter.evaluation.audit import Audit
from vlmq.exporter.evaluation.measure import Measurement, Memory
from vlmq.exporter.evaluation.sensitivity import Shown
from vlmq.exporter.evaluation.speed import Speed
from vlmq.exporter.images import digest
from vlmq.exporter.samples import Sample
from vlmq.formats import manifest
from vlmq.formats.errors import FormatError
from vlmq.kernels.grid import Grid
from vlmq.terminal.conclusions import conclude

SHOWN = Shown(own=[[1], [2]], swapped=[[2], [1]], blank=[[1], [3]])


def measurement(texts, engine="torch", tokens=None, shown=SHOWN, logits=((1.0, 0.0), (0.0, 1.0)), **outputs):
    """Two probes, of one position each; another image changes both answers, a grey one the second."""
    found = {name: np.asarray(value, np.float32) for name, value in {"logits": logits, **outputs}.items()}
    seconds = Speed([0.02, 0.01, 0.09], [0.01], [0.002], [0.005])
    said = tokens or [[len(text)] for text in texts]
    return Measurement(engine, list(texts), said, Memory(100, 150, 170), seconds, 2, shown, [1, 1], found)


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

    def measure(folder, engine, samples, keep, answer=True, forced=None, timed_last=False, progress=None):
        assert keep.is_dir()
        assert (folder.name, forced) in (("reference", None), ("export", SHOWN.own))
        calls.append((folder.name, engine, answer))
        if progress:
            progress(len(samples), len(samples))
        if isinstance(said[folder.name, engine], Exception):
            raise said[folder.name, engine]
        return said[folder.name, engine]

    monkeypatch.setattr(verify, "measure", measure)
    monkeypatch.setattr(verify, "audit", lambda folder, reference: Audit())
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
    graphs, packed = verdict.likeness["onnx"], verdict.likeness["torch"]
    assert graphs.cosine == pytest.approx({"connector": 0.6, "language": 1.0})
    assert packed.cosine == pytest.approx({"vision": 0.0, "connector": 0.6, "language": 1.0})
    assert graphs.error == pytest.approx({"connector": 20**0.5, "language": 1.0})  # (3, 4) for (1, 0); 2 for 1
    assert graphs.sensitivity == {"swapped": (100.0, 100.0), "blank": (50.0, 50.0)}
    assert (graphs.divergence.kl, graphs.divergence.top1, graphs.divergence.tokens) == (0.0, 100.0, 2)
    assert graphs.faster == {"answer": 1.0, "first_token": 1.0, "token": 1.0, "image": 1.0}
    assert verdict.reference.disk == {"safetensors": 900, "onnx": 0}
    assert verdict.export.disk == {"safetensors": 300, "onnx": 400}
    assert (verdict.bits, verdict.samples, verdict.images) == (4, 4, 2)
    assert [miss.split(":")[0] for miss in verdict.misses] == ["cosine-connector", "cosine-vision", "cosine-connector"]


@pytest.mark.parametrize(("rotated", "compared"), [("vision", "connector language"), ("language", "language vision")])
def test_outputs_that_a_rotation_turns_are_not_compared(samples, folders, models, rotated, compared):
    """They lie in another basis, so their cosine says nothing, and must not fail an export whose answers agree."""
    reference, export = folders
    describe(export, bits=(8,), recipe={"rotate": [rotated]})
    verdict = verify.verify(export, reference, samples)
    assert sorted(verdict.likeness["torch"].cosine) == compared.split()


def test_each_model_is_measured_by_itself_and_the_export_in_the_engine_it_is_meant_for(samples, folders, models):
    reference, export = folders
    describe(export)
    verify.verify(export, reference, samples)
    assert models[1] == [("reference", "torch", True), ("export", "onnx", True), ("export", "torch", False)]
    models[1].clear()
    (export / "model.safetensors").unlink()
    verify.verify(export, reference, samples)
    assert models[1] == [("reference", "torch", True), ("export", "onnx", True)]


def failed(verdict):
    """The names of the missed thresholds; the outputs of these made-up models are far apart on purpose."""
    return [name for name in (miss.split(":")[0] for miss in verdict.misses) if not name.startswith("cosine")]


@pytest.mark.parametrize(
    ("bits", "allowed", "ok"),
    [(8, None, False), (4, None, False), (3, None, False), (2, None, True), (4, 24.9, False), (4, 25.0, True)],
)
def test_a_drop_beyond_what_the_bits_allow_is_a_miss(samples, folders, models, bits, allowed, ok):
    reference, export = folders
    describe(export, bits=(bits,))
    models[0]["export", "onnx"] = measurement(["yes", "no", "2", "3"], "onnx")  # 25 points less
    given = {} if allowed is None else {"max-drop": allowed}
    verdict = verify.verify(export, reference, samples, given)
    assert failed(verdict) == ([] if ok else ["max-drop"])
    if not ok:
        assert "accuracy lost: 25 points, more than the" in verdict.misses[0]


DEFAULTS = [(2, 100, None, None), (3, 5, 0.3, 0.7), (4, 2, 0.1, 0.85), (6, 2, 0.05, 0.95), (16, 2, 0.02, 0.97)]


@pytest.mark.parametrize(("bits", "points", "nats", "cosine"), DEFAULTS)
def test_fewer_bits_may_lose_more(bits, points, nats, cosine):
    limits = thresholds.limits(bits, {})
    assert (limits["max-drop"], limits["kl"], limits["cosine-vision"]) == (points, nats, cosine)


def test_inputs_of_few_bits_count_as_much_as_weights(folders):
    _, export = folders
    describe(export, bits=(8,))
    made = manifest.read(export)
    inputs = {name: record.model_copy(update={"inputs": Grid(4, -1)}) for name, record in made.tensors.items()}
    assert verify.fewest_bits(made) == 8
    assert verify.fewest_bits(made.model_copy(update={"tensors": inputs})) == 4


def test_an_unknown_threshold_is_refused_with_the_name_that_was_meant(samples, folders, models):
    reference, export = folders
    describe(export)
    with pytest.raises(VlmqError, match="cosine-visoin: no such threshold; did you mean cosine-vision"):
        verify.verify(export, reference, samples, {"cosine-visoin": 1})
    assert models[1] == []


def test_distributions_that_lie_apart_are_a_miss_and_every_engine_is_judged(samples, folders, models):
    """By hand: softmax (1, 0) against (0, 1) is e/(e+1) against 1/(e+1), a divergence of (e-1)/(e+1) = 0.4621 nats."""
    reference, export = folders
    describe(export, bits=(4,))
    models[0]["export", "torch"] = measurement([], logits=((0.0, 1.0), (0.0, 1.0)))
    verdict = verify.verify(export, reference, samples)
    assert verdict.likeness["torch"].divergence.kl == pytest.approx(0.4621 / 2, abs=1e-4)
    assert verdict.likeness["torch"].divergence.top1 == 50.0
    assert failed(verdict) == ["kl", "top1"]
    assert all("torch: " in miss for miss in verdict.misses if miss.startswith(("kl", "top1")))


def test_logits_that_are_not_numbers_are_a_miss(samples, folders, models):
    reference, export = folders
    describe(export, bits=(4,))
    models[0]["export", "torch"] = measurement([], logits=((np.nan, 1.0), (0.0, 1.0)))
    assert "kl" in failed(verify.verify(export, reference, samples))


@pytest.mark.parametrize("swapped", [[[1], [2]], [[1], [1]]])
def test_an_export_that_other_images_do_not_change_as_often_is_a_miss(samples, folders, models, swapped):
    reference, export = folders
    describe(export, bits=(4,))
    blind = dataclasses.replace(SHOWN, swapped=swapped)
    models[0]["export", "onnx"] = measurement(["yes", "yes", "2", "3"], "onnx", shown=blind)
    verdict = verify.verify(export, reference, samples)
    assert failed(verdict) == ["sensitivity"]
    assert "onnx: swapped images change" in verdict.misses[0]


def test_an_export_that_cannot_be_run_is_a_miss_and_the_other_engine_is_still_judged(samples, folders, models):
    reference, export = folders
    describe(export, bits=(4,))
    models[0]["export", "onnx"] = VlmqError("its graph is broken")
    verdict = verify.verify(export, reference, samples)
    assert verdict.misses[0] == "runs: its graph is broken"
    assert verdict.export is None
    assert list(verdict.likeness) == ["torch"]
    assert "failed" in report.write(verdict, export).with_suffix(".html").read_text()


def test_a_reference_that_cannot_be_run_is_bad_input(samples, folders, models):
    reference, export = folders
    describe(export)
    models[0]["reference", "torch"] = VlmqError("not enough memory")
    with pytest.raises(VlmqError, match="not enough memory"):
        verify.verify(export, reference, samples)


def test_a_reference_is_measured_once_for_the_same_samples(samples, folders, models, monkeypatch, tmp_path):
    reference, export = folders
    describe(export, bits=(4,))
    plain = verify.measure

    def measure(folder, engine, samples, keep, **options):
        found = plain(folder, engine, samples, keep, **options)
        found.write(keep)
        return found

    monkeypatch.setattr(verify, "measure", measure)
    first = verify.verify(export, reference, samples, cache=tmp_path / "cache")
    again = verify.verify(export, reference, samples, cache=tmp_path / "cache")
    assert [call[0] for call in models[1]].count("reference") == 1
    assert again.accuracy == first.accuracy
    assert again.likeness["onnx"].divergence == first.likeness["onnx"].divergence
    assert first.likeness["onnx"].faster
    assert (again.likeness["onnx"].faster, again.reference.speed) == ({}, None)  # times of two runs are no pair
    assert not any("time" in row.label for row in report.rows(again))
    other = [dataclasses.replace(samples[0], text="why?"), *samples[1:]]
    verify.verify(export, reference, other, cache=tmp_path / "cache")
    (reference / "model.safetensors").write_bytes(bytes(901))
    verify.verify(export, reference, samples, cache=tmp_path / "cache")
    assert [call[0] for call in models[1]].count("reference") == 3


def test_a_better_export_is_no_miss(samples, folders, models):
    reference, export = folders
    describe(export, bits=(4,))
    models[0]["export", "onnx"] = measurement(["yes", "yes", "2", "2"], "onnx")
    assert failed(verify.verify(export, reference, samples, {"max-drop": 0})) == []


def test_without_answers_an_export_whose_components_point_elsewhere_is_a_miss(samples, folders, models):
    reference, export = folders
    describe(export, bits=(4,))
    bare = [dataclasses.replace(sample, answers=()) for sample in samples]
    verdict = verify.verify(export, reference, bare)
    assert verdict.accuracy == {}
    assert [miss.split(":")[0] for miss in verdict.misses] == ["cosine-connector", "cosine-vision", "cosine-connector"]


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
    assert table["answers that blank images change (onnx)"].reference == "50.0 %"
    assert table["weights on disk, safetensors"].difference == "3.00 x smaller"
    assert table["weights on disk, onnx"].difference == "2.25 x smaller"
    assert table["time per answer (torch / onnx)"].reference == "20.0 ms"  # the median
    assert table["time per answer (torch / onnx)"].difference == "1.00 x faster"
    assert table["further tokens (torch / torch)"].export == "500 a second"


@pytest.fixture
def shown(monkeypatch, capsys):
    """What a person sees of a verdict on a terminal of so many columns: exit code, lines of stdout, stderr."""

    def show(verdict, columns=80, verbose=False, folder="export"):
        for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": str(columns)}.items():
            monkeypatch.setenv(name, value)
        code = 0
        try:
            conclude(Path(folder), verdict, None, False, verbose)
        except typer.Exit as end:
            code = end.exit_code
        said = capsys.readouterr()
        return code, [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in said.out.splitlines()], said.err

    return show


def test_a_terminal_shows_the_rows_that_decide_each_on_one_line_of_eighty_columns(samples, folders, models, shown):
    reference, export = folders
    describe(export, bits=(4,))
    verdict = verify.verify(export, reference, samples)
    _, lines, _ = shown(verdict)
    assert max(map(len, lines[:-3])) <= 80  # below the table is prose, which a terminal wraps
    table = {re.split(r"  +", line.strip())[0]: re.split(r"  +", line.strip())[1:] for line in lines if line.strip()}
    assert table["accuracy, overall (4)"] == ["75.00 %", "75.00 %", "+0.00 (-50.00 to +50.00)"]
    assert table["divergence, nats a token"] == ["0.0000", "at most 0.1"]
    assert table["least cosine, connector"] == ["0.6000", "at least 0.85"]
    assert table["changed by blank images"] == ["50.0 %", "50.0 %", "+0.0"]
    assert table["weights on disk"] == ["0.0 MB", "0.0 MB", "2.25 x smaller"]  # the graphs', which are run
    assert table["time per answer"] == ["20.0 ms", "20.0 ms", "1.00 x faster"]
    assert len(lines) <= 22
    _, every, _ = shown(verdict, columns=120, verbose=True)
    labels = [row.label for row in report.rows(verdict)]
    assert all(any(line.strip().startswith(label) for line in every) for label in labels)
    assert len(labels) > 25


def test_misses_are_told_one_a_line_with_exit_code_1_and_many_of_a_kind_are_counted(samples, folders, models, shown):
    reference, export = folders
    describe(export, bits=(4,))
    verdict = verify.verify(export, reference, samples)
    many = [f"tensors: layer{place}: not what the source has" for place in range(9)]
    code, lines, err = shown(dataclasses.replace(verdict, misses=(*many, *verdict.misses)))
    told = err.splitlines()
    assert code == 1
    assert [line for line in told if "tensors" in line] == [
        "vlmq: tensors: layer0: not what the source has",
        "vlmq: tensors: layer1: not what the source has",
        "vlmq: tensors: and 7 more, all in report.json",
    ]
    assert {line.split(": ")[1] for line in told} == {"tensors", "cosine-vision", "cosine-connector"}
    assert any("failed, 12 missed" in line for line in lines)
    code, lines, err = shown(dataclasses.replace(verdict, misses=()))
    assert (code, err) == (0, "")
    assert any(line.startswith("ok: ") for line in lines)


def test_an_export_of_which_no_engine_runs_still_has_its_misses_told(samples, folders, models, shown):
    reference, export = folders
    describe(export, bits=(4,))
    for engine in ("onnx", "torch"):
        models[0]["export", engine] = VlmqError("its graph is broken")
    code, _, err = shown(verify.verify(export, reference, samples))
    assert (code, err) == (1, "vlmq: runs: its graph is broken\n" * 2)


def test_components_are_compared_with_the_references_on_disk(samples, folders, models, monkeypatch):
    reference, export = folders
    describe(export, bits=(4,))
    sizes = {"onnx": {"vision": 2 * 10**6, "other": 10**6}}
    audited = Audit(disk=sizes, source_disk={"vision": 8 * 10**6})
    monkeypatch.setattr(verify, "audit", lambda folder, reference: audited)
    table = {row.label: row for row in report.rows(verify.verify(export, reference, samples))}
    vision = table["of these vision (onnx)"]
    assert (vision.reference, vision.export, vision.difference) == ("8.0 MB", "2.0 MB", "4.00 x smaller")
    assert table["of these other (onnx)"].reference == ""


def test_the_report_is_json_and_has_everything(samples, folders, models):
    reference, export = folders
    describe(export, bits=(4,))
    verdict = verify.verify(export, reference, samples)
    written = json.loads(report.write(verdict, export).read_text())
    assert written["ok"] is False
    assert written["misses"] == list(verdict.misses)
    assert written["export"]["speed"]["images_per_second"] == 200
    assert written["accuracy"]["yes/no"]["difference"]["points"] == -50.0
    assert written["export"]["memory"] == {"imported": 100, "loaded": 150, "peak": 170}
    assert written.keys() == {"ok", *(field.name for field in dataclasses.fields(verdict))}


def test_the_page_needs_nothing_beside_it_and_shows_ten_samples(samples, folders, models):
    reference, export = folders
    describe(export, bits=(4,))
    verdict = verify.verify(export, reference, samples)
    page = report.write(verdict, export).with_suffix(".html").read_text()
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links), links
    assert page.count("<svg") == 1  # accuracy; these models have no blocks
    assert page.count("<img") == len(verdict.examples) == 2  # as many as there are images
    assert [(example.reference, example.export) for example in verdict.examples] == [("yes", "Yes."), ("3", "two")]
    for miss in verdict.misses:
        assert html.escape(miss, quote=False) in page


def test_what_a_model_says_cannot_become_part_of_the_page(samples, folders, models):
    reference, export = folders
    describe(export, bits=(4,))
    models[0]["export", "onnx"] = measurement(["<script>alert(1)</script>", "yes", "2", "3"], "onnx")
    page = report.write(verify.verify(export, reference, samples), export).with_suffix(".html").read_text()
    assert "<script" not in page


def test_a_model_verified_against_itself_agrees_in_everything(tmp_path, tiny_folders, random_samples, monkeypatch):
    monkeypatch.setattr(verify, "audit", lambda folder, reference: Audit())  # it is no export
    export = shutil.copytree(tiny_folders["llava-mistral"], tmp_path / "same")
    describe(export)
    stages = []
    verdict = verify.verify(
        export, tiny_folders["llava-mistral"], random_samples, progress=lambda stage, done, of: stages.append(stage)
    )
    assert verdict.ok
    assert verdict.token_agreement == 1.0
    found = verdict.likeness["torch"]
    assert found.cosine == pytest.approx({"vision": 1.0, "connector": 1.0, "language": 1.0})
    assert found.divergence.kl == pytest.approx(0.0, abs=1e-6)
    assert found.answers == 1.0
    assert set(found.blocks.values()) == {0.0}
    assert len(found.blocks) == 2 + 1 + 2  # CLIP's third layer is never read
    assert all(before == after for before, after in found.sensitivity.values())
    assert verdict.reference.speed.tokens_per_second > 0
    assert verdict.accuracy["overall"].difference.points == 0.0
    assert sorted(set(stages)) == ["export", "reference"]

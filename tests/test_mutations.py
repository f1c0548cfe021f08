"""The verdict against exports that are known to be bad, and known to be good.

Every fault of `corruptions.py` is done to a good export of both families, in safetensors and in ONNX graphs. It must be
caught by name twice: by the hashes of the manifest, and, once the manifest has been made to agree with the faulty files
as a faulty exporter's would, by what is checked against the source and by what the model answers.
"""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from corruptions import CORRUPTIONS, ROUNDED_INPUTS, Corruption, Export
from verified_here import measure_here, open_on_one_thread

from vlmq.exporter.data import evaluation_set
from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.evaluation import verify, worker
from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.recipe import make_recipe
from vlmq.formats import genai, manifest
from vlmq.formats.errors import FormatError
from vlmq.formats.folder import companions, copy_companions

FORMATS = ("safetensors", "onnx")
FEW = 8  # pictures that a corrupted export is asked about; a good one is asked about MORE
MORE = 24
SEEN = {"max-drop", "kl", "top1", "sensitivity", "cosine-vision", "cosine-connector", "cosine-language"}

GOOD = {
    "rtn, 4 bits": {"method": "rtn", "bits": 4, "group_size": 64},
    "rtn, 8 bits, rows": {"method": "rtn", "bits": 8, "group_size": -1},
    "rtn, 3 bits, asymmetric": {"method": "rtn", "bits": 3, "group_size": 32, "symmetric": False},
    "rtn, 6 bits, rotated": {"method": "rtn", "bits": 6, "group_size": 64, "rotate": ["language"]},
    "rtn, mixed": {
        "method": "rtn",
        "bits": 4,
        "group_size": 64,
        "components": {"vision": {"bits": 8}, "connector": {"bits": 16}},
    },
    "uniform, 8 bits": {"method": "uniform", "bits": 8},
    "gptq, 2 bits": {"method": "gptq", "bits": 2, "group_size": 64, "symmetric": False},
    "smoothquant, inputs of 8 bits": {
        "method": "smoothquant",
        "bits": 8,
        "group_size": -1,
        "activations": {"bits": 8, "group_size": 0},
    },
}
ROUNDING = "smoothquant, inputs of 8 bits"


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, and no measurement in a process of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "measure", measure_here)
        patch.setattr(worker, "open_vlm", open_on_one_thread)
        patch.setattr(gc, "collect", lambda: 0)  # a third of the time of a verification, for memory that nobody reads
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def samples():
    """Questions about different pictures."""
    first = {}
    for sample in evaluation_set("demo").samples:
        if sample.kind == "question":
            first.setdefault(sample.image, sample)
    return list(first.values())[:MORE]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """(demo, name of GOOD) or (demo, format) -> the folder of a good export; made once, on four samples."""
    root = tmp_path_factory.mktemp("good")
    made = {}

    def make(demo: str, name: str) -> Path:
        if (demo, name) not in made:
            folder = root / f"{demo}-{len(made)}"
            if name in FORMATS:
                made.update(_both(demo, folder))
            else:
                made[demo, name] = _export(demo, folder, GOOD[name], "safetensors")
        return made[demo, name]

    return make


def _export(demo: str, folder: Path, recipe: dict, formats: str) -> Path:
    samples = 32 if "activations" in recipe else 4  # a range that few samples gave cuts others off
    export(Request(demo, folder, make_recipe(recipe), formats=formats, samples=samples, verify=False))
    return folder


def _both(demo: str, folder: Path) -> dict:
    """One export in both formats, taken apart into two, with folds and all."""
    recipe = {"method": "awq", "bits": 4, "group_size": 64, "symmetric": False}
    _export(demo, folder, recipe, "both")
    found = {}
    for kind in FORMATS:
        part = Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-{kind}")))
        if kind == "onnx":
            (part / "model.safetensors").unlink()
        else:
            shutil.rmtree(part / "onnx")
            for name in (*companions(part), genai.CONFIG):  # what readers of graphs want of them
                (part / name).unlink()
            config = json.loads((folder / "config.json").read_text())
            copy_companions(CHECKPOINTS[demo], part, config["quantization_config"])
        made = manifest.read(folder)
        update = {"files": manifest.describe(part), "onnx": made.onnx if kind == "onnx" else None}
        manifest.write(part, made.model_copy(update=update))
        found[demo, kind] = part
    return found


@pytest.fixture(scope="module")
def references(samples):
    """What the references say, measured once for so many samples, however many exports they are compared with."""
    known = {}
    return lambda demo, count: known.setdefault(
        (demo, count), measure_here(CHECKPOINTS[demo], "torch", samples[:count])
    )


@pytest.fixture
def misses(samples, references, monkeypatch):
    """The misses of a verdict by the names of their checks."""

    def of(folder: Path, demo: str, count: int = FEW, **given: float) -> list[str]:
        reference = CHECKPOINTS[demo]

        def measured(model, engine, asked, *arguments, **options):
            return references(demo, count) if model == reference else measure_here(model, engine, asked, **options)

        monkeypatch.setattr(verify, "measure", measured)
        limits = {name.replace("_", "-"): value for name, value in given.items()}
        return list(verify.verify(folder, reference, samples[:count], limits).misses)

    return of


def _names(misses: list[str]) -> set[str]:
    return {miss.partition(":")[0] for miss in misses}


def _told(corruption: Corruption, found: set[str]) -> bool:
    return all(found & set(check.split("|")) for check in corruption.audit)


CASES = [
    pytest.param(demo, kind, name, id=f"{demo}-{kind}-{name}")
    for demo in CHECKPOINTS
    for kind in FORMATS
    for name, corruption in CORRUPTIONS.items()
    if kind in corruption.formats
]


@pytest.mark.parametrize(("demo", "kind", "name"), CASES)
def test_a_corrupted_export_is_caught_by_name_whatever_its_manifest_says(
    demo, kind, name, exports, misses, tmp_path, vlmq
):
    corruption = CORRUPTIONS[name]
    bad = Export(exports(demo, kind), tmp_path / "bad", CHECKPOINTS[demo])
    corruption.do(bad)
    bad.write()
    if name != "the tower quantized though kept":  # where the manifest alone is at fault
        with pytest.raises(FormatError, match=r"export|copy"):
            manifest.coverage(bad.folder)
    bad.agree()
    if "runs" not in corruption.audit:
        manifest.coverage(bad.folder)  # nothing that it hashes tells any more
    if corruption.answers or "runs" in corruption.audit or not corruption.audit:
        found = _names(misses(bad.folder, demo))
    else:
        found = _names(verify.audited(bad.folder, CHECKPOINTS[demo])[1])
    assert _told(corruption, found), found
    assert not corruption.answers or found & SEEN, found
    if not corruption.audit and not corruption.answers:
        assert not found, f"{name} is caught without hashes now: {found}"


@pytest.mark.parametrize("demo", CHECKPOINTS)
def test_a_range_of_inputs_that_is_too_small_shows_in_the_answers(demo, exports, misses, tmp_path):
    bad = Export(exports(demo, ROUNDING), tmp_path / "bad", CHECKPOINTS[demo])
    ROUNDED_INPUTS.do(bad)
    bad.write()
    bad.agree()
    manifest.coverage(bad.folder)
    assert _names(misses(bad.folder, demo)) & SEEN


@pytest.mark.parametrize("kind", FORMATS)
def test_the_command_says_what_is_wrong_and_exits_1(kind, exports, misses, tmp_path, vlmq, samples, monkeypatch):
    demo = "blip2-mini"
    bad = Export(exports(demo, kind), tmp_path / "bad", CHECKPOINTS[demo])
    CORRUPTIONS["nibbles swapped"].do(bad)
    bad.write()
    misses(bad.folder, demo)  # puts the measurement in place
    monkeypatch.setattr("vlmq.exporter.data.evaluation_set", lambda source: type("Set", (), {"samples": samples[:FEW]}))
    code, _, err = vlmq("verify", bad.folder, "--no-gate")
    assert code == 1
    said = {line.split(": ")[1] for line in err.splitlines() if line.startswith("vlmq: ")}
    assert {"files", "hashes", "steps", "kl"} <= said
    assert ">failed<" in (bad.folder / "report.html").read_text()


@pytest.mark.parametrize("demo", CHECKPOINTS)
@pytest.mark.parametrize("name", [*FORMATS, *GOOD])
def test_a_good_export_is_no_false_alarm(demo, name, exports, misses):
    # One of so few answers is worth 4 points, and any of these exports may lose one of hundreds.
    assert misses(exports(demo, name), demo, MORE, max_drop=5) == []


def test_there_are_enough_of_both():
    assert len(CORRUPTIONS) + 1 >= 25
    assert len(CHECKPOINTS) * (len(FORMATS) + len(GOOD)) >= 20

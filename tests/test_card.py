"""The card says what was measured, and its snippets run."""

import json
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.recipe import make_recipe
from vlmq.formats import card, manifest
from vlmq.formats.errors import FormatError

HEX = "0" * 64


def side(engine, accuracy_bytes, seconds):
    memory = {"imported": 10**6, "loaded": 10**6 + accuracy_bytes, "peak": 3 * accuracy_bytes}
    disk = {"safetensors": accuracy_bytes, "onnx": 0 if engine == "torch" else accuracy_bytes}
    return {
        "folder": "f",
        "engine": engine,
        "threads": 2,
        "disk": disk,
        "memory": memory,
        "seconds_per_answer": seconds,
    }


REPORT = {
    "ok": True,
    "samples": 240,
    "images": 60,
    "bits": 4,
    "accuracy": {
        "overall": {
            "reference": 97.5,
            "export": 96.25,
            "difference": {"points": -1.25, "low": -2.5, "high": 0.25, "samples": 240},
        }
    },
    "token_agreement": 0.925,
    "reference": side("torch", 40 * 10**6, 0.02),
    "export": side("onnx", 8 * 10**6, 0.005),
    "misses": [],
    "a field of a later release": {"kl": 0.5},
}


def made(**changes):
    """A manifest as an export of a Hub model writes it."""
    record = manifest.TensorRecord(
        method="awq", bits=4, group=64, symmetric=True, shape=(64, 64), bytes=2192, sha256=HEX
    )
    content = {
        "vlmq": "9.9",
        "source": manifest.Source(
            name="user/base",
            revision="abc123",
            parameters=5000,
            files={"model.safetensors": {"bytes": 10000, "sha256": HEX}},
        ),
        "family": "llava",
        "recipe": {"consumer": "any"},
        "calibration": manifest.Calibration(dataset="nlphuji/flickr30k@1", count=128, ids_sha256="f" * 64),
        "tensors": {"language_model.model.layers.0.mlp.up_proj": record},
        "kept": {"lm_head": "output head"},
        "files": {"model.safetensors": {"bytes": 4000, "sha256": HEX}, "onnx/a.onnx": {"bytes": 5000, "sha256": HEX}},
        "onnx": {"accuracy_level": 0},
    }
    return manifest.Manifest.model_validate(content | changes)


def rendered(report=REPORT, release=None, name="user/small", **changes):
    return card.render(made(**changes), report, release or {}, name)


def test_the_front_matter_is_what_the_hub_reads():
    data = ModelCard(rendered()).data
    assert data.base_model == "user/base"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.pipeline_tag == "image-text-to-text"
    assert data.library_name == "transformers"
    assert {"vlmq", "llava", "4-bit", "compressed-tensors", "onnx"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == (
        "visual-question-answering",
        "accuracy",
        96.25,
    )
    assert data.model_name == "small"


def test_a_local_source_is_no_base_model_of_the_hub_unless_it_is_named():
    source = made().source.model_copy(update={"name": "/home/me/secret/my-llava", "revision": None})
    text = rendered(source=source)
    assert "base_model" not in text
    assert "/home/me" not in text
    assert "`my-llava`, quantized" in text
    named = card.render(made(source=source), REPORT, {}, "user/small", "user/base")
    assert ModelCard(named).data.base_model == "user/base"


def test_every_figure_comes_from_the_measurements():
    text = rendered()
    for row in (
        "| accuracy, overall | 97.50 % | 96.25 % | -1.25 points (-2.50 to +0.25) |",
        "| answers with the same tokens |  | 92.5 % |  |",
        "| memory of the model | 40.0 MB | 8.0 MB | 5.00 x smaller |",
        "| time per answer | 20.0 ms | 5.0 ms | 4.00 x faster |",
        "| weights on disk, safetensors | 0.0 MB | 0.0 MB | 2.50 x smaller |",
        "| calibration | nlphuji/flickr30k@1, 128 samples, seed 0, sha256 of their ids `" + "f" * 64 + "` |",
        "| 1 linear | 4 bits, groups of 64, symmetric |",
        "| 1 linear | kept: output head |",
    ):
        assert row in text, row
    assert "240 questions about 60 images" in text


def test_what_was_not_measured_is_not_on_it():
    text = rendered(report={}, calibration=None)
    assert "accuracy" not in text.replace("accuracy-level", "")
    assert "model-index" not in text
    assert "has not been compared with the reference" in text
    assert "transformers has not been asked to load it" in text
    assert "none: no method looked at samples" in text


def test_what_is_not_good_is_among_the_limitations():
    report = REPORT | {"misses": ["accuracy fell by 9.00 points, more than the 2 allowed"], "ok": False}
    text = rendered(report, {"ok": False, "misses": ["transformers reports a and 0 more keys as missing"]})
    assert "* It does not answer as the reference did: accuracy fell by 9.00 points" in text
    assert "* It failed the release gate: transformers reports a and 0 more keys as missing." in text


def test_graphs_that_simulate_say_for_how_many_linears():
    linears = [{"simulated": True, "linears": 7}, {"simulated": False, "linears": 5}, {"simulated": True, "linears": 2}]
    assert "round the inputs of 9 linears in floating point" in rendered(onnx={"accuracy_level": 0, "linears": linears})
    assert "in floating point" not in rendered(onnx={"accuracy_level": 0, "linears": linears[1:2]})
    assert "in floating point" not in rendered()


def test_what_transformers_cannot_load_has_no_snippet_for_it():
    first = made().tensors["language_model.model.layers.0.mlp.up_proj"]
    tensors = {"a": first, "b": first.model_copy(update={"bits": 8, "symmetric": False})}
    assert [found.consumer for found in card.snippets(made(tensors=tensors), "n")] == ["onnxruntime"]
    assert "cannot load several grids of which some are asymmetric; vlmq's own" in rendered(tensors=tensors)


def test_the_snippet_for_vllm_is_there_for_exports_made_for_it_and_compiles():
    """vLLM is not installed where the tests run, and the card says that they do not run it."""
    assert "vllm" not in [found.consumer for found in card.snippets(made(), "user/small")]
    found = card.snippets(made(recipe={"consumer": "vllm"}), "user/small")[-1]
    assert found.consumer == "vllm"
    assert not found.run
    assert "do not run it" in found.words
    compile(found.code, "card", "exec")


def test_a_name_is_text_and_never_code():
    for found in card.snippets(made(recipe={"consumer": "vllm"}), 'a"); evil("'):
        assert 'evil("' not in re.sub(r'"(\\.|[^"\\])*"', "", found.code)


def test_a_broken_report_is_one_line(tmp_path):
    manifest.write(tmp_path, made())
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(FormatError, match=r"report.json: not JSON .*; run vlmq verify"):
        card.write(tmp_path)


@pytest.mark.parametrize("variant", ["blip2-opt", "llava-llama"])
def test_every_export_has_a_card_whose_snippets_run(variant, tiny_folders, tmp_path, monkeypatch):
    """In processes that know nothing of the tests, exactly as the card prints them."""
    rules = [{"component": "vision", "bits": 8}] if variant == "blip2-opt" else []
    recipe = make_recipe({"method": "rtn", "group_size": 32, "rules": rules})
    export(Request(str(tiny_folders[variant]), tmp_path / "out", recipe, verify=False))
    text = (tmp_path / "out" / "README.md").read_text()
    codes = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(codes) == 2
    assert ("decompress_model" in codes[0]) == bool(rules)
    Image.effect_noise((20, 20), 60).save(tmp_path / "out" / "picture.png")
    said = []
    for code in codes:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout.strip())
    assert said[1]
    assert said[0].endswith(said[1])  # transformers gives LLaVA's prompt back first


def test_the_plot_shows_after_in_percent_of_before(tmp_path):
    manifest.write(tmp_path, made())
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    card.write(tmp_path)
    assert Image.open(tmp_path / "comparison.png").size[0] > 400
    assert "![Before and after](comparison.png)" in (tmp_path / "README.md").read_text()
    found = card.card_plot.shares(REPORT)
    assert found["time per answer"] == pytest.approx(25)
    assert found["memory of the model"] == pytest.approx(20)
    assert found["accuracy"] == pytest.approx(100 * 96.25 / 97.5)
    assert card.card_plot.draw({"reference": None, "export": None}, tmp_path) is None

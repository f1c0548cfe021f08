"""The model card, README.md: generated from what was measured, `vlmq.json`, `report.json` and `release.json`, alone.

What a file does not say is not on the card. The front matter is the Hub's: https://huggingface.co/docs/hub/model-cards.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from vlmq.formats import card_plot, compressed_tensors, manifest
from vlmq.formats.compressed_tensors import Grids
from vlmq.formats.errors import FormatError
from vlmq.formats.manifest import Manifest

NAME = "README.md"
REPORT, RELEASE = "report.json", "release.json"
HERE = "."  # the name of a folder that has none on the Hub yet
PIPELINE = "image-text-to-text"
TASK, TASK_NAME = "visual-question-answering", "Visual question answering"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PROMPTS = {  # of a question, as each family was trained
    "blip-2": "Question: what is in the picture? Answer:",
    "llava": "USER: <image>\nwhat is in the picture? ASSISTANT:",
}


@dataclass(frozen=True)
class Snippet:
    """How to load the folder in one program; `run` tells whether a test of vlmq runs it, or compiles it alone."""

    consumer: str
    words: str
    code: str
    run: bool = True


def write(folder: Path, name: str | None = None, base_model: str | None = None) -> Path:
    """Write README.md, and the plot where there is a report, into a folder that vlmq made.

    name: what readers call it, `user/name` on the Hub; else the snippets run inside the folder. base_model: the Hub's
    name of a source that was a local folder.
    FormatError where a file that the card is made from is broken.
    """
    made, report, release = manifest.read(folder), read_json(folder / REPORT), read_json(folder / RELEASE)
    plot = card_plot.draw(report, folder) if report else None
    path = folder / NAME
    part = path.with_suffix(".part")
    part.write_text(render(made, report, release, name or HERE, base_model, plot), encoding="utf-8")
    part.replace(path)  # whole or as it was
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A file of measurements; empty where it is absent."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: not JSON ({error}); run vlmq verify {path.parent}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path}: not a JSON object; run vlmq verify {path.parent}")
    return content


def render(
    made: Manifest,
    report: Mapping[str, Any],
    release: Mapping[str, Any],
    name: str,
    base_model: str | None = None,
    plot: str | None = None,
) -> str:
    """The whole card. report, release: empty where nothing was measured."""
    on_hub = base_model or (made.source.name if made.source.revision and HUB_ID.fullmatch(made.source.name) else None)
    revision = f" at revision `{made.source.revision}`" if made.source.revision and not base_model else ""
    base = f"[{on_hub}](https://huggingface.co/{on_hub}){revision}" if on_hub else f"`{Path(made.source.name).name}`"
    # not the folder's name: the same export is the same bytes wherever it lies
    title = f"{Path(made.source.name).name}, {_bits(made)} bits" if name == HERE else name.rpartition("/")[2]
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string((Path(__file__).parent / "card.md.jinja").read_text(encoding="utf-8"))
    return template.render(
        front=front_matter(made, report, title, on_hub).to_yaml().strip(),
        title=title,
        base=base,
        made=made,
        summary=_summary(made),
        methods=", ".join(sorted({entry.method for entry in made.tensors.values()})) or "none",
        grids=list(_grids(made)),
        calibration=_calibration(made),
        measured_on=_measured_on(report),
        rows=rows(made, report),
        plot=plot,
        snippets=snippets(made, name),
        limitations=limitations(made, report, release),
    )


def front_matter(made: Manifest, report: Mapping[str, Any], title: str, base_model: str | None) -> ModelCardData:
    """The YAML between the dashes; model-index results where answers were scored."""
    safetensors = _has_safetensors(made)
    stored = sorted({entry.stored for entry in made.tensors.values()} - {manifest.DENSE})
    bits = sorted({entry.bits for entry in made.tensors.values()})
    tags = ["vlmq", made.family, "quantized", *(f"{count}-bit" for count in bits)]
    if safetensors:
        tags += ["compressed-tensors" if kind == manifest.PACKED else kind for kind in stored]
    if made.onnx is not None:
        tags += ["onnx", "onnxruntime"]
    overall = report.get("accuracy", {}).get("overall")
    results = overall and [
        EvalResult(
            task_type=TASK,
            task_name=TASK_NAME,
            dataset_type=str(report.get("dataset") or "custom"),
            dataset_name=str(report.get("dataset") or f"{report.get('samples')} held-out questions"),
            metric_type="accuracy",
            metric_name="VQA accuracy, %",
            metric_value=round(overall["export"], 2),
        )
    ]
    said: dict[str, Any] = {"model_name": title, "eval_results": results} if results else {}
    if base_model:
        said |= {"base_model": base_model, "base_model_relation": "quantized"}
    library = "transformers" if safetensors else "onnx"
    return ModelCardData(pipeline_tag=PIPELINE, library_name=library, tags=tags, **said)


def _has_safetensors(made: Manifest) -> bool:
    return any(name.endswith(".safetensors") for name in made.files)


def _summary(made: Manifest) -> str:
    found = manifest.sizes(made)
    if not made.tensors:
        return "no linear quantized"
    said = f"{len(made.tensors)} linears at {_bits(made)} bits"
    if not found.files:
        return f"{said}, as ONNX graphs"
    return f"{said}, {found.bits_per_weight:.2f} bits per weight with scales and zeros"


def _bits(made: Manifest) -> str:
    return " and ".join(str(bits) for bits in sorted({entry.bits for entry in made.tensors.values()}))


def _grids(made: Manifest) -> Iterable[tuple[str, str]]:
    """The grid of each kind of weight, and how many linears have it."""
    counts: dict[str, int] = {}
    for entry in made.tensors.values():
        group = {-1: "rows", 0: "the whole tensor"}.get(entry.group, f"groups of {entry.group}")
        inputs = f", inputs of {entry.inputs.bits} bits" if entry.inputs else ""
        zero = "symmetric" if entry.symmetric else "asymmetric"
        said = f"{entry.bits} bits, {group}, {zero}{inputs}"
        counts[said] = counts.get(said, 0) + 1
    for said, count in sorted(counts.items()):
        yield _linears(count), said
    if made.kept:
        yield _linears(len(made.kept)), f"kept: {'; '.join(sorted(set(made.kept.values())))}"


def _linears(count: int) -> str:
    return f"{count} linear{'s' if count != 1 else ''}"


def _calibration(made: Manifest) -> str:
    if made.calibration is None:
        return "none: no method looked at samples"
    found = made.calibration
    dataset = found.dataset if HUB_ID.match(found.dataset) or "/" not in found.dataset else Path(found.dataset).name
    return f"{dataset}, {found.count} samples, seed {found.seed}, sha256 of their ids `{found.ids_sha256}`"


def _measured_on(report: Mapping[str, Any]) -> str:
    if not report:
        return "Answers, memory and time were not measured (`vlmq verify` does)."
    before, after = report.get("reference") or {}, report.get("export") or {}
    engines = f" Before: {before['engine']} in float32; after: {after['engine']}." if before and after else ""
    return f"{report.get('samples')} questions about {report.get('images')} images.{engines}"


def rows(made: Manifest, report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What, before, after, and what that is: of accuracy, size, memory and time, what was measured."""
    found = []
    for kind, score in report.get("accuracy", {}).items():
        change = score["difference"]
        words = f"{change['points']:+.2f} points ({change['low']:+.2f} to {change['high']:+.2f})"
        found.append((f"accuracy, {kind}", f"{score['reference']:.2f} %", f"{score['export']:.2f} %", words))
    if "token_agreement" in report:
        found.append(("answers with the same tokens", "", f"{100 * report['token_agreement']:.1f} %", ""))
    before, after = report.get("reference") or {}, report.get("export") or {}
    source = sum(record.bytes for record in made.source.files.values())
    for what, size in _disk(made).items():
        found.append(_smaller(f"weights on disk, {what}", source, size))
    if before and after:
        first, second = (side["memory"]["loaded"] - side["memory"]["imported"] for side in (before, after))
        found.append(_smaller("memory of the model", first, second))
        found.append(_smaller("process at its peak", before["memory"]["peak"], after["memory"]["peak"]))
        first, second = before.get("seconds_per_answer"), after.get("seconds_per_answer")
        if first and second:
            ratio = _ratio(first, second, "faster", "slower")
            found.append(("time per answer", f"{1000 * first:.1f} ms", f"{1000 * second:.1f} ms", ratio))
    return found


def _disk(made: Manifest) -> dict[str, int]:
    """Bytes of weights by format, as the manifest lists them."""
    sizes = {
        "safetensors": sum(entry.bytes for name, entry in made.files.items() if name.endswith(".safetensors")),
        "ONNX": sum(entry.bytes for name, entry in made.files.items() if name.startswith("onnx/")),
    }
    return {what: size for what, size in sizes.items() if size}


def _smaller(what: str, before: int, after: int) -> tuple[str, str, str, str]:
    ratio = _ratio(before, after, "smaller", "larger")
    return what, f"{before / 1e6:,.1f} MB", f"{after / 1e6:,.1f} MB", ratio


def _ratio(before: float, after: float, less: str, more: str) -> str:
    if before <= 0 or after <= 0:  # memory of a model too small to show
        return ""
    return f"{before / after:.2f} x {less}" if after <= before else f"{after / before:.2f} x {more}"


def _sites(made: Manifest) -> dict[str, Grids]:
    """The grids of the linears whose weights are packed, by their names in the files."""
    return {module: entry.grids for module, entry in made.tensors.items() if entry.stored != manifest.DENSE}


def _unloadable(made: Manifest) -> str | None:
    """Why transformers alone cannot load the safetensors; None: it can."""
    other = {entry.stored for entry in made.tensors.values()} - {manifest.PACKED, manifest.DENSE}
    if other:
        return f"transformers reads {' and '.join(sorted(other))} through gptqmodel, which vlmq does not run"
    embedding = next((module for module in _sites(made) if module.endswith("embed_tokens")), None)
    return compressed_tensors.unloadable(_sites(made), embedding)


def snippets(made: Manifest, name: str) -> list[Snippet]:
    """How to load the folder, or the repository `name`, in every program that can."""
    prompt, quoted = json.dumps(PROMPTS[made.family]), json.dumps(name)
    found = []
    if _has_safetensors(made) and not _unloadable(made):
        unpack = compressed_tensors.UNPACK if compressed_tensors.is_packed_in_transformers(_sites(made)) else None
        lines = [
            "from PIL import Image",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            f"model = AutoModelForImageTextToText.from_pretrained({quoted})",
            *([f"{unpack}  # its grids are several, or inputs are rounded"] if unpack else []),
            f"processor = AutoProcessor.from_pretrained({quoted})",
            'image = Image.open("picture.png").convert("RGB")',
            f'inputs = processor(images=image, text={prompt}, return_tensors="pt").to(model.device, model.dtype)',
            "tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)",
            "print(processor.batch_decode(tokens, skip_special_tokens=True)[0])",
        ]
        words = "In transformers (`pip install transformers compressed-tensors`), which makes the weights dense:"
        found.append(Snippet("transformers", words, "\n".join(lines)))
    if made.onnx is not None:
        lines = [
            "from pathlib import Path",
            "",
            "from huggingface_hub import snapshot_download",
            "from PIL import Image",
            "from vlmq.exporter.runtime import OnnxVlm",
            "",
            f"folder = Path({quoted})",
            "if not folder.is_dir():",
            f"    folder = Path(snapshot_download({quoted}))",
            'image = Image.open("picture.png").convert("RGB")',
            f"print(OnnxVlm(folder).generate([image], [{prompt}])[0].text)",
        ]
        found.append(Snippet("onnxruntime", "In onnxruntime (with vlmq, which runs its graphs):", "\n".join(lines)))
    if _has_safetensors(made) and made.recipe.get("consumer") == "vllm":
        lines = [
            "from PIL import Image",
            "from vllm import LLM, SamplingParams",
            "",
            f"llm = LLM({quoted})",
            'image = Image.open("picture.png").convert("RGB")',
            f'request = {{"prompt": {prompt}, "multi_modal_data": {{"image": image}}}}',
            "greedy = SamplingParams(temperature=0, max_tokens=20)",
            "print(llm.generate([request], greedy)[0].outputs[0].text)",
        ]
        words = "In vLLM (written after its source and documentation; vlmq's tests compile this, they do not run it):"
        found.append(Snippet("vllm", words, "\n".join(lines), run=False))
    return found


def limitations(made: Manifest, report: Mapping[str, Any], release: Mapping[str, Any]) -> list[str]:
    """What the measurements do not show, and what they show that is not good."""
    found = []
    if report:
        found += [f"It does not answer as the reference did: {miss}." for miss in report.get("misses", ())]
        found.append("Answers were compared on the questions above alone; other pictures and languages may lose more.")
    else:
        found.append("It has not been compared with the reference (`vlmq verify` does).")
    found += [f"It failed the release gate: {miss}." for miss in release.get("misses", ())]
    why_not = _unloadable(made) if _has_safetensors(made) else None
    if why_not:
        found.append(f"{why_not}; vlmq's own `load` reads it.")
    elif not release and _has_safetensors(made):
        found.append("transformers has not been asked to load it (`vlmq verify` does).")
    if any(entry.inputs for entry in made.tensors.values()):
        found.append("transformers rounds inputs on other scales than vlmq does, so that its answers may differ.")
    if made.recipe.get("consumer") != "vllm" and _has_safetensors(made):
        found.append("It was not made for vLLM, which takes fewer linears quantized (`vlmq export --consumer vllm`).")
    if made.onnx is not None and made.onnx.get("accuracy_level") == 0:
        found.append("Its ONNX graphs multiply in float32; `--accuracy-level 4` is faster and less exact.")
    simulated = sum(entry["linears"] for entry in (made.onnx or {}).get("linears", ()) if entry["simulated"])
    if simulated:
        found.append(f"Its ONNX graphs round the inputs of {simulated} linears in floating point, which saves no time.")
    if made.calibration and made.calibration.count < 64:
        found.append(f"It was calibrated on {made.calibration.count} samples only.")
    found.append("The base model's own limitations, and its licence, hold for it as well.")
    return found


def _levels(made: Manifest) -> set[int]:
    return {entry.bits for entry in made.tensors.values()}

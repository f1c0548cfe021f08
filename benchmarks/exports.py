"""What an export of each demo is: its accuracy, its size, its speed, and whether onnxruntime says what torch says.

    python benchmarks/exports.py

For every demo, AWQ at 4 bits in groups of 64, all components, as a user would run it, in a process of its own. Then
onnxruntime's greedy tokens (accuracy_level 0) are compared with those of the PyTorch model that holds the dequantized
weights, on all evaluation questions; where two differ, the gap between the two tokens' logits is given. Last, the
weights in the ONNX graphs are compared with those in the safetensors, bit by bit.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import torch

from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.images import open_image
from vlmq.exporter.load import load
from vlmq.exporter.runtime import OnnxVlm
from vlmq.exporter.samples import prompt_of
from vlmq.formats import manifest
from vlmq.formats.onnx_weights import read_weights
from vlmq.kernels.linear import QuantizedLinear

FLAGS = ("--method", "awq", "--bits", "4", "--group-size", "64")
TIE = 1e-4  # logits this close are a tie, which either engine may break


def export(name: str, folder: Path) -> dict:
    """Run the command line; its own verdict and the seconds it took."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "vlmq.cli", "export", name, *FLAGS, "-o", str(folder), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(done.returncode)
    return {"seconds": time.perf_counter() - start, "exit_code": done.returncode, **json.loads(done.stdout)}


def compare_tokens(name: str, folder: Path) -> dict:
    """onnxruntime's answers against torch's, with the same weights."""
    samples = common.questions()
    checkpoint = open_checkpoint(name)
    torch_vlm = common.vlm(checkpoint, load(folder))
    expected = common.answers(torch_vlm, checkpoint, samples)
    found = common.answers(OnnxVlm(folder), checkpoint, samples)
    gaps = [
        gap(torch_vlm, checkpoint, sample, one.tokens, two.tokens)
        for sample, one, two in zip(samples, expected, found, strict=True)
        if one.tokens != two.tokens
    ]
    return {
        "answers": len(samples),
        "equal": len(samples) - len(gaps),
        "gaps": gaps,
        "ties": sum(gap <= TIE for gap in gaps),
    }


def gap(vlm, checkpoint, sample, one: list[int], two: list[int]) -> float:
    """How far apart torch's logits are for the first token in which two answers differ; an answer's end is a token."""
    end = min(vlm.stop)
    first, second = [*one, end], [*two, end]
    place = next(place for place in range(len(first)) if first[place] != second[place])
    inputs = vlm.processor(
        images=open_image(sample.image), text=prompt_of(sample, checkpoint.family), return_tensors="pt"
    )
    said = torch.tensor([first[:place]], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], said], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        logits = vlm.model(**inputs).logits[0, -1]
    return (logits[first[place]] - logits[second[place]]).abs().item()


def compare_weights(folder: Path) -> dict:
    """The dequantized weights of the graphs against those of the safetensors."""
    packed = {
        name: module.quantized() for name, module in load(folder).named_modules() if isinstance(module, QuantizedLinear)
    }
    graphs = {name: weight for file in (folder / "onnx").glob("*.onnx") for name, weight in read_weights(file).items()}
    same = [
        name
        for name, weight in packed.items()
        if name in graphs and torch.equal(weight.dequantize(), graphs[name].dequantize())
    ]
    return {"safetensors": len(packed), "onnx": len(graphs), "bit_identical": len(same)}


def main() -> None:
    results = {}
    with TemporaryDirectory() as work:
        for name in CHECKPOINTS:
            folder = Path(work) / name
            done = export(name, folder)
            sizes = manifest.sizes(manifest.read(folder))
            done["folder"] = folder.name
            results[name] = {
                **done,
                "sizes": {
                    "linears_ratio": sizes.linears_ratio,
                    "files_ratio": sizes.files_ratio,
                    "bits_per_weight": sizes.bits_per_weight,
                },
                "tokens": compare_tokens(name, folder),
                "weights": compare_weights(folder),
            }
            found = results[name]
            score = found["verdict"]["accuracy"]["overall"]
            print(
                f"{name}: {score['reference']:.2f} % -> {score['export']:.2f} % "
                f"({score['difference']['low']:+.2f} to {score['difference']['high']:+.2f}), quantized linears "
                f"{sizes.linears_ratio:.2f} x smaller than fp16, file {sizes.files_ratio:.2f} x, onnxruntime's tokens "
                f"equal for {found['tokens']['equal']} of {found['tokens']['answers']} "
                f"(others' gaps: {found['tokens']['gaps']}), "
                f"weights bit-identical for {found['weights']['bit_identical']} of {found['weights']['safetensors']}, "
                f"{found['seconds']:.0f} s"
            )
    print(common.write("exports", "python benchmarks/exports.py", results))


if __name__ == "__main__":
    main()

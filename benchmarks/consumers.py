"""Who loads an export, and does it say the same: consumer x layout x family x bits, from real runs.

    python benchmarks/consumers.py [--questions 24] [--only NAME ...] [--families NAME ...] [--bits B ...]

Every demo is exported by rounding to nearest in groups of 64 at 2, 4 and 8 bits, and with vision at 8 and the rest at
4. The tokens compared with are those of transformers' model in float32 with the dequantized weights in plain linears.
Each consumer but our two readers runs in a process of its own, with nothing of ours in it; those that must not share an
environment with this one (onnxruntime-genai, gptqmodel, Node's packages) get one, made here and thrown away. A consumer
that cannot be had, or fails, is a row with the reason. --only keeps the other rows of the last run.
"""

import argparse
import itertools
import json
import shutil
import site
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import numpy as np
from torch import nn

from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.convert import convert
from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.images import open_image
from vlmq.exporter.inference.processor import encode
from vlmq.exporter.load import load
from vlmq.exporter.pipeline import Request, export
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.runtime import OnnxVlm, TorchVlm, open_processor
from vlmq.exporter.samples import prompt_of
from vlmq.formats.errors import FormatError
from vlmq.formats.onnx_graphs import quantized_linears

HERE = Path(__file__).parent
NODE = HERE.parent / "tests" / "node"
TOKENS = 20
BITS = {"2": (2, {}), "4": (4, {}), "8": (8, {}), "8 / 4": (4, {"vision": {"bits": 8}})}  # of all, of components


@dataclass(frozen=True)
class Cell:
    """One export, and what is asked of it. requests: the file that consumers are given."""

    family: str
    bits: str
    folder: Path
    requests: Path
    work: Path


@dataclass(frozen=True)
class Consumer:
    """Who, of which layout and bits. ask: new tokens, answer by answer. leaves: components that it takes at 16 bits."""

    name: str
    layout: str
    bits: tuple[str, ...]
    ask: Callable[[Cell], list[list[int]]]
    leaves: tuple[str, ...] = ()


class UnusableError(Exception):
    """A consumer that cannot be had, or does not run: why, in one line."""


def told(command: Sequence[str | Path], **options) -> str:
    """What a command prints; UnusableError with its last line where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UnusableError((lines or [f"exit code {done.returncode}"])[-1][:300])
    return done.stdout


def last_line(text: str) -> list[list[int]]:
    return json.loads(text.strip().splitlines()[-1])


def in_process(open_vlm: Callable[[Path], OnnxVlm | TorchVlm]) -> Callable[[Cell], list[list[int]]]:
    """One of our two readers."""

    def ask(cell: Cell) -> list[list[int]]:
        vlm = open_vlm(cell.folder)
        return [
            vlm.generate([open_image(Path(request["image"]))], [request["prompt"]], TOKENS)[0].tokens
            for request in json.loads(cell.requests.read_text())
        ]

    return ask


def packed(folder: Path) -> TorchVlm:
    return TorchVlm(load(folder), open_processor(folder))


def dense(folder: Path) -> TorchVlm:
    """The reference: every quantized linear a plain one with the dequantized weight."""
    model = load(folder)
    for name, linear in quantized_linears(model).items():
        plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        plain.weight.data = linear.quantized().dequantize().float()
        if linear.bias is not None:
            plain.bias.data = linear.bias.data.float()
        model.set_submodule(name, plain)
    return TorchVlm(model, open_processor(folder))


@cache
def environment(work: Path, name: str, packages: tuple[str, ...], on_top: bool) -> Path:
    """The python of a new environment with the packages; on_top: of what is installed here."""
    place = work / name
    told([sys.executable, "-m", "venv", place])
    python = place / "bin" / "python"
    if on_top:
        own = told([python, "-c", "import site; print(site.getsitepackages()[0])"]).strip()
        (Path(own) / "here.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    told([python, "-m", "pip", "install", "-q", *packages])
    return python


def transformers_alone(cell: Cell) -> list[list[int]]:
    return last_line(told([sys.executable, HERE / "asking/ask_transformers.py", cell.folder, cell.requests]))


def through_gptqmodel(layout: str) -> Callable[[Cell], list[list[int]]]:
    def ask(cell: Cell) -> list[list[int]]:
        other = cell.folder.with_name(f"{cell.folder.name}-{layout}")
        if not other.exists():
            convert(cell.folder, layout, other, gate=False)
        python = environment(cell.work, "gptqmodel", ("gptqmodel", "accelerate", "optimum", "requests"), True)
        return last_line(told([python, HERE / "asking/ask_transformers.py", other, cell.requests]))

    return ask


@cache
def node_script(work: Path) -> Path:
    if shutil.which("npm") is None:
        raise UnusableError("Node.js is not installed")
    place = Path(shutil.copytree(NODE, work / "node", ignore=shutil.ignore_patterns("node_modules")))
    told(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=place)
    return place / "ask.mjs"


def transformers_js(cell: Cell) -> list[list[int]]:
    return last_line(told(["node", node_script(cell.work), cell.folder, cell.requests]))


def onnxruntime_genai(cell: Cell) -> list[list[int]]:
    python = environment(cell.work, "genai", ("onnxruntime-genai", "numpy"), False)
    return last_line(told([python, HERE / "asking/ask_genai.py", cell.folder, cell.requests]))


CONSUMERS = (
    Consumer("vlmq, PyTorch", "compressed-tensors", tuple(BITS), in_process(packed)),
    Consumer("transformers", "compressed-tensors", tuple(BITS), transformers_alone),
    Consumer("transformers, gptqmodel", "awq", ("4",), through_gptqmodel("awq"), ("connector",)),
    Consumer("transformers, gptqmodel", "gptq", ("4", "8"), through_gptqmodel("gptq"), ("vision", "connector")),
    Consumer("onnxruntime", "ONNX", tuple(BITS), in_process(OnnxVlm)),
    Consumer("transformers.js", "ONNX", tuple(BITS), transformers_js),
    Consumer("onnxruntime-genai", "ONNX", tuple(BITS), onnxruntime_genai),
)


def requests_of(name: str, count: int, work: Path) -> Path:
    """The questions as every consumer reads them: image and prompt, and what the processor makes of them."""
    checkpoint = open_checkpoint(name)
    processor = open_processor(checkpoint.folder)
    every = common.questions()
    requests = []
    for number, sample in enumerate(every[:: len(every) // count][:count]):
        prompt = prompt_of(sample, checkpoint.family)
        encoded = encode(processor, [open_image(sample.image)], [prompt], "np")
        inputs = work / f"{name}-{number}.npz"
        pixels = np.asarray(encoded["pixel_values"], np.float32)
        np.savez(inputs, input_ids=np.asarray(encoded["input_ids"]), pixel_values=pixels)
        requests.append({"image": str(sample.image), "prompt": prompt, "inputs": str(inputs)})
    path = work / f"{name}.json"
    path.write_text(json.dumps(requests))
    return path


def row(consumer: Consumer, cell: Cell, expected: list[list[int]], stop: set[int]) -> dict:
    """One line of the table."""
    found = {"consumer": consumer.name, "layout": consumer.layout, "family": cell.family}
    found |= {"bits": cell.bits, "leaves": list(consumer.leaves)}
    try:
        answers = [before_end(tokens, stop) for tokens in consumer.ask(cell)]
    except (UnusableError, VlmqError, FormatError) as error:
        return {**found, "loads": False, "why": str(error)}
    same = sum(one == two for one, two in zip(answers, expected, strict=True))
    return {**found, "loads": True, "same": same, "of": len(expected)}


def before_end(tokens: list[int], stop: set[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in stop), len(tokens))]


def rows(families: Iterable[str], bits: Iterable[str], consumers: Sequence[Consumer], count: int, work: Path):
    for name in families:
        requests = requests_of(name, count, work)
        for level, leaves in itertools.product(bits, sorted({consumer.leaves for consumer in consumers})):
            asked = [one for one in consumers if one.leaves == leaves and level in one.bits]
            if asked:
                folder = work / "-".join((name, level.replace(" / ", "-"), *leaves))
                width, components = BITS[level]
                components = {**components, **{component: {"bits": 16} for component in leaves}}
                recipe = make_recipe({"method": "rtn", "bits": width, "group_size": 64, "components": components})
                export(Request(name, folder, recipe, verify=False, gate=False))
                cell = Cell(name, level, folder, requests, work)
                reference = dense(folder)
                expected = in_process(lambda _, vlm=reference: vlm)(cell)
            for consumer in asked:
                found = row(consumer, cell, expected, reference.stop)
                print(found, flush=True)
                yield found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--only", nargs="+", default=sorted({consumer.name for consumer in CONSUMERS}))
    parser.add_argument("--families", nargs="+", default=list(CHECKPOINTS))
    parser.add_argument("--bits", nargs="+", default=list(BITS), choices=list(BITS))
    given = parser.parse_args()
    consumers = [consumer for consumer in CONSUMERS if consumer.name in given.only]
    with TemporaryDirectory() as work:
        found = list(rows(given.families, given.bits, consumers, given.questions, Path(work)))
    made = {key(entry) for entry in found}
    path = common.RESULTS / "consumers.json"
    before = json.loads(path.read_text())["results"] if path.exists() else []
    kept = [entry for entry in before if key(entry) not in made]
    print(common.write("consumers", "python benchmarks/consumers.py", sorted([*kept, *found], key=key)))


def key(entry: dict) -> tuple[int, str, str, str]:
    """A row's place in the table: in the order of CONSUMERS."""
    order = [(consumer.name, consumer.layout) for consumer in CONSUMERS]
    return order.index((entry["consumer"], entry["layout"])), entry["layout"], entry["family"], entry["bits"]


if __name__ == "__main__":
    main()

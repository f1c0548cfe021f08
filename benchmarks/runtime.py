"""What quantized graphs save at run time: tokens a second and resident memory, at the shapes of BLIP-2 with OPT-2.7B.

    python benchmarks/runtime.py [--layers 32] [--vision-blocks 39] [--threads 2]

A decoder (2560 wide, 32 heads, 10240 in the feed-forward) and a vision encoder (1408 wide, 6144, 257 rows) with random
weights are written by vlmq's own writer, one precision at a time, and each is run in a fresh process that has
onnxruntime alone: greedy decoding at batch 1 after a past of `--past` tokens, caches bound as they come out; and whole
pictures. A part of the layers gets as large a part of the vocabulary, so that the output head, which stays in full
precision unless said otherwise, weighs what it weighs in the whole. `read_bytes` are what one token has to read of the
weights, as they lie in memory; beside the rate at which this machine reads memory (the sum over a large array) they
tell how near to it a decoder comes. Ratios are to float32 of the same command.

A folder that is kept has the rows that are done: the same command goes on where it was stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

LAYERS, BLOCKS, VOCABULARY = 32, 39, 50272
DECODER, VISION = "decoder_model_merged", "vision_encoder"


@dataclass(frozen=True)
class Precision:
    bits: int
    group: int = 0  # columns; -1: a row
    inputs: int | None = None  # bits they are rounded to
    level: int = 0  # accuracy_level
    head: bool = False  # is the output head quantized too?


DECODERS = {
    "fp32": Precision(32),
    "fp16": Precision(16),
    "W4 g128, level 0": Precision(4, 128),
    "W4 g32, level 0": Precision(4, 32),
    "W4 g128 and head, level 0": Precision(4, 128, head=True),
    "W4 g128, level 4": Precision(4, 128, level=4),
    "W4 g32, level 4": Precision(4, 32, level=4),
    "W4 g128 and head, level 4": Precision(4, 128, level=4, head=True),
}
ENCODERS = {"fp32": Precision(32), "W8A8": Precision(8, -1, 8)}


def build(part: str, precision: Precision, count: int, folder: Path) -> None:
    """Write the graphs of a random model of which `part` has its true widths and `count` layers."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    from vlmq.formats.onnx_graphs import export
    from vlmq.kernels.grid import Grid, to_grid
    from vlmq.kernels.linear import QuantizedLinear

    with no_init_weights():
        model = AutoModelForImageTextToText.from_config(config(part, count)).eval()
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2**22, generator=generator)
    if precision.bits < 32:  # float16 holds it, as a checkpoint does; a float32 file is to have float32
        pool = pool.mul(256).round().div(256)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = int(torch.randint(len(pool), (), generator=generator))  # equal tensors onnxruntime would have once
            _fill(parameter, pool.roll(start), name.endswith("weight"))
        beginnings = ["language_model.model.decoder.layers" if part == DECODER else "vision_model.encoder.layers"]
        if precision.head:
            beginnings.append("language_model.lm_head")
        for name, module in list(model.named_modules()) if precision.bits < 16 else ():
            if isinstance(module, torch.nn.Linear) and name.startswith(tuple(beginnings)):
                weight = to_grid(module.weight, Grid(precision.bits, precision.group))
                rounded = Grid(precision.inputs, -1) if precision.inputs else None
                model.set_submodule(name, QuantizedLinear.from_weight(weight, module.bias, rounded))
    export(model.half() if precision.bits == 16 else model, folder, precision.level)


def _fill(parameter: Any, pool: Any, is_weight: bool) -> None:
    """Weights with variance 1 / columns, so that activations keep their size; norms of 1, biases of 0."""
    if parameter.ndim < 2:
        parameter.fill_(1.0 if is_weight else 0.0)
        return
    scale = 2.0 ** round(np.log2(parameter.shape[1:].numel() ** -0.5))  # a power of two: float16 still holds it
    flat = parameter.view(-1)
    for start in range(0, len(flat), len(pool)):
        slab = flat[start : start + len(pool)]
        slab.copy_(pool[: len(slab)] * scale)


def config(part: str, count: int) -> Any:
    """BLIP-2 with OPT-2.7B, `count` layers of one part, and the others as small as they can be."""
    from transformers import Blip2Config

    tiny = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    vision = {**tiny, "intermediate_size": 64, "image_size": 28}
    text = {**tiny, "ffn_dim": 64, "word_embed_proj_dim": 64, "vocab_size": 64}
    if part == DECODER:
        shape = {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_attention_heads": 32}
        text = {**shape, "num_hidden_layers": count, "vocab_size": VOCABULARY * count // LAYERS}
    else:
        shape = {"hidden_size": 1408, "intermediate_size": 6144, "num_attention_heads": 16}
        vision = {**shape, "num_hidden_layers": count, "image_size": 224}
    return Blip2Config(
        vision_config={**vision, "patch_size": 14},
        qformer_config={**tiny, "intermediate_size": 64, "encoder_hidden_size": vision["hidden_size"]},
        text_config={"model_type": "opt", **text},
    )


def run(path: Path, threads: int, steps: int, past: int) -> dict[str, Any]:
    """In this process, which has nothing else: load one graph and run it; seconds a step, and resident bytes."""
    import onnxruntime

    from vlmq.exporter.evaluation.memory import forget_peak, peak, resident

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    before = resident()
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter() - start
    highest = peak()
    forget_peak()
    step = _decoding(session, past) if path.name.startswith(DECODER) else _seeing(session)
    step()  # what is made once is made now
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": float(np.median(seconds)),
        "load_seconds": round(loaded, 2),
        "resident_bytes": resident(),
        "model_bytes": resident() - before,
        "peak_loading_bytes": highest,
        "peak_running_bytes": peak(),
    }


def _dtype(value: Any) -> type:
    return {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}[value.type]


def _seeing(session: Any) -> Callable[[], None]:
    (pixels,) = session.get_inputs()
    picture = np.random.default_rng(0).standard_normal((1, 3, *pixels.shape[2:])).astype(_dtype(pixels))
    return lambda: session.run(None, {pixels.name: picture})


def _decoding(session: Any, past: int) -> Callable[[], None]:
    """One more token each time it is called; what comes out as keys and values goes in as they, without a copy."""
    from onnxruntime import OrtValue

    embeds, _, _, *slots = session.get_inputs()
    source = np.random.default_rng(0)
    token = source.standard_normal((1, 1, embeds.shape[2])).astype(_dtype(embeds))
    caches = [
        OrtValue.ortvalue_from_numpy(
            source.standard_normal((1, slot.shape[1], past, slot.shape[3])).astype(_dtype(slot))
        )
        for slot in slots
    ]
    length = past

    def step() -> None:
        nonlocal caches, length
        length += 1
        binding = session.io_binding()
        binding.bind_cpu_input("inputs_embeds", token)
        binding.bind_cpu_input("attention_mask", np.ones((1, length), np.int64))
        binding.bind_cpu_input("position_ids", np.full((1, 1), length - 1))
        for slot, cache in zip(slots, caches, strict=True):
            binding.bind_ortvalue_input(slot.name, cache)
        for output in session.get_outputs():
            binding.bind_output(output.name)
        session.run_with_iobinding(binding)
        caches = binding.get_outputs()[1:]

    return step


def bandwidth(threads: int, size: int = 2**29) -> float:
    """Bytes a second that this machine reads: the best of some sums over `size` bytes, more than caches hold."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(size // 4)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def read_bytes(path: Path) -> int:
    """What of a graph is read at every step: the CPU provider casts float16 to float32 as it loads it, Cast or none."""
    import onnx_ir as ir

    graph = ir.load(path).graph
    total = 0
    for value in graph.initializers.values():
        width = 2 if value.dtype == ir.DataType.FLOAT16 else 1
        looked_up = all(node.op_type == "Gather" for node in value.consumers())  # of such a table only some rows
        if value.const_value is not None and not looked_up:
            total += value.const_value.nbytes * width
    return total


def child(*arguments: object) -> str:
    """Run a step of this file in a process of its own; what it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"runtime: {' '.join(map(str, arguments))} ended with {done.returncode}")
    return done.stdout


def measured(part: str, name: str, count: int, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """One precision of one part: built, run as often as asked, and removed."""
    with TemporaryDirectory(dir=options.folder, prefix="vlmq-runtime-") as work:
        child("--build", part, "--name", name, "--count", count, "--folder", work)
        (path,) = (Path(work) / "onnx").glob(f"{part}*.onnx")
        size = sum(file.stat().st_size for file in path.parent.glob(f"{part}*"))
        arguments = ["--run", path, "--threads", options.threads, "--steps", options.steps, "--past", options.past]
        runs = [json.loads(child(*arguments)) for _ in range(options.repeat)]
        found = min(runs, key=lambda one: one["seconds"])
        read = read_bytes(path)
    row = {"part": part, "precision": name, "count": count, "file_bytes": size, "read_bytes": read, **found}
    row["bandwidth"] = round(rate)
    row["per_second"] = round(1 / found["seconds"], 3)
    if part == DECODER:  # a picture's rows share what is read, so that a vision encoder is bound by arithmetic
        row["of_bandwidth"] = round(read / found["seconds"] / rate, 3)
    print(json.dumps(row), flush=True)
    return row


def all_rows(options: argparse.Namespace, kept: Path | None) -> list[dict[str, Any]]:
    """Those that are kept, and the others measured."""
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept and kept.exists() else []
    known = {(row["part"], row["precision"]) for row in rows}
    wanted = ("fp32", *options.only) if options.only else ("",)
    rate = bandwidth(options.threads)
    for part, precisions, count in ((DECODER, DECODERS, options.layers), (VISION, ENCODERS, options.vision_blocks)):
        for name in precisions:
            if count and name.startswith(wanted) and (part, name) not in known:
                rows.append(measured(part, name, count, options, rate))
                if kept:
                    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = [*DECODERS, *ENCODERS]
    return sorted(rows, key=lambda row: (row["part"] != DECODER, order.index(row["precision"])))


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its ratios to the float32 of its part: times faster, and parts of the memory."""
    whole = {row["part"]: row for row in rows if row["precision"] == "fp32"}
    return [
        {
            **row,
            "faster": round(whole[row["part"]]["seconds"] / row["seconds"], 2),
            "resident": round(row["resident_bytes"] / whole[row["part"]]["resident_bytes"], 3),
        }
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=4, help=f"of the decoder; the whole has {LAYERS}; 0: none")
    parser.add_argument("--vision-blocks", type=int, default=4, help=f"the whole has {BLOCKS}; 0: none")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of onnxruntime")
    parser.add_argument("--steps", type=int, default=16, help="tokens or pictures, after one that is not counted")
    parser.add_argument("--past", type=int, default=64, help="tokens before the first")
    parser.add_argument("--repeat", type=int, default=2, help="processes for each precision; the faster one counts")
    parser.add_argument("--only", nargs="+", help="only precisions whose names begin so; float32 always")
    parser.add_argument("--folder", type=Path, help="for the graphs, one at a time, and for rows that are done")
    parser.add_argument("--build", choices=(DECODER, VISION), help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        schemes = DECODERS if options.build == DECODER else ENCODERS
        build(options.build, schemes[options.name], options.count, options.folder)
        return
    if options.run:
        print(json.dumps(run(options.run, options.threads, options.steps, options.past)))
        return
    if not (0 <= options.layers <= LAYERS and 0 <= options.vision_blocks <= BLOCKS):
        sys.exit(f"runtime: --layers is 0 to {LAYERS}, --vision-blocks 0 to {BLOCKS}")

    flags = f"--layers {options.layers} --vision-blocks {options.vision_blocks} --threads {options.threads}"
    kept = options.folder and options.folder / f"{flags.replace(' ', '')}-{options.past}.jsonl"
    rows = all_rows(options, kept)
    found = {"threads": options.threads, "past": options.past, "rows": compared(rows)}
    for row in found["rows"]:
        print(f"{row['part']} {row['precision']}: {row['faster']} times as fast, {row['resident']:.0%} of the memory")

    import common  # not before: a process that has loaded transformers is no smaller afterwards

    only = f" --only {shlex.join(options.only)}" if options.only else ""
    print(common.write("runtime", f"python benchmarks/runtime.py {flags}{only}", found))


if __name__ == "__main__":
    main()

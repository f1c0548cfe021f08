"""What an export costs at the shapes that people have: peak memory, wall and processor seconds of RTN, AWQ and GPTQ.

    python benchmarks/scale.py [--shape llava-1.5-7b] [--scale 0.25] [--method awq] [--samples 32] [--blocks 2]
                               [--calibrate-in bfloat16] [--device cuda]

The checkpoint has random weights of the shape named (`random_checkpoint.py`), the samples are random pictures with a
request for a caption, and each export is `vlmq export` at 4 bits in groups of 128 in a process of its own, whose peak
resident memory and processor seconds the operating system tells; `sampled.py` says where the time went, and `vlmq plan`
what memory it would take. A result says what part of the shape it is of. Run
again, the command keeps what results/scale.json has of other shapes, parts, methods and numbers of samples. With a GPU
blocks are calibrated and solved there, and the results are results/scale-cuda.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import rmtree

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SHAPES = ("blip2-opt-2.7b", "llava-1.5-7b")
METHODS = ("rtn", "awq", "gptq")
ACTIVATION_MEMORY = "16MiB"  # less than what any number of samples leaves between blocks: it lies on the disk
SIDE = 400  # pixels of a picture, more than any of the shapes reads
# Of two rows that agree in these the later one counts.
WHICH = ("shape", "scale", "blocks", "method", "samples", "calibrate_in")


def measured(command: list[str], log: Path) -> dict[str, float]:
    """Run a command to its end: seconds, and the peak of its resident memory in bytes; what it prints goes to `log`.

    wait4(2) tells of this one process and of those it has waited for.
    """
    start = time.perf_counter()
    with log.open("w") as output:
        started = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, used = os.wait4(started.pid, 0)
        except BaseException:
            started.kill()
            raise
    wall = time.perf_counter() - start
    started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        sys.exit(f"scale: {' '.join(command)} ended with {started.returncode}; {log} says\n{log.read_text()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    cpu = used.ru_utime + used.ru_stime
    return {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1), "peak_bytes": used.ru_maxrss * unit}


def checkpoint(shape: str, scale: float, blocks: int | None, folder: Path) -> Path:
    """The random checkpoint, made unless it is there; in a process of its own, for a child begins with our peak."""
    part = f"{shape}-x{scale:g}" + ("" if blocks is None else f"-{blocks}-blocks")
    made = folder / part
    if not made.is_dir():
        command = [sys.executable, str(HERE / "random_checkpoint.py"), shape, str(made), "--scale", f"{scale:g}"]
        measured([*command, *([] if blocks is None else ["--blocks", str(blocks)])], folder / f"{part}.log")
    return made


def pictures(count: int, folder: Path) -> Path:
    """A folder of so many pictures of coloured noise, coarse and fine."""
    made = folder / f"pictures-{count}"
    made.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE)), dtype=np.int16)
        picture = picture + generator.integers(-20, 20, picture.shape)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(made / f"{index:04}.png")
    return made


def layers(folder: Path) -> dict[str, int]:
    """How many layers each transformer of a checkpoint has."""
    config = json.loads((folder / "config.json").read_text())
    parts = {"vision": "vision_config", "connector": "qformer_config", "language": "text_config"}
    return {part: config[name]["num_hidden_layers"] for part, name in parts.items() if name in config}


def export(
    source: Path, method: str, data: Path, samples: int, calibrate_in: str, device: str, folder: Path
) -> dict[str, object]:
    """One export: what it cost, and what it wrote."""
    output = folder / f"{source.name}-{method}"
    rmtree(output, ignore_errors=True)
    wanted = [str(source), "--method", method, "--bits", "4", "--group-size", "128", "--samples", str(samples)]
    wanted += ["--format", "safetensors", "--no-verify", "--no-gate", "--activation-memory", ACTIVATION_MEMORY]
    plan = [sys.executable, "-m", "vlmq", "plan", *wanted, "--json"]
    planned = json.loads(subprocess.run(plan, capture_output=True, check=True, text=True).stdout)["peak_memory"]
    profile = folder / f"{output.name}.json"
    wanted += [
        "--calibrate-in",
        calibrate_in,
        "--device",
        device,
        "-o",
        str(output),
        "--calibration",
        str(data),
        "--fresh",
    ]
    command = [sys.executable, str(HERE / "sampled.py"), str(profile), "export", *wanted]
    cost = measured(command, folder / f"{output.name}.log")
    count = layers(source)
    found = {
        **cost,
        "planned_bytes": planned,
        "planned_over_peak": round(planned / cost["peak_bytes"], 3),
        **json.loads(profile.read_text()),
        "layers": count,
        "seconds_per_layer": round(cost["seconds"] / sum(count.values()), 2),
        "source_bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "written_bytes": sum(file.stat().st_size for file in output.glob("*.safetensors")),
    }
    rmtree(output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--samples", nargs="+", type=int, default=[32])
    parser.add_argument("--scale", type=float, default=1.0, help="of widths, heads and layers")
    parser.add_argument("--blocks", type=int, help="only so many layers of each transformer, 2 or more")
    parser.add_argument("--calibrate-in", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where blocks are solved")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "vlmq-scale", help="for checkpoints"
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for shape in options.shape:
        source = checkpoint(shape, options.scale, options.blocks, options.folder)
        for samples in options.samples:
            data = pictures(samples, options.folder)
            for method in options.method:
                found = export(source, method, data, samples, options.calibrate_in, options.device, options.folder)
                which = (shape, options.scale, options.blocks, method, samples, options.calibrate_in)
                rows.append({**dict(zip(WHICH, which, strict=True)), **found})
                print(json.dumps(rows[-1]), flush=True)

    import common  # not before the exports: it loads torch, and a child begins with our peak

    name = "scale" if options.device == "cpu" else f"scale-{options.device}"
    before = common.RESULTS / f"{name}.json"
    kept = json.loads(before.read_text())["results"] if before.exists() else []
    new = {tuple(row[key] for key in WHICH) for row in rows}
    rows = [row for row in kept if tuple(row[key] for key in WHICH) not in new] + rows
    command = "python benchmarks/scale.py" + ("" if options.device == "cpu" else f" --device {options.device}")
    print(common.write(name, command, rows))


if __name__ == "__main__":
    main()

"""vlmq against other quantizers: the same random LLaVA, samples and grid, each in a process of its own.

    python benchmarks/peers.py [--folder FOLDER] [--only NAME ...] [--repeat N]

Every tool rounds the decoder's linears to 4 bits in groups of 128, symmetric. Wall and CPU time and peak resident
memory are those of the whole process, from its start until its output is written. What it wrote is made dense and put
into the same fp32 model, and compared with the original on samples that nobody calibrated on. Last, transformers is
asked to read what was written as a LLaVA. `benchmarks/peers/README.md` says where the comparison is uneven.

In a FOLDER that is kept, what has run is not run again unless named by --only. `results/peers.json` is written once
every tool has run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

import common

SCRIPTS = Path(__file__).parent / "peers"
LANGUAGE_ALONE = "language model alone"
LLAVA = "LLaVA"
LAYERS = 8
SURROUNDINGS = {
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",  # or threads that wait for a busy core count as work
    "GPTQMODEL_CPU_WORKERS": "2",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
KEPT = [part for name in ("vision", "connector") for part in (f"--{name}-bits", "16")]
GRID = ["--bits", "4", "--group-size", "128", "--symmetric", *KEPT]
OURS = ["--format", "safetensors", "--no-verify", "--no-gate"]  # `reload.py` asks of all tools who reads it


class Failed(Exception):  # noqa: N818 - a result like others
    """A process ended badly; the message is the last line it wrote."""


@dataclass(frozen=True)
class Tool:
    """One tool and method; `against` is the row of vlmq that it is compared with."""

    name: str
    environment: str | None  # None: this one
    method: str
    what: str
    against: str

    def command(self, inputs: Path, output: Path, environments: Path) -> list[str]:
        if self.environment is None:
            files = ["--calibration", str(inputs / "calibration"), "-o", str(output / "model")]
            chosen = ["--method", self.method, *GRID, "--samples", "16", *OURS]
            return [sys.executable, "-m", "vlmq.cli", "export", str(inputs / "checkpoint"), *chosen, *files]
        script = SCRIPTS / f"run_{self.environment.replace('-', '_')}.py"
        return [self.python(environments), str(script), self.method, str(inputs), str(output)]

    @property
    def surroundings(self) -> dict[str, str]:
        """Its process's variables; where to import vlmq from is no business of others."""
        hidden = {"PYTHONPATH"} if self.environment else set()
        return {**{name: value for name, value in os.environ.items() if name not in hidden}, **SURROUNDINGS}

    def ask(self, *command: object) -> str:
        """The last line that a process prints."""
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env=self.surroundings, check=False
        )
        if done.returncode:
            raise Failed(_last_line(done.stderr, done.returncode))
        return (done.stdout.strip().splitlines() or [""])[-1]

    def python(self, environments: Path) -> str:
        return str(environments / self.environment / "bin" / "python") if self.environment else sys.executable


TOOLS = (  # the quick ones first
    Tool("vlmq-rtn", None, "rtn", LLAVA, "vlmq-rtn"),
    Tool("vlmq-awq", None, "awq", LLAVA, "vlmq-awq"),
    Tool("vlmq-gptq", None, "gptq", LLAVA, "vlmq-gptq"),
    Tool("llm-compressor-gptq", "llm-compressor", "gptq", LLAVA, "vlmq-gptq"),
    Tool("gptqmodel-gptq", "gptqmodel", "gptq", LANGUAGE_ALONE, "vlmq-gptq"),
    Tool("auto-round", "auto-round", "signround", LLAVA, "vlmq-gptq"),
    Tool("llm-compressor-awq", "llm-compressor", "awq", LLAVA, "vlmq-awq"),
    Tool("gptqmodel-awq", "gptqmodel", "awq", LANGUAGE_ALONE, "vlmq-awq"),
)


def quantize(tool: Tool, inputs: Path, output: Path, environments: Path) -> dict:
    """Run the tool's process in an empty folder and make its weights dense; what it cost."""
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    started, load = time.time(), os.getloadavg()[0]
    with (output / "log").open("w") as log:
        process = subprocess.Popen(
            ["nice", "-n", "5", *tool.command(inputs, output, environments)],
            stdout=log,
            stderr=log,
            env={**tool.surroundings, "STARTED": str(started)},
            cwd=output,  # some leave logs where they are started
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.time() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Failed(_last_line((output / "log").read_text(), process.returncode))
    if tool.environment is None:
        found = {
            "wall_s": wall,
            "cpu_s": used.ru_utime + used.ru_stime,
            "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            "versions": {"vlmq": common.revision()},
        }
        tool.ask(sys.executable, SCRIPTS / "run_vlmq.py", output)
    else:
        found = json.loads((output / "cost.json").read_text())
    return {**found, "load": [load, os.getloadavg()[0]]}


def measure(tool: Tool, inputs: Path, output: Path, environments: Path, repeat: int) -> dict:
    """All that is known of a tool; the line it failed with, where it did."""
    said = {"what": tool.what, "method": tool.method}
    try:
        if tool.environment:
            tool.ask("sh", SCRIPTS / "environments.sh", environments, tool.environment)
        runs = [quantize(tool, inputs, output, environments) for _ in range(repeat)]
        model, dense = output / "model", output / "dense.safetensors"
        return {
            **said,
            **{key: statistics.median(run[key] for run in runs) for key in ("wall_s", "cpu_s", "peak_bytes")},
            "runs": runs,
            "errors": json.loads(TOOLS[0].ask(sys.executable, SCRIPTS / "score.py", inputs, dense)),
            **json.loads(tool.ask(tool.python(environments), SCRIPTS / "reload.py", inputs, model, dense)),
        }
    except Failed as failure:
        return {**said, "failed": str(failure)}


def _last_line(text: str, code: int) -> str:
    return f"exit code {code}: {(text.strip().splitlines() or [''])[-1]}"


def with_ratios(results: dict[str, dict]) -> dict[str, dict]:
    """Each tool's figures over those of the row of vlmq that it is compared with."""
    for tool in TOOLS:
        one, ours = results.get(tool.name, {}), results.get(tool.against, {})
        if "errors" in one and "errors" in ours:
            one["against"] = tool.against
            one["ratios"] = {key: one[key] / ours[key] for key in ("wall_s", "cpu_s", "peak_bytes")}
            one["ratios"]["hidden"] = one["errors"]["hidden"] / ours["errors"]["hidden"]
    return results


def table(results: dict[str, dict]) -> str:
    numbers = ("wall s", "CPU s", "peak GB", "hidden", "logits", "KL", "/CPU", "/peak", "/hidden")
    lines = [f"{'tool':20}" + "".join(f"{name:>9}" for name in numbers) + "  (/: over vlmq's)"]
    for name, one in results.items():
        if "failed" in one:
            lines.append(f"{name:20} failed: {one['failed']}")
            continue
        errors, ratios = one["errors"], one.get("ratios", {})
        figures = [f"{one['wall_s']:9.0f}{one['cpu_s']:9.0f}{one['peak_bytes'] / 1e9:9.2f}"]
        figures += [f"{errors[key]:9.4f}" for key in ("hidden", "logits", "kl")]
        figures += [f"{ratios[key]:9.2f}" if ratios else " " * 9 for key in ("cpu_s", "peak_bytes", "hidden")]
        reads = "reloads" if one["reloads"] else "does not reload"
        lines.append(f"{name:20}{''.join(figures)}  {one['what']}; {reads}: {one['why'][:70]}")
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, default=Path(gettempdir(), "peers"), help="where all is made")
    arguments.add_argument(
        "--only", nargs="+", choices=[tool.name for tool in TOOLS], help="run these, again if need be"
    )
    arguments.add_argument("--repeat", type=int, default=1, help="runs of each; medians are given")
    arguments.add_argument("--layers", type=int, default=LAYERS, help="of the Llama; others than 8 are a rehearsal")
    said = arguments.parse_args()
    folder = said.folder.absolute()
    inputs, outputs = folder / "inputs", folder / "outputs"
    if not inputs.exists():
        subprocess.run([sys.executable, str(SCRIPTS / "inputs.py"), str(inputs), str(said.layers)], check=True)
    results = {}
    for tool in TOOLS:
        kept = folder / f"{tool.name}.json"
        if tool.name in said.only if said.only else not kept.exists():
            found = measure(tool, inputs, outputs / tool.name, folder / "environments", said.repeat)
            kept.write_text(json.dumps(found, indent=1) + "\n")
            print(table({tool.name: found}), flush=True)
        if kept.exists():
            results[tool.name] = json.loads(kept.read_text())
    print(table(with_ratios(results)))
    if said.layers != LAYERS:
        print("a rehearsal; nothing is written")
    elif len(results) == len(TOOLS):
        print(common.write("peers", "python benchmarks/peers.py", results))
    else:
        print(f"{len(TOOLS) - len(results)} tools have not run in {folder}; run again without --only")


if __name__ == "__main__":
    main()

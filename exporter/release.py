"""The release gate: transformers' own `from_pretrained` loads an export, in a process of its own, and is compared.

Every tensor must be found and every one used; every weight in memory must be the one that was packed, bit for bit;
`generate()`, called before anything else, must give the greedy tokens of our reader, and logits and vision features
must be its. What was found is written as `release.json`. `release_worker.py` is the other end.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.progress import Progress
from vlmq.formats import card, compressed_tensors, layouts, manifest
from vlmq.formats.errors import FormatError
from vlmq.formats.shards import headers

NAME = "release.json"
LARGEST = 1e-4  # of the largest value: what sums in another order may differ by


@dataclass(frozen=True)
class Release:
    """What transformers made of an export. Where it cannot load one, `why_not` says why, and the rest is empty.

    answers: whether tokens and features were compared; not where inputs are rounded, which it does on other scales.
    """

    manifest_sha256: str  # of vlmq.json: what was found holds for these files
    readers: dict[str, str] = field(default_factory=dict)  # package -> release
    why_not: str | None = None
    failure: str | None = None  # how one of the two readers ended
    unpacked_by: str | None = None  # the line that was needed before generate()
    keys: dict[str, list[str]] = field(default_factory=dict)  # missing, unexpected, mismatched
    weights: int = 0  # tensors whose values were compared
    rounded: bool = False  # it multiplies in the scales' precision; our reader in float32
    differing: list[str] = field(default_factory=list)  # weights that are not those that were packed
    answers: bool = False
    tokens: int = 0  # greedy tokens compared
    same_tokens: bool = False
    largest: dict[str, float] = field(default_factory=dict)  # component -> difference, of the largest value

    @property
    def misses(self) -> tuple[str, ...]:
        """A line for each thing that is not as it must be."""
        found = [
            f"transformers reports {names[0]} and {len(names) - 1} more keys as {kind}"
            for kind, names in self.keys.items()
            if names
        ]
        if self.differing:
            found.append(f"in transformers {self.differing[0]} and {len(self.differing) - 1} more are other weights")
        if self.answers and not self.failure and not self.same_tokens:
            found.append("transformers' generate() gives other greedy tokens than vlmq's reader")
        found += [
            f"transformers' {component} features differ by {value:.1e} of their largest value"
            for component, value in self.largest.items()
            if not value <= LARGEST
        ]
        return (*found, self.failure) if self.failure else tuple(found)

    @property
    def ok(self) -> bool:
        return not self.misses


def conclude(folder: Path, gate: bool, progress: Progress = lambda what, done, of: None) -> Release | None:
    """The end of whatever made or measured an export: where asked, transformers loads it, and its card is written anew
    with all that is known by then. None where it was not asked, or has no safetensors.
    """
    found = None
    if gate:
        progress("loading with transformers", 0, 1)
        found = check(folder)
        progress("loading with transformers", 1, 1)
    card.write(folder)
    return found


def check(folder: Path) -> Release | None:
    """Load an export as its users will, and write what was found into it; None where it has no safetensors.

    VlmqError where the process that loads it is ended from outside; a difference, or a reader that fails, is no error
    but a miss of the release.
    """
    manifest.read(folder)
    if not headers(folder):
        return None
    release = _run(folder)
    content = asdict(release) | {"ok": release.ok, "misses": list(release.misses)}
    (folder / NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return release


def read(folder: Path) -> Release | None:
    """What was found when the folder was checked last; None where it never was, or was changed since then.

    FormatError for a file that is not one of ours.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        release = Release(**{key: value for key, value in content.items() if key not in ("ok", "misses")})
    except (ValueError, TypeError, AttributeError):
        raise FormatError(f"{path}: not what vlmq writes; run vlmq verify {folder}") from None
    return release if release.manifest_sha256 == manifest.identity(folder) else None


def why_not(folder: Path) -> str | None:
    """Why transformers is not asked to load a folder; None: it is."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    layout = layouts.of_config(config)
    if not layout.general:
        return f"transformers reads {layout.stored} through gptqmodel, which vlmq does not run"
    if config.get("dequantize"):
        return None
    if compressed_tensors.has_t5(manifest.read(folder).tensors):
        return "transformers cannot load a T5 with several grids or rounded inputs; vlmq's own load() does"
    if len(config["config_groups"]) == 1:
        return None
    if not all(group["weights"]["symmetric"] for group in config["config_groups"].values()):
        return "transformers cannot load several grids of which some are asymmetric; vlmq's own load() does"
    if any("embed" in target for group in config["config_groups"].values() for target in group["targets"]):
        return "transformers cannot load a packed embedding beside another grid; vlmq's own load() does"
    return None


def _run(folder: Path) -> Release:
    reason = why_not(folder)
    if reason:
        return Release(manifest.identity(folder), why_not=reason)
    with tempfile.TemporaryDirectory(prefix="vlmq-release-") as work:
        # Like the `vlmq` script, and unlike a plain `python -m`, it imports nothing from the working directory.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "vlmq.exporter.release_worker", os.path.abspath(folder), work]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, errors="replace")
        found = Path(work) / "found.json"
        if done.returncode < 0:
            raise VlmqError(
                f"{folder}: the process that loads it with transformers was ended by signal {-done.returncode}, often "
                f"for lack of memory; run vlmq verify {folder} on a larger machine"
            )
        if done.returncode or not found.is_file():
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
            return Release(manifest.identity(folder), failure=f"transformers cannot load it: {last.strip()}")
        return Release(manifest.identity(folder), **json.loads(found.read_text(encoding="utf-8")))

"""Which samples an export calibrates on and which it is verified on, and that no image is in both.

Named by the user, or, where nothing is named: the demo's own sets for a demo, and a public image-text set for any
other model, of which some samples that were not calibrated on are held out for verification.
"""

import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp

from vlmq.exporter import hub_samples, sources
from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.demo import catalog as demo
from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.samples import COUNT, Sample, Samples, draw, image_digests, refuse_leakage
from vlmq.formats import folder as folders
from vlmq.formats.errors import FormatError

DEMO = "demo"  # names the demo's own sets, whatever the model
EVALUATED = 5000  # samples at most, drawn where the set has more: VQAv2's 214,354 would take days on a CPU
HELD_OUT = 64  # samples for verification where no data set is named


@dataclass(frozen=True)
class Data:
    """The samples to calibrate on (None: no method looks at any), and those to verify on (None: not asked).

    digests: of the images calibrated on, by sample id.
    """

    calibration: Samples | None
    digests: dict[str, str]
    evaluation: Samples | None


def choose(
    checkpoint: Checkpoint,
    calibration: str | None,
    evaluation: str | None,
    count: int = COUNT,
    seed: int = 0,
    text_only: bool = False,
    verify: bool = True,
) -> Data:
    """Read both sets; VlmqError for one that cannot be read, has too few samples, or shares an image with the other.

    count: samples to calibrate on; 0 where no method looks at any.
    """
    source = calibration or (DEMO if checkpoint.name in CHECKPOINTS else hub_samples.DEFAULT)
    named = evaluation or (DEMO if source == DEMO else None)
    held_out = HELD_OUT if verify and not named else 0
    drawn = _read(source, "calibration", count + held_out, seed, text_only) if count + held_out else Samples(source, ())
    kept, rest = drawn.samples[:count], drawn.samples[count:]
    digests = image_digests(kept)
    evaluated = None
    if verify:
        evaluated = evaluation_set(named) if named else Samples(drawn.source, _unseen(rest, digests))
        if not evaluated.samples:
            raise VlmqError(
                f"{source}: after {len(kept)} samples to calibrate on, none is left to verify on; "
                "name a set with --data, take fewer --samples, or pass --no-verify"
            )
        refuse_leakage(digests.values(), evaluated.samples)
    return Data(Samples(drawn.source, kept) if count else None, digests, evaluated)


def evaluation_set(source: str | None) -> Samples:
    """The samples that `vlmq verify` asks about: all of the set, or EVALUATED of them."""
    if source is None:
        raise VlmqError("--data: name the samples to verify on: a folder, .json or .jsonl that was not calibrated on")
    found = _read(source, "evaluation", None, 0)
    return Samples(found.source, draw(found.samples, EVALUATED))


def _unseen(samples: tuple[Sample, ...], digests: dict[str, str]) -> tuple[Sample, ...]:
    """Those whose image is not among the digests."""
    seen, found = set(digests.values()), image_digests(samples)
    return tuple(sample for sample in samples if sample.id in found and found[sample.id] not in seen)


def _read(source: str, split: str, count: int | None, seed: int, text_only: bool = False) -> Samples:
    if source != DEMO:
        return sources.read(source, count, seed, text_only)
    return Samples(DEMO, sources.read(demo_folder(split), count, seed).samples)


def demo_folder(split: str) -> Path:
    """One of the demo's sets (`demo/splits.py`) on disk, drawn once into the user's cache."""
    from vlmq.exporter.demo.dataset import write_split

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlmq" / f"demo-{_world_version()}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        cache = Path(mkdtemp(prefix="vlmq-demo-"))  # a home that cannot be written to, as in some containers
    final = cache / split
    if not final.is_dir():
        try:
            with folders.staged(final) as stage:
                write_split(split, stage)
        except FormatError:
            if not final.is_dir():  # unless another process has just drawn the same
                raise
    return final


def _world_version() -> str:
    """A hash of the code that draws: what an older release drew is never taken for this one's."""
    sources = sorted(Path(demo.__file__).parent.glob("*.py"))
    return sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]

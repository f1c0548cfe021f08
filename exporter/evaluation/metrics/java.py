"""METEOR and SPICE through `pycocoevalcap` (an optional extra), where Java and their models are there.

Neither is guessed at: what cannot run is said not to be available, and why. METEOR brings all it needs. SPICE fetches
Stanford's parser on its first use; we do not let it, so it runs only where someone has fetched it.
"""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

SCORERS = ("METEOR", "SPICE")

Words = Sequence[str]


class UnavailableError(Exception):
    """Why a metric cannot be computed here."""


def score(metric: str, captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """The metric over the set, 0 to 1. captions[i], references[i][j]: words. UnavailableError where it cannot run."""
    lacking = missing(metric)
    if lacking:
        raise UnavailableError(f"needs {lacking}")
    said = {number: [" ".join(words)] for number, words in enumerate(captions)}
    known = {number: [" ".join(words) for words in all_] for number, all_ in enumerate(references)}
    try:
        return float(_scorer(metric)(known, said)[0])
    except (OSError, ValueError, subprocess.SubprocessError) as fault:
        raise UnavailableError(f"its Java program failed ({' '.join(str(fault).split())})") from None


def missing(metric: str) -> str | None:
    """What the metric needs that is not here."""
    package = find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        return "`pip install 'vlmq[captions]'`"
    if not shutil.which("java"):
        return "Java"
    parser = Path(next(iter(package.submodule_search_locations))) / "spice" / "lib" / "stanford-corenlp-3.6.0"
    if metric == "SPICE" and not all(parser.with_name(parser.name + end).is_file() for end in (".jar", "-models.jar")):
        return "Stanford CoreNLP 3.6.0 in pycocoevalcap/spice/lib"
    return None


def _scorer(metric: str) -> Callable[[dict[int, list[str]], dict[int, list[str]]], tuple[float, object]]:
    if metric == "METEOR":
        from pycocoevalcap.meteor.meteor import Meteor

        return Meteor().compute_score
    from pycocoevalcap.spice.spice import Spice

    return Spice().compute_score

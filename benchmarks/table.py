"""The report of methods.py: its rows as JSON, as Markdown tables with the verdicts, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import common
import plot
from cells import Cell, Cells, read
from configurations import CHECKPOINTS, FULL, REFERENCE, VARIANTS, VARIED_BITS, Configuration, rows
from verdicts import findings, said

from vlmq.exporter.evaluation.statistics import LEVEL

COMMAND = "python benchmarks/methods.py"
PICTURE = Path(__file__).parent.parent / "docs" / "methods.png"
BULKY = ("right", "divergences")  # stay in the .jsonl
# Where a sentence does not hold: what was found to be the reason, by the sentence.
REASONS = {
    "Group-aware is no worse than vanilla, and better in logit KL": (
        "it is no worse, but in groups of 64 on models this small either scale is within noise of the other; the gap "
        "that paper 001 reports is at 6.7 billion weights, in groups of 128."
    ),
    "It is so against a SmoothQuant whose strength is searched with the same loss (not asked for)": (
        "both searches have the same loss, and of two sets of candidates neither has the better one everywhere."
    ),
    "Rotation and GPTQ are the best of all in KL": (
        "the best of them are within their intervals of one another, a few thousandths of a nat. On LLaVA it was 0.021 "
        "(0.011 to 0.032) behind until the channels inside a feed-forward, which cannot be rotated, were evened out."
    ),
    "Rotation and GPTQ are the best of all in KL where what cannot be rotated is rescaled (not asked for)": (
        "on LLaVA it is; on BLIP-2 all of them are within noise of full precision, a few thousandths of a nat."
    ),
    "Q-VLM is better than layer-wise search at W4A4, and its ablations are in between": (
        "all of it is better on LLaVA, beyond the interval, and on BLIP-2 there is a few thousandths of a nat to gain. "
        "The joint search alone lowers the error of its block's output, as it must, but not the divergence of the "
        "answers; four times the tokens, errors relative to each token's size, outputs that somebody reads alone, and "
        "blocks solved on the ranges of the layer-wise search do not change that. What gains is the tuning."
    ),
    "Q-VLM is so on the outlier variants too, smoothed first": (
        "what is left to gain is within the intervals. Tuning did harm on LLaVA (KL 0.090, layer by layer 0.018) until "
        "it began from the ranges of the layer-wise search, before a language model that is smoothed as well."
    ),
}

HEAD = (
    "| method | W | A | granularity | components | bits per weight | accuracy | minus reference | KL | seeds | s |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def report(measured: Path) -> None:
    """Write methods.json, methods.md and the picture, from the rows that there are."""
    kept = read(measured)
    cells = Cells(kept)
    results = [{name: value for name, value in kept[row].items() if name not in BULKY} for row in rows() if row in kept]
    written = [common.write("methods", COMMAND, results), common.RESULTS / "methods.md", PICTURE]
    written[1].write_text("\n".join(_lines(cells, len(results))) + "\n")
    plot.draw(cells, PICTURE)
    print(*written, sep="\n")


def _lines(cells: Cells, measured: int) -> Iterator[str]:
    machine = common.machine()
    yield "# Methods compared"
    yield ""
    yield (
        f"`{COMMAND}`: {measured} of {len(rows())} rows measured, on {machine['processor']}, a core each. Accuracy in "
        f"% of {common.SOME} questions whose pictures were not calibrated on, mean over seeds; intervals "
        f"of {LEVEL:.0%} resample pictures. KL: of the first token's logits from the reference's, in nats. Bits per "
        "weight: of the quantized linears, scales and zeros counted. s: processor seconds to quantize. One seed: "
        "nothing depends on it."
    )
    yield from _verdicts(cells)
    yield from _losses(cells)
    for checkpoint in CHECKPOINTS:
        for variant in VARIANTS:
            yield from _table(cells, checkpoint, variant)
    if cells.refused:
        yield from ("", "## Refused", "")
        yield from (f"* {one}, {other}: {what}: {why}" for (one, other, what), why in cells.refused.items())


def _verdicts(cells: Cells) -> Iterator[str]:
    yield from ("", "## What it must show", "")
    for finding in findings(cells):
        yield f"* {finding.sentence}: **{finding.verdict}**"
        if finding.verdict == "does not hold":
            yield f"  Reason (believed, not isolated): {REASONS.get(finding.sentence, 'not found yet.')}"
        marks = {True: "yes", False: "no", None: "missing"}
        yield from (f"  * {marks[check.good]}: {check.what}" for check in finding.checks)


def _losses(cells: Cells) -> Iterator[str]:
    """AWQ's two losses side by side: which is more accurate, and at what cost."""
    yield from ("", "## AWQ's loss: from the Gram matrix, or of the block's output", "")
    yield "| model | bits | accuracy, gram | block | KL, gram | block | s, gram | block |"
    yield "|---|---|---|---|---|---|---|---|"
    for checkpoint in CHECKPOINTS:
        for variant in VARIANTS:
            for bits in VARIED_BITS["awq by block"]:
                pair = [
                    cells.get(checkpoint, variant, Configuration(method, bits, FULL, "g64", "all"))
                    for method in ("awq", "awq by block")
                ]
                if all(pair):
                    yield f"| {checkpoint}, {variant} | {bits} | {_side_by_side([cell for cell in pair if cell])} |"


def _side_by_side(pair: list[Cell]) -> str:
    columns = [said(cell.accuracy, signed=False) for cell in pair]
    columns += [f"{cell.mean('divergence'):.4f}" for cell in pair]
    columns += [f"{cell.mean('quantize_seconds'):.1f}" for cell in pair]
    return " | ".join(columns)


def _table(cells: Cells, checkpoint: str, variant: str) -> Iterator[str]:
    order = {row.configuration: place for place, row in enumerate(reversed(rows()))}
    found = sorted(cells.of(checkpoint, variant), key=lambda cell: -order.get(cell.configuration, -1))
    yield from ("", f"## {checkpoint}, {variant}", "", *HEAD)
    yield from (_line(cell, cells.reference(checkpoint, variant)) for cell in found)


def _line(cell: Cell, reference: Cell | None) -> str:
    what = cell.configuration
    change = cell.against(reference) if reference and what != REFERENCE else None
    columns = (
        what.method,
        what.weights,
        what.inputs,
        what.granularity,
        what.components,
        f"{cell.mean('bits_per_weight'):.2f}",
        said(cell.accuracy, signed=False),
        said(change) if change else "",
        f"{cell.mean('divergence'):.4f}",
        len(cell.rows),
        f"{cell.mean('quantize_seconds'):.1f}",
    )
    return f"| {' | '.join(map(str, columns))} |"

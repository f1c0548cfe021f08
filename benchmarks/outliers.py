"""AWQ against RTN where it matters: on the demos with outlier channels, at 3 bits, three seeds.

    python benchmarks/outliers.py

For every demo and seed two variants: `rescaled`, whose outliers a method only has to divide out again, and `tuned`,
rescaled and then fine-tuned, so that the columns that read an outlier have weights of their own. Accuracy on the
2400 evaluation questions, with the paired difference AWQ - RTN and its 95 % interval; divergence of the first token's
logits from the reference's.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import numpy as np
from rich.console import Console
from rich.table import Table

from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.demo.outliers import STEPS, make_outliers
from vlmq.exporter.evaluation import vqa
from vlmq.exporter.evaluation.statistics import paired_difference
from vlmq.exporter.load import load
from vlmq.exporter.recipe import make_recipe
from vlmq.exporter.simulate import simulate

METHODS = ("rtn", "awq")
PROBES = 600  # questions whose logits are compared
GROUP = 64
SAMPLES = 128


def scores(asked, checkpoint, samples) -> np.ndarray:
    found = common.answers(asked, checkpoint, samples)
    return np.array([vqa.accuracy(answer.text, sample.answers) for answer, sample in zip(found, samples, strict=True)])


def compare(folder: Path, bits: int, seed: int, samples) -> dict[str, object]:
    """Reference, RTN and AWQ on one checkpoint."""
    checkpoint = open_checkpoint(str(folder))
    reference = common.vlm(checkpoint, load(folder))
    logits = common.first_logits(reference, checkpoint, samples[:PROBES])
    row: dict[str, object] = {"reference": 100 * scores(reference, checkpoint, samples).mean()}
    by_method = {}
    for method in METHODS:
        recipe = make_recipe({"method": method, "bits": bits, "group_size": GROUP})
        model, solved = simulate(checkpoint, recipe, common.calibration(SAMPLES, seed))
        quantized = common.vlm(checkpoint, model)
        by_method[method] = scores(quantized, checkpoint, samples)
        row[method] = {
            "accuracy": 100 * by_method[method].mean(),
            "divergence": common.divergence(logits, common.first_logits(quantized, checkpoint, samples[:PROBES])),
            "linear_loss": float(np.mean([site.loss for site in solved.values()])),
        }
    difference = paired_difference(by_method["rtn"], by_method["awq"], [sample.image for sample in samples])
    row["awq_minus_rtn"] = {"points": difference.points, "low": difference.low, "high": difference.high}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    samples = common.questions()
    rows = []
    table = Table("model", "variant", "seed", "bits", "reference", "rtn", "awq", "awq - rtn", "KL rtn", "KL awq")
    with TemporaryDirectory() as work:
        for name, source in CHECKPOINTS.items():
            for seed in options.seeds:
                for variant, steps in (("rescaled", 0), ("tuned", STEPS)):
                    folder = make_outliers(source, Path(work) / f"{name}-{variant}-{seed}", seed, steps)
                    for bits in options.bits:
                        row = compare(folder, bits, seed, samples)
                        rows.append({"model": name, "variant": variant, "seed": seed, "bits": bits, **row})
                        rtn, awq, change = row["rtn"], row["awq"], row["awq_minus_rtn"]
                        table.add_row(
                            name,
                            variant,
                            str(seed),
                            str(bits),
                            f"{row['reference']:.2f}",
                            f"{rtn['accuracy']:.2f}",
                            f"{awq['accuracy']:.2f}",
                            f"{change['points']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})",
                            f"{rtn['divergence']:.4f}",
                            f"{awq['divergence']:.4f}",
                        )
    Console(width=130).print(table)
    print(common.write("outliers", "python benchmarks/outliers.py", rows))


if __name__ == "__main__":
    main()

"""The README's picture: scenes of the demo with a question each, and what reference and export answer.

python benchmarks/picture.py blip2-mini-awq-w4 docs/answers.png
"""

import argparse
from pathlib import Path

import common
import matplotlib.pyplot as plt

from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.images import open_image
from vlmq.exporter.load import load
from vlmq.exporter.runtime import OnnxVlm
from vlmq.formats import manifest

EVERY = 411  # takes questions of all kinds, none chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="an export of a demo")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    options = parser.parse_args()
    checkpoint = open_checkpoint(manifest.read(options.folder).source.name)
    samples = common.questions()[::EVERY]
    before = common.answers(common.vlm(checkpoint, load(checkpoint.folder)), checkpoint, samples)
    after = common.answers(OnnxVlm(options.folder), checkpoint, samples)
    figure, axes = plt.subplots(1, len(samples), figsize=(2.5 * len(samples), 3.4))
    for axis, sample, one, two in zip(axes, samples, before, after, strict=True):
        axis.imshow(open_image(sample.image))
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(sample.text, fontsize=9, wrap=True)
        right = "#116329" if two.text == sample.answers[0] else "#a40e26"
        axis.set_xlabel(f"16 bits: {one.text}\n4 bits: {two.text}", fontsize=10, color=right)
    figure.tight_layout()
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()

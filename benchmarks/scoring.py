"""The fast scorer of `exporter/search/packed.py` held against `TorchVlm`, which answers one prompt at a time.

python benchmarks/scoring.py
"""

from __future__ import annotations

import time

import common
import numpy as np
import torch

from vlmq.exporter.checkpoint import open_checkpoint
from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.load import load
from vlmq.exporter.runtime import TorchVlm
from vlmq.exporter.search.packed import Scorer


def main() -> None:
    torch.set_num_threads(1)
    samples = common.questions()
    for name, folder in CHECKPOINTS.items():
        checkpoint = open_checkpoint(str(folder))
        model = load(folder)
        scorer = Scorer(checkpoint, samples)
        start = time.process_time()
        scores = scorer.score(model)
        fast = time.process_time() - start
        vlm = TorchVlm(model, scorer.processor)
        start = time.process_time()
        answers = common.answers(vlm, checkpoint, samples)
        slow = time.process_time() - start
        logits = common.first_logits(vlm, checkpoint, samples)
        equal = sum(answer.tokens == tokens for answer, tokens in zip(answers, scores.tokens, strict=True))
        print(
            f"{name}: tokens of {equal} of {len(samples)} answers equal, {100 * scores.right.mean():.2f} % right; "
            f"logits differ by {np.abs(scores.logits - logits).max():.1e} at most; "
            f"{fast:.1f} s, and {slow:.1f} s one prompt at a time"
        )


if __name__ == "__main__":
    main()

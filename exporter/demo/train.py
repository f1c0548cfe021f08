"""Train a demo model from scratch on a CPU: `python -m vlmq.exporter.demo.train llava-mini`.

One run has two stages, set by how much of the time has gone, each with a learning rate that rises briefly and falls
along a cosine. First seeing: the vision tower learns to name things (supervision.py), soon the Q-Former too. Then they
are frozen, as pretrained ones are when a vision-language model is made, and speaking begins: projection and language
model learn answers and captions, about two things at first and then up to four. Trained together, colours and shapes
are named one by one and hardly ever bound to each other. Pictures never repeat.

The shipped checkpoints come from sessions that were stopped and resumed while these stages were being found: LLaVA's
parts were trained together to the end, BLIP-2's language model as here, on the frozen tower and Q-Former.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.demo.models import DEMOS, Demo, Model
from vlmq.exporter.demo.packing import answer_loss, exact_matches, logits_of, pack
from vlmq.exporter.demo.questions import ASKED, TAUGHT
from vlmq.exporter.demo.saving import save
from vlmq.exporter.demo.splits import TRAINING, VALIDATION, prior_accuracy
from vlmq.exporter.demo.supervision import Supervision, wording
from vlmq.exporter.demo.world import Scene, scene_of

PICTURES = 8  # per step
QUESTIONS = 12  # per picture, and one caption
PEAK = 1.2e-3  # learning rate
SEEING = 0.45  # of the time
WARMUP = 0.05  # of a stage
PATCHES_ALONE = 0.15  # of seeing; a Q-Former that starts on a tower without places settles for none
WORDS = 0.2  # weight of wording beside answers
CROWD = 0.12  # of speaking until answers are about up to four things
LESSONS = 0.7  # of speaking until questions are asked as often as they will be
SPEAKING = ("language_model", "language_projection", "model.language_model", "model.multi_modal_projector", "lm_head")
REPORT = 400  # steps


def stage_of(progress: float) -> tuple[bool, float]:
    """Whether speaking has begun, and how much of the stage has gone."""
    return (False, progress / SEEING) if progress < SEEING else (True, (progress - SEEING) / (1 - SEEING))


def most_things(speaking: bool, gone: float) -> int:
    """Answers start with two things. Naming does not: what is alone need not be found, and no query learns to find."""
    return 2 + min(2, int(2 * gone / CROWD)) if speaking else 4


def learning_rate(gone: float) -> float:
    rise = min(1.0, gone / WARMUP)
    return PEAK * rise * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, gone))) / 2)


def new_scenes(step: int, most: int) -> list[Scene]:
    """Those of one step, at most `most` things in each."""
    first = TRAINING.start + step * PICTURES
    return [scene_of(id, most) for id in range(first, first + PICTURES)]


@torch.inference_mode()
def validate(demo: Demo, model: Model, pictures: int = 200) -> dict[str, float]:
    """Exact matches in percent: of all questions, of each answer type, and of captions."""
    found: dict[str, list[bool]] = defaultdict(list)
    scenes = [scene_of(id) for id in itertools.islice(VALIDATION, pictures)]
    for start in range(0, pictures, 50):
        batch = pack(demo, scenes[start : start + 50], questions=7).to(model.device)
        logits = logits_of(demo, model, batch, demo.look(model, batch.pixels)[-1])
        for kind, match in zip(batch.kinds, exact_matches(logits, batch), strict=True):
            found[kind].append(match)
            if kind != "caption":
                found["overall"].append(match)
    return {kind: 100 * sum(matches) / len(matches) for kind, matches in sorted(found.items())}


class Training:
    """A model, its supervision and its optimizer: all that one step changes."""

    def __init__(self, name: str, device: str) -> None:
        torch.manual_seed(0)
        self.demo = DEMOS[name]
        self.model = self.demo.build().to(device)
        self.model.set_attn_implementation("eager")  # a CPU is slow at fused attention's backward in bfloat16
        self.supervision = Supervision().to(device)
        self.weights = [*self.model.parameters(), *self.supervision.parameters()]
        self.optimizer = torch.optim.AdamW(self.weights, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.05)
        self.step = 0
        self.elapsed = 0.0  # seconds
        self.best = 0.0  # percent

    def learn(self, progress: float) -> dict[str, float]:
        """One step on new pictures; its losses."""
        speaking, gone = stage_of(progress)
        scenes = new_scenes(self.step, most_things(speaking, gone))
        batch = pack(self.demo, scenes, QUESTIONS, TAUGHT if gone < LESSONS else ASKED).to(self.model.device)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(SPEAKING) == speaking)
        losses: dict[str, Tensor] = {}
        with torch.autocast(self.model.device.type, torch.bfloat16):
            patches, queries, image = self.demo.look(self.model, batch.pixels)
            if speaking:
                losses["answers"] = answer_loss(logits_of(self.demo, self.model, batch, image), batch)
                losses["words"] = wording(image, self.model.get_input_embeddings().weight, scenes)
                loss = losses["answers"] + WORDS * losses["words"]
            else:
                loss = losses["naming"] = self.supervision(patches, queries if gone >= PATCHES_ALONE else None, scenes)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(gone)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.step += 1
        return {name: value.item() for name, value in losses.items()}

    def keep(self, file: Path) -> None:
        """Write everything needed to go on, by a rename."""
        part = file.with_suffix(".part")
        parts = {name: getattr(self, name).state_dict() for name in ("model", "supervision", "optimizer")}
        torch.save(parts | {name: getattr(self, name) for name in ("step", "elapsed", "best")}, part)
        os.replace(part, file)

    def go_on(self, file: Path) -> None:
        state = torch.load(file, weights_only=True, map_location=self.model.device)
        for name in ("model", "supervision", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.elapsed, self.best = state["step"], state["elapsed"], state["best"]


def train(name: str, minutes: float, device: str, folder: Path, resume: Path | None) -> Iterator[str]:
    """Train for that long, reporting in lines; once there are answers, `folder` always holds the best model so far."""
    training = Training(name, device)
    if resume and resume.exists():
        training.go_on(resume)
    sums = Counter[str]()
    tick = time.monotonic()
    while (progress := training.elapsed / (60 * minutes)) < 1:
        sums.update(training.learn(progress))
        now = time.monotonic()
        training.elapsed, tick = training.elapsed + now - tick, now
        if training.step % REPORT:
            continue
        scores = validate(training.demo, training.model) if "answers" in sums else {}
        if scores.get("overall", 0) > training.best:
            training.best = scores["overall"]
            save(name, training.model, folder)
        if resume:
            training.keep(resume)
        losses = [f"{loss} {total / REPORT:.3f}" for loss, total in sums.items()]
        shares = [f"{kind} {score:.1f}" for kind, score in scores.items()]
        sums.clear()
        yield "  ".join([f"{training.elapsed / 60:5.1f} min", f"step {training.step:6d}", *losses, *shares])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("name", choices=DEMOS)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="of the CPU; all unless told")
    parser.add_argument("--folder", type=Path, help="for the checkpoint; the shipped one unless told")
    parser.add_argument("--resume", type=Path, help="a file that keeps the state of training, to go on after a stop")
    options = parser.parse_args()
    logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = options.folder or CHECKPOINTS[options.name]
    for line in train(options.name, options.minutes, options.device, folder, options.resume):
        print(line, flush=True)
    print(f"without the image: {prior_accuracy('evaluation'):.1f} %")


if __name__ == "__main__":
    main()

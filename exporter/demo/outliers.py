"""Give a demo model the outlier channels that real OPT, LLaMA, CLIP and EVA have and that a small model has not.

What a quantizer sees of them is that a few channels of what a linear reads are 20 to 60 times larger than the rest, the
same few in every block, and that much depends on them (Dettmers et al. 2022, "LLM.int8()", section 4; Xiao et al. 2023,
"SmoothQuant", figure 4). Two steps make them:

1. `rescale` multiplies a channel where it is made (weight and bias of a norm, or a row of the linear before a ReLU or a
   gate) and divides the columns of the linears that read it. Nothing else reads it, so the model computes what it did;
   the factors are powers of two, so only what underflows in fp16 is rounded. The residual stream itself cannot be
   rescaled exactly: a norm divides by the spread of all channels together.
2. A short fine-tuning, in which the columns that read an outlier grow weights of their own. Without it, AWQ and
   SmoothQuant would only have to find the inverse of step 1.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from vlmq.exporter.demo.catalog import CHECKPOINTS
from vlmq.exporter.demo.models import DEMOS, Model
from vlmq.exporter.demo.packing import answer_loss, logits_of, pack
from vlmq.exporter.demo.saving import save
from vlmq.exporter.demo.splits import CALIBRATION, TRAINING
from vlmq.exporter.demo.world import Dice, scene_of

CHANNELS = 8
LEADING = 12  # of which the seed picks so many
FACTORS = (16, 32, 64)
STEPS = 60
PICTURES = 16  # per step of fine-tuning
RATE = 2e-5  # its learning rate

# Blocks -> what makes a channel -> the linears that read it.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
READERS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "blip2-mini": {
        "vision_model.encoder.layers": {"layer_norm1": ("self_attn.qkv",), "layer_norm2": ("mlp.fc1",)},
        "language_model.model.decoder.layers": {
            "self_attn_layer_norm": _QKV,
            "final_layer_norm": ("fc1",),
            "fc1": ("fc2",),
        },
    },
    "llava-mini": {
        "model.vision_tower.encoder.layers": {"layer_norm1": _QKV, "layer_norm2": ("mlp.fc1",)},
        "model.language_model.layers": {
            "input_layernorm": _QKV,
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.up_proj": ("mlp.down_proj",),
        },
    },
}


@torch.no_grad()
def rescale(name: str, model: Model, seed: int) -> None:
    """Make outliers in place, in channels that the seed picks; the outputs stay as they were, to the last bit."""
    dice = Dice(seed)
    weights = _weights_of_channels(name, model)
    for path, makers in READERS[name].items():
        blocks = dict(model.get_submodule(path).named_children())
        shares = [
            weights[path, number, maker]
            for number, block in blocks.items()
            for maker in makers
            if not _inner(block, maker)
        ]
        residual = _factors(dice, torch.stack(shares).sum(0))  # the same channels in every block
        for number, block in blocks.items():
            for maker, readers in makers.items():
                made = block.get_submodule(maker)
                inner = _inner(block, maker)
                factors = _factors(dice, weights[path, number, maker]) if inner else residual
                made.weight.mul_(factors[:, None] if inner else factors)
                if getattr(made, "bias", None) is not None:
                    made.bias.mul_(factors)
                for reader in readers:
                    block.get_submodule(reader).weight.div_(factors)


def _inner(block: nn.Module, maker: str) -> bool:
    """Whether the channels lie between two linears, each block's own, and not in the residual stream."""
    return isinstance(block.get_submodule(maker), nn.Linear)


def _weights_of_channels(name: str, model: Model) -> dict[tuple[str, str, str], Tensor]:
    """What each channel contributes to what is read, as a share of 1, by blocks, block and maker: (channels,)."""
    squares: dict[tuple[str, str, str], Tensor] = {}
    columns: dict[tuple[str, str, str], Tensor] = {}
    hooks = []
    for path, makers in READERS[name].items():
        for number, block in model.get_submodule(path).named_children():
            for maker, names in makers.items():
                readers = [block.get_submodule(reader) for reader in names]
                columns[path, number, maker] = torch.stack([reader.weight.square().sum(0) for reader in readers]).sum(0)

                def keep(_: nn.Module, inputs: tuple[Tensor], key: tuple = (path, number, maker)) -> None:
                    squares[key] = inputs[0].flatten(0, -2).square().mean(0)

                hooks.append(readers[0].register_forward_pre_hook(keep))
    demo = DEMOS[name]
    batch = pack(demo, [scene_of(id) for id in CALIBRATION[:16]], questions=4).to(model.device)
    logits_of(demo, model, batch, demo.look(model, batch.pixels)[-1])
    for hook in hooks:
        hook.remove()
    energies = {key: squares[key] * columns[key] for key in squares}
    return {key: energy / energy.sum() for key, energy in energies.items()}


def _factors(dice: Dice, shares: Tensor) -> Tensor:
    """One factor per channel: 1, but an outlier's in some of those that contribute most, as outliers do."""
    factors = torch.ones_like(shares)
    leading = shares.argsort(descending=True)[:LEADING].tolist()
    for channel in dice.some(leading, CHANNELS):
        factors[channel] = dice.pick(FACTORS)
    return factors


def finetune(name: str, model: Model, steps: int, seed: int) -> None:
    """Train on answers and captions for a few steps, in place."""
    demo = DEMOS[name]
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    first = TRAINING.stop - (seed + 1) * 1_000_000  # pictures that the first training did not reach
    for step in range(steps):
        scenes = [scene_of(first + step * PICTURES + number) for number in range(PICTURES)]
        batch = pack(demo, scenes, questions=7).to(model.device)
        loss = answer_loss(logits_of(demo, model, batch, demo.look(model, batch.pixels)[-1]), batch)
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


def make_outliers(source_folder: Path, target_folder: Path, seed: int = 0, finetune_steps: int = STEPS) -> Path:
    """Write the outlier variant of a demo checkpoint; with no fine-tuning it answers exactly as its source does."""
    model = AutoModelForImageTextToText.from_pretrained(source_folder, dtype=torch.float32, local_files_only=True)
    name = {"blip-2": "blip2-mini", "llava": "llava-mini"}[model.config.model_type]
    rescale(name, model, seed)
    if finetune_steps:
        finetune(name, model, finetune_steps, seed)
    save(name, model, target_folder)
    return target_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("name", choices=CHECKPOINTS, help="the demo to start from")
    parser.add_argument("target", type=Path, help="a folder for the variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="of fine-tuning; 0 for the pure rescale")
    options = parser.parse_args()
    logging.disable_progress_bar()
    print(make_outliers(CHECKPOINTS[options.name], options.target, options.seed, options.steps))


if __name__ == "__main__":
    main()

"""Modality weights: how much an error in a vision token matters to the loss, measured in errors of a text token.

MBQ (arXiv 2412.19509, section 3): to first order an error in a block's output y changes the loss L by |dL/dy| times
the error, so the errors of vision and text tokens are weighed by the mean |dL/dy| of each. The Gram matrix holds
squared errors, which the ratio weighs as it is; MBQ's code weighs absolute ones, with a ratio for attention and one for
the MLP.

The loss here is the cross-entropy of the text after the image: question and answer where a sample has both, for
calibration samples do not say where the answer begins. The first token after the image is not among its targets: it is
the template's (a newline, a start mark), and the last image position would be weighed for predicting it. An
encoder-decoder's loss is of what its decoder says, and its encoder's blocks alone have vision tokens to weigh.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmq.exporter.calibration import Inputs, vision_tokens
from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.walk import walk


def weights(checkpoint: Checkpoint, batches: Sequence[Inputs]) -> dict[str, float]:
    """For each block of the language component that sees the image, by its name in memory: mean |dL/dy| over the vision
    tokens of all samples, divided by that over their text tokens; y (sequence, width) is the block's output, L a
    sample's loss.

    The whole model is in memory meanwhile, in float32: here and in the tuning of qvlm alone. Samples go through it one
    at a time, and only hidden states of the language component have gradients, so that a sample's activations are
    all that comes on top. Samples without an image have nothing to compare and are left out; VlmqError where all are.

    Of the last block the ratio is 0, for nothing reads what it puts out for the image; `floored` says why that is no
    weight yet.
    """
    seen = [sample for batch in batches for sample in _samples(batch) if vision_tokens(sample, checkpoint.config).any()]
    if not seen:
        raise VlmqError(
            "token_weights: modality compares image with text, and no sample has an image; add some, or choose none"
        )
    model = checkpoint.model().requires_grad_(False)
    plan = walk(model, checkpoint.family)
    names = [block.name for block in plan.blocks if block.component == "language" and not block.answers]
    blocks = [model.get_submodule(name) for name in names]
    vision, text = torch.zeros(len(blocks), dtype=torch.float64), torch.zeros(len(blocks), dtype=torch.float64)
    vision_count = text_count = 0
    for sample in seen:
        places = vision_tokens(sample, checkpoint.config)[0]
        for index, gradient in enumerate(_gradients(model, blocks, sample, places)):
            sizes = gradient.abs().double().mean(1)
            vision[index] += sizes[places].sum()
            text[index] += sizes[~places].sum()
        vision_count += int(places.sum())
        text_count += int((~places).sum())
    if not bool((text > 0).all()):
        raise VlmqError("token_weights: no sample has text after its image to compare with; add some, or choose none")
    ratios = (vision / vision_count) / (text / text_count)
    return dict(zip(names, ratios.tolist(), strict=True))


def floored(ratios: dict[str, float]) -> dict[str, float]:
    """The ratios, each at least their median, as in the authors' released code.

    The last block's output for the image is never read, but the keys and values that it makes of the image are: with
    the ratio of its output alone, their errors would count for nothing.
    """
    least = median(ratios.values())
    return {name: max(ratio, least) for name, ratio in ratios.items()}


def _samples(batch: Inputs) -> Iterable[Inputs]:
    """The samples of a batch, each a batch of one."""
    return ({key: value[row : row + 1] for key, value in batch.items()} for row in range(len(batch["input_ids"])))


@torch.enable_grad()
def _gradients(model: nn.Module, blocks: list[nn.Module], sample: Inputs, places: Tensor) -> list[Tensor]:
    """dL/dy (sequence, width) of every block for one sample; `places` (sequence) are its vision tokens."""
    outputs: list[Tensor] = []

    def differentiate(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (args[0] if args else kwargs["hidden_states"]).requires_grad_()

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        hooks.callback(blocks[0].register_forward_pre_hook(differentiate, with_kwargs=True).remove)
        for block in blocks:
            hooks.callback(block.register_forward_hook(keep).remove)
        logits = model(**sample, use_cache=False).logits[0]
    if "decoder_input_ids" in sample:
        loss = F.cross_entropy(logits[:-1], sample["decoder_input_ids"][0, 1:])
    else:
        predicting = _predicting(places)
        loss = F.cross_entropy(logits[predicting], sample["input_ids"][0, predicting + 1])
    return [gradient[0] for gradient in torch.autograd.grad(loss, outputs)]


def _predicting(places: Tensor) -> Tensor:
    """The positions after the image whose next token is a target: text that text follows."""
    after = places.cumsum(0) == places.sum()
    return (after[:-1] & ~places[:-1]).nonzero()[:, 0]

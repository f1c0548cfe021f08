"""What Q-VLM's optimisation of the vision encoder minimises (paper 004, section 3.3):

    L = L_reg + l1 L_ent + l2 L_err                                                            (eq. 10)

L_reg is the cross-entropy of the answers, in nats a token. L_ent (eq. 8) adds up the conditional entropies between
neighbouring blocks of the language model, each weighted by how much the error of the last block depends on the first
of the two; it is printed without the minus sign of eq. 4, but to minimise the entropy is what the text asks for. The
weights are those of the quantized model as it starts (full precision has no error, so no gradient), divided by their
mean, and the sum is divided by the number of pairs. L_err (eq. 9) is the distance from full precision of what the
vision encoder puts out plus eta times that of what the last language block does, each relative to the size of what it
should be.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.exporter.calibration import Inputs
from vlmq.exporter.methods import qvlm
from vlmq.exporter.walk import Walk

ELEMENTS = 2048  # of a hidden state that its entropy is taken from


@dataclass(frozen=True)
class Weights:
    """l1, l2 and eta of eq. 9 and 10, of which the paper gives none.

    Chosen on llava-mini at W4A4 per token, one run each, on 256 calibration samples that the tuning had not seen. Their
    answers diverge from full precision by 0.053 nats untuned; by 0.014 with l1 = 0, 0.010 with 0.01, 0.027 with 0.1
    (cross-entropy 0.072; 0.038, 0.050, 0.059), and by 0.017 with l1 = l2 = 0. So l1 does harm where it is large, and
    between 0 and 0.01 they do not decide. In none did the entropy fall (0.420 untuned, 0.422 to 0.427 tuned).
    """

    entropy: float = 0.01
    error: float = 1.0
    output: float = 1.0


@dataclass(frozen=True)
class Seen:
    """What one run puts out: the last vision block, every language block (pairs, sequence, width), and the logits."""

    vision: Tensor
    language: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Target:
    """Inputs of one length, what full precision makes of them, and where the answers are.

    answer: bool (pairs, sequence). read: bool (pairs, sequence), where somebody reads what the last block puts out:
    everywhere but at the image. ranges: the extremes of what each language block puts out (blocks, 2).
    """

    inputs: Inputs
    vision: Tensor
    output: Tensor
    ranges: Tensor
    answer: Tensor
    read: Tensor

    @property
    def pairs(self) -> int:
        return len(self.answer)


def observe(model: PreTrainedModel, plan: Walk, inputs: Inputs) -> Seen:
    """Run the model, and look at its blocks."""
    last = [block.name for block in plan.blocks if block.component == "vision"][-1]
    names = [last, *(block.name for block in plan.blocks if block.component == "language")]
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: keep(name, output))
        for name in names
    ]
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return Seen(outputs[last], [outputs[name] for name in names[1:]], logits)


def target_of(seen: Seen, inputs: Inputs, vision: Tensor, mark: int) -> Target:
    """What full precision makes of the inputs.

    The answer follows the last token `mark` and the image (vision: bool, pairs x sequence). Where nothing does, all
    text after the image stands for it.
    """
    extremes = [torch.stack([hidden.amin(), hidden.amax()]) for hidden in seen.language]
    text = _after(vision)
    answer = text & _after(inputs["input_ids"] == mark)
    answer = torch.where(answer.any(1, keepdim=True), answer, text)
    return Target(inputs, seen.vision, seen.language[-1], torch.stack(extremes), answer, ~vision)


def _after(marked: Tensor) -> Tensor:
    """The positions behind the last that is marked: bool (rows, sequence), all of them where none is."""
    return marked.flip(1).cumsum(1).flip(1) == 0


@dataclass(frozen=True)
class Loss:
    """L of eq. 10. levels: of each language block's output; shares: the weight of each pair of neighbours."""

    weights: Weights
    levels: Sequence[Tensor]
    shares: Sequence[float]

    def __call__(self, seen: Seen, target: Target) -> Tensor:
        """() over pairs of one length."""
        return (
            cross_entropy(seen.logits, target)
            + self.weights.entropy * self.entropy(seen.language)
            + self.weights.error * self.error(seen, target)
        )

    def entropy(self, hidden: Sequence[Tensor]) -> Tensor:
        """L_ent: nats an element, a weighted mean over the pairs of neighbouring blocks."""
        dice = torch.Generator().manual_seed(0)
        chosen = torch.randint(hidden[0].numel(), (ELEMENTS,), generator=dice)
        assigned = [
            qvlm.soft_assignment(each.flatten()[chosen], levels)
            for each, levels in zip(hidden, self.levels, strict=True)
        ]
        total = hidden[0].new_zeros(())
        for share, before, after in zip(self.shares, assigned, assigned[1:], strict=False):
            total = total + share * qvlm.conditional_entropy(before, after)
        return total / max(len(self.shares), 1)

    def error(self, seen: Seen, target: Target) -> Tensor:
        """L_err: relative distances, so that neither depends on the scale of the activations."""
        output = _distance(seen.language[-1][target.read], target.output[target.read])
        return _distance(seen.vision, target.vision) + self.weights.output * output


def cross_entropy(logits: Tensor, target: Target) -> Tensor:
    """L_reg: of the answers' tokens, nats a token."""
    asked = target.answer[:, 1:]  # a token is predicted at the position before it
    found, tokens = logits[:, :-1][asked].float(), target.inputs["input_ids"][:, 1:][asked]
    return F.cross_entropy(found, tokens, reduction="sum") / max(len(tokens), 1)


def levels_of(targets: Sequence[Target], bits: int) -> list[Tensor]:
    """The levels that the outputs of the language blocks are assigned to, between their extremes at full precision."""
    ranges = torch.stack([target.ranges for target in targets])
    pairs = zip(ranges[..., 0].amin(0), ranges[..., 1].amax(0), strict=True)
    return [qvlm.levels_between(low, high, bits) for low, high in pairs]


def shares_of(model: PreTrainedModel, plan: Walk, targets: Sequence[Target]) -> list[float]:
    """|| dE / dX^(k) || of eq. 8 over all targets, divided by the mean over k: of every language block but the last.

    E is the squared error of what the last one puts out.
    """
    squares: list[float] = []
    for target in targets:
        seen = observe(model, plan, target.inputs)
        error = (seen.language[-1] - target.output)[target.read].square().sum()
        gradients = torch.autograd.grad(error, seen.language[:-1]) if seen.language[:-1] else ()
        sizes = [gradient.double().square().sum().item() for gradient in gradients]
        squares = [total + size for total, size in zip(squares or [0.0] * len(sizes), sizes, strict=True)]
    norms = [total**0.5 for total in squares]
    mean = sum(norms) / max(len(norms), 1)
    return [norm / mean if mean else 1.0 for norm in norms]


def _distance(output: Tensor, target: Tensor) -> Tensor:
    return torch.linalg.vector_norm(output - target) / torch.linalg.vector_norm(target)

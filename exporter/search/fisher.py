"""How much an error in each output of each linear costs: the mean square of a gradient there.

To second order an error e of the outputs of a linear makes the answers diverge by 1/2 e^T F e nats, where F is the
Fisher information J^T (diag p - p p^T) J: J is what the logits gain by the outputs, p what they say (Martens,
arXiv 1412.1193, sections 6 and 8). Answers drawn from p would give F too, but a sure model hardly ever draws the ones
that tell. With signs x of +-1, z = (diag(sqrt p) - p sqrt(p)^T) x has E[z z^T] = diag p - p p^T, so that F is the
mean of g g^T, g the gradient of z . logits. Errors of different outputs are taken to be unrelated, so what is kept of g
is its mean square for each output channel.

The gradients are those of the tokens that answer a prompt; what a question says, no model has to foretell.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from vlmq.exporter.calibration import Inputs, decoder_inputs
from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.images import open_image
from vlmq.exporter.runtime import check_image_tokens
from vlmq.exporter.samples import Sample, prompt_of
from vlmq.exporter.walk import Site

DRAWS = 4  # of signs for each sample: one alone says little where samples are few


def answered(
    samples: Iterable[Sample], processor: ProcessorMixin, checkpoint: Checkpoint
) -> Iterator[tuple[Inputs, int]]:
    """The model's inputs for each sample (prompt and first answer), and how many of their tokens are the answer's."""
    for sample in samples:
        prompt = prompt_of(sample, checkpoint.family)
        image = None if sample.image is None else open_image(sample.image)
        start = checkpoint.family.start
        text = prompt if start is not None else " ".join([prompt, *sample.answers[:1]])
        whole = dict(processor(images=image, text=text, return_tensors="pt"))
        if image is not None:
            check_image_tokens(processor, text, whole["input_ids"][0].numpy())
        if start is not None:
            whole["decoder_input_ids"] = decoder_inputs(" ".join(sample.answers[:1]), processor, start)
            yield whole, whole["decoder_input_ids"].shape[1] - 1
            continue
        alone = processor(images=image, text=prompt, return_tensors="pt")["input_ids"]
        yield whole, whole["input_ids"].shape[1] - alone.shape[1]


def foretelling(logits: Tensor, answer: int) -> Tensor:
    """The logits of the tokens that answer: (tokens, vocabulary) -> (answer, vocabulary); none known: of the first."""
    return logits[-answer - 1 : -1] if answer else logits[-1:]


def channel_weights(
    model: nn.Module, sites: Sequence[Site], samples: Iterable[tuple[Inputs, int]], seed: int = 0, draws: int = DRAWS
) -> dict[str, Tensor]:
    """For every site: E[g^2] of each of its output channels (rows,), float64, summed over the tokens of a sample.

    model: in memory, float32. The expectation is over samples and over `draws` signs for each; of an answer of several
    tokens it is the mean over them. A site that a sample does not run counts 0 for it.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    found = {site.name: torch.zeros(site.rows, dtype=torch.float64) for site in sites}
    count = 0
    for inputs, answer in samples:
        for gradients in _gradients(model, sites, inputs, answer, generator, draws):
            for name, gradient in gradients.items():
                found[name] += gradient.double().square().flatten(0, -2).sum(0) / draws
        count += 1
    return {name: total / count for name, total in found.items()}


@torch.no_grad()
def log_probabilities(model: nn.Module, samples: Iterable[tuple[Inputs, int]]) -> list[Tensor]:
    """Of the tokens that answer each sample, (answer, vocabulary) float64."""
    found = (foretelling(model(**inputs, use_cache=False).logits[0], answer) for inputs, answer in samples)
    return [logits.double().log_softmax(-1) for logits in found]


def divergence(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Mean KL(reference || other) in nats: over the tokens of an answer, then over samples."""
    each = [(mine.exp() * (mine - theirs)).sum(-1).mean() for mine, theirs in zip(reference, other, strict=True)]
    return float(torch.stack(each).mean())


@torch.enable_grad()
def _gradients(
    model: nn.Module, sites: Sequence[Site], inputs: Inputs, answer: int, generator: torch.Generator, draws: int
) -> list[dict[str, Tensor]]:
    """dL/dy (..., rows) of every site's output y for one sample, for each of several draws."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # Nothing before the first site has a gradient; from there on all outputs hang together.
        outputs[name] = output if output.requires_grad else output.requires_grad_()
        return outputs[name]

    with ExitStack() as hooks:
        for site in sites:
            hooks.callback(model.get_submodule(site.name).register_forward_hook(partial(keep, site.name)).remove)
        logits = model(**inputs, use_cache=False).logits[0]
    telling = foretelling(logits, answer)
    p = telling.detach().softmax(-1)
    names = list(outputs)
    found = []
    for _ in range(draws):
        signed = p.sqrt() * (2.0 * torch.randint(2, p.shape, generator=generator) - 1)
        z = signed - p * signed.sum(-1, keepdim=True)
        # Signs of different tokens are apart: the square of the gradient of the sum is, in expectation, their sum.
        loss = (z * telling).sum() / len(p) ** 0.5
        ys = [outputs[name] for name in names]
        gradients = torch.autograd.grad(loss, ys, allow_unused=True, retain_graph=True)
        found.append({name: each for name, each in zip(names, gradients, strict=True) if each is not None})
    return found

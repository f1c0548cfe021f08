"""What an error in a weight does to a model's answers, to second order.

An error D in the weight of a linear changes the logits by J D, and the answers then diverge by 1/2 E[a^2] nats, where

    a = z . J D = sum over tokens t of g_t^T D x_t

x_t is what the linear reads, g_t the gradient of z . logits by what it puts out, and z has the covariance of the answer
under the model's own probabilities p, diag p - p p^T: then E[a^2] is D^T F D with the Fisher information F (Martens,
arXiv 1412.1193, sections 6 and 8). Answers drawn from p would give F too, but a sure model hardly ever draws the ones
that tell. With signs x of +-1, z = (diag(sqrt p) - p sqrt(p)^T) x has that covariance.

So nothing is taken apart: errors of all channels and tokens of a linear, and of all linears, add up in `a`, with their
signs, before it is squared. The answers are the tokens that follow a prompt; what a question says, no model has to
foretell.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from vlmq.exporter.calibration import Inputs, decoder_inputs, joined
from vlmq.exporter.checkpoint import Checkpoint
from vlmq.exporter.images import open_image
from vlmq.exporter.progress import Progress, silent
from vlmq.exporter.runtime import check_image_tokens
from vlmq.exporter.samples import Sample, prompt_of
from vlmq.exporter.search.sensitivity import Item

DRAWS = 2048  # of signs, of all samples together: where these are few, one for each says little


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


def together(samples: Iterable[tuple[Inputs, int]], most: int) -> list[tuple[Inputs, int]]:
    """Samples of equal shapes as batches of `most` or fewer: inputs (b, ...). Nothing is padded."""
    alike: dict[Any, list[Inputs]] = defaultdict(list)
    for inputs, answer in samples:
        shapes = tuple((name, each.shape) for name, each in inputs.items())
        alike[answer, shapes].append(inputs)
    return [
        (joined(group[begin : begin + most]), answer)
        for (answer, _), group in alike.items()
        for begin in range(0, len(group), most)
    ]


def foretelling(logits: Tensor, answer: int) -> Tensor:
    """Logits of the tokens that answer, or of the first: (b, tokens, vocabulary) -> (b, answer, vocabulary)."""
    return logits[:, -answer - 1 : -1] if answer else logits[:, -1:]


def effects(
    model: nn.Module,
    items: Sequence[Item],
    samples: Iterable[tuple[Inputs, int]],
    seed: int = 0,
    draws: int | None = None,
    progress: Progress = silent,
) -> Tensor:
    """a of every draw, of every item at every choice below 16 bits: (draws * samples, items, choices) float32.

    model: in memory, float32, on any device. draws: for each sample; None: as makes DRAWS in all. Of an answer of
    several tokens, E[a^2] is the mean over them. A linear that a sample does not run has no effect on it.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    sites = [site for item in items for site in item.sites]
    samples = list(samples)
    draws = draws or -(-DRAWS // sum(len(inputs["input_ids"]) for inputs, _ in samples))
    found = []
    for done, (inputs, answer) in enumerate(samples):
        progress("effects", done, len(samples))
        read, gradients = _seen(model, sites, inputs, answer, generator, draws)
        count = len(inputs["input_ids"])
        each = []
        for item in items:
            effect = torch.zeros(count, draws, len(item.choices))
            for site, errors in item.changes():
                if site in read:
                    effect += _effect(errors, read[site], gradients[site], count).cpu()
            each.append(effect)
        found.append(torch.stack(each, 2).flatten(0, 1))
    progress("effects", len(samples), len(samples))
    return torch.cat(found)


@torch.no_grad()
def log_probabilities(model: nn.Module, samples: Iterable[tuple[Inputs, int]]) -> list[Tensor]:
    """Of the tokens that answer each sample, or several together: (b, answer, vocabulary) float64."""
    return [_told(model, inputs, answer).double().log_softmax(-1).cpu() for inputs, answer in samples]


def divergence(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Mean KL(reference || other) in nats: over the tokens of an answer, then over samples."""
    each = [(mine.exp() * (mine - theirs)).sum(-1).mean(-1) for mine, theirs in zip(reference, other, strict=True)]
    return float(torch.cat(each).mean())


def _told(model: nn.Module, inputs: Inputs, answer: int) -> Tensor:
    """The logits that answer, where the model is."""
    device = next(model.parameters()).device
    given = {name: each.to(device) for name, each in inputs.items()}
    return foretelling(model(**given, use_cache=False).logits, answer)


@torch.enable_grad()
def _seen(
    model: nn.Module, sites: Sequence[str], inputs: Inputs, answer: int, generator: torch.Generator, draws: int
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """What every linear reads (b, ..., in), and the gradients by what it puts out (b, ..., out), of each draw."""
    read: dict[str, Tensor] = {}
    put_out: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # Nothing before the first site has a gradient; from there on all outputs hang together.
        read[name] = args[0].detach()
        put_out[name] = output if output.requires_grad else output.requires_grad_()
        return put_out[name]

    with ExitStack() as hooks:
        for site in sites:
            hooks.callback(model.get_submodule(site).register_forward_hook(partial(keep, site)).remove)
        telling = _told(model, inputs, answer)
    p = telling.detach().softmax(-1)
    gradients: dict[str, list[Tensor]] = {name: [] for name in put_out}
    for _ in range(draws):
        signed = p.sqrt() * (2.0 * torch.randint(2, p.shape, generator=generator) - 1).to(p.device)
        z = signed - p * signed.sum(-1, keepdim=True)
        # Signs of different tokens are apart: the square of the sum is, in expectation, the sum of their squares.
        loss = (z * telling).sum() / p.shape[1] ** 0.5
        ys = list(put_out.values())
        found = torch.autograd.grad(loss, ys, allow_unused=True, retain_graph=True)
        for (name, y), gradient in zip(put_out.items(), found, strict=True):
            gradients[name].append(torch.zeros_like(y) if gradient is None else gradient)
    return read, gradients


@torch.no_grad()
def _effect(errors: Sequence[Tensor], x: Tensor, gradients: Sequence[Tensor], samples: int) -> Tensor:
    """a of one linear for each of its errors (out, in): x (..., in), gradients (..., out) -> (samples, draws, errors).

    Some decoders flatten what they read, (samples * tokens, in).
    """
    rows, columns = x.flatten(0, -2), []
    for error in errors:
        change = rows @ error.to(rows.device).T  # of what it puts out
        by_token = [(change * gradient.flatten(0, -2)).sum(-1) for gradient in gradients]
        columns.append(torch.stack([tokens.view(samples, -1).sum(-1) for tokens in by_token], -1))
    return torch.stack(columns, -1)

"""Rotating residual streams: a checkpoint read as an equivalent one whose streams have no outlier channels.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), sections 3 and 4. With an orthogonal R, all that writes a stream
writes R x in place of x, and all that reads it multiplies by W R^T in place of W. In between stands a norm. Its weight
and bias are folded into the linears that read it, and what is left commutes with R: an RMSNorm with every orthogonal
R, a LayerNorm with those for which R 1 = 1, as they keep the mean and the variance. So a LayerNorm stays one, where
QuaRot makes an RMSNorm of it, and the rotated model has the architecture of the original.

Between the values and the output linear of an attention, every head is rotated too: attention mixes tokens, not
channels. Between the two linears of a feedforward nothing is: R would have to be computed when the model runs. Where a
scale commutes with what stands there (a ReLU, a gate), the channels are evened out instead, by the weights alone
(cross-layer equalization; Nagel et al. 2019, arXiv 1906.04721, section 4.1).

CLIP's stream is written by a norm, `pre_layrnorm`, whose weight does not commute with R. There norms are folded and
values rotated, and the stream stays as it is.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmq.exporter.checkpoint import Checkpoint, Place, Transform
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import COMPONENTS, Component, Stage, Stream, family_of

FACTOR = 64  # rows of the largest Hadamard matrix that is multiplied by: larger ones are Kronecker products
CHUNK = 4096  # rows of an embedding that are in float64 at a time
UNTIED = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}

Read = Callable[[str], Tensor]  # a stored tensor by its in-memory name


@dataclass(frozen=True, eq=False)
class Rotation:
    """A random orthogonal R: x (..., n) -> R x along the last dimension, float64.

    H is the Kronecker product of `factors`, orthogonal matrices whose first row is constant; D holds the `signs`.
    R = H^T D spreads one channel evenly over all (QuaRot, section 3: a randomized Hadamard matrix). R = H^T D H, where
    D leaves the constant first row of H alone, keeps the mean: R 1 = 1. Its entries are about normal, of variance 1/n.
    """

    factors: tuple[Tensor, ...]
    signs: Tensor  # (n,)
    keeps_mean: bool

    def __call__(self, x: Tensor) -> Tensor:
        if self.keeps_mean:
            x = _times(x, [factor.T for factor in self.factors])
        return _times(x * self.signs, self.factors)

    def turn(self, x: Tensor, dim: int) -> Tensor:
        """Rotate every run of n entries along `dim`."""
        runs = x.movedim(dim, -1).unflatten(-1, (-1, len(self.signs)))
        return self(runs).flatten(-2).movedim(-1, dim)


def rotation(width: int, seed: int, keeps_mean: bool) -> Rotation:
    """The rotation of `width` channels that a seed decides; with R 1 = 1 if it `keeps_mean`."""
    power = width & -width  # the largest power of two that divides it
    factors = [_cosines(width // power)]
    while power > 1:
        factors.append(_sylvester(min(power, FACTOR)))
        power //= len(factors[-1])
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    if keeps_mean:
        signs[0] = 1
    return Rotation(tuple(factors), signs, keeps_mean)


def _sylvester(size: int) -> Tensor:
    """The Hadamard matrix of a power of two, made orthogonal."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < size:
        H = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return H / math.sqrt(size)


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, which has a constant first row whatever the size."""
    index = torch.arange(size, dtype=torch.float64)
    H = torch.cos(math.pi / size * index.unsqueeze(1) * (index + 0.5)) * math.sqrt(2 / size)
    H[0] = math.sqrt(1 / size)
    return H


def _times(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Rows x (..., n) times the Kronecker product of the factors, one factor after the other."""
    x = x.unflatten(-1, [len(factor) for factor in factors])
    for dim, factor in zip(range(-len(factors), 0), factors, strict=True):
        x = (x.movedim(dim, -1) @ factor).movedim(-1, dim)
    return x.flatten(-len(factors))


@dataclass(frozen=True)
class _Evened:
    """The scale s (n,) of the channels between two linears, float64, its geometric mean 1.

    A channel's values are about as large as the product of the norms of its rows in `makers` (a linear, and its gate),
    which read a norm of weight `gamma`; they are divided, and its column in `reader` multiplied, by the square root of
    how much larger they are than that column. Then both are equally hard to round.
    """

    makers: tuple[str, ...]
    reader: str
    gamma: str

    def __call__(self, read: Read) -> Tensor:
        gamma = read(self.gamma).double()
        values = torch.stack([(read(maker).double() * gamma).norm(dim=1) for maker in self.makers]).prod(0)
        columns = read(self.reader).double().norm(dim=0)
        alive = (values > 0) & (columns > 0)
        scale = torch.where(alive, values / columns, 1.0).sqrt()
        return torch.where(alive, scale / scale[alive].log().mean().exp(), 1.0)


@dataclass(frozen=True)
class _Turned:
    """What a weight W and a bias b become: rows W diag(gamma) columns^T, and rows (b + W beta).

    gamma and beta name the weight and the bias of the norm that W reads, where they are folded into it. `part`: which
    of how many stacked parts of the rows is rotated. Besides, its rows are divided by the scale `made`, and its columns
    multiplied by the scale `read`.
    """

    gamma: str | None = None
    beta: str | None = None
    columns: Rotation | None = None
    rows: Rotation | None = None
    part: tuple[int, int] = (0, 1)
    made: _Evened | None = None
    read: _Evened | None = None

    def weight(self, name: str, read: Read) -> Tensor:
        stored = read(name)
        chunks = [stored] if self.rows or self.made else stored.split(CHUNK)
        return torch.cat([self._weight(chunk.double(), read).float() for chunk in chunks])

    def _weight(self, weight: Tensor, read: Read) -> Tensor:
        if self.gamma:
            weight = weight * read(self.gamma).double()
        if self.read:
            weight = weight * self.read(read)
        if self.columns:
            weight = self.columns.turn(weight, -1)
        return self._turn_rows(weight, read)

    def bias(self, name: str, weight: str, read: Read) -> Tensor:
        bias = read(name).double()
        if self.beta:
            bias = bias + read(weight).double() @ read(self.beta).double()
        return self._turn_rows(bias, read).float()

    def _turn_rows(self, x: Tensor, read: Read) -> Tensor:
        if self.made:
            scale = self.made(read)
            x = x / (scale if x.ndim == 1 else scale.unsqueeze(1))
        if self.rows is None:
            return x
        index, count = self.part
        parts = list(x.chunk(count))
        parts[index] = self.rows.turn(parts[index], 0)
        return torch.cat(parts)


def _filled(value: float, name: str, read: Read) -> Tensor:
    return torch.full_like(read(name), value, dtype=torch.float32)


def _shift(columns: Rotation | None, gamma: str, beta: str, read: Read) -> Tensor:
    """R (beta / gamma): what a norm of weight 1 adds, where a linear that reads it has no bias to take W beta."""
    weight, bias = read(gamma).double(), read(beta).double()
    if bool(((weight == 0) & (bias != 0)).any()):
        raise VlmqError(f"{gamma}: is 0 where {beta} is not, which cannot be folded; leave the component out of rotate")
    shift = torch.where(bias == 0, bias, bias / weight)
    return (columns.turn(shift, 0) if columns else shift).float()


def rotate(checkpoint: Checkpoint, components: Collection[Component], seed: int = 0) -> Checkpoint:
    """A view of the checkpoint in which the streams of `components` are rotated, by rotations that `seed` decides.

    A tensor is transformed when it is read; its place and its dtype stay. A head that is tied to the embedding becomes
    a tensor of its own, as the last norm is folded into the one and not into the other. VlmqError for a component of
    which the family's table gives no stream.
    """
    for component in (component for component in COMPONENTS if component in components):
        stages = [stage for stage in checkpoint.family.stages if stage.component == component and stage.stream]
        if not stages:
            raise VlmqError(
                f"rotate: the {component} of this {checkpoint.family.name} has no residual stream that can be rotated; "
                f"leave {component} out"
            )
        for stage in stages:
            assert stage.stream is not None
            # Of a configuration alone, without tensors, only what it says changes.
            transforms = _transforms(checkpoint.places, stage, stage.stream, seed) if checkpoint.places else {}
            checkpoint = _untied(checkpoint, stage.stream)
            checkpoint = replace(checkpoint, transforms={**checkpoint.transforms, **transforms})
    return checkpoint


def _transforms(stored: Mapping[str, Place], stage: Stage, stream: Stream, seed: int) -> dict[str, Transform]:
    """Every tensor of a stream that is not read as it is stored."""
    whole = rotation(stream.width, seed, keeps_mean=stream.norm == "layer") if stream.writers else None
    transforms = {name: Transform(name, partial(_Turned(columns=whole).weight, name)) for name in stream.embeddings}
    turned: dict[str, _Turned] = defaultdict(_Turned)

    def turn(linear: str, **how: Any) -> None:
        turned[linear] = replace(turned[linear], **how)

    for norm, readers in _norms(stored, stage, stream).items():
        gamma, beta = f"{norm}.weight", f"{norm}.bias"
        absorbed = all(f"{reader}.bias" in stored for reader in readers)
        for reader in readers:
            turn(reader, columns=whole, gamma=gamma, beta=beta if beta in stored and absorbed else None)
        transforms[gamma] = Transform(gamma, partial(_filled, 1.0, gamma))
        if beta in stored:
            left = partial(_filled, 0.0, beta) if absorbed else partial(_shift, whole, gamma, beta)
            transforms[beta] = Transform(beta, left)
    head = rotation(stream.head, seed, keeps_mean=False)
    parts = stage.fused.get(stream.values[0], ("v",))
    for block in _blocks(stored, stage):
        for writer in stream.writers:
            turn(f"{block}.{writer}", rows=whole)
        makes, reads = (f"{block}.{linear}" for linear in stream.values)
        turn(makes, rows=head, part=(parts.index("v"), len(parts)))
        turn(reads, columns=head)
        for maker, evened in _inner(block, stage):
            turn(maker, made=evened)
            turn(evened.reader.removesuffix(".weight"), read=evened)
    for source in stream.sources:
        turn(source, rows=whole)

    for linear, how in turned.items():
        weight, bias = f"{linear}.weight", f"{linear}.bias"
        source = weight if weight in stored else stream.tied or weight
        transforms[weight] = Transform(source, partial(how.weight, source))
        if bias in stored:
            transforms[bias] = Transform(bias, partial(how.bias, bias, source))
    missing = sorted({transform.source for transform in transforms.values()} - set(stored))
    if missing:
        raise VlmqError(f"{stage.path}: the stream's {missing[0]} matches no tensor; correct families.py")
    return transforms


def _blocks(stored: Mapping[str, Place], stage: Stage) -> list[str]:
    prefix = f"{stage.path}."
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in stored if name.startswith(prefix)}
    return [prefix + number for number in sorted(numbers, key=int)]


def _norms(stored: Mapping[str, Place], stage: Stage, stream: Stream) -> dict[str, list[str]]:
    """Each norm that reads the stream, with the linears that read the norm."""
    linears = {linear for entry in stage.reads for linear in entry.linears}
    norms = {
        f"{block}.{entry.after}": [f"{block}.{linear}" for linear in entry.linears]
        for block in _blocks(stored, stage)
        for entry in stage.reads
        if entry.after is not None and entry.after not in linears
    }
    if stream.last is not None and stream.last.after is not None:
        norms[stream.last.after] = [name for linear in stream.last.linears for name in _matching(stored, linear)]
    return norms


def _inner(block: str, stage: Stage) -> Iterator[tuple[str, _Evened]]:
    """The linears of a block's feedforwards that make what another reads, with a scale that commutes in between."""
    made = {linear: entry for entry in stage.reads for linear in entry.linears}
    for entry in stage.reads:
        if entry.kind == "feedforward" and entry.after in made:
            makers = made[entry.after]
            names = tuple(f"{block}.{linear}.weight" for linear in makers.linears)
            yield (
                f"{block}.{entry.after}",
                _Evened(names, f"{block}.{entry.linears[0]}.weight", f"{block}.{makers.after}.weight"),
            )


def _matching(stored: Mapping[str, Place], pattern: str) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    return [name.removesuffix(".weight") for name in stored if fnmatchcase(name, f"{pattern}.weight")]


def _untied(checkpoint: Checkpoint, stream: Stream) -> Checkpoint:
    """The same tensors, the head among them, under a configuration that ties none."""
    config = copy.deepcopy(checkpoint.config)
    if stream.last is None or stream.tied is None:
        return checkpoint
    # BLIP-2 heeds its text model's entry, LLaVA its own, which is true where either is.
    if not (getattr(config, "tie_word_embeddings", False) or config.text_config.tie_word_embeddings):
        return checkpoint
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    places = checkpoint.places
    if places:
        head = f"{stream.last.linears[0]}.weight"  # on disk named as in memory
        places = {head: Place(places[stream.tied].file, head), **places}
    return replace(
        checkpoint,
        config=config,
        family=family_of(config),
        places=places,
        changes={**checkpoint.changes, **UNTIED},
    )

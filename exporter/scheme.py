"""A scheme: all that is decided about one site before any work, by the recipe, and read by the methods."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vlmq.kernels.grid import Grid


class Options(BaseModel):
    """How methods go about their work; each reads its own, and all have the value that serves most."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    awq_loss: Literal["gram", "block"] = "gram"  # what the search for a scale minimises: a linear's error, the block's
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = "search"  # smoothquant's migration strength
    damp: Annotated[float, Field(gt=0, le=1)] = 0.01  # gptq: share of the mean diagonal added to the Gram matrix
    act_order: bool = True  # gptq: the columns with the largest inputs first
    static_groups: bool = True  # gptq: scales fitted before any column is rounded
    clip: bool = True  # gptq: shrink static ranges where that lowers the error, as awq does
    gptaq: bool = False  # gptq: aim at the outputs of the full-precision model (arXiv 2504.02692)
    token_weights: Literal["none", "modality"] = "none"  # weigh vision tokens as the loss does (arXiv 2412.19509)
    biases: bool = False  # round biases too, on a grid of their own
    cross_layer: bool = True  # qvlm: search percentiles jointly in blocks of dependent layers, not layer by layer
    vision_tuning: bool = True  # qvlm: tune the ranges of the vision encoder
    threshold: float | None = None  # qvlm: h0 of eq. 7, in nats an element; None: the mean over the layers


@dataclass(frozen=True)
class Scheme:
    """What one site gets: a method, a grid for its weight and, where activations are quantized too, for its input."""

    method: str
    grid: Grid
    inputs: Grid | None = None
    rows: tuple[slice, ...] | None = None  # solved one by one; None: the whole linear at once
    options: Options = field(default_factory=Options)

"""A packed embedding as onnxruntime has it: what torch.onnx.export traces in place of a QuantizedEmbedding.

Its operator is GatherBlockQuantized, which reads the layout of kernels/nbits.py, the blocks of a row one after another.
Like kernels/graph_linear.py, it has no values outside of a tracer.

Source: onnxruntime, docs/ContribOperators.md, com.microsoft.GatherBlockQuantized.
"""

import torch
from torch import Tensor, nn

from vlmq.kernels import nbits
from vlmq.kernels.embedding import QuantizedEmbedding
from vlmq.kernels.graph_linear import MICROSOFT, symbolic
from vlmq.kernels.grid import Grid


class GraphEmbedding(nn.Module):
    """y (..., width) = W[ids]: qweight uint8 (vocabulary, bytes), scales and qzeros as in kernels/nbits.py."""

    def __init__(self, embedding: QuantizedEmbedding, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the graph. In float16 scales are, too; in float32 they are cast when the graph is finished."""
        super().__init__()
        packed = embedding.packed
        self.grid, self.solved, self.dtype = packed.grid, packed.scales.dtype, dtype
        self.embedding_dim = embedding.embedding_dim
        self.container, self.block = packed.container, packed.block
        self.qweight: Tensor
        self.scales: Tensor
        self.qzeros: Tensor | None
        # Not a tied head's own tensors: the tracer would call them by its name.
        scales = packed.scales.clone()
        self.register_buffer("qweight", packed.qweight.flatten(1))
        self.register_buffer("scales", scales.half() if dtype == torch.float16 else scales)
        self.register_buffer("qzeros", None if packed.qzeros is None else packed.qzeros.clone())

    def forward(self, ids: Tensor) -> Tensor:
        zeros = () if self.qzeros is None else (self.qzeros,)
        attributes = {"bits": self.container, "block_size": self.block, "gather_axis": 0, "quantize_axis": 1}
        shape = (*ids.shape, self.embedding_dim)
        tensors = (self.qweight, ids, self.scales, *zeros)
        return symbolic(f"{MICROSOFT}::GatherBlockQuantized", tensors, attributes, shape, self.dtype)


def has_operator(grid: Grid, columns: int) -> bool:
    """Whether the operator can read such a table: it knows no block that is part empty, as a grid of rows may have."""
    return columns % nbits.block_of(grid, columns) == 0

"""An embedding that keeps its table packed, and dequantizes only the rows that are looked up.

The layout is that of kernels/nbits.py, whose every tensor has a row for each row of the table. So an output head that
is tied to the embedding, a `QuantizedLinear` made of the same `NBitsWeight`, shares its memory.
"""

import torch
from torch import Tensor, nn

from vlmq.kernels import nbits
from vlmq.kernels.grid import QuantizedWeight
from vlmq.kernels.nbits import NBitsWeight


class QuantizedEmbedding(nn.Module):
    """y (..., width) = W[ids], ids (...) int64, W (vocabulary, width) on a grid.

    Buffers `qweight`, `scales`, `qzeros` have the shapes of kernels/nbits.py; scales keep the dtype they were solved in
    whatever the model is cast to, and y has the dtype that the model is cast to, `dtype` at first.
    """

    def __init__(self, packed: NBitsWeight, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.grid = packed.grid
        self.num_embeddings = packed.qweight.shape[0]
        self.embedding_dim = packed.columns
        self.qweight: Tensor
        self.scales: Tensor
        self.qzeros: Tensor | None
        self.like: Tensor
        self.register_buffer("qweight", packed.qweight)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("qzeros", packed.qzeros)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # holds nothing but a dtype

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> "QuantizedEmbedding":
        return cls(nbits.pack(weight), dtype)

    def quantized(self) -> QuantizedWeight:
        """The table as it was solved: the same codes, scale and zero, bit for bit."""
        return nbits.unpack(self.packed)

    @property
    def packed(self) -> NBitsWeight:
        """The whole table, in the module's own memory."""
        return NBitsWeight(self.qweight, self.scales, self.qzeros, self.embedding_dim, self.grid)

    def dense(self) -> nn.Embedding:
        """The same embedding with its whole table dequantized."""
        weight = nbits.dequantize(self.packed).to(self.like.dtype)
        return nn.Embedding.from_pretrained(weight, freeze=True)

    def forward(self, ids: Tensor) -> Tensor:
        which = ids.flatten()
        qzeros = None if self.qzeros is None else self.qzeros[which]
        rows = NBitsWeight(self.qweight[which], self.scales[which], qzeros, self.embedding_dim, self.grid)
        return nbits.dequantize(rows).to(self.like.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.grid}"

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

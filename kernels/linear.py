"""A linear layer that computes from packed codes and never holds the full-precision weight between calls.

Two ways to the same product:

* reference   dequantize in float32, multiply in the input's dtype: anywhere, any bits, any group;
* fast        torch's int4 product for CPUs, after `to_fast()`, for bfloat16 inputs of a layer that `has_fast`.

Both round the input first, where the layer has a grid for it. A graph for onnxruntime has a GraphLinear in its place
(kernels/graph_linear.py).

The layer holds its codes once: `to_fast()` replaces MatMulNBits' layout by torch's, `to_portable()` undoes it.

Why bfloat16 only: torch 2.13 takes float32 and float16 too, but vectorizes bfloat16 alone. A 2048 x 2048 weight times
one row took 0.2 ms in bfloat16, 0.7 ms as a dense float32 product, and 6.6 and 10 ms in int4 with the other two.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmq.kernels import nbits
from vlmq.kernels.grid import TENSOR, Grid, Limits, QuantizedWeight, round_input
from vlmq.kernels.nbits import NBitsWeight

FAST_BLOCKS = (32, 64, 128, 256)
FAST_ROWS = 16  # torch's int4 layout wants a multiple of so many rows of the weight


class QuantizedLinear(nn.Module):
    """y (..., out) = x (..., in) W^T + bias, W on a grid, and x too where `inputs` is one.

    Buffers `qweight`, `scales`, `qzeros` have the shapes of kernels/nbits.py; scales keep the dtype they were solved
    in whatever the model is cast to. `bias` is a parameter or None. `limits` are those of `round_input`. ValueError
    where `inputs` is a TENSOR grid without limits, or has groups that do not divide the columns.
    """

    weight: None = None  # T5 asks a linear for it, to read its dtype where it is a tensor

    def __init__(
        self,
        packed: NBitsWeight,
        bias: Tensor | None = None,
        inputs: Grid | None = None,
        limits: Limits | None = None,
    ) -> None:
        super().__init__()
        if inputs is not None:
            inputs.width(packed.columns)
            if inputs.group == TENSOR and limits is None:
                raise ValueError("one range for a whole input must be known beforehand; give its limits")
        self.inputs = inputs
        self.limits = limits
        self.grid = packed.grid
        self.block = packed.block
        self.out_features = packed.qweight.shape[0]
        self.in_features = packed.columns
        self.qweight: Tensor | None
        self.scales: Tensor
        self.qzeros: Tensor | None
        self.int4: Tensor | None
        self.int4_scales: Tensor | None
        self.register_buffer("qweight", packed.qweight)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("qzeros", packed.qzeros)
        self.register_buffer("int4", None, persistent=False)
        self.register_buffer("int4_scales", None, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        inputs: Grid | None = None,
        limits: Limits | None = None,
    ) -> "QuantizedLinear":
        return cls(nbits.pack(weight), bias, inputs, limits)

    def quantized(self) -> QuantizedWeight:
        """The weight as it was solved: the same codes, scale and zero, bit for bit."""
        return nbits.unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting():
            raise ValueError("a traced reference would hold dense weights; export with vlmq.formats.onnx_graphs")
        if self.inputs is not None:
            x = round_input(x, self.inputs, self.limits)
        if self.int4 is not None and self.int4_scales is not None and x.dtype == torch.bfloat16:
            rows = x.reshape(-1, self.in_features)
            product = _int4_product(rows, self.int4, self.block, self.int4_scales).view(*x.shape[:-1], -1)
        else:
            return F.linear(x, nbits.dequantize(self.packed).to(x.dtype), self.bias)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        inputs = "" if self.inputs is None else f", inputs={self.inputs}, limits={self.limits}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.grid}{inputs}"

    @property
    def has_fast(self) -> bool:
        """Whether torch's int4 product takes this weight: a 4-bit container, whole blocks of 32 or more, on a CPU."""
        return (
            nbits.CONTAINERS[self.grid.bits] == 4
            and self.block in FAST_BLOCKS
            and self.in_features % self.block == 0
            and self.out_features % FAST_ROWS == 0
            and self.scales.device.type == "cpu"
        )

    def to_fast(self) -> None:
        """Put the codes into torch's int4 layout, where the layer `has_fast`; otherwise nothing changes.

        For a model that computes in bfloat16, whose accuracy it keeps. Inputs of another dtype still get the reference,
        slowly: the codes are first read back.
        """
        if self.qweight is None or not self.has_fast:
            return
        # as they lie in their container: w = (codes - zeros) * scales = (codes - 8) * scales + (8 - zeros) * scales
        codes = nbits.from_bytes(self.qweight.flatten(1), 4)
        scales = self.scales.float()
        offsets = torch.zeros_like(scales)
        if self.qzeros is not None:
            offsets = (8 - nbits.from_bytes(self.qzeros, 4)[:, : scales.shape[1]].float()) * scales
        self.int4_scales = torch.stack((scales, offsets), dim=-1).transpose(0, 1).bfloat16().contiguous()
        self.int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        self.qweight = None

    def to_portable(self) -> None:
        """Undo `to_fast()`."""
        if self.int4 is None:
            return
        self.qweight = self.packed.qweight
        self.int4 = self.int4_scales = None

    @property
    def packed(self) -> NBitsWeight:
        """The weight in MatMulNBits' layout, the layer's own tensors where it holds them so."""
        qweight = self.qweight
        if qweight is None:
            # The int4 layout differs between processors; a product of the identity with scale 1 and offset 0 reads
            # codes - 8 from any of them, exactly.
            scales = torch.tensor([1.0, 0.0]).bfloat16().expand(self.scales.shape[1], self.out_features, 2).contiguous()
            assert self.int4 is not None  # the codes are in one layout or the other
            columns = _int4_product(torch.eye(self.in_features).bfloat16(), self.int4, self.block, scales)
            qweight = nbits.to_bytes((columns.T + 8).to(torch.uint8), 4).view(*self.scales.shape, -1)
        return NBitsWeight(qweight, self.scales, self.qzeros, self.in_features, self.grid)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self.to_portable()  # torch's int4 layout exists on a CPU only
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self


def _int4_product(x: Tensor, codes: Tensor, block: int, scales: Tensor) -> Tensor:
    """x (rows, in) W^T, W = (codes - 8) * scale + offset; codes in torch's int4 layout, scales (blocks, out, 2)."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), codes, block, scales)

"""A quantized linear as onnxruntime has it: what torch.onnx.export traces in place of a QuantizedLinear.

Its forward only tells the tracer which operator reads which tensors (kernels/products.py); outside of a tracer it has
no values. The operators of domain `vlmq` are model-local functions, whose bodies are in kernels/functions.py.
"""

import torch
from torch import Tensor, nn

from vlmq.kernels import products
from vlmq.kernels.grid import TENSOR, Grid, Limits, between
from vlmq.kernels.linear import QuantizedLinear
from vlmq.kernels.products import Product

MICROSOFT, OURS = "com.microsoft", "vlmq"
MIDDLE = 128  # what stands for 0 in the uint8 codes of an input on a symmetric grid


class GraphLinear(nn.Module):
    """y (..., out) = x (..., in) W^T + bias: buffers as `products.pack` has them, and those of the input's range."""

    weight: None = None  # as QuantizedLinear's

    def __init__(self, linear: QuantizedLinear, product: Product, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the graph. In float16 scales are, too; in float32 they are cast when the graph is finished."""
        super().__init__()
        packed = linear.packed
        self.product = product
        self.grid = linear.grid
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.inputs, self.limits = linear.inputs, linear.limits
        self.bias = linear.bias
        self.qweight: Tensor
        self.scales: Tensor
        self.qzeros: Tensor
        self.qweight_high: Tensor
        self.input_scale: Tensor
        self.input_zero: Tensor
        self.sums: Tensor
        for name, tensor in products.pack(packed, product.kind).items():
            self.register_buffer(name, tensor.half() if name == "scales" and dtype == torch.float16 else tensor)
        self.solved = linear.scales.dtype
        if linear.inputs is not None and linear.inputs.group == TENSOR:
            scale, zero = _static(linear.inputs, linear.limits)
            self.register_buffer("input_scale", scale)
            self.register_buffer("input_zero", zero)
        if product.kind == products.INTEGERS and linear.inputs is not None and _uneven_tokens(linear.inputs):
            weight = linear.quantized()
            self.register_buffer("sums", (weight.codes.int() - weight.zero).sum(1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None and self.limits is not None and self.inputs.group != TENSOR:
            x = x.clamp(self.limits.low, self.limits.high)
        if self.product.kind == products.INTEGERS:
            y = self._integers(x)
        else:
            y = self._blocks(self._rounded(x) if self.product.simulated else x)
        return y if self.bias is None else y + self.bias

    def _integers(self, x: Tensor) -> Tensor:
        assert self.inputs is not None
        weight = (self.qweight, self.scales, *self._some("qzeros"))
        if self.inputs.group == TENSOR:
            return self._node("TensorMatMul", (x, self.input_scale, self.input_zero, *weight), _ends(self.inputs))
        if self.inputs.symmetric:
            return self._node("TokenMatMul", (x, *weight), {"top": float(self.inputs.levels // 2 - 1)})
        return self._node("UnevenTokenMatMul", (x, self.sums, *weight), {"top": float(self.inputs.levels - 1)})

    def _rounded(self, x: Tensor) -> Tensor:
        """The input on its grid, in floating point."""
        assert self.inputs is not None
        if self.inputs.group == TENSOR:
            return self._round("RoundTensor", (x, self.input_scale, self.input_zero), _ends(self.inputs))
        groups = {"groups": [-1, self.inputs.width(self.in_features)]}
        if self.inputs.symmetric:
            return self._round("RoundGroups", (x,), {**groups, "top": float(self.inputs.levels // 2 - 1)})
        return self._round("RoundUnevenGroups", (x,), {**groups, "top": float(self.inputs.levels - 1)})

    def _blocks(self, x: Tensor) -> Tensor:
        containers = self.product.containers
        size = {
            "K": self.in_features,
            "N": self.out_features,
            "block_size": self.qweight.shape[-1] * 8 // containers[0],
            "accuracy_level": self.product.level,
        }
        if len(containers) == 1:
            tensors = (x, self.qweight, self.scales, *self._some("qzeros"))
            return self._node("MatMulNBits", tensors, {**size, "bits": containers[0]}, MICROSOFT)
        tensors = (x, self.qweight, self.qweight_high, self.scales, self.qzeros, *self._some("qzeros_high"))
        return self._node("SplitMatMul", tensors, {**size, "high_bits": containers[1]})

    def _some(self, name: str) -> tuple[Tensor, ...]:
        found = getattr(self, name, None)
        return () if found is None else (found,)

    def _node(self, operator: str, tensors: tuple[Tensor, ...], attributes: dict, domain: str = OURS) -> Tensor:
        shape = (*tensors[0].shape[:-1], self.out_features)
        return symbolic(f"{domain}::{operator}", tensors, attributes, shape, tensors[0].dtype)

    def _round(self, operator: str, tensors: tuple[Tensor, ...], attributes: dict) -> Tensor:
        return symbolic(f"{OURS}::{operator}", tensors, attributes, tensors[0].shape, tensors[0].dtype)


def symbolic(operator: str, tensors: tuple[Tensor, ...], attributes: dict, shape: tuple, dtype: torch.dtype) -> Tensor:
    """What the tracer takes for a node of the operator; its one output has the shape and the dtype."""
    return torch.onnx.ops.symbolic(operator, tensors, attributes, dtype=dtype, shape=shape, version=1)


def _uneven_tokens(inputs: Grid) -> bool:
    return not inputs.symmetric and inputs.group != TENSOR


def _static(inputs: Grid, limits: Limits | None) -> tuple[Tensor, Tensor]:
    """Scale float32 and zero uint8, scalars, of the one range of an input; a symmetric grid's zero is MIDDLE."""
    assert limits is not None  # QuantizedLinear has seen to it
    low, high = torch.tensor(limits.low), torch.tensor(limits.high)
    scale, zero = between(low, high, inputs, torch.float32)
    return scale, torch.full_like(zero, MIDDLE) if inputs.symmetric else zero


def _ends(inputs: Grid) -> dict[str, float]:
    """The least and the greatest code of an input with one range."""
    if inputs.symmetric:
        half = inputs.levels // 2
        return {"least": float(MIDDLE - half), "most": float(MIDDLE + half - 1)}
    return {"least": 0.0, "most": float(inputs.levels - 1)}

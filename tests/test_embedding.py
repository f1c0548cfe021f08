"""The packed embedding against torch's own on the dequantized table."""

import pytest
import torch
from torch.nn import functional as F

from vlmq.kernels import nbits
from vlmq.kernels.embedding import QuantizedEmbedding
from vlmq.kernels.grid import BITS, ROW, TENSOR, Grid, to_grid
from vlmq.kernels.linear import QuantizedLinear

GRIDS = [
    *(Grid(bits, 32, symmetric) for bits in BITS for symmetric in (True, False)),
    Grid(4, ROW),
    Grid(3, 48, symmetric=False),
    Grid(8, TENSOR, symmetric=False),
]
IDS = torch.tensor([[3, 0, 49], [7, 7, 21]])


def _table(grid, rows=50, columns=96):
    return to_grid(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)), grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_looking_up_packed_rows_is_looking_up_the_dequantized_table(grid):
    table = _table(grid)
    scale, zero = (part.float().repeat_interleave(96 // part.shape[1], 1) for part in (table.scale, table.zero))
    found = QuantizedEmbedding.from_weight(table)(IDS)
    assert torch.equal(found, F.embedding(IDS, (table.codes - zero) * scale))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_packed_table_is_the_one_that_was_solved(grid):
    table = _table(grid)
    found = QuantizedEmbedding.from_weight(table).quantized()
    assert all(torch.equal(getattr(found, part), getattr(table, part)) for part in ("codes", "scale", "zero"))


def test_only_the_rows_looked_up_are_dequantized(monkeypatch):
    sizes = []
    dequantize = nbits.dequantize
    monkeypatch.setattr(nbits, "dequantize", lambda packed: sizes.append(len(packed.qweight)) or dequantize(packed))
    QuantizedEmbedding.from_weight(_table(Grid(4, 32)))(IDS)
    assert sizes == [IDS.numel()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_gets_rows_of_its_dtype_from_scales_as_they_were_solved(dtype):
    table = _table(Grid(4, 32))
    embedding = QuantizedEmbedding.from_weight(table).to(dtype)
    assert embedding.scales.dtype == torch.float16
    assert torch.equal(embedding(IDS), table.dequantize().to(dtype)[IDS])


def test_a_tied_head_shares_the_codes():
    packed = nbits.pack(_table(Grid(4, 32)))
    embedding = QuantizedEmbedding(packed)
    head = QuantizedLinear(embedding.packed)
    assert embedding.qweight.data_ptr() == head.qweight.data_ptr()
    assert torch.equal(head.quantized().dequantize(), embedding.dense().weight)


def test_a_packed_table_is_as_small_as_its_bits():
    embedding = QuantizedEmbedding.from_weight(_table(Grid(4, 32)))
    assert sum(buffer.nbytes for buffer in embedding.buffers()) == 50 * (96 // 2 + 3 * 2)

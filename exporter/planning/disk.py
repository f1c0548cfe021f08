"""How much disk an export takes, at its output's place: while it runs, and when it is done."""

from collections.abc import Iterator

import torch

from vlmq.exporter import ends
from vlmq.exporter.inspection import inspection, stored_dtype
from vlmq.exporter.planning.workload import FLOAT, Need, Part, Workload
from vlmq.exporter.scheme import Scheme
from vlmq.exporter.walk import Site
from vlmq.formats.shards import MAX_SHARD_BYTES
from vlmq.kernels import nbits
from vlmq.kernels.graph_embedding import has_operator
from vlmq.kernels.products import Kind, packed_bytes, product, unsaid

REMEDY = "free some, or choose another --output"


def needs(work: Workload) -> tuple[Need, ...]:
    """The most that each step of an export holds on disk."""
    written = safetensors(work)
    tensors = Part("safetensors", written, "all tensors, quantized or not")
    quantizing = (
        tensors,
        Part("a shard", min(written, MAX_SHARD_BYTES), "is there twice while it is finished"),
        *_kept(work),
    )
    found = [Need("quantizing", quantizing, REMEDY)]
    if work.formats != "safetensors":
        parts = (tensors, Part("ONNX graphs", graphs(work), "and the weights beside them"))
        found.append(Need("writing ONNX graphs", parts, f"choose --format safetensors, {REMEDY}"))
    return tuple(found)


def _kept(work: Workload) -> tuple[Part, ...]:
    """For a stopped run to go on from, where it looks at samples."""
    if not work.samples:
        return ()
    return (
        Part("the journal", work.codes, "what is finished, a byte for each code, for a stopped run to go on from"),
        Part("activations", work.activations_on_disk, "hidden states, for the same"),
    )


def safetensors(work: Workload) -> int:
    """Bytes of all tensors that an export writes, without the files' headers."""
    return inspection(work.checkpoint, work.skeleton, work.walk, work.assignment).after


def graphs(work: Workload) -> int:
    """Bytes of the weights of the ONNX graphs."""
    return packed_in_graphs(work) + dense_in_graphs(work) * graph_float(work)


def graph_float(work: Workload) -> int:
    """Bytes of a float in the graphs, which have no bfloat16."""
    return 2 if stored_dtype(work.checkpoint) == torch.float16 else FLOAT


def packed_in_graphs(work: Workload) -> int:
    """Bytes of what is packed in the graphs."""
    scale = graph_float(work)
    linears = sum(
        packed_bytes((site.rows, site.columns), scheme.grid, _kind(work, scheme), scale)
        for site, scheme in _packed(work)
    )
    return linears + sum(_packed_ends(work).values())


def _packed_ends(work: Workload) -> dict[str, int]:
    """Bytes in the graphs of a packed token embedding, and of a head that is tied to it, by the weight's name."""
    found, scale, tied = {}, graph_float(work), ends.find(work.skeleton)
    for site, scheme in _quantized(work):
        if site.kind != "embedding":
            continue
        shape = (site.rows, site.columns)
        if has_operator(scheme.grid, site.columns):
            found[f"{site.name}.weight"] = nbits.packed_bytes(shape, scheme.grid, scale)
        if tied.tied:
            found[f"{tied.head}.weight"] = packed_bytes(shape, scheme.grid, _kind(work, scheme), scale)
    return found


def repacked_in_graphs(work: Workload) -> int:
    """Bytes of those that PyTorch packs in another way, so that both are there while a graph is made."""
    scale = graph_float(work)
    return sum(
        nbits.packed_bytes((site.rows, site.columns), scheme.grid, scale)
        for site, scheme in _packed(work)
        if _kind(work, scheme) != unsaid(scheme.grid)
    )


def _kind(work: Workload, scheme: Scheme) -> Kind:
    return product(scheme.grid, scheme.inputs, work.accuracy_level).kind


def _packed(work: Workload) -> Iterator[tuple[Site, Scheme]]:
    """The linears that are packed: not an embedding, nor a linear of which some rows stay dense."""
    for site, scheme in _quantized(work):
        dense = scheme.rows and sum(rows.stop - rows.start for rows in scheme.rows) < site.rows
        if site.kind != "embedding" and not dense:
            yield site, scheme


def _quantized(work: Workload) -> Iterator[tuple[Site, Scheme]]:
    for block in work.walk.blocks:
        for entry in block.inputs:
            yield from work.quantized(entry)


def dense_in_graphs(work: Workload) -> int:
    """Elements of the other parameters of the graphs: a tied head has its own weight there, a dead block none."""
    packed = {f"{site.name}.weight" for site, _ in _packed(work)} | set(_packed_ends(work))
    head = f"{ends.find(work.skeleton).head}.weight"
    once = {name for name, _ in work.skeleton.named_parameters()} | {head}
    return sum(count for name, count in work.sizes.items() if name in once - packed and not _is_dead(name, work))


def _is_dead(name: str, work: Workload) -> bool:
    """Whether a parameter is of a block whose output is never read."""
    lists = tuple(f"{stage.path}." for stage in work.checkpoint.family.stages if not stage.single)
    return name.startswith(lists) and not name.startswith(tuple(f"{block.name}." for block in work.walk.blocks))

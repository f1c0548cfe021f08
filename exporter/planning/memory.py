"""How much memory an export will hold, step by step, as sums of named parts.

One block is in memory at a time (DESIGN.md, promise 7); what it is calibrated on waits on disk beyond a limit. Steps
that need the whole model are named as such.
"""

from collections.abc import Iterable, Iterator

from vlmq.exporter.calibration import ROWS
from vlmq.exporter.evaluation.answers import BATCH as ANSWERED_TOGETHER
from vlmq.exporter.evaluation.worker import fitting, sample_bytes
from vlmq.exporter.methods.qvlm import MOST
from vlmq.exporter.methods.registry import METHODS
from vlmq.exporter.planning import disk
from vlmq.exporter.planning.working import to_rescale, to_solve
from vlmq.exporter.planning.workload import FLOAT, Need, Part, Workload
from vlmq.exporter.quantize import needs_reference
from vlmq.exporter.solving import is_asymmetric
from vlmq.exporter.vision_tuning import BATCH as TUNED_TOGETHER
from vlmq.exporter.vision_tuning import is_tuned
from vlmq.exporter.walk import Block, Input

TRACER = 94 * 10**6  # bytes that torch's ONNX exporter takes for itself, and
TRACED = 5_400_000  # for the nodes of a block; measured on models of 6 to 36 blocks

MORE = "close other programs, or take a machine with more"


def needs(work: Workload, base: int) -> tuple[Need, ...]:
    """The most that each step of an export holds in memory. base: bytes of the process before the work begins."""
    start = Part("Python and its libraries", base, "resident when this was planned")
    return tuple(_steps(work, start))


def _steps(work: Workload, base: Part) -> Iterator[Need]:
    blocks = [block for block in work.walk.blocks if block.sites[0].kind != "embedding"]
    if any(scheme.options.token_weights == "modality" for scheme in work.schemes):
        speaking = [block for block in blocks if block.component == "language"]
        parts = (base, _whole(work), _differentiated(work, speaking, 1), _waiting(work))
        yield Need("weighing tokens", parts, f"set --option token_weights=none, {MORE}")
    if any(is_tuned(work.assignment.schemes.get(site.name)) for site in work.walk.sites if site.component == "vision"):
        parts = (base, _whole(work), _differentiated(work, blocks, min(work.samples, TUNED_TOGETHER)), _waiting(work))
        yield Need("tuning the vision encoder", parts, f"set --option vision_tuning=false, {MORE}")
    if work.samples:
        parts = (base, _outside(work), _batch(work, blocks[-1]), _waiting(work))
        yield Need("catching the inputs of a stage", parts, MORE)
        yield _largest(Need(f"calibrating {block.name}", _calibrating(work, base, block), MORE) for block in blocks)
    solved = (Need(f"solving {block.name}", _solving(work, base, block), _cheaper(work)) for block in work.walk.blocks)
    yield _largest(solved)
    if work.formats != "safetensors":
        yield Need("writing ONNX graphs", (base, *_graphs(work)), f"choose --format safetensors, {MORE}")
    if work.gate and work.formats != "onnx":
        yield Need("loading it with transformers", (base, *_loading(work, base)), f"pass --no-gate, {MORE}")
    if work.verify:
        yield Need("verifying", (base, *_verifying(work, base)), f"pass --no-verify, {MORE}")


def _largest(needs: Iterable[Need]) -> Need:
    return max(needs, key=lambda need: need.bytes)


def _cheaper(work: Workload) -> str:
    return f"choose --method rtn, {MORE}" if work.samples else MORE


def _calibrating(work: Workload, base: Part, block: Block) -> tuple[Part, ...]:
    return (base, *_block(work, block), _statistics(work, block), _batch(work, block), _waiting(work))


def _solving(work: Workload, base: Part, block: Block) -> tuple[Part, ...]:
    codes = sum(site.rows * site.columns for entry in block.inputs for site, _ in work.quantized(entry))
    statistics, copies = max(_moments(work, block), key=sum)
    return (
        base,
        *_block(work, block),
        Part("statistics", statistics, "Gram matrices of the inputs that are not solved yet"),
        Part("codes", codes, "a byte for each weight until the block is written"),
        Part("working copies", copies, "what the method computes with, on its costliest input"),
        _waiting(work),
    )


def _moments(work: Workload, block: Block) -> Iterator[tuple[int, int]]:
    """Bytes of statistics and of working copies: while scales are searched, then as one input after the other goes."""
    sizes = [_of_an_input(work, entry) if work.samples else 0 for entry in block.inputs]
    for index, entry in enumerate(block.inputs):
        yield sum(sizes), to_rescale(entry, work)
        yield sum(sizes[index:]), to_solve(entry, work)


def _block(work: Workload, block: Block) -> tuple[Part, Part]:
    searched = [
        scheme
        for entry in block.inputs
        for _, scheme in work.quantized(entry)
        if METHODS[scheme.method].percentiles and scheme.options.cross_layer and scheme.inputs
    ]
    times = MOST if searched and work.samples else 1
    why = f"in float32, with {times - 1} more that are searched with it" if times > 1 else "in float32"
    return (
        Part("the block", times * work.elements(block) * FLOAT, why),
        Part("a tensor in flight", work.largest(block) * work.stored, "as stored, while it is read or written"),
    )


def _statistics(work: Workload, block: Block) -> Part:
    count = sum(_of_an_input(work, entry) for entry in block.inputs) if work.samples else 0
    return Part("statistics", count, "a Gram matrix in float32 for each distinct input")


def _of_an_input(work: Workload, entry: Input) -> int:
    columns = entry.sites[0].columns
    schemes = [scheme for _, scheme in work.quantized(entry)]
    matrices = 2 if any(is_asymmetric(scheme) for scheme in schemes) else 1
    rows = ROWS if any(scheme.inputs for scheme in schemes) else 0
    return (matrices * columns + rows) * columns * FLOAT


def _batch(work: Workload, block: Block) -> Part:
    read = sum(entry.sites[0].columns for entry in block.inputs) * (2 if needs_reference(work.assignment) else 1)
    made = max(sum(site.rows for site in entry.sites if site.kind != "head") for entry in block.inputs)
    counted = max(entry.sites[0].columns for entry in block.inputs)
    count = work.batch * work.tokens(block) * (read + made + counted) * FLOAT
    return Part("a batch", count, f"{work.batch} samples in a block: what its linears read and make")


def _waiting(work: Workload) -> Part:
    count = min(work.activations, work.activation_memory)
    return Part("hidden states", count, "what all samples have between blocks, up to the limit; the rest is on disk")


def _outside(work: Workload) -> Part:
    inside = tuple(f"{name}." for name in (*(block.name for block in work.walk.blocks), *work.walk.kept))
    count = sum(count for name, count in work.sizes.items() if not name.startswith(inside))
    return Part("outside the blocks", count * FLOAT, "embeddings and norms, float32, until the inputs are caught")


def _whole(work: Workload) -> Part:
    return Part("the whole model", work.parameters * FLOAT, "in float32, because gradients go through it")


def _differentiated(work: Workload, blocks: list[Block], samples: int) -> Part:
    """What every linear of the blocks reads and makes is kept until its gradient is known."""
    widths = sum(
        work.tokens(block) * (entry.sites[0].columns + sum(site.rows for site in entry.sites))
        for block in blocks
        for entry in block.inputs
    )
    return Part("activations", samples * widths * FLOAT, f"of {samples} samples in all blocks, for their gradients")


def _graphs(work: Workload) -> Iterator[Part]:
    dense = disk.dense_in_graphs(work)
    yield Part("packed linears", disk.packed_in_graphs(work), "as the graphs hold them")
    yield Part("some of them again", disk.repacked_in_graphs(work), "as PyTorch holds them, where that differs")
    yield Part("other weights", dense * FLOAT, "in float32, as the model computes")
    yield Part("other weights again", dense * disk.graph_float(work), "as the graphs store them")
    yield Part("the tracer", TRACER + len(work.walk.blocks) * TRACED, "nodes of three graphs")


def _loading(work: Workload, base: Part) -> tuple[Part, ...]:
    return (
        Part("the export", work.parameters * FLOAT, "whole, dense and in float32, in a process of its own"),
        Part("that process", base.bytes, "its Python and libraries"),
    )


def _verifying(work: Workload, base: Part) -> tuple[Part, ...]:
    config = work.checkpoint.config
    batch = fitting(config, ANSWERED_TOGETHER) * sample_bytes(config)
    return (
        Part("the reference", work.parameters * FLOAT, "whole and in float32, in a process of its own"),
        Part("that process", base.bytes, "its Python and libraries"),
        Part("its batch", batch, "caches and logits of the samples that are answered together"),
    )

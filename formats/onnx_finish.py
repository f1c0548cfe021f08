"""What is done to a traced graph before it is written: clean it, name its weights, store them small.

* Traces of the tracing machine (source lines, file paths) are removed: same input, same bytes, wherever it ran.
* A weight is called what it is called in the model.
* float32 tensors that float16 holds exactly are stored in float16 behind a Cast. onnxruntime folds the Cast when it
  loads the graph: the file is half as large and the resident memory the same. A table that is looked up is cast after
  the look-up, and stays small in memory too.
* The functions of domain `vlmq` that its nodes call come with it.
"""

import numpy as np
import onnx
import onnx_ir as ir

from vlmq.formats.onnx_modules import MODEL
from vlmq.kernels import functions
from vlmq.kernels.graph_linear import OURS

INLINE_BYTES = 1024  # transformers.js infers shapes from small tensors, so they must be inside the graph file
FLOATING = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
TOTAL = "total_sequence_length"


def finish(model: ir.Model, shrink: bool = True) -> None:
    """Clean and name the graph in place; `shrink` a float32 one."""
    _strip(model)
    for name in list(model.graph.initializers):
        if name.startswith(f"{MODEL}."):
            rename(model.graph, name, name.removeprefix(f"{MODEL}."))
    for output in model.graph.outputs:
        # the tracer says past_sequence_length + sequence_length, in either order
        output.shape = ir.Shape([TOTAL if "+" in str(size) else size for size in output.shape or ()])
    for value in list(model.graph.initializers.values()) if shrink else ():
        _store_small(model.graph, value)
    _bring_functions(model)


def _bring_functions(model: ir.Model) -> None:
    for name in sorted({node.op_type for node in model.graph if node.domain == OURS}):
        function = ir.serde.deserialize_function(onnx.parser.parse_function(functions.text(name)))
        model.functions[function.identifier()] = function
        model.graph.opset_imports.update({OURS: 1, **function.opset_imports})


def _strip(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.doc_string = None
    model.producer_name, model.producer_version = "vlmq", None
    model.graph.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.name = "main_graph"
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def rename(graph: ir.Graph, old: str, new: str) -> None:
    """Call an initializer otherwise."""
    value = graph.initializers.pop(old)
    value.name = new
    if value.const_value is not None:
        value.const_value.name = new
    graph.initializers[new] = value


def _store_small(graph: ir.Graph, value: ir.Value) -> None:
    """Keep a floating initializer in float16 if that loses nothing; whoever reads it gets float32 from a Cast."""
    if value.const_value is None or value.const_value.dtype not in FLOATING:
        return
    array = value.const_value.numpy()
    full = array.astype(np.float32)
    if full.nbytes > INLINE_BYTES:
        with np.errstate(over="ignore"):
            half = full.astype(np.float16)
        if np.array_equal(half.astype(np.float32), full):
            _replace(value, half)
            _cast_for_readers(graph, value)
            return
    if array.dtype != np.float32:
        _replace(value, full)


def _replace(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.Tensor(array, name=value.name)
    value.dtype = value.const_value.dtype


def _cast_for_readers(graph: ir.Graph, value: ir.Value) -> None:
    shared: ir.Value | None = None
    for node, place in list(value.uses()):
        if node.op_type == "Gather" and place == 0:
            rows = node.outputs[0]
            readers = list(rows.uses())
            is_output = rows in graph.outputs
            name, rows.name, rows.dtype = rows.name, f"{rows.name}/half", ir.DataType.FLOAT16
            cast = _cast(rows, name)
            graph.insert_after(node, cast)
            for reader, slot in readers:
                reader.replace_input_with(slot, cast.outputs[0])
            if is_output:
                graph.outputs[list(graph.outputs).index(rows)] = cast.outputs[0]
        else:
            if shared is None:
                cast = _cast(value, f"{value.name}/float")
                graph.insert_before(graph[0], cast)
                shared = cast.outputs[0]
            node.replace_input_with(place, shared)


def _cast(value: ir.Value, name: str | None) -> ir.Node:
    output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
    return ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, outputs=[output], name=f"{name}/cast")

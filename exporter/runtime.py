"""Ask a model about pictures: in PyTorch, or in onnxruntime from an exported folder.

Both answer a batch at a time, greedily or sampled, and give the same tokens for the same weights. A prompt is complete
when it comes here: the family's template has been applied. `inference/` holds how it is done.
"""

from pathlib import Path
from typing import Literal

from vlmq.exporter.inference.answers import Answer, Piece
from vlmq.exporter.inference.onnx_vlm import OnnxVlm
from vlmq.exporter.inference.processor import check_image_tokens, open_processor
from vlmq.exporter.inference.sampling import GREEDY, Sampling
from vlmq.exporter.inference.sessions import Provider, without_torch
from vlmq.exporter.inference.torch_vlm import TorchVlm

__all__ = (
    "GREEDY",
    "Answer",
    "Engine",
    "OnnxVlm",
    "Piece",
    "Provider",
    "Sampling",
    "TorchVlm",
    "check_image_tokens",
    "engine_of",
    "open_processor",
    "open_vlm",
    "without_torch",
)

Engine = Literal["torch", "onnx"]


def engine_of(folder: Path) -> Engine:
    """onnxruntime wherever the folder has graphs for it, as `vlmq run` does."""
    return "onnx" if (folder / "onnx").is_dir() else "torch"


def open_vlm(folder: Path, engine: Engine, provider: Provider = "cpu") -> "OnnxVlm | TorchVlm":
    """The model of an exported folder, or of any checkpoint, in the engine; the provider is onnxruntime's."""
    if engine == "onnx":
        return OnnxVlm(folder, provider=provider)
    from vlmq.exporter.load import load

    return TorchVlm(load(folder), open_processor(folder))

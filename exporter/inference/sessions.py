"""onnxruntime: a folder's graphs as sessions, and a batch whose keys and values stay where they are made.

Each step's keys and values are bound as inputs of the next (IOBinding): they are never copied, to the host or anywhere.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlmq.exporter.errors import VlmqError

Provider = Literal["cpu", "cuda"]
PROVIDERS: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
PAST = "past_key_values."


def without_torch() -> None:
    """Keep PyTorch out of this process for good, where nothing has imported it yet: a third of a gigabyte less.

    transformers' processors do without it, but import it wherever they find it. Call this before importing
    transformers, in a process that will only run graphs.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that models cannot be loaded is the purpose
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]    # what makes `import torch` fail


def graph_file(folder: Path, name: str) -> Path:
    """The graph of that name, whatever its precision; VlmqError where there is none, or more than one."""
    found = sorted((folder / "onnx").glob(f"{name}*.onnx"))
    if len(found) != 1:
        seen = "no" if not found else "more than one"
        raise VlmqError(f"{folder / 'onnx'}: {seen} {name}*.onnx; export with --format onnx or both")
    return found[0]


def open_session(path: Path, threads: int = 0, provider: Provider = "cpu") -> Any:
    """threads: of one operator; 0 lets onnxruntime choose. VlmqError for what it cannot load, or not there."""
    import onnxruntime

    wanted = PROVIDERS[provider]
    if wanted not in onnxruntime.get_available_providers():
        raise _unavailable(provider, "this onnxruntime was built without it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings are about the machine, not the model
    if provider != "cpu":
        onnxruntime.set_default_logger_severity(4)  # what is missing is said below, in one line
        options.log_severity_level = 4
    providers = [wanted] if provider == "cpu" else [wanted, PROVIDERS["cpu"]]
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own have no other base: missing or short external data, a broken graph
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VlmqError(f"{path}: onnxruntime cannot load it ({what}); copy the whole folder again") from error
    if session.get_providers()[0] != wanted:  # it goes on without, and says so in its log alone
        raise _unavailable(provider, "its libraries or a device are missing")
    return session


def _unavailable(provider: Provider, why: str) -> VlmqError:
    return VlmqError(f"{provider}: onnxruntime cannot use it here ({why}); choose --provider cpu")


def run(session: Any, value: np.ndarray) -> np.ndarray:
    """The one output of a graph with one input, in the input's own dtype."""
    (slot,) = session.get_inputs()
    return session.run(None, {slot.name: np.ascontiguousarray(value, dtype=DTYPES[slot.type])})[0]


def read(encoder: Any, embeds: np.ndarray, mask: np.ndarray) -> list[Any]:
    """What an encoder makes of prompts (n, sequence, width) for all steps of its decoder, where it makes it."""
    binding = encoder.io_binding()
    fed = {"inputs_embeds": embeds, "encoder_attention_mask": mask}
    for slot in encoder.get_inputs():
        binding.bind_cpu_input(slot.name, np.ascontiguousarray(fed[slot.name], DTYPES[slot.type]))
    for output in encoder.get_outputs():
        binding.bind_output(output.name, _device(encoder))
    encoder.run_with_iobinding(binding)
    return binding.get_outputs()


def _device(session: Any) -> str:
    return "cuda" if session.get_providers()[0] == PROVIDERS["cuda"] else "cpu"


class Continuation:
    """A batch that is being continued, in a session of a decoder; `logits` (n, vocabulary) float32 say what comes next.

    embeds (n, sequence, width): the prompts. mask (n, sequence): 0 where they are padding. read: where an encoder has
    read the prompts, what it made of them; then `embeds` are the token that answers begin with.
    """

    def __init__(self, session: Any, embeds: np.ndarray, mask: np.ndarray, read: Sequence[Any] = ()) -> None:
        self._session, self._binding = session, session.io_binding()
        self._slots = {slot.name: slot for slot in session.get_inputs()}
        self._outputs = [output.name for output in session.get_outputs()]
        self._read = read
        empty = self._empty(len(embeds))
        self._past = empty[: len(empty) - len(read)]
        self._mask = mask.astype(np.int64)
        self.logits = self._step(embeds)

    def say(self, embeds: np.ndarray) -> np.ndarray:
        """Go on with one more token of each, embedded (n, 1, width); the logits of the next."""
        if not self._read:
            self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        self.logits = self._step(embeds)
        return self.logits

    def _empty(self, batch: int) -> list[Any]:
        from onnxruntime import OrtValue

        return [
            OrtValue.ortvalue_from_numpy(np.zeros((batch, slot.shape[1], 0, slot.shape[3]), DTYPES[slot.type]))
            for name, slot in self._slots.items()
            if name.startswith(PAST)
        ]

    def _step(self, embeds: np.ndarray) -> np.ndarray:
        if self._read:
            fed = {"inputs_embeds": embeds, "encoder_attention_mask": self._mask}
        else:
            positions = np.maximum(self._mask.cumsum(-1) - 1, 0)[:, -embeds.shape[1] :]  # padding does not count
            fed = {"inputs_embeds": embeds, "attention_mask": self._mask, "position_ids": positions}
        for name, array in fed.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array, DTYPES[self._slots[name].type]))
        names = (name for name in self._slots if name.startswith(PAST))
        for name, value in zip(names, [*self._past, *self._read], strict=True):
            self._binding.bind_ortvalue_input(name, value)
        self._binding.clear_binding_outputs()  # a longer past needs more room than what is bound
        for name in self._outputs:
            self._binding.bind_output(name, "cpu" if name == "logits" else _device(self._session))
        self._session.run_with_iobinding(self._binding)
        logits, *self._past = self._binding.get_outputs()
        return logits.numpy()[:, -1].astype(np.float32)

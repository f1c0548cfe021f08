"""Ask a model about pictures: in PyTorch, or in onnxruntime from an exported folder.

Both answer greedily, a batch at a time, and give the same tokens for the same weights. A prompt is complete when it
comes here: the family's template has been applied.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vlmq.exporter.errors import VlmqError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

Engine = Literal["torch", "onnx"]
ENCODER_DECODERS = ("t5",)  # language models whose config.json seldom says that they are
GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")


@dataclass(frozen=True)
class Answer:
    """What a model said: its text, and the new tokens before the end-of-sequence token."""

    text: str
    tokens: list[int]


def without_torch() -> None:
    """Keep PyTorch out of this process for good, where nothing has imported it yet: a third of a gigabyte less.

    transformers' processors do without it, but import it wherever they find it. Call this before importing
    transformers, in a process that will only run graphs.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that models cannot be loaded is the purpose
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]    # what makes `import torch` fail


def open_processor(folder: Path) -> "ProcessorMixin":
    """The tokenizer and image processor of a folder.

    Always the PIL one: torchvision's resizes a little differently, and answers would depend on what is installed.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VlmqError(f"{folder}: no usable tokenizer and image processor ({what}); copy the model's own") from error
    _complete(processor, _json(folder / "config.json"))
    return processor


def _complete(processor: "ProcessorMixin", config: dict[str, Any]) -> None:
    """What older processors leave out, from the model's config: without it prompts have no place for their image."""
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    known: dict[str, Any] = {"num_query_tokens": config.get("num_query_tokens")}
    vision = config.get("vision_config", {})
    if config.get("model_type") == "llava":
        known = {
            "patch_size": vision.get("patch_size"),
            "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default"),
            # CLIP's class token; absent in processors that were saved before transformers counted it.
            "num_additional_image_tokens": 1 if vision.get("model_type") == "clip_vision_model" else None,
        }
    for name, value in known.items():
        if value is not None and not getattr(processor, name, None):
            setattr(processor, name, value)


def engine_of(folder: Path) -> Engine:
    """onnxruntime wherever the folder has graphs for it, as `vlmq run` does."""
    return "onnx" if (folder / "onnx").is_dir() else "torch"


def open_vlm(folder: Path, engine: Engine) -> "OnnxVlm | TorchVlm":
    """The model of an exported folder, or of any checkpoint, in the engine."""
    if engine == "onnx":
        return OnnxVlm(folder)
    from vlmq.exporter.load import load

    return TorchVlm(load(folder), open_processor(folder))


class TorchVlm:
    """A transformers model and its processor."""

    def __init__(self, model: "PreTrainedModel", processor: "ProcessorMixin") -> None:
        from vlmq.exporter.families import start_token  # imports transformers, which a process without torch does later

        self.model, self.processor = model.eval(), processor
        self.stop = _stop_tokens(
            getattr(model.generation_config, "eos_token_id", None),
            getattr(model.config.text_config, "eos_token_id", None),
            processor.tokenizer.eos_token_id,
        )
        text = model.config.text_config
        self.start = start_token(text) if text.is_encoder_decoder else None
        _pad_outside(processor, self.start is not None)

    def generate(self, images: Sequence["Image"], prompts: Sequence[str], max_new_tokens: int = 20) -> list[Answer]:
        """The greedy continuation of each prompt about its image, one batch; without images, of the text alone."""
        import torch
        from transformers import GenerationConfig

        inputs = self._inputs(images, prompts)
        greedy = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.stop),
            pad_token_id=_pad(self.processor),
            decoder_start_token_id=self.start,
        )
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, generation_config=greedy)
        given = inputs["input_ids"].shape[1] if self.start is None else 1
        new = tokens[:, given:]  # generate() gives what it went on from back first
        return _answers(new.tolist(), self.stop, self.processor)

    def image_features(self, images: Sequence["Image"]) -> "torch.Tensor":
        """(n, tokens, width): the images as the language model sees them."""
        import torch

        pixels = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            features = self.model.get_image_features(
                pixels.to(self.model.device, self.model.dtype), return_dict=True
            ).pooler_output
        return features if isinstance(features, torch.Tensor) else torch.stack(list(features))

    def next_logits(self, images: Sequence["Image"], prompts: Sequence[str]) -> np.ndarray:
        """(n, vocabulary) float32: the logits of the first new token."""
        import torch

        inputs = self._inputs(images, prompts)
        if self.start is not None:
            inputs["decoder_input_ids"] = torch.full((len(prompts), 1), self.start, device=self.model.device)
        with torch.inference_mode():
            logits = self.model(**inputs).logits
        return logits[:, -1].float().cpu().numpy()

    def forced_logits(
        self, images: Sequence["Image"], prompts: Sequence[str], answers: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """For each prompt (tokens + 1, vocabulary) float32: the logits that generation sees before every token of the
        answer given, and after its last, whatever it would have said itself."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        forcing = _Forcing(answers, _pad(self.processor))
        steps = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(map(len, answers)) + 1,
            eos_token_id=None,
            pad_token_id=_pad(self.processor),
            decoder_start_token_id=self.start,
        )
        with torch.inference_mode():
            self.model.generate(
                **self._inputs(images, prompts),
                generation_config=steps,
                logits_processor=LogitsProcessorList([forcing]),
            )
        return _rows(forcing.seen, answers)

    def _inputs(self, images: Sequence["Image"], prompts: Sequence[str]) -> Any:
        encoded = _encode(self.processor, images, prompts, "pt")
        if images:
            encoded["pixel_values"] = encoded["pixel_values"].to(self.model.dtype)
        return {name: value.to(self.model.device) for name, value in encoded.items()}


class _Forcing:
    """Lets generation say the tokens of given answers (then `fill`), and keeps the logits it saw."""

    def __init__(self, answers: Sequence[Sequence[int]], fill: int) -> None:
        self.answers, self.fill = answers, fill
        self.seen: list[np.ndarray] = []

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        import torch

        tokens = _said_at(self.answers, len(self.seen), self.fill)
        self.seen.append(scores.float().cpu().numpy().copy())
        forced = torch.full_like(scores, -torch.inf)
        forced[torch.arange(len(tokens)), torch.tensor(tokens)] = 0
        return forced


def _said_at(answers: Sequence[Sequence[int]], step: int, fill: int) -> list[int]:
    return [answer[step] if step < len(answer) else fill for answer in answers]


def _rows(steps: Sequence[np.ndarray], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Steps of (n, vocabulary)  ->  for each of n answers (tokens + 1, vocabulary)."""
    return [np.stack([step[row] for step in steps[: len(answer) + 1]]) for row, answer in enumerate(answers)]


class OnnxVlm:
    """The graphs of an exported folder. torch computes nothing here."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        """threads: of one operator; 0 lets onnxruntime choose."""
        self.processor = open_processor(folder)
        config = _json(folder / "config.json")
        self.image_token = config.get("image_token_id", config.get("image_token_index"))
        self.stop = _stop_tokens(
            _json(folder / "generation_config.json").get("eos_token_id"),
            config.get("text_config", {}).get("eos_token_id"),
            self.processor.tokenizer.eos_token_id,
        )
        self.vision, self.embed, self.decoder = (_session(_graph(folder, name), threads) for name in GRAPHS)
        self.encoder: Any = None
        self.start: Any = None
        if config.get("text_config", {}).get("model_type") in ENCODER_DECODERS:
            self.encoder = _session(_graph(folder, "encoder_model"), threads)
            named = config["text_config"].get("decoder_start_token_id")
            self.start = config["text_config"].get("pad_token_id", 0) if named is None else named
        _pad_outside(self.processor, self.encoder is not None)
        self.past = [slot for slot in self.decoder.get_inputs() if slot.name.startswith("past_key_values.")]
        self.outputs = [output.name for output in self.decoder.get_outputs()]

    def generate(self, images: Sequence["Image"], prompts: Sequence[str], max_new_tokens: int = 20) -> list[Answer]:
        """The greedy continuation of each prompt about its image, one batch; without images, of the text alone."""
        embeds, mask, past = self._begin(images, prompts)
        running = np.ones(len(prompts), dtype=bool)
        steps: list[np.ndarray] = []
        while len(steps) < max_new_tokens and running.any():
            logits, past = self._step(embeds, mask, past)
            tokens = logits.argmax(-1)
            steps.append(tokens)
            running &= ~np.isin(tokens, sorted(self.stop))
            embeds = self._embed(tokens[:, None])
            mask = self._grown(mask)
        new = np.stack(steps, axis=1).tolist() if steps else [[] for _ in prompts]
        return _answers(new, self.stop, self.processor)

    def image_features(self, images: Sequence["Image"]) -> np.ndarray:
        """(n, tokens, width): the images as the language model sees them."""
        pixels = self.processor.image_processor(list(images), return_tensors="np")["pixel_values"]
        return self.vision.run(None, {"pixel_values": np.asarray(pixels, dtype=np.float32)})[0]

    def next_logits(self, images: Sequence["Image"], prompts: Sequence[str]) -> np.ndarray:
        """(n, vocabulary) float32: the logits of the first new token."""
        return self._step(*self._begin(images, prompts))[0]

    def forced_logits(
        self, images: Sequence["Image"], prompts: Sequence[str], answers: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """For each prompt (tokens + 1, vocabulary) float32: the logits that generation sees before every token of the
        answer given, and after its last, whatever it would have said itself."""
        embeds, mask, past = self._begin(images, prompts)
        steps: list[np.ndarray] = []
        for step in range(max(map(len, answers)) + 1):
            logits, past = self._step(embeds, mask, past)
            steps.append(logits)
            embeds = self._embed(np.array(_said_at(answers, step, _pad(self.processor)))[:, None])
            mask = self._grown(mask)
        return _rows(steps, answers)

    def _prompt(self, images: Sequence["Image"], prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """inputs_embeds (n, sequence, width) with the image features in their places, attention_mask (n, sequence)."""
        encoded = _encode(self.processor, images, prompts, "np")
        tokens, mask = np.asarray(encoded["input_ids"]), np.asarray(encoded["attention_mask"])
        if not images:
            return self._embed(tokens), mask.astype(np.int64)
        features = self.vision.run(None, {"pixel_values": np.asarray(encoded["pixel_values"], dtype=np.float32)})[0]
        places = tokens == self.image_token
        if places.sum() != features.shape[0] * features.shape[1]:
            raise VlmqError(
                f"prompts: {places.sum()} image tokens for {features.shape[0]} x {features.shape[1]} image "
                "features; every prompt needs its image's placeholder exactly once"
            )
        embeds = self._embed(tokens)
        embeds[places] = features.reshape(-1, features.shape[-1])
        return embeds, mask.astype(np.int64)

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        return self.embed.run(None, {"input_ids": tokens.astype(np.int64)})[0]

    def _begin(self, images: Sequence["Image"], prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[Any]]:
        """What the first step of the decoder reads: inputs_embeds, the mask of what was asked, and the past.

        Where an encoder reads what is asked, that is the token that answers begin with, and a past that ends with what
        the encoder made of the question, for all steps to read.
        """
        embeds, mask = self._prompt(images, prompts)
        if self.encoder is None:
            return embeds, mask, self._no_past(len(prompts))
        asked = _values({"inputs_embeds": embeds, "encoder_attention_mask": mask})
        cross = self.encoder.run_with_ort_values([output.name for output in self.encoder.get_outputs()], asked)
        start = np.full((len(prompts), 1), self.start)
        return self._embed(start), mask, [*self._no_past(len(prompts))[: -len(cross)], *cross]

    def _grown(self, mask: np.ndarray) -> np.ndarray:
        """The mask after one more token: an encoder's stays as it is."""
        return np.pad(mask, ((0, 0), (0, 1)), constant_values=1) if self.encoder is None else mask

    def _no_past(self, batch: int) -> list[Any]:
        empty = {slot.name: np.zeros((batch, slot.shape[1], 0, slot.shape[3]), np.float32) for slot in self.past}
        return list(_values(empty).values())

    def _step(self, embeds: np.ndarray, mask: np.ndarray, past: list[Any]) -> tuple[np.ndarray, list[Any]]:
        """Run the decoder on new positions  ->  logits of the last one (n, vocabulary), the longer past."""
        if self.encoder is None:
            positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -embeds.shape[1] :]  # padding does not count
            fed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        else:
            fed = {"inputs_embeds": embeds, "encoder_attention_mask": mask}
        values = _values(fed) | {slot.name: value for slot, value in zip(self.past, past, strict=True)}
        logits, *present = self.decoder.run_with_ort_values(self.outputs, values)
        return logits.numpy()[:, -1], [*present, *past[len(present) :]]


def _values(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    import onnxruntime

    return {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()
    }


def _pad_outside(processor: Any, has_encoder: bool) -> None:
    """Pad on the left, where generation goes on from the last token of what was asked; for an encoder on the right:
    BLIP-2's processor puts the image's tokens before the padding, and T5 counts the distance between any two tokens."""
    processor.tokenizer.padding_side = "right" if has_encoder else "left"


def _encode(processor: "ProcessorMixin", images: Sequence["Image"], prompts: Sequence[str], kind: str) -> Any:
    """input_ids and attention_mask (n, sequence), padded; pixel_values (n, 3, height, width)."""
    if not images:
        return processor(text=list(prompts), padding=True, return_tensors=kind)
    try:
        encoded = processor(images=list(images), text=list(prompts), padding=True, return_tensors=kind)
    except ValueError as error:  # the processor's own check of prompts against images
        raise VlmqError(f"prompts: {error}; every prompt needs its image's placeholder exactly once") from error
    for prompt, tokens in zip(prompts, np.asarray(encoded["input_ids"]), strict=True):
        check_image_tokens(processor, prompt, tokens)
    return encoded


def check_image_tokens(processor: Any, prompt: str, tokens: np.ndarray) -> None:
    """Refuse an encoded prompt (sequence,) without a place for its image: BLIP-2 would answer blindly."""
    mark = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
    if not (tokens == mark).any():
        raise VlmqError(f"{prompt!r}: has no place for the image; write {processor.image_token} where it belongs")


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings are about the machine, not the model
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own have no other base: missing or short external data, a broken graph
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VlmqError(f"{path}: onnxruntime cannot load it ({what}); copy the whole folder again") from error


def _graph(folder: Path, name: str) -> Path:
    found = sorted((folder / "onnx").glob(f"{name}*.onnx"))
    if len(found) != 1:
        seen = "no" if not found else "more than one"
        raise VlmqError(f"{folder / 'onnx'}: {seen} {name}*.onnx; export with --format onnx or both")
    return found[0]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _stop_tokens(*places: int | list[int] | None) -> set[int]:
    """The end-of-sequence tokens, from the first place that names any."""
    for named in places:
        if named is not None:
            return {named} if isinstance(named, int) else set(named)
    return set()


def _pad(processor: "ProcessorMixin") -> int:
    tokenizer = processor.tokenizer
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _answers(rows: list[list[int]], stop: set[int], processor: "ProcessorMixin") -> list[Answer]:
    answers = []
    for row in rows:
        end = next((place for place, token in enumerate(row) if token in stop), len(row))
        tokens = row[:end]
        answers.append(Answer(processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(), tokens))
    return answers

"""Asking a transformers model. PyTorch is imported where it is used: this file is read where there is none, too."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmq.exporter.inference.answers import Answer, Piece, Transcript, answers_of
from vlmq.exporter.inference.once import seen_once
from vlmq.exporter.inference.processor import encode, pad_outside, padding, stop_tokens
from vlmq.exporter.inference.sampling import GREEDY, Choose, Sampling, chooser
from vlmq.exporter.inference.steps import rows_of, said_at

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin


class TorchVlm:
    """A transformers model and its processor."""

    def __init__(self, model: "PreTrainedModel", processor: "ProcessorMixin") -> None:
        from vlmq.exporter.families import TOWERS, start_token  # transformers is imported later where no torch is

        self.model, self.processor = model.eval(), processor
        text = model.config.text_config
        self.start = start_token(text) if text.is_encoder_decoder else None
        self.tower = model.get_submodule(TOWERS[model.config.model_type])
        pad_outside(processor, self.start is not None)
        self.stop = stop_tokens(
            getattr(model.generation_config, "eos_token_id", None),
            getattr(model.config.text_config, "eos_token_id", None),
            processor.tokenizer.eos_token_id,
        )

    def generate(
        self,
        images: Sequence["Image"],
        prompts: Sequence[str],
        max_new_tokens: int = 20,
        sampling: Sampling = GREEDY,
    ) -> list[Answer]:
        """The continuation of each prompt about its image, one batch; without images, of the text alone."""
        inputs = self._inputs(images, prompts)
        tokens = self._generate(images, inputs, max_new_tokens, self.stop, _choosing(sampling, len(prompts)))
        given = inputs["input_ids"].shape[1] if self.start is None else 1
        new = tokens[:, given:]  # generate() gives what it went on from back first
        return answers_of(new.tolist(), self.stop, self.processor)

    def stream(
        self,
        images: Sequence["Image"],
        prompts: Sequence[str],
        max_new_tokens: int = 20,
        sampling: Sampling = GREEDY,
    ) -> Iterator[Piece]:
        """What `generate` answers, piece by piece: the `text`s at each `place` are its text when put together.

        transformers' generate() hands tokens on but does not wait, so it runs in a thread of its own.
        """
        inputs = self._inputs(images, prompts)
        choosing = _choosing(sampling, len(prompts))
        said: Queue[list[int] | None] = Queue()

        def work() -> None:
            try:
                self._generate(images, inputs, max_new_tokens, self.stop, choosing, _Handing(said))
            finally:
                said.put(None)

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(work)
            transcript = Transcript(len(prompts), self.stop, self.processor.tokenizer)
            for tokens in iter(said.get, None):
                yield from transcript.add(tokens)
            running.result()  # its error, if it had one
        yield from transcript.end()

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
        with torch.inference_mode(), seen_once(self.tower, images):
            logits = self.model(**inputs).logits
        return logits[:, -1].float().cpu().numpy()

    def forced_logits(
        self, images: Sequence["Image"], prompts: Sequence[str], answers: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """For each prompt (tokens + 1, vocabulary) float32: the logits that generation sees before every token of the
        answer given, and after its last, whatever it would have said itself."""
        seen: list[np.ndarray] = []

        def choose(logits: np.ndarray) -> np.ndarray:
            seen.append(logits)
            return said_at(answers, len(seen) - 1, padding(self.processor))

        inputs, steps = self._inputs(images, prompts), max(map(len, answers)) + 1
        self._generate(images, inputs, steps, None, [_Choosing(choose)])
        return rows_of(seen, answers)

    def _generate(
        self,
        images: Sequence["Image"],
        inputs: dict[str, "torch.Tensor"],
        max_new_tokens: int,
        stop: set[int] | None,
        choosing: Sequence["_Choosing"],
        streamer: "_Handing | None" = None,
    ) -> "torch.Tensor":
        """(n, tokens): the prompts (of an encoder-decoder the token that answers begin with), and what follows them."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        greedy = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=None if stop is None else sorted(stop),
            pad_token_id=padding(self.processor),
            decoder_start_token_id=self.start,
        )
        with torch.inference_mode(), seen_once(self.tower, images):
            return self.model.generate(
                **inputs,
                generation_config=greedy,
                logits_processor=LogitsProcessorList(choosing),
                streamer=streamer,
            )

    def _inputs(self, images: Sequence["Image"], prompts: Sequence[str]) -> Any:
        encoded = encode(self.processor, images, prompts, "pt")
        if images:
            encoded["pixel_values"] = encoded["pixel_values"].to(self.model.dtype)
        return {name: value.to(self.model.device) for name, value in encoded.items()}


class _Choosing:
    """Lets greedy generation say the tokens that are chosen here."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        import torch

        tokens = self._choose(scores.float().cpu().numpy().copy())
        forced = torch.full_like(scores, -torch.inf)
        forced[torch.arange(len(tokens)), torch.as_tensor(tokens)] = 0
        return forced


def _choosing(sampling: Sampling, count: int) -> list[_Choosing]:
    return [] if sampling == GREEDY else [_Choosing(chooser(sampling, count))]


class _Handing:
    """Hands on the tokens that generate() puts here, after the prompts, which it puts first."""

    def __init__(self, said: "Queue[list[int] | None]") -> None:
        self._said, self._is_prompt = said, True

    def put(self, value: "torch.Tensor") -> None:
        if not self._is_prompt:
            self._said.put(value.tolist())
        self._is_prompt = False

    def end(self) -> None:
        """What generate() calls last; its return says as much."""

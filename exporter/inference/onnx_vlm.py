"""Asking an exported folder's graphs. torch computes nothing here."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmq.exporter.errors import VlmqError
from vlmq.exporter.inference.answers import Answer, Piece, Transcript, answers_of
from vlmq.exporter.inference.once import distinct
from vlmq.exporter.inference.processor import encode, open_processor, pad_outside, padding, read_json, stop_tokens
from vlmq.exporter.inference.sampling import GREEDY, Sampling, chooser
from vlmq.exporter.inference.sessions import Continuation, Provider, graph_file, open_session, read, run
from vlmq.exporter.inference.steps import rows_of, said_at

if TYPE_CHECKING:
    from PIL.Image import Image

GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
ENCODER = "encoder_model"
ENCODER_DECODERS = ("t5",)  # language models whose config.json seldom says that they are


class OnnxVlm:
    """The graphs of an exported folder, and its processor."""

    def __init__(self, folder: str | Path, threads: int = 0, provider: Provider = "cpu") -> None:
        """threads: of one operator; 0 lets onnxruntime choose. VlmqError where the folder or the provider is no use."""
        folder = Path(folder)
        self.processor = open_processor(folder)
        config = read_json(folder / "config.json")
        self.image_token = config.get("image_token_id", config.get("image_token_index"))
        self.stop = stop_tokens(
            read_json(folder / "generation_config.json").get("eos_token_id"),
            config.get("text_config", {}).get("eos_token_id"),
            self.processor.tokenizer.eos_token_id,
        )
        self.vision, self.embed, self.decoder = (
            open_session(graph_file(folder, name), threads, provider) for name in GRAPHS
        )
        text = config.get("text_config", {})
        self.encoder, self.start = None, 0
        if text.get("model_type") in ENCODER_DECODERS:
            self.encoder = open_session(graph_file(folder, ENCODER), threads, provider)
            named = text.get("decoder_start_token_id")
            self.start = text.get("pad_token_id", 0) if named is None else named
        pad_outside(self.processor, self.encoder is not None)

    def generate(
        self,
        images: Sequence["Image"],
        prompts: Sequence[str],
        max_new_tokens: int = 20,
        sampling: Sampling = GREEDY,
    ) -> list[Answer]:
        """The continuation of each prompt about its image, one batch; without images, of the text alone."""
        steps = list(self._tokens(images, prompts, max_new_tokens, sampling))
        rows = np.stack(steps, axis=1).tolist() if steps else [[] for _ in prompts]
        return answers_of(rows, self.stop, self.processor)

    def stream(
        self,
        images: Sequence["Image"],
        prompts: Sequence[str],
        max_new_tokens: int = 20,
        sampling: Sampling = GREEDY,
    ) -> Iterator[Piece]:
        """What `generate` answers, piece by piece: the `text`s at each `place` are its text when put together."""
        transcript = Transcript(len(prompts), self.stop, self.processor.tokenizer)
        for tokens in self._tokens(images, prompts, max_new_tokens, sampling):
            yield from transcript.add(tokens)
        yield from transcript.end()

    def image_features(self, images: Sequence["Image"]) -> np.ndarray:
        """(n, tokens, width): the images as the language model sees them."""
        return run(self.vision, self.processor.image_processor(list(images), return_tensors="np")["pixel_values"])

    def next_logits(self, images: Sequence["Image"], prompts: Sequence[str]) -> np.ndarray:
        """(n, vocabulary) float32: the logits of the first new token."""
        return self._begin(images, prompts).logits

    def forced_logits(
        self, images: Sequence["Image"], prompts: Sequence[str], answers: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """For each prompt (tokens + 1, vocabulary) float32: the logits that generation sees before every token of the
        answer given, and after its last, whatever it would have said itself."""
        said = self._begin(images, prompts)
        seen = [said.logits]
        for step in range(max(map(len, answers))):
            seen.append(said.say(self._embed(said_at(answers, step, padding(self.processor))[:, None])))
        return rows_of(seen, answers)

    def _tokens(
        self, images: Sequence["Image"], prompts: Sequence[str], max_new_tokens: int, sampling: Sampling
    ) -> Iterator[np.ndarray]:
        """(n,) new tokens, step by step until every answer is over; those of an answer that is over mean nothing."""
        choose = chooser(sampling, len(prompts))
        said = self._begin(images, prompts)
        running = np.ones(len(prompts), dtype=bool)
        for left in reversed(range(max_new_tokens)):
            tokens = choose(said.logits)
            yield tokens
            running &= ~np.isin(tokens, sorted(self.stop))
            if not left or not running.any():
                return
            said.say(self._embed(tokens[:, None]))

    def _begin(self, images: Sequence["Image"], prompts: Sequence[str]) -> Continuation:
        """The prompts, image features in their places, as the decoder, or an encoder before it, has read them."""
        encoded = encode(self.processor, images, prompts, "np")
        tokens, mask = np.asarray(encoded["input_ids"]), np.asarray(encoded["attention_mask"])
        embeds = self._embed(tokens)
        if images:
            first, which = distinct(images)
            features = run(self.vision, encoded["pixel_values"][first])[which]
            places = tokens == self.image_token
            if places.sum() != features.shape[0] * features.shape[1]:
                raise VlmqError(
                    f"prompts: {places.sum()} image tokens for {features.shape[0]} x {features.shape[1]} image "
                    "features; every prompt needs its image's placeholder exactly once"
                )
            embeds[places] = features.reshape(-1, features.shape[-1])
        if self.encoder is None:
            return Continuation(self.decoder, embeds, mask)
        start = self._embed(np.full((len(prompts), 1), self.start))
        return Continuation(self.decoder, start, mask, read(self.encoder, embeds, mask))

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        return run(self.embed, tokens)

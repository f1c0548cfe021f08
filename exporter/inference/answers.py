"""What a model said, and the text of it piece by piece as it says it.

A token need not be a whole character, nor a character final: a piece is what can no longer change. Put together, the
pieces of an answer are its text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import ProcessorMixin

BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of one byte, where a vocabulary of characters falls back to bytes
UNFINISHED = "\ufffd"  # what tokenizers make of the bytes of a character that is not whole


@dataclass(frozen=True)
class Answer:
    """What a model said: its text, and the new tokens before the end-of-sequence token."""

    text: str
    tokens: list[int]


@dataclass(frozen=True)
class Piece:
    """What one more token adds to the text of the answer to the prompt at `place` in its batch, which may be nothing.

    token: None in the last piece of an answer, whose text was waiting for more.
    """

    place: int
    text: str
    token: int | None


def answers_of(rows: Iterable[Sequence[int]], stop: set[int], processor: "ProcessorMixin") -> list[Answer]:
    """Rows of new tokens, an end-of-sequence token and what follows it included  ->  answers."""
    answers = []
    for row in rows:
        end = next((place for place, token in enumerate(row) if token in stop), len(row))
        answers.append(Answer(text_of(processor.tokenizer, row[:end]), list(row[:end])))
    return answers


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True).strip()


class Transcript:
    """The pieces of a batch of answers, one token of each at a time."""

    def __init__(self, count: int, stop: set[int], tokenizer: Any) -> None:
        self._writers = {place: _Writer(tokenizer) for place in range(count)}  # of the answers that go on
        self._stop = stop

    def add(self, tokens: Iterable[int]) -> Iterator[Piece]:
        """The next token of every answer, of those that are over too, in the batch's order."""
        for place, token in enumerate(tokens):
            if place in self._writers:
                if token in self._stop:
                    yield self._close(place)
                else:
                    yield Piece(place, self._writers[place].add(int(token)), int(token))

    def end(self) -> Iterator[Piece]:
        """No answer goes on."""
        for place in sorted(self._writers):
            yield self._close(place)

    def _close(self, place: int) -> Piece:
        return Piece(place, self._writers.pop(place).end(), None)


def in_order(pieces: Iterable[Piece]) -> Iterator[str]:
    """The texts of a batch as they can be printed, an answer a line: the first as it is said, later ones in turn."""
    waiting: dict[int, str] = {}
    over: set[int] = set()
    turn = 0
    for piece in pieces:
        if piece.place == turn:
            yield piece.text
        else:
            waiting[piece.place] = waiting.get(piece.place, "") + piece.text
        if piece.token is None:
            over.add(piece.place)
        while turn in over:
            turn += 1
            yield "\n" + waiting.pop(turn, "")


class _Writer:
    """One answer's text as far as it is settled."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._tokens, self._written = tokenizer, list[int](), 0
        self._whole = 0  # tokens before a run of single bytes, which another byte may still turn into no characters
        # Cleaning up joins " ." and " n't" to the word before, so no word is settled before the next begins.
        self._by_word = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))

    def add(self, token: int) -> str:
        self._tokens.append(token)
        if not BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or ""):
            self._whole = len(self._tokens)
        text = text_of(self._tokenizer, self._tokens[: self._whole]).rstrip(UNFINISHED).rstrip()
        return self._until(text, max(text.rfind(" "), 0) if self._by_word else len(text))

    def end(self) -> str:
        text = text_of(self._tokenizer, self._tokens)
        return self._until(text, len(text))

    def _until(self, text: str, end: int) -> str:
        piece = text[self._written : end]
        self._written = max(self._written, end)
        return piece

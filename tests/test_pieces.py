"""The text of an answer piece by piece, with the tokenizers' own decoding of the whole as the oracle."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlmq.exporter.inference.answers import Piece, Transcript, in_order

SPECIAL = ["<s>", "</s>"]
STOP = 1
TEXTS = (
    "a red circle",
    "  spaces  before,  within and after  ",
    "漢字 and 😀🏳️‍🌈, naïve café — ok",
    "It 's here . Do n't ! ' quoted ' , right ?",
    "\n\nlines\n\n",
    "",
)


# transformers 5.24 cleans up after BPE only when told so in these words.
CLEANING = {
    "clean_up_tokenization_spaces": True,
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
}


def by_bytes(**options) -> PreTrainedTokenizerFast:
    """As GPT-2's and OPT's: a token a byte, so that most characters above ASCII are several tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: place for place, token in enumerate([*SPECIAL, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options)


def by_fallback(**options) -> PreTrainedTokenizerFast:
    """As Llama's: letters are tokens, with a mark for a space before; anything else falls back to its bytes."""
    known = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz▁.,!?'"]
    model = models.BPE({token: place for place, token in enumerate(known)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options)


@pytest.fixture(params=[by_bytes, by_fallback])
def tokenizer(request):
    return request.param(clean_up_tokenization_spaces=False)


def pieces_of(tokenizer, rows: list[list[int]]) -> list[Piece]:
    """Every row said token by token, those that are shorter ended by </s> and padded."""
    transcript = Transcript(len(rows), {STOP}, tokenizer)
    found = []
    for step in range(max(map(len, rows)) + 1):
        found += transcript.add([row[step] if step < len(row) else STOP for row in rows])
    return [*found, *transcript.end()]


def joined(pieces: list[Piece], place: int) -> str:
    return "".join(piece.text for piece in pieces if piece.place == place)


def test_pieces_together_are_the_text_of_the_whole_answer(tokenizer):
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    pieces = pieces_of(tokenizer, rows)
    for place, (row, text) in enumerate(zip(rows, TEXTS, strict=True)):
        assert joined(pieces, place) == tokenizer.decode(row).strip() == text.strip()
        assert [piece.token for piece in pieces if piece.place == place] == [*row, None]


def test_no_piece_has_part_of_a_character(tokenizer):
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    assert any(len(row) > len(text) for row, text in zip(rows, TEXTS, strict=True))  # there are parts to have
    assert not any("\ufffd" in piece.text for piece in pieces_of(tokenizer, rows))


def test_a_plain_letter_is_said_at_once(tokenizer):
    row = tokenizer.encode("abc", add_special_tokens=False)[-3:]
    assert [piece.text for piece in pieces_of(tokenizer, [row])] == ["a", "b", "c", ""]


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer):
    row = tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    pieces = pieces_of(tokenizer, [row])
    assert joined(pieces, 0) == tokenizer.decode(row).strip()
    assert "\ufffd" in pieces[-1].text


@pytest.mark.parametrize("made", [by_bytes, by_fallback])
@pytest.mark.parametrize("clean", [False, True])
def test_any_tokens_in_any_order_add_up(made, clean):
    """Where spaces are cleaned up, a word is said when the next begins, for " ." becomes "."."""
    tokenizer = made(**CLEANING if clean else {})
    source = random.Random(0)
    alphabet = [*range(3, len(tokenizer)), *tokenizer.encode(" .,!?'nts" * 8, add_special_tokens=False)]
    for _ in range(60):
        row = source.choices(alphabet, k=source.randrange(1, 24))
        assert joined(pieces_of(tokenizer, [row]), 0) == tokenizer.decode(row, skip_special_tokens=True).strip()


@pytest.mark.parametrize("made", [by_bytes, by_fallback])
def test_spaces_that_are_cleaned_up_later_were_never_said(made):
    tokenizer = made(**CLEANING)
    row = tokenizer.encode("it 's here . do n't ! go", add_special_tokens=False)
    text = tokenizer.decode(row, skip_special_tokens=True).strip()
    assert text == "it's here. don't! go"
    assert joined(pieces_of(tokenizer, [row]), 0) == text


def test_answers_that_were_over_before_the_first_follow_it():
    pieces = [*(Piece(place, text, None) for place, text in ((2, "c"), (1, "b"), (0, "a")))]
    assert "".join(in_order(pieces)) == "a\nb\nc\n"


def test_answers_of_a_batch_are_printed_whole_and_in_order():
    pieces = [
        *(Piece(0, "a", 7), Piece(1, "x", 8), Piece(2, "p", 9)),
        *(Piece(0, "b", 7), Piece(1, "y", None), Piece(2, "q", 9)),
        *(Piece(0, "c", None), Piece(2, "r", 9)),
        Piece(2, "", None),
    ]
    printed = list(in_order(pieces))
    assert "".join(printed) == "abc\nxy\npqr\n"
    assert printed[:2] == ["a", "b"]  # at once

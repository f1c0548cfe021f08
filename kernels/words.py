"""Codes packed into int32 words: dense, lowest bits first, nothing wasted.

Code i of a row occupies bits i*b .. i*b + b - 1 of the row's bit string, and bit n of that string is bit n % 32 of
word n // 32; with 3, 5 or 6 bits a code may lie across two words. This is how compressed-tensors 0.18 and later pack
1 to 8 bits (`compressors/pack_quantized/helpers.py`); for 2, 4 and 8 bits every release packs so.
"""

import math

import torch
from torch import Tensor

WORD = 32


def words_for(count: int, bits: int) -> int:
    """How many words hold so many codes."""
    return math.ceil(count * bits / WORD)


def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """codes uint8, each below 2**bits  ->  words int32, `dim` of n codes shortened to ceil(n * bits / 32).

    The bits of the last word that no code needs are 0.
    """
    rows = codes.movedim(dim, -1)
    count = rows.shape[-1]
    # 32 codes fill `bits` words exactly, so code k of every 32 lies at the same place of its words.
    padded = torch.nn.functional.pad(rows, (0, -count % WORD)).unflatten(-1, (-1, WORD))
    words = torch.zeros(*padded.shape[:-1], bits, dtype=torch.int32, device=codes.device)
    for place in range(WORD):
        code = padded[..., place].to(torch.int32)
        word, shift = divmod(place * bits, WORD)
        words[..., word] |= code << shift
        if shift + bits > WORD:
            words[..., word + 1] |= code >> (WORD - shift)
    return words.flatten(-2)[..., : words_for(count, bits)].movedim(-1, dim).contiguous()


def unpack(words: Tensor, bits: int, count: int, dim: int = -1) -> Tensor:
    """words int32  ->  codes uint8, `dim` of ceil(count * bits / 32) words lengthened to `count` codes."""
    rows = words.movedim(dim, -1)
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % bits)).unflatten(-1, (-1, bits))
    codes = torch.empty(*padded.shape[:-1], WORD, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        # The shift of a signed word drags its sign in from the left: only the bits that are the word's own are kept.
        code = (padded[..., word] >> shift) & (mask if shift + bits <= WORD else 2 ** (WORD - shift) - 1)
        if shift + bits > WORD:
            code |= (padded[..., word + 1] << (WORD - shift)) & mask
        codes[..., place] = code.to(torch.uint8)
    return codes.flatten(-2)[..., :count].movedim(-1, dim).contiguous()

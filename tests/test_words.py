"""Codes in int32 words, with compressed-tensors' own packing as the oracle."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from vlmq.kernels.grid import BITS
from vlmq.kernels.words import pack, unpack, words_for

# Their unpacking of 4 bits fails where the packed dimension is a single word, so every dimension is more than 8 codes.
SHAPES = [(12, 128), (9, 32), (11, 33), (32, 9), (20, 100)]


def codes_of(bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    codes.view(-1)[0] = 2**bits - 1  # the highest code sets the sign bit of some words
    return codes


def signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """What compressed-tensors calls the same code: int8 around 0."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_words_are_those_of_compressed_tensors(bits, shape, dim):
    codes = codes_of(bits, shape)
    assert torch.equal(pack(codes, bits, dim), pack_to_int32(signed(codes, bits), bits, packed_dim=dim))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_compressed_tensors_unpacks_the_codes_we_packed_and_so_do_we(bits, shape, dim):
    codes = codes_of(bits, shape)
    words = pack(codes, bits, dim)
    theirs = unpack_from_int32(words, bits, torch.Size(shape), packed_dim=dim)
    assert torch.equal(theirs, signed(codes, bits))
    assert torch.equal(unpack(words, bits, shape[dim], dim), codes)


@pytest.mark.parametrize("bits", BITS)
def test_no_bit_is_wasted_and_the_bits_past_the_last_code_are_zero(bits):
    words = pack(torch.full((1, 33), 2**bits - 1, dtype=torch.uint8), bits)
    assert words.shape == (1, words_for(33, bits))
    ones = sum(int(word).bit_count() for word in words.view(-1).numpy().view("uint32"))
    assert ones == 33 * bits


def test_the_bytes_of_a_small_pack_never_change():
    """Worked by hand: codes 0 1 2 3 4 5 6 7 ... of three bits, lowest first, across the border of two words."""
    codes = torch.arange(16, dtype=torch.uint8).remainder(8).unsqueeze(0)
    words = pack(codes, 3)
    bits = sum(int(code) << (3 * place) for place, code in enumerate(codes[0].tolist()))
    assert words.numpy().tobytes().hex() == bits.to_bytes(8, "little").hex() == "88c6fa88c6fa0000"


@pytest.mark.parametrize("bits", BITS)
def test_leading_dimensions_are_kept(bits):
    codes = codes_of(bits, (2, 3, 40))
    assert torch.equal(pack(codes, bits)[1], pack(codes[1], bits))
    assert torch.equal(unpack(pack(codes, bits), bits, 40), codes)

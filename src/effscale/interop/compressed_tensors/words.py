"""Pack codes into 32-bit words, as compressed-tensors does.

A row is one stream of bits: with b bits per code, code i occupies the bits from i b on, starting with the lowest bits
of the first word. The stored value is the code plus $2^{b-1}$, so that it is never negative, and zeros fill the last
word of the row. This differs from how codes are stored in memory (``effscale.quant.packing``). Supported are 2, 4 and 8 bits, which never cross a byte
boundary.
"""

import numpy as np
from jaxtyping import Int8, Int32

WORD_BYTES = 4


def words_in(codes: int, bits: int) -> int:
    """Return the number of words that a row of codes takes.

    Example:
        >>> words_in(64, 4), words_in(65, 4)
        (8, 9)
    """
    return -(-codes * bits // (8 * WORD_BYTES))


def to_words(codes: Int8[np.ndarray, "rows codes"], bits: int) -> Int32[np.ndarray, "rows words"]:
    """Pack rows of signed codes into words.

    Example:
        >>> codes = np.array([[1, 0, -8, 7]], np.int8)
        >>> hex(to_words(codes, 4).item())
        '0xf089'
    """
    rows, count = codes.shape
    per_byte = 8 // bits
    packed = np.zeros((rows, words_in(count, bits) * WORD_BYTES), np.uint8)
    unsigned = codes.view(np.uint8) + np.uint8(1 << (bits - 1))
    for place in range(per_byte):
        part = unsigned[:, place::per_byte]
        packed[:, : part.shape[1]] |= part << np.uint8(place * bits)
    return packed.view("<i4")


def from_words(
    words: Int32[np.ndarray, "rows words"], bits: int, count: int
) -> Int8[np.ndarray, "rows codes"]:
    """Unpack the first ``count`` codes of each row.

    Example:
        >>> from_words(np.array([[0xF089]], np.int32), 4, 4).tolist()
        [[1, 0, -8, 7]]
    """
    packed = np.ascontiguousarray(words, "<i4").view(np.uint8)
    per_byte, mask = 8 // bits, np.uint8((1 << bits) - 1)
    unsigned = np.empty((len(words), packed.shape[1] * per_byte), np.uint8)
    for place in range(per_byte):
        unsigned[:, place::per_byte] = (packed >> np.uint8(place * bits)) & mask
    return (unsigned[:, :count] - np.uint8(1 << (bits - 1))).view(np.int8)

"""Read the blocks of GGUF files, llama.cpp's format, as codes.

A block holds 32 consecutive inputs of one output:

======  =====  ================================================================  =============================
type    bytes  content                                                           number from the code n
======  =====  ================================================================  =============================
Q8_0    34     float16 d; 32 signed bytes                                        d n
Q4_0    18     float16 d; 16 bytes, with codes i and i + 16 in byte i, low first  d (n - 8)
Q4_1    20     float16 d; float16 m; 16 bytes likewise                           d n + m
======  =====  ================================================================  =============================

References:
    ggml authors, "ggml", ``ggml-quants.c``. https://github.com/ggml-org/ggml
"""

from collections.abc import Mapping

import numpy as np

from effscale.interop.gguf.file import GGUFFile
from effscale.interop.packed.coded import CodedTensor, check_scales
from effscale.interop.tensors import FolderError, StructuredTensor, TensorInfo
from effscale.quant.formats import Format

BLOCK = 32
TABLE = "token_embd.weight"
FORMATS = {
    "Q8_0": Format(bits=8, granularity="group", group_size=BLOCK),
    "Q4_0": Format(bits=4, granularity="group", group_size=BLOCK, spread="paper"),
    "Q4_1": Format(
        bits=4, granularity="group", group_size=BLOCK, symmetric=False, integer_zero=False
    ),
}


class GGUFBlocks:
    """The tensors of a GGUF file, with blocks of the three types as codes; see
    ``effscale.interop.tensors.MixedTensors``.

    Raises:
        FolderError: No tensor has one of these types.
    """

    def __init__(self, file: GGUFFile):
        self._file = file
        self._formats = {
            name: FORMATS[file.kind(name)]
            for name, info in file.infos.items()
            if file.kind(name) in FORMATS and len(info.shape) == 2
        }
        if not self._formats:
            kinds = sorted({file.kind(name) for name in file.infos})
            raise FolderError(
                f"it has tensors of {', '.join(kinds)}; load_packed supports the packed types {', '.join(FORMATS)}. "
                "Use effscale.interop.load_pretrained to load the others as floats"
            )
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(info.shape, info.dtype, self._formats.get(name))
            for name, info in file.infos.items()
        }

    def read(self, name: str) -> np.ndarray | StructuredTensor:
        """One tensor: an array, or codes."""
        if name not in self._formats:
            return self._file.read(name)
        format = self._formats[name]
        codes, scale, zero = from_blocks(self._file.read_bytes(name), format)
        for floats in (scale, zero):
            if floats is not None:
                check_scales(f"the scales of {name}", floats, positive=False)
        return CodedTensor(codes, scale, zero, format, is_table=name == TABLE)


def from_blocks(
    data: np.ndarray, format: Format
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return codes ``(rows, values)``, and scales and zero points ``(rows, blocks)``, from rows of bytes."""
    rows = len(data)
    num_floats = 1 if format.symmetric else 2
    size = 2 * num_floats + BLOCK * format.bits // 8
    blocks = data.reshape(rows, -1, size)
    floats = np.ascontiguousarray(blocks[..., : 2 * num_floats]).view("<f2").astype(np.float32)
    content = blocks[..., 2 * num_floats :]
    scale = floats[..., 0]
    if format.bits == 8:
        codes = content.view(np.int8)
    else:
        codes = np.empty((*content.shape[:-1], BLOCK), np.int8)
        half = np.int8(8)
        codes[..., : BLOCK // 2] = (content & 15).view(np.int8) - half
        codes[..., BLOCK // 2 :] = (content >> 4).view(np.int8) - half
    zero = None if format.symmetric else floats[..., 1] + 8 * scale
    return np.ascontiguousarray(codes).reshape(rows, -1), scale, zero

"""Load and save PyTorch and Hugging Face model folders."""

from effscale.interop.load import load_pretrained
from effscale.interop.peft.adapters import load_adapter, save_adapter
from effscale.interop.save import save_pretrained
from effscale.interop.tensors import FolderError
from effscale.interop.tokenizer import load_tokenizer

__all__ = [
    "FolderError",
    "load_adapter",
    "load_pretrained",
    "load_tokenizer",
    "save_adapter",
    "save_pretrained",
]

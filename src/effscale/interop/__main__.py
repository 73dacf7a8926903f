"""Inspect, convert and compare model folders on the command line.

python -m effscale.interop inspect FOLDER            show family, sizes, parameters, types
python -m effscale.interop convert FOLDER OUT        write safetensors, with another type or file size
python -m effscale.interop compare FOLDER            compare with transformers, layer by layer
"""

import os
import pathlib
import sys
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

Folder = Annotated[pathlib.Path, tyro.conf.Positional]


def inspect(folder: Folder, tensors: bool = False) -> None:
    """Show what a model folder (or GGUF file) contains, without loading it.

    Args:
        folder: The folder or file.
        tensors: Also list every tensor: its name in the file, the parameter of effscale, and how its layout changes.
    """
    from effscale.interop.summary import mapping, summarize

    table = Table(show_header=False)
    for name, value in summarize(folder).items():
        table.add_row(name, value)
    Console().print(table)
    if tensors:
        print(
            "\n".join(
                f"{name}  {known} -> {ours}  ({layout})"
                for name, known, ours, layout in mapping(folder)
            )
        )


def convert(
    folder: Folder,
    out: Folder,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write the model of a folder as safetensors with config.json and tokenizer, in the layout of transformers.

    It reads everything that load_pretrained reads: safetensors, PyTorch's .bin, DeepSpeed-Chat's reward models,
    Megatron-DeepSpeed's BLOOM, GGUF.

    Args:
        folder: The folder or GGUF file to read.
        out: The folder to write.
        dtype: Type of the numbers; by default, each tensor keeps its own.
        max_shard_size: Maximum size of a file, such as 500MB.
    """
    from effscale.interop.files.writer import parse_size
    from effscale.interop.load import load_pretrained
    from effscale.interop.save import save_pretrained

    parse_size(max_shard_size)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{str(out)!r}: is a file; pass a folder to write into")
    with Console(stderr=True).status(f"converting {folder}"):
        model = load_pretrained(folder, dtype=dtype)
        save_pretrained(model, out, max_shard_size=max_shard_size, like=folder)
    print(f"written: {out}")


def compare(folder: Folder, text: str = "The capital of France is") -> None:
    """Run the model in effscale and in transformers on the same input, and show the largest difference by layer.

    Args:
        folder: The folder; transformers must also be able to load it.
        text: The input. A model without a tokenizer gets random token ids, and an image model gets a random image.
    """
    from effscale.interop.compare import compare as differences

    with Console(stderr=True).status(f"running {folder} in effscale and in transformers"):
        found = differences(folder, text)
    table = Table("result", "largest difference", "largest value", "relative to it")
    for row in found:
        relative = row.largest / row.scale if row.scale else row.largest
        table.add_row(row.name, f"{row.largest:.2e}", f"{row.scale:.4g}", f"{relative:.1e}")
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``. With ``EFFSCALE_TRACEBACK=1`` in the environment, errors show their traceback."""
    commands = {"inspect": inspect, "convert": convert, "compare": compare}
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            args=argv,
            prog="python -m effscale.interop",
            description="Inspect, convert and compare model folders of PyTorch.",
        )
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("EFFSCALE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

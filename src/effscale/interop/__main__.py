"""Model folders on the command line.

python -m effscale.interop inspect FOLDER            what it is: family, sizes, parameters, types
python -m effscale.interop convert FOLDER OUT        to safetensors, of another type or file size
python -m effscale.interop compare FOLDER            here and in transformers, layer by layer
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
    """Says what a model folder (or GGUF file) holds, without loading it.

    Args:
        folder: The folder or file.
        tensors: List every tensor, too: its name there, the parameter here, and how its layout changes.
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
    """Writes the model of a folder as safetensors with config.json and tokenizer, as transformers lays it out.

    Reads whatever load_pretrained reads: safetensors, PyTorch's .bin, DeepSpeed-Chat's reward models, Megatron-DeepSpeed's
    BLOOM, GGUF.

    Args:
        folder: The folder or GGUF file to read.
        out: The folder to write.
        dtype: Type of the numbers; by default each tensor keeps its own.
        max_shard_size: Bytes in a file at most, such as 500MB.
    """
    from effscale.interop.files.writer import parse_size
    from effscale.interop.load import load_pretrained
    from effscale.interop.save import save_pretrained

    parse_size(max_shard_size)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{str(out)!r} is a file; give a folder to write into")
    with Console(stderr=True).status(f"converting {folder}"):
        model = load_pretrained(folder, dtype=dtype)
        save_pretrained(model, out, max_shard_size=max_shard_size, like=folder)
    print(f"written: {out}")


def compare(folder: Folder, text: str = "The capital of France is") -> None:
    """Runs the model here and in transformers on the same input, and shows the largest difference by layer.

    Args:
        folder: The folder; transformers must be able to load it, too.
        text: The input. A model without a tokenizer gets random token ids, and one of images a random image.
    """
    from effscale.interop.compare import compare as differences

    with Console(stderr=True).status(f"running {folder} here and in transformers"):
        found = differences(folder, text)
    table = Table("result", "largest difference", "largest value", "relative to it")
    for row in found:
        relative = row.largest / row.scale if row.scale else row.largest
        table.add_row(row.name, f"{row.largest:.2e}", f"{row.scale:.4g}", f"{relative:.1e}")
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``. With ``EFFSCALE_TRACEBACK=1`` in the environment errors keep their traceback."""
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

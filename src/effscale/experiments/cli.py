"""The command line of an experiment: a preset, then any field of its config."""

import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

from effscale.models.validation import did_you_mean

Config = TypeVar("Config")


def parse(presets: Mapping[str, Config], description: str, argv: Sequence[str] | None = None) -> Config:
    """The config that a command line asks for.

    ``--preset NAME`` chooses where to start from (``default`` otherwise); every other option replaces a field.
    Nested fields are written with dots: ``--model.num-layers 8``.

    Args:
        presets: Configs of one class by name; ``default`` must be there.
        description: Shown by ``--help``.
        argv: The words of the command line; None takes the program's.

    Returns:
        The config.

    Raises:
        SystemExit: On ``--help``, and on a wrong option, after saying what would do.
    """
    import tyro  # tyro takes a while, and only the command line needs it

    words = list(sys.argv[1:] if argv is None else argv)
    name = "default"
    for index, word in enumerate(words):
        if word == "--preset" or word.startswith("--preset="):
            inline = word.partition("=")[2]
            name = inline or (words[index + 1] if index + 1 < len(words) else "")
            del words[index : index + (1 if inline else 2)]
            break
    if name not in presets:
        sys.exit(f"--preset {name!r}: {did_you_mean(name, presets)}")
    shown = description.strip() + f"\n\n--preset NAME starts from one of: {', '.join(presets)}."
    config = presets[name]
    try:
        return tyro.cli(type(config), default=config, args=words, description=shown)
    except ValueError as error:  # a config that refuses its values
        sys.exit(f"error: {error}")

"""What experiments do before anything is written: see that the folder will do, and prepare the corpora."""

import pathlib
from collections.abc import Sequence
from typing import Any

from effscale.experiments.console import status
from effscale.experiments.host import cache_folder


def check_folder(config: Any, free: Sequence[str]) -> None:
    """Checks that ``config.out`` is unused or, with ``config.resume``, holds a run of the same config.

    Args:
        config: An experiment's.
        free: Fields that may differ.

    Raises:
        ValueError: The folder is of another config.
        FileExistsError: It holds a run, and this one is not to go on with it.
    """
    from effscale.training import RunFolder, check_unused
    from effscale.training.serialize import differences, to_json

    if not config.resume:
        if config.out is not None:
            check_unused(config.out)
        return
    folder = RunFolder.create(config.out, resume=True)
    found = [
        f"{name}: {there!r} there, {here!r} here"
        for name, (there, here) in differences(folder.config(), to_json(config)).items()
        if name.partition(".")[0] not in free
    ]
    if found:
        raise ValueError(
            f"{folder.path} is of another config ({'; '.join(found)}); resume with the saved values, or start a new run folder"
        )


def prepared_corpora(config: Any, *, tokenizer: pathlib.Path | None = None) -> tuple[Any, Any]:
    """The corpora that ``config.corpus`` names and their weights, from the cache if they are there.

    Args:
        config: An experiment's, with ``corpus``, ``cache``, ``vocab_size`` and ``validation_fraction``.
        tokenizer: A file, or its folder, in place of one that is trained to ``vocab_size``.
    """
    from effscale.data import parse_mixture, prepare_mixture

    sources, weights = parse_mixture(config.corpus)
    with status("preparing the corpus") as progress:
        corpora = prepare_mixture(
            sources,
            config.cache or cache_folder("corpora"),
            vocab_size=None if tokenizer else config.vocab_size,
            tokenizer=tokenizer,
            validation_fraction=config.validation_fraction,
            progress=lambda p: progress(f"{p.documents:,} documents, {p.tokens:,} tokens"),
        )
    return corpora, weights

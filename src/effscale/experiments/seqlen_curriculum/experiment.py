"""Short sequences first, to stay stable at eight times the batch and four times the learning rate.

A small GPT learns from one text with a small batch at the learning rate tuned for it, with a large batch at a large
learning rate, and with the same large batch whose rows are short at first and grow. All see equally many tokens, in one
order a seed. Logged are the signs of instability of the paper: how far the loss rises above its minimum, and the norm and the
maximum of Adam's variance; Adam has no weight decay. Further learning rates of the large batch show where each way breaks.

    python -m effscale.experiments.seqlen_curriculum
    python -m effscale.experiments.seqlen_curriculum --learning-rate-factors 4 --seeds 5
    python -m effscale.experiments.seqlen_curriculum --out runs/mine --resume
"""

import itertools
import time

from effscale.experiments.seqlen_curriculum.config import FREE, PRESETS, Config
from effscale.experiments.shared.cli import messages, parse
from effscale.experiments.shared.host import keep_freed_memory
from effscale.experiments.shared.prepared import (
    check_folder,
    corpus_digests,
    prepared_corpora,
    resumable,
)
from effscale.experiments.shared.results import Result, finish


def run(config: Config) -> Result:
    """Trains as ``config`` says and fills the run folder.

    A run whose loss or gradient is not finite for ten steps ends there; that is a result.

    Args:
        config: What to do.

    Returns:
        The named figures.

    Raises:
        ValueError: If parts of the config do not fit each other or the corpus; or ``resume`` is set and the folder is of
            another config.
        FileExistsError: If ``out`` already holds a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.experiments.seqlen_curriculum import figures as draw
    from effscale.experiments.seqlen_curriculum import report
    from effscale.experiments.seqlen_curriculum.arms import Training, make_arms
    from effscale.training import RunFolder

    began = time.perf_counter()
    # What cannot work is refused before anything is written.
    arms = make_arms(config)
    check_folder(config, FREE)
    corpora, weights = prepared_corpora(config, tokenizer=config.tokenizer)
    training = Training(config, corpora, weights)
    folder = RunFolder.create(
        config.out,
        name="seqlen_curriculum",
        config=config,
        data=corpus_digests(corpora),
        resume=config.resume,
    )
    try:
        with resumable(folder):
            for arm in arms:
                training.run(folder, arm)
    finally:
        training.close()

    runs = {arm.name: report.read(folder.path, arm, config) for arm in arms}
    figures = report.figures(runs)
    first = dict(itertools.islice(runs.items(), 3))
    draw.training(folder.figures / "training.png", first)
    draw.instability(folder.figures / "instability.png", first)
    draw.validation(folder.figures / "validation.png", first)
    if len(first) < len(runs):
        draw.learning_rates(folder.figures / "learning_rates.png", runs, figures)
    tables = report.tables(runs, figures)
    return finish(folder, "seqlen_curriculum", figures, tables, began=began, left=2)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        name = "python -m effscale.experiments.seqlen_curriculum"
        config = parse(PRESETS, __doc__ or "", argv, name=name)
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()

"""Dense models, mixtures of experts and their students learn from real text for the same number of steps.

A mixture of experts with one expert for each token computes as much as a dense model, and holds several times its parameters. What is asked: how much
lower is its loss, and how much longer must a dense model train to get there? And what the paper observed on the way: are experts worth more
in later layers? Is a dense part beside one expert as good as two experts? Does a pyramid of residual experts do as well as
its largest number of experts everywhere, with fewer parameters? And a shallower student of it, whose teacher leaves before the end? What each
arm computed is counted.

    python -m effscale.experiments.moe
    python -m effscale.experiments.moe --arms dense moe --num-experts 16
    python -m effscale.experiments.moe --out runs/mine --resume

The default corpus is the Python standard library of the running interpreter, so nothing is downloaded.
"""

import time

from effscale.experiments.moe.config import FREE, PRESETS, Config
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
    """Trains all arms as ``config`` says and fills the run folder.

    Args:
        config: What to do.

    Returns:
        The named figures.

    Raises:
        ValueError: If parts of the config do not fit each other or the corpus; or ``resume`` is set and the folder is of
            another config.
        FileExistsError: If ``out`` already holds a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
        TrainingDivergedError: If loss or gradient of a run is not finite for ten steps.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.data import unigram_entropy
    from effscale.experiments.moe import report
    from effscale.experiments.moe.runs import Training
    from effscale.training import RunFolder

    began = time.perf_counter()
    # What cannot work is refused before anything is written.
    check_folder(config, FREE)
    corpora, weights = prepared_corpora(config)
    folder = RunFolder.create(
        config.out,
        name="moe",
        config=config,
        data=corpus_digests(corpora),
        resume=config.resume,
    )
    with resumable(folder):
        for name in config.arms:
            training = Training(config, name, corpora, weights)
            for seed in range(config.seeds):
                training.run(folder, seed)

    runs = report.read(folder.path, config, corpora[0].vocab_size)
    entropy = unigram_entropy([corpus.validation for corpus in corpora])
    report.draw(folder.figures, runs)
    named = {"unigram_entropy": entropy, **report.figures(runs)}
    return finish(folder, "moe", named, report.tables(runs), began=began)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.moe")
        keep_freed_memory()
        run(config)

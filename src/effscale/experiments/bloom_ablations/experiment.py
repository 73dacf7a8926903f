"""What BLOOM's choices are worth in small: ALiBi against rotary and learned positions, also in longer rows than those of training, and the norm after the embedding.

All arms are the same model but for what they are about, and learn from the same rows in the same order. Each gets the same care: a search by the same rule, with a seed
that is not compared, finds its learning rate and warmup. Then each is trained over several seeds and evaluated on the same held-out text, cut
into rows of the length of training and into longer ones. What is learned of positions beyond the length of training is nothing, so that a table of learned ones is there as it was initialized.

    python -m effscale.experiments.bloom_ablations
    python -m effscale.experiments.bloom_ablations --arms alibi rotary --corpus 'text:books/*.txt'
    python -m effscale.experiments.bloom_ablations --out runs/mine --resume

Source: Le Scao et al., "BLOOM", 2022 (arXiv:2211.05100), section 3.2; Press et al., "Train short, test long", 2021.
"""

import time

import numpy as np

from effscale.experiments.bloom_ablations.config import FREE, PRESETS, Config
from effscale.experiments.shared.cli import messages, parse
from effscale.experiments.shared.host import keep_freed_memory
from effscale.experiments.shared.prepared import (
    check_folder,
    corpus_digests,
    prepared_corpora,
    resumable,
)
from effscale.experiments.shared.results import Result, finish
from effscale.parallel import shard_batch


def run(config: Config) -> Result:
    """Trains as ``config`` says and fills the run folder.

    A run whose loss or gradient is not finite for ten steps ends there; that is a result, and the others are made.

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
    from effscale.data import parse_source
    from effscale.experiments.bloom_ablations import report
    from effscale.experiments.bloom_ablations.runs import Runner
    from effscale.training import RunFolder

    began = time.perf_counter()
    mesh = config.mesh.build()
    # What cannot work is refused before the corpus is prepared, and before anything is written.
    parse_source(config.corpus)  # one source: a weight, as in a mixture, would mean nothing
    shard_batch(np.zeros(config.batch_size, np.int8), mesh)
    check_folder(config, FREE)
    (corpus,), _ = prepared_corpora(config.pretraining("alibi"), tokenizer=config.tokenizer)
    runner = Runner(config, corpus, mesh)
    folder = RunFolder.create(
        config.out,
        name="bloom_ablations",
        config=config,
        data=corpus_digests([corpus]),
        resume=config.resume,
    )
    with resumable(folder):
        found = {arm: runner.search(folder, arm) for arm in config.arms}
        for seed in range(config.seeds):
            for arm in config.arms:
                runner.run(folder, arm, seed, found[arm].best)
    losses = report.read(folder.path, config)
    named, each = report.figures(losses, config)
    report.draw(folder.figures / "bloom_ablations.png", losses, config)
    tables = report.tables(losses, config, found)
    return finish(folder, "bloom_ablations", named, tables, seeds=each, began=began)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        config = parse(
            PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.bloom_ablations"
        )
        keep_freed_memory()
        run(config)

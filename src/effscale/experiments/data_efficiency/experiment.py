"""A GPT is pretrained with less data: curriculum learning, random-LTD, and both, against plain training.

Each technique trains on the whole budget of tokens and on parts of it, over several seeds. A budget is of layer-averaged
tokens: those that a layer processes, averaged over the layers. So a technique that shows the model short rows or drops
tokens makes more steps of the same budget. Validation is on all tokens of whole rows. What is compared is the loss at the end,
and the data, operations and time that each needs to reach the loss of plain training.

Every technique gets the same care: its learning rate warms up by steps, and a search by the same rule, with a seed that is not
compared, finds its peak and the length of its warmup.

    python -m effscale.experiments.data_efficiency
    python -m effscale.experiments.data_efficiency --techniques none ltd --fractions 1.0 0.67 --seeds 5
    python -m effscale.experiments.data_efficiency --out runs/mine --resume

Source: Li et al., "DeepSpeed Data Efficiency", 2022 (arXiv:2212.03597), section 4.1.
"""

import time

import numpy as np

from effscale.experiments.data_efficiency.config import FREE, PRESETS, Config
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
    from effscale.data import parse_source, save_tokenizer
    from effscale.experiments.data_efficiency import report
    from effscale.experiments.data_efficiency.figures import draw
    from effscale.experiments.data_efficiency.runs import Runner
    from effscale.training import RunFolder

    began = time.perf_counter()
    mesh = config.mesh.build()
    # What cannot work is refused before the corpus is prepared, and before anything is written.
    parse_source(config.corpus)  # one source: a weight, as in a mixture, would mean nothing
    shard_batch(np.zeros(config.batch_size, np.int8), mesh)
    check_folder(config, FREE)
    one = config.pretraining("none", 1.0)  # the text is the same for all
    (corpus,), _ = prepared_corpora(one, tokenizer=one.tokenizer)
    runner = Runner(config, corpus, mesh)
    folder = RunFolder.create(
        config.out,
        name="data_efficiency",
        config=config,
        data=corpus_digests([corpus]),
        resume=config.resume,
    )
    save_tokenizer(corpus.tokenizer, folder.path)
    with resumable(folder):
        found = {technique: runner.search(folder, technique) for technique in config.techniques}
        for fraction in config.fractions:
            for technique in config.techniques:
                for seed in range(config.seeds):
                    runner.run(folder, technique, fraction, seed, found[technique].best)
                runner.forget(technique, fraction)

    comparison = report.read(folder.path, config, corpus.vocab_size, found)
    figures = comparison.figures()
    draw(folder.figures, comparison)
    tables = report.tables(comparison)
    seeds = comparison.seeds()
    return finish(folder, "data_efficiency", figures, tables, seeds=seeds, began=began, left=2)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        config = parse(
            PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.data_efficiency"
        )
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()

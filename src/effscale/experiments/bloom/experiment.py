"""BLOOM's recipe in small: a multilingual corpus and tokenizer, pretraining, fine-tuning on prompted tasks, and what that does for tasks and languages that it has not seen.

The corpus is cleaned of short, repetitive and duplicate documents, and described in a datasheet. The model is a BLOOM (ALiBi, a norm after the embedding) that is
pretrained with a growing batch and a rate that counts samples. Then it is fine-tuned on prompted tasks as BLOOMZ is: several records in a row
that do not see each other, the loss on the answers, each record with the same weight. Tasks are evaluated by rank before and after, in languages in which they were learned, in
others, and for tasks that were not learned at all.

    python -m effscale.experiments.bloom
    python -m effscale.experiments.bloom --data FOLDER --languages en fr sw --new-languages sw --tasks TASKS --new-tasks nli
    python -m effscale.experiments.bloom --preset bloom-560m --data FOLDER --tasks TASKS --tokenizer tokenizer.json
    python -m effscale.experiments.bloom --out runs/mine --resume

The default corpus comes with `make assets`; nothing is downloaded here. FOLDER holds a folder of text for each language, TASKS a YAML file and examples for each task.
"""

import contextlib
import signal
import time

import jax
import numpy as np

from effscale.experiments.bloom.config import MAY_DIFFER_ON_RESUME, PRESETS, Config
from effscale.experiments.shared.cli import messages, parse
from effscale.experiments.shared.host import keep_freed_memory
from effscale.experiments.shared.prepared import check_folder, corpus_digests, resumable
from effscale.experiments.shared.results import Result, finish
from effscale.parallel import batch_shard, initialize, shard_batch


def run(config: Config) -> Result:
    """Pretrains, fine-tunes and evaluates for each seed, and fills the run folder.

    Args:
        config: What to do.

    Returns:
        The named figures.

    Raises:
        ValueError: If parts of the config do not fit each other, the corpus, the tasks or the devices; or ``resume`` is set and the folder is of another config.
        FileExistsError: If ``out`` already holds a run and ``resume`` is not set.
        FileNotFoundError: If a language has no text, or there are no tasks.
        MissingAssetError: If the default corpus is not installed.
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
        TrainingDivergedError: If loss or gradient is not finite for ten updates.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.experiments.bloom import report
    from effscale.experiments.bloom.corpus import datasheet, prepare
    from effscale.experiments.bloom.runs import Runs
    from effscale.experiments.bloom.tasks import Tasks
    from effscale.training import RunFolder

    check_folder(config, MAY_DIFFER_ON_RESUME)
    mesh = config.mesh.build()
    # What cannot work is refused before the corpus is prepared, or at least before anything is trained.
    parts = batch_shard(mesh).count
    for rows in (*config.pretrain.ramp().values, config.finetune.batch_size):
        if rows % parts:
            raise ValueError(f"a batch of {rows} rows cannot be divided over {parts} processes")
        shard_batch(np.zeros(rows // parts, np.int8), mesh)
    tasks = Tasks(config)
    tasks.check()
    prepared = prepare(config)
    folder = RunFolder.create(
        config.out,
        name="bloom",
        config=config,
        data=corpus_digests(list(prepared.corpora.values())) | {"tasks": tasks.digest()},
        resume=config.resume,
    )
    first = jax.process_index() == 0  # of several processes, the one that writes
    with resumable(folder), jax.set_mesh(mesh):
        if first:
            datasheet(config, prepared, folder.path)
        began = time.perf_counter()
        runs = Runs(config, folder, mesh, prepared, tasks)
        with contextlib.closing(runs):
            runs.task_rows(0)  # too few are refused now
            for seed in range(config.seeds):
                runs.run(seed)
        found = [report.read(folder.path / f"seed-{seed}") for seed in range(config.seeds)]
    named, each = report.figures(found, prepared)
    if first:
        report.draw(folder.figures / "bloom.png", folder.path, found)
    return finish(folder, "bloom", named, report.tables(found, prepared), began=began, seeds=each)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.bloom")
        if initialize():
            # Until training installs its own handler, JAX's would swallow the signal.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        keep_freed_memory()
        run(config)

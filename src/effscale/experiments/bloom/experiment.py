"""BLOOM's recipe at small scale: a multilingual corpus and tokenizer, pretraining, fine-tuning on prompted tasks, and
evaluation on tasks and languages that fine-tuning has not seen.

The corpus is cleaned of short, repetitive and duplicate documents, and described in a datasheet. The model is a BLOOM
(ALiBi, a norm after the embedding). It is pretrained with a growing batch and a learning rate scheduled by samples.

Then it is fine-tuned on prompted tasks like BLOOMZ: several records packed into a row without attending to each
other, the loss on the answers, and the same weight for each record. Before and after, tasks are evaluated by ranking
the choices: in the languages in which they were learned, in other languages, and on tasks that were not learned at
all.

    python -m effscale.experiments.bloom
    python -m effscale.experiments.bloom --data FOLDER --languages en fr sw --new-languages sw --tasks TASKS --new-tasks nli
    python -m effscale.experiments.bloom --preset bloom-560m --data FOLDER --tasks TASKS --tokenizer tokenizer.json
    python -m effscale.experiments.bloom --out runs/mine --resume

The default corpus comes with `make assets`; this program downloads nothing. FOLDER contains a folder of text for each
language; TASKS contains a YAML file and examples for each task.
"""

import contextlib
import signal
import time

import jax
import numpy as np

from effscale.command.folder import Result, check_folder, finish, open_folder, resumable
from effscale.command.line import keep_freed_memory, messages, parse
from effscale.experiments.bloom.config import MAY_DIFFER_ON_RESUME, PRESETS, Config
from effscale.experiments.shared.prepared import corpus_digests
from effscale.parallel import batch_shard, initialize, shard_batch


def run(config: Config) -> Result:
    """Pretrain, fine-tune and evaluate for each seed, and fill the run folder.

    Args:
        config: Options of the run.

    Returns:
        The named figures.

    Raises:
        ValueError: The config is inconsistent or does not match the corpus, the tasks or the devices; or ``resume`` is set and the folder has another config.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        FileNotFoundError: A language has no text, or there are no tasks.
        MissingAssetError: The default corpus is not installed.
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        TrainingDivergedError: The loss or gradient is not finite for ten steps.
    """
    # Imports that only a run needs are here, so that --help is fast.
    from effscale.experiments.bloom import report
    from effscale.experiments.bloom.corpus import datasheet, prepare
    from effscale.experiments.bloom.runs import Runs
    from effscale.experiments.bloom.tasks import Tasks

    check_folder(config, MAY_DIFFER_ON_RESUME)
    mesh = config.mesh.build()
    # Invalid settings raise before the corpus is prepared, or at least before training.
    parts = batch_shard(mesh).count
    for rows in (*config.pretrain.ramp().values, config.finetune.batch_size):
        if rows % parts:
            raise ValueError(
                f"the batch size must be a multiple of the {parts} processes, got {rows}"
            )
        shard_batch(np.zeros(rows // parts, np.int8), mesh)
    tasks = Tasks(config)
    tasks.check()
    prepared = prepare(config)
    folder = open_folder(
        config, "bloom", corpus_digests(list(prepared.corpora.values())) | {"tasks": tasks.digest()}
    )
    first = jax.process_index() == 0  # only the first of several processes writes
    with resumable(folder), jax.set_mesh(mesh):
        if first:
            datasheet(config, prepared, folder.path)
        began = time.perf_counter()
        runs = Runs(config, folder, mesh, prepared, tasks)
        with contextlib.closing(runs):
            runs.task_rows(0)  # raises if there are too few
            for seed in range(config.seeds):
                runs.run(seed)
        found = [report.read(folder.path / f"seed-{seed}") for seed in range(config.seeds)]
    named, each = report.figures(found, prepared)
    if first:
        report.draw(folder.figures / "bloom.png", folder.path, found)
    return finish(folder, "bloom", named, report.tables(found, prepared), began=began, seeds=each)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.bloom")
        if initialize():
            # Until training installs its own handler, JAX's handler would swallow the signal.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        keep_freed_memory()
        run(config)

"""The three steps of RLHF in one command: supervised fine-tuning, a reward model, and PPO, each of which can be taken alone.

Step 1 (sft) teaches a model to answer as the chosen responses do. Step 2 (reward) makes a model that tells a better response from a worse one. Step 3 (ppo)
lets the first learn from the second by trying. grpo and rloo do it without a critic, dpo without a reward model. Each step ends in a
model folder that transformers opens, too; a run that is stopped goes on where it was, in the middle of a step.

    python -m effscale.experiments.rlhf
    python -m effscale.experiments.rlhf --step base sft reward grpo --seeds 1
    python -m effscale.experiments.rlhf --preset smollm2-135m
    python -m effscale.experiments.rlhf --preset smollm2-135m --actor FOLDER --data pairs.jsonl
    python -m effscale.experiments.rlhf --out runs/mine --resume --step dpo

Without --actor and --data nothing is downloaded: a small GPT-2 learns the source of the running Python's standard library ("base"), and then to say what
its functions and classes do: the chosen response is what the documentation says of it, the rejected one what it says of another.
"""

import time

import jax
import numpy as np

from effscale.experiments.rlhf.config import FREE, PRESETS, Config
from effscale.experiments.shared.cli import messages, parse
from effscale.experiments.shared.host import keep_freed_memory
from effscale.experiments.shared.prepared import check_folder, resumable
from effscale.experiments.shared.results import Result, finish
from effscale.parallel import shard_batch


def run(config: Config) -> Result:
    """Takes the steps of ``config`` for each seed and fills the run folder.

    Args:
        config: What to do.

    Returns:
        The named figures.

    Raises:
        ValueError: If parts of the config do not fit each other, the records or the devices; or ``resume`` is set and the folder is of another config.
        FileExistsError: If ``out`` already holds a run and ``resume`` is not set.
        FileNotFoundError: If a step is missing that another needs.
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
        TrainingDivergedError: If loss or gradient of a step is not finite for ten updates.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.data.tokenizer import tokenizer_digest
    from effscale.experiments.rlhf import report
    from effscale.experiments.rlhf.data import make_encoder, read_phases
    from effscale.experiments.rlhf.runs import Steps
    from effscale.training import RunFolder

    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes: this experiment runs in one; for several hosts use effscale.rlhf.make_policy_step in a loop of your own"
        )
    check_folder(config, FREE)
    mesh = config.mesh.build()
    for step in config.step:  # what cannot be divided is refused before the first step
        shard_batch(np.zeros(config.learning(step).batch_size, np.int8), mesh)
    phases = read_phases(config)
    encoder = make_encoder(config, phases)
    digest = {"tokenizer": tokenizer_digest(encoder.tokenizer)}
    folder = RunFolder.create(
        config.out, name="rlhf", config=config, data=digest, resume=config.resume
    )
    every = [Steps(config, folder, mesh, seed, phases, encoder) for seed in range(config.seeds)]
    with resumable(folder), jax.set_mesh(mesh):
        for step in config.step:
            for steps in every:
                steps.run(step)
        began = time.perf_counter()
        seeds = [report.read(steps, config) for steps in every]
    began -= sum(sum(seed.seconds.values()) for seed in seeds)  # those of earlier calls, too
    named, each = report.figures(seeds)
    report.draw(folder.figures / "rlhf.png", folder.path, seeds)
    result = finish(folder, "rlhf", named, report.tables(seeds), began=began, seeds=each)
    told = report.conversations(every[0], seeds[0], config.samples)
    if told:
        with (folder.path / "report.md").open("a", encoding="utf-8") as file:
            file.write(f"\n{told}\n")
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.rlhf")
        keep_freed_memory()
        run(config)

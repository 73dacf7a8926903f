"""The three steps of RLHF in one command: supervised fine-tuning, a reward model, and PPO. You can also run each step
separately.

Step 1 (sft) trains a model to answer like the chosen responses. Step 2 (reward) trains a model that distinguishes
better from worse responses. Step 3 (ppo) trains the first model by trial and error with the second. grpo and rloo do
this without a critic, dpo without a reward model. Each step saves a Hugging Face folder. A run that was stopped
resumes where it was, even in the middle of a step.

    python -m effscale.experiments.rlhf
    python -m effscale.experiments.rlhf --step base sft reward grpo --seeds 1
    python -m effscale.experiments.rlhf --preset smollm2-135m
    python -m effscale.experiments.rlhf --preset smollm2-135m --actor FOLDER --data pairs.jsonl
    python -m effscale.experiments.rlhf --out runs/mine --resume --step dpo

Without --actor and --data nothing is downloaded. A small GPT-2 learns the source of the running Python's standard
library ("base"), and then to answer what its functions and classes do. The chosen response is the documentation of
the function in question, the rejected one that of another.
"""

import time

import jax
import numpy as np

from effscale.command.folder import Result, check_folder, finish, open_folder, resumable
from effscale.command.line import keep_freed_memory, messages, parse
from effscale.experiments.rlhf.config import FREE, PRESETS, Config
from effscale.parallel import initialize, shard_batch


def run(config: Config) -> Result:
    """Run the steps of ``config`` for each seed and fill the run folder.

    Args:
        config: Options of the run.

    Returns:
        The named figures.

    Raises:
        ValueError: The config is inconsistent or does not match the records or the devices; or ``resume`` is set and the folder has another config.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        FileNotFoundError: A step that another step needs is missing.
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        TrainingDivergedError: The loss or gradient of a step is not finite for ten updates.
    """
    # Imports that only a run needs are here, so that --help is fast.
    from effscale.data.tokenizer import tokenizer_digest
    from effscale.experiments.rlhf import report
    from effscale.experiments.rlhf.data import check_reward_tokenizer, make_encoder, read_phases
    from effscale.experiments.rlhf.runs import Steps

    if jax.process_count() > 1:
        raise ValueError(
            f"rlhf must run in one process, because every step reads and writes the same run folder, got {jax.process_count()} processes. For several hosts, use effscale.rlhf.make_policy_step in your own loop"
        )
    check_folder(config, FREE)
    mesh = config.mesh.build()
    for step in config.step:  # raises before the first step if batches cannot be split
        shard_batch(np.zeros(config.learning(step).batch_size, np.int8), mesh)
    phases = read_phases(config)
    encoder = make_encoder(config, phases)
    if config.reward is not None:
        check_reward_tokenizer(config.reward, encoder)
    digest = {"tokenizer": tokenizer_digest(encoder.tokenizer)}
    folder = open_folder(config, "rlhf", digest)
    every = [Steps(config, folder, mesh, seed, phases, encoder) for seed in range(config.seeds)]
    with resumable(folder), jax.set_mesh(mesh):
        for step in config.step:
            for steps in every:
                steps.run(step)
        began = time.perf_counter()
        seeds = [report.read(steps, config) for steps in every]
    began -= sum(sum(seed.seconds.values()) for seed in seeds)  # including those of earlier calls
    named, each = report.figures(seeds)
    report.draw(folder.figures / "rlhf.png", folder.path, seeds)
    samples = report.conversations(every[0], seeds[0], config.samples)
    tables = report.tables(seeds)
    return finish(folder, "rlhf", named, tables, began=began, seeds=each, text=samples)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.rlhf")
        initialize()  # each of several processes then knows of the others, and refuses
        keep_freed_memory()
        run(config)

"""A GPT's pretraining as one of the runs of a run folder."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax

from effscale.experiments.shared.cli import StoppedBySignal
from effscale.experiments.shared.pretraining import Pretraining, Trained
from effscale.experiments.shared.pretraining_config import FREE, PretrainingConfig
from effscale.experiments.shared.runs import once
from effscale.training import RunFolder, TrainingDivergedError, TrainState
from effscale.training.serialize import write_json


def pretrain_once(
    folder: RunFolder,
    name: str,
    training: Pretraining,
    config: PretrainingConfig,
    *,
    batches: Callable[[], grain.IterDataset],
    evaluate: Callable[[TrainState], dict[str, float]],
    final: Callable[[Trained], Mapping[str, Any]],
    diverged: Mapping[str, Any],
    free_fields: Sequence[str] = FREE,
    compile_first: bool = False,
) -> None:
    """Makes a run, continues one that was stopped, or leaves a finished one as it is; one that diverges is finished.

    Args:
        folder: The run folder.
        name: The run, which is also its own folder inside; its ``final.json`` says what came out.
        training: What is compiled.
        config: Of the run, but for its folder.
        batches: Makes its batches.
        evaluate: As in ``Pretraining.train``.
        final: From what the run left to what ``final.json`` holds.
        diverged: What it holds if loss or gradient is not finite for ten steps.
        free_fields: Fields of the config that may change when a run goes on.
        compile_first: As in ``Pretraining.train``.

    Raises:
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
    """
    place = folder.path / name

    def train() -> None:
        with jax.set_mesh(training.mesh):
            try:
                trained = training.train(
                    batches(),
                    place,
                    config=dataclasses.replace(config, out=place, resume=True),
                    evaluate=evaluate,
                    tensorboard=folder.tensorboard / name,
                    free_fields=free_fields,
                    compile_first=compile_first,
                )
            except TrainingDivergedError as error:  # a result, after which the other runs are made
                print(f"{name} diverged at step {error.step}", file=sys.stderr)
                write_json(place / "final.json", dict(diverged))
                return
            if trained.stopped_reason == "signal":
                message = f"stopped and saved {name} at step {int(trained.state.step)}"
                raise StoppedBySignal(message, trained.signal)
            found = dict(final(trained))
        write_json(place / "final.json", found)

    once(folder, name, train)

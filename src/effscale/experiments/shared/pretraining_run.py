"""Pretraining of a GPT as one of the runs of a run folder."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax

from effscale.experiments.shared.pretraining import Pretraining, Trained
from effscale.experiments.shared.pretraining_config import FREE, PretrainingConfig
from effscale.experiments.shared.runs import once
from effscale.training import RunFolder, TrainingDivergedError, TrainState
from effscale.training.errors import StoppedBySignal
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
    """Start a run, resume one that was stopped, or skip a finished one. A run that diverges counts as finished.

    Args:
        folder: The run folder.
        name: Name of the run and of its folder inside the run folder; its ``final.json`` has the results.
        training: The compiled training.
        config: Config of the run, without its folder.
        batches: Creates its batches.
        evaluate: As in ``Pretraining.train``.
        final: Converts the result of the run to the content of ``final.json``.
        diverged: Content of ``final.json`` if the loss or gradient is not finite for ten steps.
        free_fields: Fields of the config that can change when the run is resumed.
        compile_first: As in ``Pretraining.train``.

    Raises:
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
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
            except TrainingDivergedError as error:  # a result; the other runs continue
                print(f"{name} diverged at step {error.step}", file=sys.stderr)
                write_json(place / "final.json", dict(diverged))
                return
            if trained.stopped_reason == "signal":
                message = f"stopped and saved {name} at step {int(trained.state.step)}"
                raise StoppedBySignal(message, trained.signal)
            found = dict(final(trained))
        write_json(place / "final.json", found)

    once(folder, name, train)

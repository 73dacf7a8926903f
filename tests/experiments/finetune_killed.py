"""The experiment finetune, killed at a chosen moment: ``finetune_killed.py BACKEND MOMENT:STEP OPTION ...``.

BACKEND is ``effscale`` or ``torch``. MOMENT is ``kill`` (before that step) or ``term`` (asked to stop in it); ``done:0`` kills
between the last checkpoint of the backend's first run and the mark that says it is finished.
"""

import os
import signal
import sys
import time

from effscale.experiments import finetune
from effscale.experiments.finetune import runs as finetune_runs
from effscale.experiments.shared import runs
from effscale.experiments.shared.classifier import batches as training_batches


def main():
    backend, moment, *words = sys.argv[1:]
    kind, _, number = moment.partition(":")
    running = []

    def die():
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    step_of = training_batches.TrainingBatches.__next__

    def next_batch(batches):
        if running[-1] == backend and batches.step == int(number):
            if kind == "kill":
                die()
            if kind == "term":
                os.kill(os.getpid(), signal.SIGTERM)
        return step_of(batches)

    run = finetune_runs.Runner.run
    write = runs.write_json

    def run_one(runner, name, seed):
        running.append(name)
        run(runner, name, seed)

    training_batches.TrainingBatches.__next__ = next_batch
    finetune_runs.Runner.run = run_one
    runs.write_json = lambda *arguments: (
        die() if kind == "done" and running[-1] == backend else write(*arguments)
    )
    finetune.main(words)


if __name__ == "__main__":
    main()

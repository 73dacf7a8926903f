"""The quickstart experiment, killed at a chosen moment: ``quickstart_killed.py MOMENT OPTION ...``.

MOMENT is ``step:N`` (before step N), ``write:N`` (while the checkpoint of step N is being written), ``manifest:N`` (when its
arrays are written and its checksums are not), ``term:N`` (asked to stop, at step N) or ``sample`` (after the last step).
"""

import os
import pathlib
import signal
import sys
import threading
import time

import effscale.training
import effscale.training.checkpoint
from effscale.experiments import quickstart


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def main():
    moment, *words = sys.argv[1:]
    kind, _, number = moment.partition(":")
    at = int(number or 0)
    checkpoints = pathlib.Path(words[words.index("--out") + 1]) / "checkpoints"

    fit = effscale.training.fit

    def fit_until(*arguments, before_step, **options):
        def before(step, batch):
            if step == at and kind == "step":
                die()
            if step == at and kind == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            return before_step(step, batch)

        return fit(*arguments, before_step=before, **options)

    def watch():
        while not list(checkpoints.glob(f"step_{at:08d}.orbax-checkpoint-tmp/train")):
            time.sleep(0.0002)
        die()

    effscale.training.fit = fit_until
    if kind == "write":
        threading.Thread(target=watch, daemon=True).start()
    if kind == "manifest":
        module = effscale.training.checkpoint
        write = module.write_manifest
        module.write_manifest = lambda folder: (
            die() if folder.name.endswith(f"{at:08d}") else write(folder)
        )
    if kind == "sample":
        quickstart.experiment.sample = lambda *_: die()
    quickstart.main(words)


if __name__ == "__main__":
    main()

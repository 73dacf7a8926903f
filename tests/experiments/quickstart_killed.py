"""The quickstart experiment, killed at a chosen moment: ``quickstart_killed.py MOMENT OPTION ...``.

MOMENT is ``step:N`` (before step N), ``term:N`` (asked to stop, at step N) or ``sample`` (after the last step).
"""

import os
import signal
import sys
import time

import effscale.run
from effscale.experiments import quickstart


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def main():
    moment, *words = sys.argv[1:]
    kind, _, number = moment.partition(":")
    at = int(number or 0)
    fit = effscale.run.fit

    def fit_until(*arguments, before_step, **options):
        def before(step, batch):
            if step == at and kind == "step":
                die()
            if step == at and kind == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            return before_step(step, batch)

        return fit(*arguments, before_step=before, **options)

    effscale.run.fit = fit_until
    if kind == "sample":
        quickstart.sample = lambda *_: die()
    quickstart.main(words)


if __name__ == "__main__":
    main()

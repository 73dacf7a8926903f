"""The experiment data_efficiency, killed at a chosen moment: ``data_efficiency_killed.py MOMENT:RUN:STEP OPTION ...``.

MOMENT is ``kill`` (before that step of the run, which are counted from 0) or ``term`` (asked to stop in it); ``done:RUN:0``
kills between the last checkpoint of the run and the mark that says it is finished.
"""

import os
import signal
import sys
import time

from effscale.experiments import data_efficiency
from effscale.experiments.shared import runs


def main():
    moment, *words = sys.argv[1:]
    kind, run, at = moment.split(":")
    begun = []

    def die():
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    fit, write = runs.fit, runs.write_json

    def fit_until(*arguments, before_step, **options):
        begun.append(True)

        def before(step, batch):
            if len(begun) - 1 == int(run) and step == int(at):
                if kind == "kill":
                    die()
                if kind == "term":
                    os.kill(os.getpid(), signal.SIGTERM)
            return before_step(step, batch)

        return fit(*arguments, before_step=before, **options)

    runs.fit = fit_until
    runs.write_json = lambda *arguments: (
        die() if kind == "done" and len(begun) - 1 == int(run) else write(*arguments)
    )
    data_efficiency.main(words)


if __name__ == "__main__":
    main()

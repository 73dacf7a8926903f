"""Sources and metrics for the tests of the analysis, in a module of their own so that workers can import them."""

import os
import pathlib
import signal

import numpy as np


class Remainders:
    """Rows whose only token is (7 + position) % 10,000, read one by one."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        # Several fields: what counts fields for rows gets the ids wrong.
        token = np.array([(index + 7) % 10_000])
        return {"input_ids": token, "labels": token, "extra": token, "more": token}


class ManyRows:
    """As many rows as one likes, made when asked for and whole ranges at once."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def rows(self, start, stop):
        return {"input_ids": np.arange(start, stop)[:, None] % 3}


def token(batch):
    return batch["input_ids"][:, 0]


class Killer:
    """The token; but on a sample its process is killed, ``times`` times."""

    def __init__(self, folder, sample, times):
        self.folder, self.sample, self.times = pathlib.Path(folder), sample, times

    def __call__(self, batch):
        values = token(batch)
        if (values == self.sample).any():
            deaths = len(list(self.folder.iterdir()))
            if deaths < self.times:
                (self.folder / str(deaths)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return values

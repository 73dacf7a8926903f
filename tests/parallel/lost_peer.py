"""One of two processes is lost in training, for ``test_peers.py``: ``lost_peer.py HOW WHICH``."""

import os
import sys

import jax
import numpy as np

from effscale.parallel import ending_together, initialize
from effscale.parallel.peers import on_first

how, which = sys.argv[1], int(sys.argv[2])


def refuse():
    raise FileExistsError("the folder is taken")


with ending_together("start again"):
    initialize()
    try:
        on_first(refuse)
    except (FileExistsError, RuntimeError) as error:
        print(type(error).__name__, error, flush=True)
    assert on_first(lambda: "made") == (None if jax.process_index() else "made")

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    total = jax.jit(lambda x: x.sum())
    for step in range(4):
        if step == 2 and jax.process_index() == which:
            if how == "killed":
                os.kill(os.getpid(), 9)
            raise ValueError("bad luck")
        total(jax.make_array_from_process_local_data(rows, np.ones(1))).block_until_ready()

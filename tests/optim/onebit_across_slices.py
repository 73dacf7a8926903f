"""Compiles a GPT's step with 1-bit Adam for v5p chips, and tells its collectives.

The argument is the number of slices of 64 chips, along which the workers lie; with one slice they are its four planes. Run by a
test in a process of its own, as libtpu talks a lot; prints one line of JSON.
"""

import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from effscale.models import Transformer, num_params, preset
from effscale.optim import Workers, onebit_adam
from effscale.parallel import batch_sharding, collectives, per_worker, shardings
from effscale.parallel.mesh import AXES
from effscale.training import create_train_state, make_train_step, next_token_loss

slices = int(sys.argv[1])
options = {"num_slices": slices} if slices > 1 else {}
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4", **options)
devices = sorted(topology.devices, key=lambda d: (getattr(d, "slice_index", 0), d.id))
shape = (slices, 16, 1, 4) if slices > 1 else (4, 4, 1, 4)
mesh = Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
config = preset("gpt2")
optimizer = onebit_adam(1e-4, freeze_step=1000, workers=Workers("data"))
create = lambda: create_train_state(
    Transformer(config, rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
)
place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
with jax.set_mesh(mesh):
    state = jax.eval_shape(create)
    layout = shardings(state, mesh)
    batch = {
        name: jax.ShapeDtypeStruct((64, 1024), jnp.int32, sharding=batch_sharding(mesh))
        for name in ("input_ids", "labels")
    }
    step = per_worker(make_train_step(next_token_loss, optimizer, axis_name="data"))
    step = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
    text = step.lower(jax.tree.map(place, state, layout), batch).compile().as_text()
# Between slices XLA:TPU sends by the host, under the name of the collective it was.
_SEND = re.compile(
    r"= \((?P<dtype>[a-z0-9]+)\[(?P<dims>[0-9,]*)\].* send\(.*rendezvous=\"(?P<name>[a-z_-]+)"
)
sends = [
    [m["name"], m["dtype"], math.prod(int(d) for d in m["dims"].split(",") if d)]
    for m in map(_SEND.search, text.splitlines())
    if m
]
found = [[c.kind, sorted(c.dtypes), c.size, c.devices, list(c.branches)] for c in collectives(text)]
print(json.dumps({"parameters": num_params(config), "collectives": found, "sends": sends}))

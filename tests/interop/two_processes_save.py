"""Loads a model over two processes and saves it from there: ``two_processes_save.py FROM TO``."""

import sys

import jax

from effscale.interop import load_pretrained, save_pretrained
from effscale.parallel import MeshConfig, initialize

jax.config.update("jax_num_cpu_devices", 2)
initialize()
mesh = MeshConfig(data=1, fsdp=2, tensor=2).build()
with jax.set_mesh(mesh):
    model = load_pretrained(sys.argv[1], mesh=mesh)
    for _ in range(2):  # the second replaces the first
        save_pretrained(model, sys.argv[2], max_shard_size=2000)

"""One chunk of tokens at a time: logits of both models exist for only one chunk, and are recomputed for the gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.cross_entropy.chunked import chunk_size, split_tokens
from kernels_pallas.kl_divergence.output import Output
from kernels_pallas.kl_divergence.reference import reference
from kernels_pallas.manual_axes import vary, varying_axes

CHUNK = 256


def chunked(
    student: Output, teacher: Output, weights: Float[Array, " tokens"], temperature: float
) -> Float[Array, ""]:
    """See ``kernels_pallas.kl_divergence``."""
    chunk = chunk_size(student.hidden.shape[0], CHUNK)

    @jax.checkpoint
    def one(own: Array, other: Array, weights: Array) -> Array:
        here = student._replace(hidden=own), teacher._replace(hidden=other)
        return reference(*here, weights, temperature)

    inputs = tuple(split_tokens(a, chunk) for a in (student.hidden, teacher.hidden, weights))
    zero = vary(jnp.float32(0), varying_axes(student, teacher, weights))
    return jax.lax.scan(lambda total, part: (total + one(*part), None), zero, inputs)[0]

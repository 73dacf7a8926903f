"""The public functions of error-compensated sign compression."""

from typing import Any, Literal

from jaxtyping import Array, Float, Int, UInt8

from kernels_pallas import dispatch
from kernels_pallas.sign_compress import reference

Implementation = Literal["reference", "tpu", "gpu"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "tpu", "gpu")


def compress(
    x: Float[Array, "servers rows bytes"],
    corrected: Float[Array, "..."],
    scale: Float[Array, ""],
    *,
    size: int,
    implementation: Implementation | None = None,
) -> tuple[UInt8[Array, "servers bytes"], Float[Array, "servers 8 bytes"], Float[Array, ""]]:
    r"""Add the compression error of the previous step to ``x``, and return the signs of the sum as bits.

    With $c$ the previous sum and $s$ the scale that was sent with its signs, the error is
    $e = c - s \, \mathrm{sg}(c)$, and

    $$c' = x + e, \qquad b = \mathrm{sg}(c') , \qquad \mathrm{sg}(0) = +1$$

    The new scale depends on all of $c'$, so the new error is known only after a pass over it. That is why
    $c'$ is kept and not the error: x and c are read once, and c' is written once.

    Args:
        x: Numbers to compress, of any floating dtype, with one part per server.
        corrected: float32, $c$; zeros at first.
        scale: float32, $s$; zero at first.
        size: Number of leading elements that count; the rest is padding, whose sum stays zero.
        implementation: "reference" (plain jnp), "tpu" or "gpu" (Pallas kernels), or None: the best one for the platform
            that the program is lowered for.

    Returns:
        The signs as bits, 1 for positive (bit 7 - k of byte j is element (k, j)); $c'$; and the sum of its squares.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.linspace(-1.0, 1.0, 16).reshape(1, 8, 2)
        >>> bits, corrected, squares = compress(x, jnp.zeros_like(x), jnp.float32(0), size=16)
        >>> bits.tolist(), f"{squares:.3f}"
        ([[15, 15]], '6.044')
    """
    _check_block("x", x, 3)
    if x.shape != corrected.shape:
        raise ValueError(f"corrected must have the shape of x, {x.shape}, got {corrected.shape}")
    if not 0 <= size <= x.size:
        raise ValueError(f"size must be between 0 and the {x.size} elements of x, got {size}")

    def call(module: Any) -> Any:
        return lambda *operands: module.compress(*operands, size=size)

    return _run("compress", implementation, call, (x, corrected, scale))


def average(
    bits: UInt8[Array, "workers bytes"],
    scales: Float[Array, " any"],
    corrected: Float[Array, "8 part"],
    scale: Float[Array, ""],
    size: Int[Array, ""],
    *,
    implementation: Implementation | None = None,
) -> tuple[UInt8[Array, " bytes"], Float[Array, "8 bytes"], Float[Array, ""]]:
    r"""Average what the workers sent, and compress the average in turn: the server's side of the exchange.

    $$d = c - s \, \mathrm{sg}(c), \qquad c' = \frac{1}{W} \sum_r s_r b_r + d, \qquad b = \mathrm{sg}(c')$$

    Args:
        bits: The signs that each worker sent for this server's part.
        scales: float32, $s_r$.
        corrected: float32, the server's $c$; zeros at first.
        scale: float32, the server's $s$; zero at first.
        size: int32, number of elements of the part that count; the rest is padding. It may differ between servers.
        implementation: As for ``compress``.

    Returns:
        The signs of $c'$ as bits; $c'$; and the sum of its squares.

    Example:
        >>> import jax.numpy as jnp
        >>> bits, zeros = jnp.array([[255], [15]], jnp.uint8), jnp.zeros((8, 1))
        >>> sent, mean, _ = average(bits, jnp.array([1.0, 3.0]), zeros, jnp.float32(0), jnp.int32(8))
        >>> sent.tolist(), mean[:, 0].tolist()
        ([15], [-1.0, -1.0, -1.0, -1.0, 2.0, 2.0, 2.0, 2.0])
    """
    _check_block("corrected", corrected, 2)
    if bits.shape != (scales.shape[0], corrected.shape[1]):
        raise ValueError(
            f"bits must be [workers, bytes], here {(scales.shape[0], corrected.shape[1])}, got {bits.shape}"
        )
    operands = (bits, scales, corrected, scale, size)
    return _run("average", implementation, lambda module: module.average, operands)


def why_not(name: str, workers: int, width: int) -> str | None:
    """Return why an implementation does not support this many workers and bytes here, or None if it does."""
    if name not in ("tpu", "gpu"):
        return None
    if workers == 0 or width == 0:
        return f"{workers} parts of {width} bytes are empty"
    if name == "tpu":
        return dispatch.partitioned() or _module("tpu").why_not(workers)
    return dispatch.partitioned() or _module("gpu").why_not(width)


def _run(op: str, implementation: str | None, call: Any, operands: Any) -> Any:
    """Run the op by a named implementation, or by the best one for the platform that the program is lowered for."""
    dispatch.check_name(implementation, IMPLEMENTATIONS)
    workers, width = operands[0].shape[0], operands[0].shape[-1]
    return dispatch.by_implementation(
        op,
        implementation,
        {name: lambda name=name: call(_module(name)) for name in IMPLEMENTATIONS},
        lambda name: why_not(name, workers, width),
        operands,
    )


def _module(name: str) -> Any:
    if name == "reference":
        return reference
    if name == "tpu":
        from kernels_pallas.sign_compress import tpu

        return tpu
    from kernels_pallas.sign_compress import gpu

    return gpu


def expand(
    bits: UInt8[Array, "workers bytes"], scales: Float[Array, " workers"]
) -> Float[Array, "workers 8 bytes"]:
    """Return the numbers that bits and scales represent, in float32.

    Example:
        >>> import jax.numpy as jnp
        >>> expand(jnp.array([[240]], jnp.uint8), jnp.array([0.5]))[0, :, 0].tolist()
        [0.5, 0.5, 0.5, 0.5, -0.5, -0.5, -0.5, -0.5]
    """
    return reference.expand(bits, scales)


def _check_block(name: str, x: Array, ndim: int) -> None:
    if x.ndim != ndim or x.shape[-2] != 8:
        raise ValueError(
            f"{name} must have {ndim} dimensions, with size 8 for the last but one, got {x.shape}"
        )

"""Values that are the same on all workers although their type marks them as different.

``jax.shard_map`` types a value by everything it was computed from, not by what it depends on. ``jnp.zeros_like(gradient)``,
with which optax freezes a parameter, counts as different on each worker, and so does the parameter that it is added to.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from effscale.parallel.workers import differs, is_per_worker

# Each number of the result depends only on the operands, and the result varies only if they do.
_POINTWISE = frozenset(
    [
        "abs",
        "add",
        "add_any",
        "and",
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "div",
        "eq",
        "ge",
        "gt",
        "le",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "pow",
        "reshape",
        "select_n",
        "sqrt",
        "square",
        "squeeze",
        "sub",
        "transpose",
    ]
)


def settled(function: Callable[..., Any], axis_name: str | None) -> Callable[..., Any]:
    """Return the function with results typed as the same on all workers if they depend on nothing that differs.

    A result outside of a ``PerWorker`` that is typed as different is recomputed from the values that the workers share, if
    sums, products and similar operations lead from these to it. This needs no communication. All other results are
    unchanged.

    Args:
        function: A pure function of trees of arrays; it may be traced twice.
        axis_name: The workers' axis; with None, the function is returned as it is.

    Example:
        >>> import jax.numpy as jnp
        >>> def body(scale, x):
        ...     return settled(lambda s, x: s + jnp.zeros_like(x[0]), "data")(scale, x)
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> specs = {"in_specs": (jax.P(), jax.P("data")), "out_specs": jax.P()}  # without it, P() is refused
        >>> print(jax.shard_map(body, mesh=mesh, **specs)(jnp.float32(2.0), jnp.ones(4)))
        2.0
    """
    if axis_name is None:
        return function

    def run(*args: Any) -> Any:
        out = function(*args)
        nodes, structure = jax.tree.flatten(out, is_leaf=is_per_worker)
        unsettled = lambda node: not is_per_worker(node) and differs(node, axis_name)
        if not any(map(unsettled, nodes)):
            return out
        closed = jax.make_jaxpr(lambda *args: _outside_per_worker(function(*args)))(*args)
        shared = iter(_replay(closed, jax.tree.leaves(args), axis_name))
        again = [None if is_per_worker(node) else next(shared) for node in nodes]
        nodes = [
            twin if twin is not None and unsettled(node) else node
            for node, twin in zip(nodes, again, strict=True)
        ]
        return jax.tree.unflatten(structure, nodes)

    return run


def _outside_per_worker(tree: Any) -> list[Any]:
    nodes = jax.tree.leaves(tree, is_leaf=is_per_worker)
    return [node for node in nodes if not is_per_worker(node)]


def _replay(closed: Any, args: list[Any], axis_name: str) -> list[Any]:
    """Compute the results of a jaxpr from the arguments that the workers share; None for each that needs more than those."""
    jaxpr = closed.jaxpr
    known = [None if x is None or differs(x, axis_name) else x for x in [*closed.consts, *args]]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], known, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values.get(variable)

    for equation in jaxpr.eqns:
        operands, name = [read(v) for v in equation.invars], equation.primitive.name
        if name == "pvary" and equation.params["axes"] == (axis_name,):
            results = operands
        elif name in ("jit", "pjit"):
            results = _replay(equation.params["jaxpr"], operands, axis_name)
        elif name in _POINTWISE and all(x is not None for x in operands):
            results = [equation.primitive.bind(*operands, **equation.params)]
        else:
            continue
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]

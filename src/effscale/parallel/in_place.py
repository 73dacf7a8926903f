"""Detection of lost in-place changes: a traced step works on copies of its arguments."""

from collections.abc import Callable
from typing import Any

import jax


def refusing_lost_changes(step: Callable[..., Any], runner: str) -> Callable[..., Any]:
    """Make a step raise if it replaces arrays of its arguments in place and does not return them.

    ``nnx.Optimizer.update`` and ``nnx.BatchNorm`` make such changes. Inside ``jax.shard_map`` or ``jax.vmap``, the arguments are
    copies, so a step that relies on changing them would silently do nothing.

    Args:
        step: A function of trees, such as ``nnx`` modules.
        runner: The function that runs the step, for the message.

    Raises:
        ValueError: While tracing: a change would be lost.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree_util.tree_leaves_with_path
        before = dict([*leaves(args), *leaves(kwargs)])
        out = step(*args, **kwargs)
        kept = {id(x) for x in [*before.values(), *jax.tree.leaves(out)]}
        for path, x in [*leaves(args), *leaves(kwargs)]:
            if path in before and id(x) not in kept:
                raise ValueError(
                    f"the step changed its argument{jax.tree_util.keystr(path)} in place, and the change would be lost: "
                    f"{runner} passes copies to the step. Return what it changes, such as the nnx module and its optimizer, and "
                    "continue with what is returned: `model, optimizer, loss = step(model, optimizer, batch)`"
                )
        return out

    return run

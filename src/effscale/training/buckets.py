"""One executable per shape, compiled before it is needed.

Curricula and token dropping change shapes during training. Their schedules yield few distinct shapes, the buckets.
``ShapeBuckets`` compiles the next one in a background thread while the current one runs.
"""

import collections
import concurrent.futures
import contextvars
import dataclasses
import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One compilation.

    Attributes:
        signature: A description of the shapes and types that differ between buckets.
        seconds: Time to trace, lower and compile.
        background: Whether it ran in the background.
    """

    signature: str
    seconds: float
    background: bool


class _Executable(NamedTuple):
    compiled: Any
    carries: bool
    """Whether the first output has the signature of the first argument, so that it does not have to be computed again."""


class ShapeBuckets:
    """A function with one executable for each signature of its arguments.

    The signature is the tree structure, shapes, types and shardings of all arguments, including keyword arguments. A new
    signature is compiled at the call; one that was passed to ``prepare`` is ready or is waited for. If the function
    returns the successor of an argument (a training state), that output keeps the argument's shardings, so that no second
    compilation follows.

    Args:
        function: A pure function of pytrees, not jitted.
        donate_argnums: As in ``jax.jit``.
        on_compile: Called with each ``Compilation``, from the thread that compiled.

    >>> import jax.numpy as jnp
    >>> double = ShapeBuckets(lambda x: 2 * x)
    >>> double.prepare(jax.ShapeDtypeStruct((3,), jnp.float32))
    >>> double(jnp.ones(3)).tolist(), double(jnp.ones(4)).tolist(), double(jnp.ones(3)).tolist()
    ([2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0])
    >>> double.num_compilations, [record.background for record in double.compilations]
    (2, [True, False])
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        donate_argnums: int | Sequence[int] = (),
        on_compile: Callable[[Compilation], None] | None = None,
    ):
        self.function = function
        self.donate_argnums = (
            (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums)
        )
        self.compilations: list[Compilation] = []
        self._on_compile = on_compile
        self._executables: dict[Any, concurrent.futures.Future[_Executable]] = {}
        self._lock = threading.Lock()
        self._waiting: collections.deque[Callable[[], None]] = collections.deque()
        self._worker: threading.Thread | None = None
        self._closed = False
        self._carried: tuple[weakref.ref[Any], Any] | None = None

    @property
    def num_compilations(self) -> int:
        """The number of executables compiled so far."""
        return len(self.compilations)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Compile for these arguments in the background, unless this is already done or in progress.

        Args:
            *args: Arguments as in a call, or ``jax.ShapeDtypeStruct`` in place of arrays. On a mesh these must carry
                the shardings of the later call.
            **kwargs: Keyword arguments, likewise.
        """
        key = self._key(args, kwargs)
        future: concurrent.futures.Future[_Executable] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(
                    "these buckets are closed, so nothing can be compiled in the background"
                )
            if self._executables.setdefault(key, future) is not future:
                return
        # The thread sees the same mesh and context variables but keeps no array alive.
        described = _described(args, kwargs)
        mesh, context = jax.sharding.get_mesh(), contextvars.copy_context()

        def work() -> None:
            with jax.set_mesh(mesh):
                self._compile(future, *described, background=True)

        with self._lock:
            self._waiting.append(functools.partial(context.run, work))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="shape-buckets")
                self._worker.start()

    def _work(self) -> None:
        """Run the waiting compilations one after another, in the thread."""
        while True:
            with self._lock:
                # On exit Python waits for this thread, so skip compilations that have not started.
                if not self._waiting or not threading.main_thread().is_alive():
                    self._worker = None
                    return
                compile_next = self._waiting.popleft()
            compile_next()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the executable for these arguments.

        Raises:
            ValueError: An array of a donated argument is also part of another argument, so it would be deleted there too.
            Exception: Any error of tracing or compiling, in the background or at the call.
        """
        key = self._key(args, kwargs)
        executable = self._executable(key, args, kwargs)
        out = executable.compiled(*args, **kwargs)
        if executable.carries:
            first = out[0] if isinstance(out, tuple) else out
            self._carried = (weakref.ref(first), key[1])
        return out

    def wait(self) -> None:
        """Wait until everything passed to ``prepare`` is compiled, and raise any error that occurred."""
        for future in list(self._executables.values()):
            future.result()

    def close(self) -> None:
        """Cancel compilations that have not started, and wait for the others."""
        with self._lock:
            self._closed, worker = True, self._worker
            self._waiting.clear()
        if worker is not None:
            worker.join()
        for key in [key for key, future in self._executables.items() if not future.done()]:
            del self._executables[key]

    def _executable(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Executable:
        future = self._executables.get(key)
        if future is None:
            _check_not_donated_twice(self.donate_argnums, args, kwargs)
            mine: concurrent.futures.Future[_Executable] = concurrent.futures.Future()
            with self._lock:
                future = self._executables.setdefault(key, mine)
            if future is mine:
                self._compile(mine, *_described(args, kwargs), background=False)
        return future.result()

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the key of an executable: the mesh, then one entry per argument."""
        parts: list[Any] = [jax.sharding.get_abstract_mesh()]
        for position, arg in enumerate(args):
            if position == 0 and self._carried is not None and self._carried[0]() is arg:
                parts.append(self._carried[1])
            else:
                parts.append(_signature(arg))
        parts += [(name, _signature(kwargs[name])) for name in sorted(kwargs)]
        return tuple(parts)

    def _compile(
        self,
        future: concurrent.futures.Future[_Executable],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        background: bool,
    ) -> None:
        start = time.perf_counter()
        try:
            executable = self._build(args, kwargs)
        except BaseException as error:
            future.set_exception(error)
            return
        record = Compilation(self._words(args), time.perf_counter() - start, background)
        self.compilations.append(record)
        future.set_result(executable)
        where = "in the background" if background else "at the call"
        logger.info(
            "compiled %s for %s %s in %.2f s", self._name(), record.signature, where, record.seconds
        )
        if self._on_compile is not None:
            self._on_compile(record)

    def _build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Executable:
        jitted = jax.jit(self.function, donate_argnums=self.donate_argnums)
        traced = jitted.trace(*args, **kwargs)
        out = traced.out_info
        outputs = out if isinstance(out, tuple) else (out,)
        pinned: list[Any] = [None] * len(outputs)
        carries = False
        # Only donated arguments are expected to be returned updated, and the first output must support weak references.
        for position in self.donate_argnums:
            wanted = _shapes(args[position])
            for index, output in enumerate(outputs):
                if pinned[index] is None and _shapes(output) == wanted:
                    pinned[index] = jax.tree.map(lambda x: x.sharding, args[position])
                    placed = {x.sharding is None for x in jax.tree.leaves(args[position])}
                    if position == index == 0 and len(placed) == 1:
                        carries = hasattr(args[0], "__weakref__")
                    break
        if any(isinstance(x, jax.sharding.Sharding) for x in jax.tree.leaves(pinned)):
            shardings = tuple(pinned) if isinstance(out, tuple) else pinned[0]
            traced = jax.jit(
                self.function, donate_argnums=self.donate_argnums, out_shardings=shardings
            ).trace(*args, **kwargs)
        return _Executable(traced.lower().compile(), carries)

    def _name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def _words(self, args: tuple[Any, ...]) -> str:
        """Describe the positional arguments that are not donated, which are what changes between buckets."""
        kept = [
            arg for position, arg in enumerate(args) if position not in self.donate_argnums
        ] or args
        leaves = jax.tree_util.tree_leaves_with_path(kept)
        shown = [
            f"{jax.tree_util.keystr(path)}: {leaf.dtype}{list(leaf.shape)}"
            for path, leaf in leaves[:6]
        ]
        return ", ".join(shown) + (", ..." if len(leaves) > len(shown) else "")


def _is_described(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _placement(x: Any) -> Any:
    """Return the sharding that matters: None for arrays that JAX may move freely and for those on the default device.

    Otherwise the two would count as different signatures, although the first step of a run turns one into the other.
    """
    sharding = getattr(x, "sharding", None)
    if sharding is None or (isinstance(x, jax.Array) and not x.committed):
        return None
    if len(sharding.device_set) == 1 and jax.local_devices()[0] in sharding.device_set:
        return None
    return sharding


def _normal(sharding: Any) -> Any:
    """Return the canonical form of a sharding: P("data", None) and P("data") are the same placement."""
    if not isinstance(sharding, jax.NamedSharding):
        return sharding
    spec = list(sharding.spec)
    while spec and spec[-1] is None:
        spec.pop()
    return (sharding.mesh, tuple(spec), sharding.memory_kind)


def _leaf_key(x: Any) -> Any:
    if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)):
        weak = x.weak_type if isinstance(x, jax.ShapeDtypeStruct) else x.aval.weak_type
        return x.shape, x.dtype, bool(weak), _normal(_placement(x))
    aval = jax.typeof(x)
    return aval.shape, aval.dtype, bool(aval.weak_type), None


def _signature(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_described)
    return structure, tuple(_leaf_key(leaf) for leaf in leaves)


def _shapes(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype, bool(getattr(x, "weak_type", False))) for x in leaves]


def _check_not_donated_twice(
    donate_argnums: Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise an error that names an array that is donated and also used by another argument; JAX's error only has its leaf number."""
    donated = [args[position] for position in donate_argnums]
    mine = {id(x) for x in jax.tree.leaves(donated) if isinstance(x, jax.Array)}
    others = {str(i): arg for i, arg in enumerate(args) if i not in donate_argnums} | kwargs
    for name, tree in others.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if id(x) in mine:
                raise ValueError(
                    f"argument {name}{jax.tree_util.keystr(path)} is also an array of a donated argument and would "
                    "be deleted. Pass a copy, jax.tree.map(jnp.copy, ...)."
                )


def _described(*trees: Any) -> Any:
    return jax.tree.map(_describe_leaf, trees, is_leaf=_is_described)


def _describe_leaf(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)):
        weak = x.weak_type if isinstance(x, jax.ShapeDtypeStruct) else x.aval.weak_type
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_placement(x), weak_type=bool(weak))
    aval = jax.typeof(np.asarray(x) if isinstance(x, np.generic) else x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=bool(aval.weak_type))

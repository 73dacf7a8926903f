"""Examine documents on a Ray cluster."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from effscale.extras import require

PREFETCH = 4
"""Batches in flight per processor of the cluster."""


def ray_runner(examine: Any, batches: Iterable[Sequence[str]]) -> Iterator[Any]:
    """Examine documents with Ray workers: ``Cleaned(..., run=ray_runner)``.

    It uses the cluster that Ray is connected to, or starts Ray on this machine. This process reads the documents and compares
    their digests and signatures; the workers do the expensive part, n-grams and hashing. If a worker is lost, its batch is
    examined again.

    Raises:
        ModuleNotFoundError: The extra ``ray`` is not installed.
    """
    require("cleaning with Ray", "ray")
    import ray

    if not ray.is_initialized():
        ray.init()
    call = ray.remote(lambda examine, batch: examine(batch))
    shared = ray.put(examine)
    limit = PREFETCH * max(int(ray.cluster_resources().get("CPU", 1)), 1)
    pending: collections.deque[Any] = collections.deque()
    for batch in batches:
        pending.append(call.remote(shared, batch))
        if len(pending) >= limit:
            yield ray.get(pending.popleft())
    while pending:
        yield ray.get(pending.popleft())

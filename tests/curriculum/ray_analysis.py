"""An analysis with Ray on this machine, in a process of its own: Ray warns, and its services must not outlive a test."""

import pathlib
import sys
import tempfile

import numpy as np
import ray

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from analysis_parts import Killer, Remainders, token

from effscale.curriculum.analysis.analyze import accumulate, analyze
from effscale.curriculum.analysis.workers import ray_runner
from effscale.curriculum.metrics import TokenCounts


def main():
    here = str(pathlib.Path(__file__).parent)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "deaths").mkdir()
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100_000_000,
            runtime_env={"env_vars": {"PYTHONPATH": here}},
        )
        source = Remainders(1000)
        # One worker is killed on the way.
        metrics = {"token": Killer(folder / "deaths", 500, times=1), "file": token}
        sizes = {"batch_size": 30, "shard_size": 250}
        cluster = analyze(source, metrics, folder / "cluster", run=ray_runner, **sizes)
        deaths = len(list((folder / "deaths").iterdir()))
        assert deaths == 1, deaths
        local = analyze(source, metrics, folder / "local")
        assert cluster.manifest == local.manifest
        assert cluster.values("token").tolist() == list(range(7, 1007))
        counts = accumulate(source, TokenCounts(2000), run=ray_runner, **sizes)
        # Each row holds its token twice, as input and as label.
        assert counts.tolist() == (2 * np.bincount(range(7, 1007), minlength=2000)).tolist()
        ray.shutdown()
    print("same as without Ray")


if __name__ == "__main__":
    main()

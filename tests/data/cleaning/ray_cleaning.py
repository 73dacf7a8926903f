"""Cleaning with Ray on this machine, in a process of its own: Ray warns, and its services must not outlive a test."""

import sys

import ray

from effscale.data import TextFiles
from effscale.data.cleaning import Cleaned, NearDuplicates, Quality, ray_runner
from effscale.data.documents import SkipReport


def main():
    options = {
        "source": TextFiles(paths=f"{sys.argv[1]}/*.txt"),
        "quality": Quality(min_characters=20),
        "near_duplicates": NearDuplicates(threshold=0.7, ngram=4),
    }
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
    reports = SkipReport(), SkipReport()
    here = list(Cleaned(**options).documents(reports[0]))
    there = list(Cleaned(**options, run=ray_runner).documents(reports[1]))
    ray.shutdown()
    assert there == here
    assert reports[0] == reports[1]
    assert reports[0].total == 4
    print("same as without Ray")


if __name__ == "__main__":
    main()

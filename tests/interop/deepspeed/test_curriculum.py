import copy

import numpy as np
import pytest

from effscale.curriculum.ranking import rank
from effscale.interop.deepspeed.curriculum import curriculum_from_deepspeed, pacing_from_deepspeed


def block(kind, low, high, **schedule):
    return {
        "min_difficulty": low,
        "max_difficulty": high,
        "schedule_type": kind,
        "schedule_config": schedule,
    }


def fixed_root(low, high, total, step, degree):
    return block(
        "fixed_root",
        low,
        high,
        total_curriculum_step=total,
        difficulty_step=step,
        root_degree=degree,
    )


def fixed_linear(low, high, total, step):
    return block("fixed_linear", low, high, total_curriculum_step=total, difficulty_step=step)


@pytest.mark.parametrize(
    ("config", "golden"),
    [
        (fixed_linear(2, 10, 8, 2), dict(enumerate([2, 4, 4, 6, 6, 8, 8, 10, 10, 10], 1))),
        (
            block("fixed_discrete", 1, 5, difficulty=[1, 2, 3, 4, 5], max_step=[2, 4, 6, 8]),
            dict(enumerate([1, 1, 2, 2, 3, 3, 4, 4, 5, 5], 1)),
        ),
        (
            fixed_linear(80, 2048, 110_000, 8),
            {447: 80, 448: 88, 1000: 96, 55_000: 1064, 109_999: 2040, 110_000: 2048},
        ),
        (
            fixed_root(80, 2048, 110_000, 8, 1),
            {447: 80, 448: 88, 1000: 96, 55_000: 1064, 109_999: 2040, 110_000: 2048},
        ),
        (
            fixed_root(1, 100, 110_000, 1, 2),
            {11: 1, 12: 2, 100: 3, 1000: 10, 11_000: 32, 27_500: 50, 55_000: 71, 110_000: 100},
        ),
    ],
)
def test_golden_values_of_the_original(config, golden):
    pacing = pacing_from_deepspeed(config)
    assert {step: pacing(step) for step in golden} == golden


def original(config, t):
    """fixed_linear as DeepSpeed computes it."""
    low, high = config["min_difficulty"], config["max_difficulty"]
    schedule = config["schedule_config"]
    value = int(t / schedule["total_curriculum_step"] * (high - low) + low)
    value -= value % schedule["difficulty_step"]
    return min(value, high)


def test_the_two_differences_from_the_original():
    below = fixed_linear(5, 40, 100, 8)
    assert (original(below, 1), pacing_from_deepspeed(below)(1)) == (0, 5)
    vit = fixed_linear(32, 197, 3910, 8)
    ours = pacing_from_deepspeed(vit)
    assert (original(vit, 3910), original(vit, 3982)) == (192, 197)
    assert (ours(3909), ours(3910)) == (192, 197)
    for config in (below, vit):
        total = config["schedule_config"]["total_curriculum_step"]
        pacing = pacing_from_deepspeed(config)
        differing = [
            t
            for t in range(1, total)
            if original(config, t) >= config["min_difficulty"] and pacing(t) != original(config, t)
        ]
        assert differing == []


def test_custom_schedules_need_their_function_again():
    config = block("custom", 1, 4, total_curriculum_step=3)
    pacing = pacing_from_deepspeed(config, function=lambda step: 1 + step)
    assert [pacing(t) for t in (1, 2, 3, 4)] == [2, 3, 4, 4]
    # Step 0 is none of DeepSpeed's: at 0 this function is below min_difficulty, and the other has no value.
    from_one = pacing_from_deepspeed(config, function=lambda step: 2 * step - 1)
    assert [from_one(t) for t in (0, 1, 2, 3)] == [1, 1, 3, 4]
    assert pacing_from_deepspeed(config, function=lambda step: 5 - 4 // step)(0) == 1
    with pytest.raises(ValueError, match=r"voc\.schedule_type='custom' needs a function"):
        pacing_from_deepspeed(config, name="voc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule_type": "fixed_rot"}, "voc.schedule_type must be one of .*, got 'fixed_rot'; did you mean 'fixed_root'"),
        ({"schedule_config": {"total_curriculum_step": 3}}, "voc.schedule_config: needs difficulty_step, root_degree"),
        ({"max_difficulty": 0}, "max_difficulty must be at least min_difficulty=1.*, got 0"),
        (
            block("fixed_discrete", 1, 5, difficulty=[1, 2], max_step=[3]),
            r"voc.schedule_config.difficulty must go from min_difficulty=1 to max_difficulty=5, got \[1, 2\]",
        ),
        (block("fixed_discrete", 1, 5, difficulty=[1, 5], max_step=[]), "max_step"),
    ],
)  # fmt: skip
def test_bad_schedules(change, message):
    config = {**fixed_root(1, 100, 10, 1, 2), **change}
    with pytest.raises(ValueError, match=message):
        pacing_from_deepspeed(config, name="voc")


def metric(schedule, difficulty_type="percentile", clustering_type="schedule_based"):
    return {
        "index_to_sample_path": "dummy",
        "index_to_metric_path": "dummy",
        "difficulty_type": difficulty_type,
        "clustering_type": clustering_type,
        **schedule,
    }


VOCABULARY = metric(fixed_root(1, 10, 110, 1, 2))
TRUNCATE = metric(fixed_root(80, 2048, 110, 8, 1), "value", "single_cluster")


def whole(**metrics):
    learning = {"enabled": True, "data_cluster_path": "/c", "curriculum_metrics": metrics}
    return {
        "train_batch_size": 512,
        "data_efficiency": {
            "enabled": True,
            "seed": 7,
            "data_sampling": {
                "enabled": True,
                "num_epochs": 2,
                "num_workers": 0,
                "curriculum_learning": learning,
            },
            "data_routing": {"enabled": True, "random_ltd": {"enabled": True}},
        },
    }


RANKING = rank(np.arange(50)[::-1].copy())


def test_the_recipe_of_the_gpt_example():
    config = whole(voc=VOCABULARY, seqlen_truncate=TRUNCATE)
    before = copy.deepcopy(config)
    found = curriculum_from_deepspeed(config, rankings={"voc": RANKING})
    assert config == before
    assert (found.seed, found.num_epochs, [*found.difficulties]) == (7, 2, ["voc"])
    voc = found.difficulties["voc"]
    assert (voc.ranking, voc.difficulty_type, voc.clustering_type) == (
        RANKING,
        "percentile",
        "schedule_based",
    )
    assert voc.pacing(110) == 10
    assert found.sequence_length.mode == "truncate"
    assert found.sequence_length.stages(512).values[-1] == 2048


def test_reshaping_and_metrics_that_order_nothing():
    reorder = metric(fixed_root(8, 64, 10, 8, 1), "value", "single_cluster")
    config = whole(seqlen_reshape=TRUNCATE, seqlen=reorder)
    found = curriculum_from_deepspeed(config)
    assert found.sequence_length.mode == "reshape"
    assert found.difficulties["seqlen"].clustering_type == "single_cluster"
    assert found.difficulties["seqlen"].ranking is None


@pytest.mark.parametrize("name", ["seqlen_truncate", "seqlen_reshape"])
def test_a_metric_of_lengths_that_also_clusters_is_refused(name):
    config = whole(**{name: {**TRUNCATE, "clustering_type": "schedule_based"}})
    with pytest.raises(ValueError, match=rf"{name}\.clustering_type must be 'sin"):
        curriculum_from_deepspeed(config)


def test_indexes_are_read_from_their_files(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "effscale.interop.deepspeed.curriculum.ranking_from_deepspeed",
        lambda *paths: seen.append(paths) or RANKING,
    )
    value = metric(fixed_linear(1, 10, 9, 1), "value")
    percentile = {**VOCABULARY, "index_to_sample_path": "merged"}
    found = curriculum_from_deepspeed(whole(a=value, b=percentile, c=TRUNCATE))
    assert seen == [("dummy", "dummy"), ("merged",)]
    assert found.difficulties["a"].ranking is RANKING


LEGACY = {"enabled": True, "curriculum_type": "seqlen", **fixed_linear(8, 1024, 15_000, 8)}


def test_the_older_block():
    found = curriculum_from_deepspeed({"curriculum_learning": LEGACY, "optimizer": {}})
    assert found.difficulties == {}
    assert found.sequence_length.mode == "truncate"
    # Step 0 has count 1.
    assert [found.sequence_length.stages(1)(step) for step in (0, 117, 118, 14_999)] == [
        8,
        8,
        16,
        1024,
    ]
    custom = {**LEGACY, **block("custom", 8, 64, total_curriculum_step=7)}
    found = curriculum_from_deepspeed(
        {"curriculum_learning": custom}, functions={"seqlen": lambda step: 8 * (step + 1)}
    )
    assert found.sequence_length.pacing(3) == 32


def test_switches():
    off = {"curriculum_learning": {**LEGACY, "enabled": False}}
    assert curriculum_from_deepspeed(off).sequence_length is None
    config = whole(voc=VOCABULARY)
    config["data_efficiency"]["data_sampling"]["curriculum_learning"]["enabled"] = False
    assert curriculum_from_deepspeed(config).difficulties == {}
    assert curriculum_from_deepspeed({"data_efficiency": {"enabled": False}}).difficulties == {}
    # DeepSpeed never looks at the outer ones.
    config = whole(seqlen_truncate=TRUNCATE)
    del config["data_efficiency"]["enabled"], config["data_efficiency"]["data_sampling"]["enabled"]
    assert curriculum_from_deepspeed(config).sequence_length is not None
    for path in ("data_efficiency", "data_efficiency.data_sampling"):
        config = whole(seqlen_truncate=TRUNCATE)
        place = config
        for key in path.split("."):
            place = place[key]
        place["enabled"] = False
        with pytest.raises(ValueError, match=rf"{path}\.enabled is false, but .*DeepSpeed uses"):
            curriculum_from_deepspeed(config)


def changed(path, value):
    config = whole(voc=copy.deepcopy(VOCABULARY), seqlen_truncate=copy.deepcopy(TRUNCATE))
    place = config["data_efficiency"]
    *keys, last = path.split(".")
    for key in keys:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return config


LEARNING = "data_sampling.curriculum_learning"
METRICS = f"{LEARNING}.curriculum_metrics"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data_efficency": {}}, "neither data_efficiency nor curriculum_learning.*did you mean 'data_efficency'"),
        ({}, "neither"),
        (changed("sed", 1), "data_efficiency: unknown key 'sed': did you mean 'seed'"),
        (changed(f"{LEARNING}.enabled", None), f"{LEARNING}: needs enabled"),
        (changed(f"{METRICS}.voc", 3), f"{METRICS}.voc must be an object.*, got 3"),
        (changed(f"{METRICS}.voc.schedule_config.root_degre", 2), "unknown key 'root_degre': did you mean 'root_degree'"),
        (changed(f"{METRICS}.seqlen_reshape", TRUNCATE), "seqlen_truncate and seqlen_reshape exclude each other"),
        ({"curriculum_learning": {**LEGACY, "curriculum_type": "voc"}}, "curriculum_type must be one of 'seqlen', got 'voc'"),
        ({"curriculum_learning": LEGACY, **whole(voc=VOCABULARY, seqlen_truncate=TRUNCATE)}, "both define a sequence-length curriculum"),
    ],
)  # fmt: skip
def test_what_is_unknown_missing_or_contradictory(config, message):
    with pytest.raises(ValueError, match=message):
        curriculum_from_deepspeed(config, rankings={"voc": RANKING})


def test_an_index_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"dummy\.idx: file not found"):
        curriculum_from_deepspeed(whole(voc=VOCABULARY))
    without = changed(f"{METRICS}.voc.index_to_sample_path", None)
    with pytest.raises(ValueError, match=r"curriculum_metrics\.voc: needs index_to_sample_path"):
        curriculum_from_deepspeed(without)
    assert curriculum_from_deepspeed(without, rankings={"voc": RANKING}).difficulties


def test_a_ranking_for_no_metric():
    with pytest.raises(ValueError, match="rankings: unknown key 'vox': did you mean 'voc'"):
        curriculum_from_deepspeed(whole(voc=VOCABULARY), rankings={"vox": RANKING})

"""The simulated cluster: nothing is lost or made twice, and what goes wrong costs what it must."""

import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from cluster_model import Cluster, Measured, Outcome, Store, shard_seconds, simulate

MEASURED = Measured(
    fetch=[0.02, 0.03, 0.01, 0.02],
    decode=[0.01, 0.01, 0.02, 0.01],
    make=[0.1, 0.08, 0.12, 0.1],
    plan=0.05,
    write=0.2,
    image_bytes=100_000,
)
CLUSTER = Cluster(images=8_000, workers=10, images_per_shard=20, startup_seconds=5, replacement_seconds=30)


def each_shard_once(outcome: Outcome, shards: int) -> bool:
    return outcome.made == {1: shards}


@pytest.mark.parametrize(
    "cluster",
    [
        CLUSTER,
        replace(CLUSTER, reclaims_per_hour=20),
        replace(CLUSTER, slow={3: 10.0, 4: math.inf}),
        replace(CLUSTER, slow={3: math.inf}, reclaims_per_hour=20, large={7: 20.0}),
        replace(CLUSTER, workers=400, reclaims_per_hour=20),
    ],
)
def test_each_shard_is_made_once_whatever_happens(cluster: Cluster) -> None:
    assert each_shard_once(simulate(cluster, MEASURED), 400)


def test_a_run_of_several_datasets_is_whole() -> None:
    cluster = replace(CLUSTER, images=25_000, images_per_shard=1, reclaims_per_hour=5)
    outcome = simulate(cluster, MEASURED)
    assert each_shard_once(outcome, 25_000)
    assert outcome.writes == 25_000
    assert outcome.reads >= 4 * 25_000


def test_the_same_seed_gives_the_same_run() -> None:
    cluster = replace(CLUSTER, reclaims_per_hour=20, slow={1: 4.0})
    assert simulate(cluster, MEASURED) == simulate(cluster, MEASURED)
    assert simulate(cluster, MEASURED) != simulate(replace(cluster, seed=1), MEASURED)


def test_nothing_is_wasted_where_nothing_is_taken_away() -> None:
    quiet = simulate(replace(CLUSTER, repeats=False), MEASURED)
    assert quiet.lost_seconds == quiet.repeated_seconds == 0
    reclaimed = simulate(replace(CLUSTER, reclaims_per_hour=20), MEASURED)
    assert reclaimed.lost_seconds > 0
    assert reclaimed.seconds > quiet.seconds
    assert 0 < reclaimed.efficiency < quiet.efficiency < 1


def test_more_workers_are_faster_until_the_store_is_the_limit() -> None:
    seconds = [simulate(replace(CLUSTER, workers=workers), MEASURED).seconds for workers in (1, 2, 5, 10, 50)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] / seconds[1] == pytest.approx(2, rel=0.05)
    slow_store = replace(CLUSTER, store=Store(requests_per_second=100), startup_seconds=0)
    bounded = [simulate(replace(slow_store, workers=workers), MEASURED) for workers in (2, 20, 40)]
    assert bounded[0].images_per_second == pytest.approx(2 * 9.5, rel=0.1)
    assert bounded[1].images_per_second == pytest.approx(bounded[2].images_per_second, rel=0.1)
    assert bounded[2].images_per_second <= 105


def test_reading_ahead_hides_latency_and_a_shard_alone_takes_what_its_device_takes() -> None:
    far = Store(latency=0.5)
    seconds = {
        depth: shard_seconds(MEASURED, 200, depth, far, workers=1, order=random.Random(0))[0]
        for depth in (1, 2, 8, 32)
    }
    assert seconds[1] > 2 * seconds[8]  # an image each half second
    assert sorted(seconds.values(), reverse=True) == list(seconds.values())
    near, device = shard_seconds(MEASURED, 200, 8, Store(), workers=1, order=random.Random(0))
    assert device == pytest.approx(200 * 0.1, rel=0.05)
    assert near == pytest.approx(device + MEASURED.plan + MEASURED.write, abs=0.1)


def test_a_reclaim_costs_a_shard_at_most() -> None:
    """Small shards lose less; with each reclaim half a shard on average."""
    lost = [
        simulate(replace(CLUSTER, images=80_000, images_per_shard=size, reclaims_per_hour=20), MEASURED).wasted
        for size in (20, 200, 1000)
    ]
    assert lost == sorted(lost)
    assert lost[-1] > 5 * lost[0]


def test_the_tail_is_bounded_where_idle_workers_help() -> None:
    ideal = simulate(CLUSTER, MEASURED).seconds
    shard = 2.3  # seconds
    frozen = replace(CLUSTER, slow={2: math.inf})
    assert simulate(replace(frozen, repeats=False), MEASURED).seconds == math.inf
    assert simulate(frozen, MEASURED).seconds < ideal * 10 / 9 + 3 * shard
    slow = replace(CLUSTER, slow={2: 10.0})
    assert simulate(replace(slow, repeats=False), MEASURED).seconds > ideal + 6 * shard
    assert simulate(slow, MEASURED).seconds < ideal * 10 / 9 + 4 * shard


def test_large_shards_first_leave_no_tail() -> None:
    large = replace(CLUSTER, large={399: 20.0})
    ideal = simulate(large, MEASURED).seconds
    last = simulate(replace(large, largest_first=False), MEASURED).seconds
    assert last - ideal > 12 * 2.3

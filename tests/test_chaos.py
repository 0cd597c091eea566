"""A short disturbed run; `make chaos` makes long ones."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from chaos.dataset import make_undisturbed
from chaos.events import Kind, draw_events
from chaos.tally import Tally
from chaos.trial import Course, check, run_trial
from s3server import S3Server


def test_events_are_drawn_from_their_seed() -> None:
    events = draw_events(1, 30, 300)
    assert events == draw_events(1, 30, 300) != draw_events(2, 30, 300)
    assert len(events) == 30
    assert {event.kind for event in events} == set(Kind)
    moments = [event.after for event in events]
    assert moments == sorted(set(moments))
    assert all(0 < moment < 225 for moment in moments)
    assert all((event.fault is None) == (event.kind is not Kind.STORE) for event in events)


def test_a_tally_counts_what_the_store_saw() -> None:
    tally = Tally(
        seed=7,
        kinds=Counter({Kind.WORKER: 2, Kind.STORE: 1}),
        resumes=4,
        images=5,
        images_per_shard=10,
        seconds=61.2,
        reads=[0.0, 1.5, 3.0, 33.0, 34.0, 44.5, 45.0],
    )
    assert tally.row() == "| 7 | 3 | 2 | 0 | 0 | 1 | 4 | 5 | 2 | 30 | 61 | 40 |"


@pytest.fixture
def course(tmp_path: Path, tiny_checkpoint: Path, s3_server: S3Server, bucket: str) -> Course:
    return Course(
        server=s3_server,
        bucket=bucket,
        checkpoint=tiny_checkpoint,
        folder=tmp_path,
        images=32,
        images_per_shard=4,
    )


def test_other_masks_and_missing_shards_are_told(course: Course, teacher: Path) -> None:
    course = replace(course, images=6)
    course.prepare()
    check(course, course.undisturbed)
    other = f"{course.bucket}/other"
    make_undisturbed(course.input, other, teacher, course.images_per_shard)
    with pytest.raises(AssertionError, match=re.escape("other rows than undisturbed: [0, 1, 2, 3, 4, 5]")):
        check(course, other)
    course.server.client().rm_file(f"{course.undisturbed}/masks/part-00001.parquet")
    with pytest.raises(AssertionError, match="part-00001"):
        check(course, course.undisturbed)


@pytest.mark.alone
def test_case_34_36_killed_workers_drivers_and_nodes_cost_nothing(course: Course) -> None:
    course.prepare()
    tally = run_trial(course, 5, draw_events(5, 4, course.images))
    assert set(tally.kinds) == set(Kind)
    assert tally.resumes >= 1

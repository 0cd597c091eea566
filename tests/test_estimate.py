"""What a run would cost, told from a sample."""

from pathlib import Path

import pytest
from running import jpeg, make_dataset

from pipeline import estimate
from pipeline.config import AmgConfig, MasksConfig, ModelConfig
from pipeline.estimate import MOST_SAMPLED, Drawn, draw
from pipeline.shard import ShardSummary
from pipeline.sources import ImageRef


def refs(count: int) -> list[ImageRef]:
    return [ImageRef(f"file:///{index}", None, None, None, None) for index in range(count)]


def test_a_small_listing_is_drawn_whole_and_shuffled() -> None:
    drawn = draw(refs(20))
    assert drawn.images == 20
    assert sorted(drawn.sample) == sorted(refs(20))
    assert drawn.sample != refs(20)
    assert draw([]) == Drawn(0, [])


def test_a_large_listing_is_drawn_evenly() -> None:
    drawn = draw(iter(refs(10_000)))
    assert drawn.images == 10_000
    assert len(set(drawn.sample)) == MOST_SAMPLED
    places = [int(ref.uri.rpartition("/")[2]) for ref in drawn.sample]
    assert 3500 < sum(places) / len(places) < 6500
    assert min(places[:8]) < 3000
    assert max(places[:8]) > 7000


def test_the_whole_is_as_its_sample() -> None:
    made = ShardSummary(shard=0, images=10, masks=50, statuses={"ok": 10}, bytes=2000, seconds=20.0)
    one = estimate.estimate(Drawn(1000, refs(10)), made, 5.0, images_per_shard=100, workers=1)
    assert (one.seconds, one.output_bytes, one.masks, one.workers) == (2005, 200_000, 5000, 1)
    assert one.worker_hours == round(2005 / 3600, 4)
    four = estimate.estimate(Drawn(1000, refs(10)), made, 5.0, images_per_shard=100, workers=4)
    assert four.seconds == 5 + 3 * 100 * 2  # ten shards: two workers make three of them
    assert four.worker_hours == round((4 * 5 + 2000) / 3600, 4)
    few = estimate.estimate(Drawn(30, refs(10)), made, 5.0, images_per_shard=100, workers=4)
    assert (few.seconds, few.workers) == (65, 1)


def test_a_sample_is_made_as_the_run_would_make_it(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of all images: the same masks, nearly the same bytes, a bad image among them."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(11):
        (folder / f"{index:02d}.jpg").write_bytes(jpeg(index) if index else b"no image")
    config = MasksConfig(
        images=folder.as_uri(),
        output=(tmp_path / "out").as_uri(),
        amg=AmgConfig(points_per_side=2, pred_iou_thresh=-10, stability_score_thresh=0, box_nms_thresh=1),
        model=ModelConfig(checkpoint=str(tiny_checkpoint), device="cpu"),
    )
    sample = [ImageRef(path.as_uri(), None, None, None, None) for path in sorted(folder.iterdir())]
    monkeypatch.setattr(estimate, "_SAMPLE_SECONDS", 1e9)  # however slow the machine, all of them
    made = estimate.measure(config, sample)
    assert not (tmp_path / "out").exists()
    run = make_dataset(config, tiny_checkpoint)
    shard = tmp_path / "out" / "masks" / "part-00000.parquet"
    assert made.images == run.images == 11
    assert made.failed == 1
    assert made.masks == 10 * 12
    assert made.bytes == pytest.approx(shard.stat().st_size, rel=0.25)

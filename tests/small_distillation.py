"""A distillation that takes seconds: a store of 22 scenes, a student for 64 x 64 pixels."""

from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from running import make_dataset

from pipeline.config import EmbeddingsConfig, ModelConfig
from pipeline.storage import canonical_uri
from pipeline.training.config import DescentConfig, DistillConfig
from pipeline.training.decoupled import Lessons
from pipeline.training.lessons import LessonReader, Order
from pipeline.training.scenes import scene
from pipeline.training.store import open_store

IMAGES, PER_SHARD, SIZE = 22, 4, 64


SLOW_START: Final = DescentConfig(precision="fp32", warmup_steps=4)


def write_store(folder: Path, name: str, teacher: Path, images: int = IMAGES) -> Path:
    """Scenes of three shapes, and what a teacher makes of them, in shards of 4."""
    pictures = folder / f"{name}-pictures"
    pictures.mkdir()
    for index in range(images):
        rgb = scene(index, 96).rgb_HW3
        Image.fromarray((rgb, rgb[:60], rgb[:, :70])[index % 3]).save(pictures / f"{index:03d}.png")
    config = EmbeddingsConfig(
        images=canonical_uri(str(pictures)),
        output=canonical_uri(str(folder / name)),
        images_per_shard=PER_SHARD,
        model=ModelConfig(checkpoint=canonical_uri(str(teacher))),
    )
    make_dataset(config, teacher)
    return folder / name


def config_for(store: Path, output: Path, **changed: Any) -> DistillConfig:
    few = {"batch_size": 4, "steps": 6, "device": "cpu", "descent": SLOW_START}
    return DistillConfig(**{"store": str(store), "output": str(output), **few, **changed})


def order_of(store: Path, **changed: int) -> Order:
    few = {"batch_size": 4, "workers": 1, "shards_mixed": 2, "seed": 0}
    return Order.of(open_store(str(store)), **few | changed)


def lessons(order: Order, count: int, first: int = 0, rank: int = 0, read_ahead: int = 3) -> list[Lessons]:
    with closing(LessonReader(order, rank, read_ahead=read_ahead).batches(first)) as batches:
        return list(islice(batches, count))


def ids(batches: list[Lessons]) -> list[list[int]]:
    return [[int(name.removeprefix("image ")) for name in batch.names] for batch in batches]


def same(a: Lessons, b: Lessons) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)

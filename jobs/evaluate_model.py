"""Measure a model: against a teacher, against what people marked, and beside simpler methods."""

import platform
from collections.abc import Iterable
from typing import Annotated, Final

import torch
from cyclopts import Parameter
from tqdm import tqdm

from jobs.command import run_command
from jobs.tables import check_output, origin, put
from pipeline import storage
from pipeline.amg.selfcheck import checked_model
from pipeline.errors import SettingsError
from pipeline.evaluation import against_masks, against_teacher
from pipeline.evaluation.config import EvaluationConfig
from pipeline.evaluation.pictures import (
    Picture,
    PictureSet,
    bsds_pictures,
    folder_pictures,
    scene_pictures,
)
from pipeline.evaluation.report import Table, masks_table, teacher_tables
from pipeline.model import SamModel, pick_device
from pipeline.model.weights import seeded_model

_UNTRAINED_SEED: Final = 0
_DEFAULTS: Final = EvaluationConfig()


def evaluate_model(*, config: Annotated[EvaluationConfig, Parameter(name="*")] = _DEFAULTS) -> int:
    """Measure a model and print a table a protocol, as Markdown.

    On BSDS500 and on synthetic scenes: one click a segment, and the recall of all masks. With a teacher, on all
    pictures: how alike the masks of the same prompts and the embeddings are.

    Exit codes: 0 measured; 2 settings or device, before anything is read; 3 an address, pictures or weights; 130
    interrupted. What is missing is found before anything is computed, a damaged picture when its turn comes.
    """
    _check(config)
    sets = _picture_sets(config)
    model = checked_model(config.model)
    teacher = None if config.teacher_model is None else checked_model(config.teacher_model)
    untrained = {"untrained": _untrained(model)} if config.peers else {}
    tables: list[Table] = []
    for pictures in sets:
        if pictures.has_masks:
            models = {"model": model} | ({"teacher": teacher} if teacher is not None else {}) | untrained
            scores = against_masks.measure(models, _shown(pictures), config.amg, with_felzenszwalb=config.peers)
            tables.append(masks_table(pictures.name, scores))
        if teacher is not None:
            students = {"model": model} | untrained
            agreements = against_teacher.measure(
                students, teacher, _shown(pictures), config.prompts_per_side, config.amg
            )
            tables += teacher_tables(pictures.name, agreements)
    header = _header(config, model, teacher)
    put(header, tables, config.output)
    return 0


def _check(config: EvaluationConfig) -> None:
    pick_device(config.model.device)
    check_output(config.output)
    if config.teacher_model is None and config.teacher_image_size is not None:
        raise SettingsError("--teacher-image-size without a teacher; add --teacher or --teacher-checkpoint.")
    if config.teacher_model is None and config.images is not None:
        raise SettingsError(
            "Nobody marked the pictures of --images, so they need a teacher: add --teacher or "
            "--teacher-checkpoint."
        )
    if config.bsds is None and config.images is None and not config.scenes:
        raise SettingsError("There is nothing to measure on: add --bsds, --scenes or --images.")


def _picture_sets(config: EvaluationConfig) -> list[PictureSet]:
    sets = []
    if config.bsds is not None:
        sets.append(bsds_pictures(config.bsds, config.split, config.limit))
    if config.scenes:
        sets.append(scene_pictures(config.scenes, config.scene_size))
    if config.images is not None:
        sets.append(folder_pictures(config.images, config.limit))
    return sets


def _untrained(model: SamModel) -> SamModel:
    """The model with random weights: the same architecture, image size and thresholds."""
    untrained = seeded_model(_UNTRAINED_SEED, model.image_size, model.architecture).to(model.device)
    untrained.thresholds = model.thresholds
    return untrained


def _shown(pictures: PictureSet) -> Iterable[Picture]:
    """With a bar, on a terminal."""
    return tqdm(pictures, desc=pictures.name, unit="picture", dynamic_ncols=True, disable=None)


def _header(config: EvaluationConfig, model: SamModel, teacher: SamModel | None) -> dict[str, str]:
    header = {"model": _described(model, config.model.address)}
    if teacher is not None and config.teacher_model is not None:
        header["teacher"] = _described(teacher, config.teacher_model.address)
    cuda = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if cuda else f"{model.device.type}, {platform.machine()}"
    return header | {"device": device} | origin("jobs.evaluate_model")


def _described(model: SamModel, address: str) -> str:
    return (
        f"{storage.redact(address)}: {model.architecture}, image size {model.image_size}, {model.precision}, "
        f"SHA-256 {model.weights_sha256[:16]}, thresholds {dict(model.thresholds)}"
    )


if __name__ == "__main__":
    run_command(evaluate_model, "jobs.evaluate_model")

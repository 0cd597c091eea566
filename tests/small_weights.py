"""Checkpoints for 64 x 64 pixels."""

from pipeline.model import load_model
from pipeline.model.sam import SamModel


def load(address: object) -> SamModel:
    return load_model(str(address), device="cpu", image_size=64)

"""Automatic mask generation: prompts, candidates, filters, RLE."""

from pipeline.amg.generator import MaskGenerator

__all__ = ["MaskGenerator"]

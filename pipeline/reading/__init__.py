"""Reading a masks dataset on any address: as Arrow, and as samples for PyTorch. For Ray, `reading_engine`."""

from pipeline.reading.samples import MaskTable, Sample
from pipeline.reading.stored import StoredMasks, open_masks, stored_masks
from pipeline.reading.stream import MaskSamples

__all__ = ["MaskSamples", "MaskTable", "Sample", "StoredMasks", "open_masks", "stored_masks"]

"""Which masks lie in which: parts in wholes."""

import numpy as np

from pipeline.curation.arithmetic import shared_areas
from pipeline.curation.filters import Record


def with_parents(masks: list[Record], containment: float) -> list[Record]:
    """The same masks with `parent_id`, a place in this list or None, and `depth`, 0 for those without a parent.

    A mask's parent is the smallest of the larger masks that hold at least the share `containment` of its pixels.
    Of two equally large, the first in the list counts as the larger, so no two are each other's parent.
    """
    areas = np.array([mask["area"] for mask in masks], np.int64)
    largest_first = np.lexsort((np.arange(len(masks)), -areas))
    parents: list[int | None] = [None] * len(masks)
    depths = [0] * len(masks)
    for rank, i in enumerate(largest_first.tolist()):
        larger = largest_first[:rank]
        [shared] = shared_areas([masks[i]["segmentation"]], [masks[j]["segmentation"] for j in larger])
        holders = larger[shared >= containment * areas[i]] if areas[i] else larger[:0]
        if len(holders):
            parents[i] = int(holders[-1])
            depths[i] = depths[holders[-1]] + 1
    return [
        mask | {"parent_id": parent, "depth": depth}
        for mask, parent, depth in zip(masks, parents, depths, strict=True)
    ]


def without_empty(masks: list[Record]) -> list[Record]:
    """The masks that have pixels; the parent of one that loses its own is that one's parent, where it has one."""
    keep = [i for i, mask in enumerate(masks) if mask["area"]]
    place = {old: new for new, old in enumerate(keep)}
    kept: dict[int, Record] = {}
    for i in sorted(keep, key=lambda i: masks[i]["depth"] or 0):
        parent = masks[i]["parent_id"]
        while parent is not None and parent not in place:
            parent = masks[parent]["parent_id"]
        if parent is not None:
            kept[i] = masks[i] | {"parent_id": place[parent], "depth": kept[parent]["depth"] + 1}
        else:
            kept[i] = masks[i] | {"parent_id": None, "depth": None if masks[i]["depth"] is None else 0}
    return [kept[i] for i in keep]

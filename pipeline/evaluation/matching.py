"""Which image of a truth is which image of a dataset, by their files' paths without suffix."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from pipeline import storage
from pipeline.errors import TrainingDataError
from pipeline.sources.refs import path_of


@dataclass(frozen=True)
class Named:
    """An image, or what is true of it."""

    address: str
    name: str
    """Its path below what was listed, or the address again."""

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Folders and name of the address, the name without suffix."""
        return _parts(self.address)


def matched(images: Iterable[Named], truths: Sequence[Named], source: str) -> dict[str, str]:
    """Addresses of truths by the addresses of their images, each at most once.

    Images and truths of one file name are told apart by their paths below what was listed, and where these differ
    by the longest end that two paths have in common. Only those images stay in memory whose file name a truth has.

    Args:
        images: Of a dataset.
        truths: What is true of images.
        source: Where the truths are, for messages.

    Raises:
        TrainingDataError: paths do not tell which belongs to which.
    """
    there: dict[str, list[Named]] = defaultdict(list)
    for truth in truths:
        there[truth.parts[-1]].append(truth)
    here: dict[str, list[Named]] = defaultdict(list)
    for image in images:
        if (stem := image.parts[-1]) in there:
            here[stem].append(image)
    return {
        image.address: truth.address
        for stem, alike in here.items()
        for image, truth in _of_one_stem(alike, there[stem], source)
    }


def _of_one_stem(images: list[Named], truths: list[Named], source: str) -> list[tuple[Named, Named]]:
    if len(images) == len(truths) == 1:
        return [(images[0], truths[0])]
    found: list[tuple[Named, Named]] = []
    deepest = max(len(truth.parts) for truth in truths)
    ends = [partial(_end, length=length) for length in range(deepest, 1, -1)]
    keys: list[Callable[[Named], Hashable]] = [_name, _name_without_suffix, *ends]
    for key in keys:
        alone, several = _paired(images, truths, key)
        if several and key in ends:
            raise _alike(*several[0], source)
        found += alone
        done_images, done_truths = {image for image, _ in alone}, {truth for _, truth in alone}
        images = [image for image in images if image not in done_images]
        truths = [truth for truth in truths if truth not in done_truths]
    if len(images) == len(truths) == 1 and "/" not in truths[0].name:
        return [*found, (images[0], truths[0])]
    if images and truths and not found:
        raise _alike(images, truths, source)
    return found


def _paired(
    images: list[Named], truths: list[Named], key: Callable[[Named], Hashable]
) -> tuple[list[tuple[Named, Named]], list[tuple[list[Named], list[Named]]]]:
    """What alone has a key on both sides; and where several on a side have it."""
    here, there = _by(key, images), _by(key, truths)
    both = [(here[value], there[value]) for value in here if value is not None and value in there]
    alone = [(some[0], others[0]) for some, others in both if len(some) == len(others) == 1]
    return alone, [pair for pair in both if len(pair[0]) > 1 or len(pair[1]) > 1]


def _by(key: Callable[[Named], Hashable], some: list[Named]) -> dict[Hashable, list[Named]]:
    found: dict[Hashable, list[Named]] = defaultdict(list)
    for named in some:
        found[key(named)].append(named)
    return found


def _name(named: Named) -> str:
    return named.name


def _name_without_suffix(named: Named) -> tuple[str, ...]:
    return _parts(named.name)


def _end(named: Named, length: int) -> tuple[str, ...] | None:
    return named.parts[-length:] if len(named.parts) >= length else None


def _parts(address: str) -> tuple[str, ...]:
    """Folders and name, the name without suffix."""
    *folders, name = path_of(address).split("/")
    return (*(folder for folder in folders if folder not in {"", "."}), name.rpartition(".")[0] or name)


def _alike(images: list[Named], truths: list[Named], source: str) -> TrainingDataError:
    if len(truths) > 1:
        two = storage.redact(f"{truths[0].name} and {truths[1].name}")
        return TrainingDataError(f"{source} names two images alike, as far as paths tell: {two}.")
    two = f"{images[0].name} and {images[1].name}"
    return TrainingDataError(f"Two images of the dataset are named alike, {two}, and one in {source}.")

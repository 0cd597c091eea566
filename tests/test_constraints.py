"""`constraints.txt` pins all that is installed, so that what `make audit` looks at is what runs."""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def needed(name: str, extras: frozenset[str]) -> dict[str, str]:
    """The installed versions of all that a distribution with these extras needs, by name."""
    found: dict[str, str] = {}
    seen, to_see = set(), [(name, extras)]
    while to_see:
        name, extras = one = to_see.pop()
        if one in seen:
            continue
        seen.add(one)
        found[canonicalize_name(name)] = Version(metadata.version(name)).public
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
                to_see.append((requirement.name, frozenset(requirement.extras)))
    return found


def test_every_installed_distribution_is_pinned_at_its_version() -> None:
    lines = CONSTRAINTS.read_text().splitlines()
    pins: dict[str, str] = {
        canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines) if pin
    }
    installed = needed("everymask", frozenset({"dev"}))
    del installed["everymask"]
    assert len(installed) > 100
    assert {name: pins.get(name) for name in installed} == installed

"""`ImageRef`, and what a name alone says of a file."""

from typing import Final, NamedTuple

COMPRESSED_TARS: Final = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
NOT_UTF8: Final = "(name that is not UTF-8)"


class ImageRef(NamedTuple):
    """Where one image is: the columns of `schemas.manifest.MANIFEST_SCHEMA` but `image_id`."""

    uri: str
    size: int | None
    etag: str | None
    container: str | None
    position: int | None


def suffix_of(uri: str) -> str:
    """With its dot, in lower case; empty for a name without, as for `.hidden` and `ends.`."""
    name = uri.rpartition("/")[2]
    dot = name.rfind(".")
    return name[dot:].lower() if 0 < dot < len(name) - 1 else ""


def path_of(uri: str) -> str:
    """Folders and name without the protocol; a tar's member or a Parquet file's row stands below its file."""
    kind, separator, rest = uri.partition("://")
    if kind in {"tar", "parquet"} and "::" in rest:
        inner, _, container = rest.partition("::")
        return f"{path_of(container)}/{inner}"
    return rest if separator else uri


def label_of(uri: str) -> str:
    """How `skipped` names a file: by its suffix, a dot-file by its name."""
    name = uri.rpartition("/")[2]
    compressed = next((end for end in COMPRESSED_TARS if name.lower().endswith(end)), "")
    return compressed or suffix_of(uri) or (name if name.startswith(".") else "(no suffix)")


def is_storable(uri: str) -> bool:
    """Local names and tar members need not be UTF-8; the manifest is."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        return False
    return True

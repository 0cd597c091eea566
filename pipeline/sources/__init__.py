"""Sources: where images come from, and how one image's bytes are fetched.

`find_images` lists, `fetch` reads. In between lies an `ImageRef`, which says where the bytes are:

    an object of its own    uri, size, etag
    a tar's member          tar://MEMBER::URI of the tar, position = byte offset of the data, the tar's etag
    a Parquet file's row    parquet://ROW::URI of the file, position = row number, the file's etag
    a damaged container     tar://::URI or parquet://::URI without position: `fetch` says what is wrong

Tars and Parquet files are never downloaded to be listed, and nothing is ever unpacked.
"""

from pipeline.sources.fetching import fetch
from pipeline.sources.listing import find_images
from pipeline.sources.refs import ImageRef

__all__ = ["ImageRef", "fetch", "find_images"]

"""Images that take the process down which decodes them, and the decoder that does it.

The decoder is a plugin of Pillow's own kind. It takes the place of the one for PPM in every Python that finds its
folder on its path, as nothing in the code that is tested lends a hand.
"""

from pathlib import Path

_SITECUSTOMIZE = """
import ctypes
import os

from PIL import Image, PpmImagePlugin

Image.init()  # or those that are found later would take its place


class PoisonedImage(PpmImagePlugin.PpmImageFile):
    def _open(self):
        self._comment = self.fp.getvalue().splitlines()[1]
        super()._open()

    def load(self):
        libc = ctypes.PyDLL(None)  # holds Python's lock, as a decoder may
        if self._comment == b"# segfaults":
            ctypes.string_at(0)
        elif self._comment == b"# hangs":
            libc.sleep(3600)
        elif self._comment == b"# aborts":
            libc.abort()
        elif self._comment == b"# is killed":
            os.kill(os.getpid(), 9)
        elif self._comment == b"# hoards":
            self.hoard = [bytes(2**28) for _ in range(2**8)]
        elif self._comment.startswith(b"# segfaults unless "):
            marker = self._comment.removeprefix(b"# segfaults unless ")
            try:
                open(marker, "xb").close()
            except FileExistsError:
                pass
            else:
                ctypes.string_at(0)
        return super().load()


Image.register_open("PPM", PoisonedImage)
"""


def write_plugin(folder: Path) -> Path:
    """The folder, with a module that Python imports when it starts."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    return folder


def poisoned(how: str) -> bytes:
    """An image of 8 x 8 pixels whose decoder `segfaults`, `hangs`, `aborts`, `is killed` or `hoards`."""
    return b"P6\n# " + how.encode() + b"\n8 8\n255\n" + bytes(range(192))

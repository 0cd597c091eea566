"""Checkpoints: where they come from, what they may be, and how they get into a model.

A checkpoint is data, never code: safetensors, or PyTorch's format read with `weights_only=True`.
"""

import hashlib
import io
import json
import pickle
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from pipeline import storage
from pipeline.errors import CheckpointError, StorageError
from pipeline.model.cache import cache_folder
from pipeline.model.sam import TINY_VITS, Architecture, SamModel
from pipeline.storage.attempts import attempt

Tensors = Mapping[str, torch.Tensor]


class Published(NamedTuple):
    """Weights that a model's authors have put on the web."""

    url: str
    sha256: str


_META: Final = "https://dl.fbaipublicfiles.com/segment_anything"
PUBLISHED: Final[dict[str, Published]] = {
    "mobile_sam": Published(
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
    "vit_b": Published(
        f"{_META}/sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": Published(
        f"{_META}/sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": Published(
        f"{_META}/sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}


def unused_tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of TinyViT's classifier, which nothing in SAM uses and MobileSAM's published file still carries."""
    if architecture not in TINY_VITS:
        return {}
    width = TINY_VITS[architecture].widths[-1]
    return {
        "image_encoder.norm_head.weight": (width,),
        "image_encoder.norm_head.bias": (width,),
        "image_encoder.head.weight": (1000, width),
        "image_encoder.head.bias": (1000,),
    }


UNUSED: Final = unused_tensors("mobile_sam")
DEMO: Final = Path(__file__).parent / "demo.safetensors"
"""Weights that come with this package; docs/model-card.md says what they are."""
_METADATA_KEY: Final = "everymask"
_DOWNLOAD_TIMEOUT_S: Final = 60  # without a byte
# What the readers of the two formats are seen to raise on damaged or random bytes.
_DAMAGE: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    safetensors.SafetensorError,
)
_NAMES_IN_A_MESSAGE: Final = 5


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors under their published names."""

    tensors: Tensors
    sha256: str
    """Of the file's bytes, hexadecimal."""
    metadata: Mapping[str, Any]
    """What `checkpoint_bytes` was given; empty for a file from elsewhere."""


class _Metadata(BaseModel):
    """What other code relies on in a checkpoint's metadata."""

    model_config = ConfigDict(extra="allow", strict=True)

    image_size: int | None = None
    thresholds: dict[str, float] = {}
    expected: dict[str, list[float]] | None = None


def read_checkpoint(address: str) -> Checkpoint:
    """Read the weights of a model by its name, or a checkpoint file by its URI.

    Raises:
        CheckpointError: not to be had, of the wrong hash, or no checkpoint.
        StorageError: the address cannot be read.
    """
    if address in PUBLISHED:
        address = str(fetch_published(address))
    elif address == "demo":
        address = str(DEMO)
    data = storage.read_bytes(storage.canonical_uri(address))
    tensors, metadata = parse_checkpoint(data, storage.redact(address))
    return Checkpoint(tensors, hashlib.sha256(data).hexdigest(), metadata)


def fetch_published(name: str) -> Path:
    """Download a model's published weights unless they are in the cache; check their SHA-256.

    The cache is `$EVERYMASK_CACHE`, by default `~/.cache/everymask`.
    """
    url, sha256 = PUBLISHED[name]
    cache = cache_folder()
    path = cache / f"{sha256[:16]}-{url.rsplit('/', 1)[-1]}"
    try:
        if path.exists() and _sha256(path) == sha256:
            return path
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            download = Path(folder) / path.name
            attempt("download", url, lambda: _download(url, download))
            if (found := _sha256(download)) != sha256:
                raise CheckpointError(f"{url} is not the published file of {name}: its SHA-256 is {found}.")
            download.replace(path)
    except StorageError as error:
        raise CheckpointError(
            f"Cannot download the weights of {name}: {error}. "
            "Where there is no network, pass --checkpoint with a copy of the file."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"Cannot keep the weights of {name} in {cache}: {error}. Set $EVERYMASK_CACHE to a folder that can be "
            "written, or pass --checkpoint with a copy of the file."
        ) from error
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, path: Path) -> None:
    """Once, with a progress bar. What is worth another attempt is a `ConnectionError` or has a status."""
    try:
        with urlopen(url, timeout=_DOWNLOAD_TIMEOUT_S) as response, path.open("wb") as file:  # noqa: S310 (ours)
            size = response.length
            with tqdm.wrapattr(response, "read", total=size, unit="B", unit_scale=True) as source:
                shutil.copyfileobj(source, file)
            if size not in {None, file.tell()}:
                raise ConnectionError(f"{file.tell()} of {size} bytes came")
    except HTTPError as error:
        error.close()
        raise
    except URLError as error:
        raise ConnectionError(str(error.reason)) from error


def parse_checkpoint(data: bytes, address: str) -> tuple[Tensors, Mapping[str, Any]]:
    """The tensors and metadata in a checkpoint's bytes. The content decides the format, not the name.

    Raises:
        CheckpointError: an HTML page, a truncated file, a pickle that holds more than tensors, ...
    """
    if data[:512].lstrip()[:1] == b"<":
        raise CheckpointError(f"{address} is an HTML or XML page, not a checkpoint; look at its address.")
    try:
        if data[8:9] == b"{":
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            metadata = _Metadata.model_validate_json(header.get("__metadata__", {}).get(_METADATA_KEY, "{}"))
            return safetensors.torch.load(data), metadata.model_dump(exclude_unset=True)
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{address} is refused: it is no checkpoint, or holds objects other than tensors, and "
            "nothing of it was executed."
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{address} is truncated or no checkpoint: {_first_line(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise CheckpointError(f"{address} is not a state dict, a plain dict of tensors by name.")
    return tensors, {}


def architecture_of(tensors: Tensors) -> Architecture:
    """Tell the architecture from the tensors' names and shapes.

    Raises:
        CheckpointError: no architecture that is known here.
    """
    if "image_encoder.patch_embed.seq.0.c.weight" in tensors:
        neck = tensors.get("image_encoder.neck.0.weight", torch.empty(0))
        of_width: dict[tuple[int, ...], Architecture] = {
            (shape.widths[-1],): name for name, shape in TINY_VITS.items()
        }
        return of_width.get(tuple(neck.shape[1:2]), "mobile_sam")  # what is wrong with it, `load_tensors` says
    positions = tensors.get("image_encoder.pos_embed")
    widths: dict[int, Architecture] = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
    if positions is None or positions.shape[-1] not in widths:
        raise CheckpointError(
            "The checkpoint is of no known architecture: neither MobileSAM's "
            "image_encoder.patch_embed.seq.0.c.weight nor image_encoder.pos_embed of SAM's ViT-B, L or H. "
            f"It has {len(tensors)} tensors: {_some(sorted(tensors))}."
        )
    return widths[positions.shape[-1]]


def published_name(architecture: Architecture, name: str) -> str:
    """The name a tensor of our model has in the published checkpoints.

    timm merges patches at a stage's start, MobileSAM at a stage's end; stem and convolutions are named
    differently.
    """
    if architecture not in TINY_VITS or not name.startswith("image_encoder."):
        return name
    name = name.replace("patch_embed.conv1.", "patch_embed.seq.0.").replace(
        "patch_embed.conv2.", "patch_embed.seq.2."
    )
    parts = name.split(".")
    if parts[1] == "stages":
        stage = int(parts[2]) - (parts[3] == "downsample")
        parts[1:3] = ["layers", str(stage)]
    return ".".join("c" if part == "conv" else part for part in parts)


def load_tensors(model: SamModel, tensors: Tensors, address: str) -> None:
    """Copy a checkpoint's tensors into a model, strictly.

    Raises:
        CheckpointError: names the tensors that are missing, unexpected, misshapen or not finite.
    """
    wanted = published_tensors(model)
    unused = unused_tensors(model.architecture)
    faults = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unexpected": sorted(
            name for name in tensors.keys() - wanted.keys() if unused.get(name) != tuple(tensors[name].shape)
        ),
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(wanted[name].shape)}"
            for name in sorted(wanted.keys() & tensors.keys())
            if tensors[name].shape != wanted[name].shape
        ],
        "not finite": [
            name for name in sorted(wanted.keys() & tensors.keys()) if not tensors[name].isfinite().all()
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in faults.items() if names)
        raise CheckpointError(f"{address} does not fit {model.architecture}: {listed}.")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
    # timm's attention keeps its gathered biases between calls; moving a module makes it forget them.
    model.to(model.device)


def published_tensors(model: SamModel) -> dict[str, torch.Tensor]:
    """The model's own tensors (not copies) by their published names."""
    return {published_name(model.architecture, name): value for name, value in model.state_dict().items()}


def checkpoint_bytes(model: SamModel, metadata: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> bytes:
    """A model as safetensors under the published names, TinyViT's unused classifier as zeros.

    The file loads here, and strictly in the original packages. `metadata` must be JSON. Floating point numbers are
    stored as `dtype`.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in published_tensors(model).items()}
    tensors |= {name: torch.zeros(shape) for name, shape in unused_tensors(model.architecture).items()}
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    return safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps(metadata)})


def seeded_model(seed: int, image_size: int, architecture: Architecture = "mobile_sam") -> SamModel:
    """An untrained model with the same random weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SamModel(architecture, image_size, "fp32")


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMES_IN_A_MESSAGE
    return ", ".join(names[:_NAMES_IN_A_MESSAGE]) + (f" and {rest} more" if rest > 0 else "")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

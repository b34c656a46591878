"""The file itself: safetensors with a format version and a checksum. Nothing in it is run, or believed unchecked."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import qconvert  # for its version, which there is when the package has been imported

from ..errors import ModelError, first_line
from ..loading import whole_file
from .header import Header

FORMAT = "qconvert-packed"
FORMAT_VERSION = 1
"""Goes up with every change that a reader of the version before would get wrong."""


@dataclass(frozen=True)
class PackedFile:
    """What `save` has written, in numbers.

    ``tensor_bits - padding_bits`` is what the report counts, where ``float_weights`` is empty: it counts those as quantized.

    Attributes:
        path: the file.
        tensor_bits: bits of the tensors.
        padding_bits: those of them that fill up the last byte of a bit plane.
        header_bytes: bytes of everything that is no tensor.
        float_weights: the quantized layers whose weights are in the file in float, and why.
    """

    path: Path
    tensor_bits: int
    padding_bits: int
    header_bytes: int
    float_weights: Mapping[str, str]

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return self.header_bytes + self.tensor_bits // 8


@dataclass(frozen=True)
class Contents:
    """What is in a file that has passed its checksum."""

    header: Header
    tensors: Mapping[str, Tensor]


def write(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> int:
    """Write the file and return its size in bytes. The old file stays until the new one is whole.

    Raises:
        ModelError: if the file cannot be written.
    """
    said = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "qconvert_version": qconvert.__version__}
    said |= header.to_metadata()
    with whole_file(path) as partial:
        safetensors.torch.save_file(dict(tensors), partial, said | {"sha256": _digest(said, tensors)})
        return partial.stat().st_size


def read(path: Path) -> Contents:
    """Return what is in the file.

    Raises:
        ModelError: if it is no such file, of a newer version, cut off or changed, or says what cannot be.
    """
    metadata, tensors = _opened(path)
    if metadata.get("format") != FORMAT:
        raise ModelError(
            f"{path} is not a file of qconvert.save: its metadata says format {metadata.get('format')!r}, not {FORMAT!r}. "
            "Weights without metadata go into a converted model with safetensors.torch.load_model"
        )
    version, by = metadata.get("format_version", ""), metadata.get("qconvert_version", "?")
    if version != str(FORMAT_VERSION):
        raise ModelError(
            f"{path} has format version {version!r}, written by qconvert {by}; this qconvert reads version "
            f"{FORMAT_VERSION}. Update qconvert: pip install --upgrade qconvert"
        )
    said = {key: value for key, value in metadata.items() if key != "sha256"}
    if metadata.get("sha256") != _digest(said, tensors):
        raise ModelError(f"{path} is damaged: its contents do not have the sha256 that it states. Copy or save it again")
    try:
        return Contents(Header.from_metadata(metadata), tensors)
    except ModelError as error:
        raise ModelError(f"{path}: the metadata is wrong: {error}") from error


def _opened(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors. The library compares shapes and places with the file's size; nothing is copied yet."""
    if not path.is_file():
        raise ModelError(f"no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # a parser fed with any bytes may raise anything; it is named as the cause
        cause = first_line(error)
        raise ModelError(f"{path} is not a safetensors file, or cut off: {cause}. Copy or save it again") from error


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the metadata, the shapes, and the bytes of the tensors in the order of their names."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    stated = json.dumps([dict(metadata), shapes], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(stated.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

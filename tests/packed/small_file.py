"""A small packed file, and how to make a bad one of it that keeps its checksum."""

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import torch
from small import convert
from torch import nn

RULES = {
    "rule": [
        {"weight": {"quantizer": "ternary", "scale": "channel"}, "input": {"quantizer": "sign", "threshold": 0.5}},
        {"layers": "2", "weight": {"quantizer": "lsq", "bits": 3}, "input": {"quantizer": "lsq", "bits": 2}},
    ]
}


def fresh() -> nn.Sequential:
    """Return a float model whose packed file is small."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 3, (1, 2, 3)), nn.BatchNorm3d(3), nn.Conv3d(3, 3, 1, bias=False))


def converted() -> nn.Module:
    """Return it converted."""
    return convert(fresh(), RULES).eval()


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a file."""
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: dict[str, Any], data: bytes) -> bytes:
    """Return the file of that header and data."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def signed(header: dict[str, Any], data: bytes) -> bytes:
    """Return the file, with the checksum that belongs to it."""
    metadata = {key: value for key, value in header["__metadata__"].items() if key != "sha256"}
    tensors = {key: value for key, value in header.items() if key != "__metadata__"}
    shapes = {key: value["shape"] for key, value in tensors.items()}
    digest = hashlib.sha256(json.dumps([metadata, shapes], sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(tensors):
        start, end = tensors[key]["data_offsets"]
        digest.update(data[start:end])
    return joined({"__metadata__": metadata | {"sha256": digest.hexdigest()}, **tensors}, data)


def with_table(content: bytes, name: str, change: Callable[[Any], Any]) -> bytes:
    """Return the file, signed again, in which one of its JSON tables is changed in place."""
    header, data = parts(content)
    table = json.loads(header["__metadata__"][name])
    change(table)
    header["__metadata__"][name] = json.dumps(table)
    return signed(header, data)

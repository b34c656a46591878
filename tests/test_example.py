"""What messages say of inputs: what they are, and nothing of what they hold."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from qconvert.example import described

X = torch.zeros(2, 3)
Pair = namedtuple("Pair", "first second")


@dataclass
class Batch:
    clip: torch.Tensor
    name: str


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (X, "(2, 3) torch.float32"),
        (np.zeros((2, 3), dtype=np.uint8), "ndarray (2, 3) uint8"),
        ([X], "[(2, 3) torch.float32]"),
        ((X, np.zeros(4)), "((2, 3) torch.float32, ndarray (4,) float64)"),
        ({"clip": [X]}, "{'clip': [(2, 3) torch.float32]}"),
        (UserDict(clip=X), "{'clip': (2, 3) torch.float32}"),
        (Batch(X, "a"), "Batch((2, 3) torch.float32)"),
        (Pair(X, 1), "Pair((2, 3) torch.float32)"),
        ({str(number): 0 for number in range(8)}, str({str(number): 0 for number in range(8)})),
        (3, "3"),
        (None, "None"),
        ("a word", "'a word'"),
    ],
)
def test_described(value: Any, text: str):
    assert described(value) == text


def test_a_long_value_is_cut():
    assert len(described(list(range(1000)))) < 40
    assert len(described("word " * 1000)) < 40

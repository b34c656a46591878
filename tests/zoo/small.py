"""What tests of small models share: three kinds of network, three sets of rules; how to convert, run and compare."""

import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from models import TRAPS, CausalModel, Entry, FunctionalConv, Residual, run, seeded
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qconvert

_WEIGHT = {"quantizer": "sign", "scale": "channel"}
CHANNELS = {"rule": [{"weight": _WEIGHT, "input": {"quantizer": "approxsign", "threshold": "channel"}}]}
STEPS = {"rule": [{"weight": {"quantizer": "lsq", "bits": 4}, "input": {"quantizer": "lsq", "bits": 4}}]}
PLAIN = {"rule": [{"weight": "sign", "input": {"quantizer": "sign", "threshold": 0.25}, "pad_value": 0.0}]}
"""All layers: with everything that is learned per channel, with learned steps, with constants only."""

BUILDERS = {"residual": Residual, "subclass": CausalModel, "functional": FunctionalConv}
every_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
every_trap = pytest.mark.parametrize("entry", TRAPS, ids=lambda entry: entry.name)
every_rule = pytest.mark.parametrize("rules", [CHANNELS, STEPS], ids=["channels", "steps"])


def clip() -> Tensor:
    """Return an input of the small models, the same each time."""
    return torch.randn(2, 2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def convert(model: nn.Module, rules: Any = CHANNELS, **settings: Any) -> nn.Module:
    """Convert without a word: no report, no warning about signs that are constant or about layers converted before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=__name__)
        return qconvert.binarize(model, rules, report=False, **settings)


def output(model: nn.Module, entry: Entry) -> list[Any]:
    """Run the model on the entry's input, with the same draws each time; return what comes out, flat."""
    seeded()
    inputs = entry.inputs()
    return pytree.tree_leaves(run(model, inputs))


def assert_equal(actual: Iterable[Any], expected: Iterable[Any]) -> None:
    """Value by value; at least one."""
    pairs = list(zip(actual, expected, strict=True))
    assert pairs
    for left, right in pairs:
        assert torch.equal(left, right) if isinstance(right, Tensor) else left == right


def binary_layers(model: nn.Module) -> list[str]:
    """Return the names of the converted layers."""
    return [name for name, module in model.named_modules() if isinstance(module, qconvert.QConv3d)]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every Parameter and buffer."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def loss(y: Tensor) -> Tensor:
    """Return a number with a gradient to all of ``y``."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()

"""Real models packed: the same outputs as the converted model's, and every layer that is left is left for a reason."""

import pytest
import torch
from models import Entry, run, seeded
from torch import nn
from torch.testing import assert_close
from zoo import ZOO

from qconvert import binarize, pack
from qconvert.example import tensors_in
from qconvert.packed import obstacles

BINARY = {"rule": [{"weight": {"quantizer": "sign", "scale": "channel"}, "input": {"quantizer": "sign", "threshold": 0.1}}]}

ROUNDED = {"diffusers Allegro"}
"""It gives layers inputs in channels_last_3d, and float convolutions this small put out the usual format all the same: then
the GroupNorm behind them rounds otherwise."""

REASONS = {"conv forward": {"the forward of QCenteredConv3d computes the weight that it convolves with"}}
"""Why layers run as before; all others run on bits."""


def outputs(model: nn.Module, entry: Entry) -> list[torch.Tensor]:
    seeded()
    with torch.no_grad():
        return tensors_in(run(model, entry.inputs()))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_a_packed_model_puts_out_what_the_converted_one_does(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstacles, "LEAST_PRODUCTS", 0)
    seeded()
    model = binarize(entry.build().eval(), BINARY, report=False)
    packed = pack(model)
    assert {layer.reason for layer in packed.summary().layers} - {None} == REASONS.get(entry.name, set())
    for theirs, ours in zip(outputs(model, entry), outputs(packed, entry), strict=True):
        tolerance = 1e-5 if entry.name in ROUNDED else 0
        assert_close(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)

"""`ProgressiveSign`: its scale belongs to the quantizer and is followed at once. Values: test_equal_to_bitorch.py."""

import pytest
import torch

from qconvert.quantizations import ProgressiveSign

X = torch.tensor([-2.0, -0.125, 0.0, 0.125, 2.0])


def test_scale_moves_the_ramp_towards_the_sign():
    quantizer = ProgressiveSign()
    assert quantizer(X).tolist() == [-1, -0.125, 0, 0.125, 1]
    quantizer.scale = 0.1  # half-width 4 ** -1
    assert quantizer.temperature == 0.75
    assert quantizer(X).tolist() == [-1, -0.5, 0, 0.5, 1]
    quantizer.scale = 1.0
    assert quantizer(X).tolist() == [-1, -1, 0, 1, 1]


def test_evaluation_is_the_sign_whatever_the_scale():
    assert ProgressiveSign().eval()(X).tolist() == [-1, -1, 1, 1, 1]


def test_scales_are_independent():
    first, second = ProgressiveSign(), ProgressiveSign()
    first.scale = 1.0
    assert second.scale == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ramp_stays_finite_at_and_above_temperature_one(temperature):
    quantizer = ProgressiveSign(custom_transform=lambda _: temperature)
    assert quantizer(X).tolist() == [-1, -1, 0, 1, 1]


def test_custom_transform_gets_the_scale():
    assert ProgressiveSign(initial_scale=0.3, custom_transform=lambda scale: scale / 3).temperature == pytest.approx(0.1)

"""What was saved comes back: outputs bit for bit, in a file of the bits that the report counts."""

import pytest
import torch
from hypothesis import given
from models import TRAPS
from networks import build, networks
from small import CHANNELS, PLAIN, STEPS, convert
from test_random_networks import assert_identical, outputs
from test_random_networks import pytestmark as _network_marks
from torch import nn

import qconvert
from qconvert.errors import ModelError
from qconvert.report.facts import collect
from qconvert.report.totals import add_up

pytestmark = _network_marks

TERNARY = {"rule": [{"weight": {"quantizer": "ternary", "scale": "channel"}, "input": "sign"}]}
DOREFA = {"rule": [{"weight": {"quantizer": "weightdorefa", "bits": 3}, "input": {"quantizer": "inputdorefa", "bits": 2}}]}
STANDARDIZED = {"rule": [{"weight": {"quantizer": "weightdorefa", "bits": 2, "standardize": True}, "rprelu": True}]}
RULES = {
    "channels": CHANNELS,
    "plain": PLAIN,
    "steps": STEPS,
    "ternary": TERNARY,
    "dorefa": DOREFA,
    "standardized": STANDARDIZED,
}
every_rule = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
every_trap = pytest.mark.parametrize("entry", TRAPS, ids=lambda entry: entry.name)


def trained(model: nn.Module) -> nn.Module:
    """As after training: no value is where a conversion starts it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9).add_(0.05)
    return model


def reported_bits(model: nn.Module) -> int:
    totals = add_up(collect(model))
    return totals.parameter_bits + totals.buffer_bits


def test_try_networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("n")

    from hypothesis import HealthCheck, Phase, settings

    @settings(phases=[Phase.generate], max_examples=60, suppress_health_check=list(HealthCheck))
    @given(network=networks)
    def check(network):
        for name, rules in RULES.items():
            converted = trained(convert(build(network), rules)).eval()
            path = folder / "model.safetensors"
            try:
                file = qconvert.save(converted, path)
            except ModelError as error:
                print(name, error)
                continue
            if file.float_weights:
                print(file.float_weights)
            loaded = qconvert.load(path, build(network))
            bits = reported_bits(converted)
            assert file.float_weights or file.tensor_bits - file.padding_bits == bits
            assert path.stat().st_size == file.file_bytes

            a, b = outputs(loaded, network, calls=1), outputs(converted, network, calls=1)
            try:
                assert_identical(a, b)
            except AssertionError:
                print("BAD", name, network, loaded, file.float_weights)
            other = qconvert.save(loaded, folder / "b.safetensors")
            assert other.tensor_bits == file.tensor_bits

    check()

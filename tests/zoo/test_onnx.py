"""A converted model exports to ONNX as any other does: standard operators, and onnxruntime computes what torch does."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from models import CausalModel, FunctionalConv, Paddings, Residual, StandardizedModel, TypeCheck, WeightNormed
from small import CHANNELS, STEPS, clip, convert
from torch import Tensor, nn

from qconvert.layers import RPReLU

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

QUANTIZERS = {
    "approxsign": CHANNELS,
    "sign, ternary": {"rule": [{"weight": "ternary", "input": "sign"}]},
    "steheaviside, swishsign": {"rule": [{"weight": "swishsign", "input": "steheaviside"}]},
    "progressive_sign": {"rule": [{"weight": "progressive_sign", "input": "progressive_sign"}]},
    "dorefa": {
        "rule": [{"weight": {"quantizer": "weightdorefa", "bits": 4}, "input": {"quantizer": "inputdorefa", "bits": 4}}]
    },
    "lsq": STEPS,
}


def exported(model: nn.Module, file: Path, x: Tensor | None = None, **settings: Any) -> onnx.ModelProto:
    torch.onnx.export(model, (clip() if x is None else x,), file, dynamo=True, verbose=False, **settings)
    graph = onnx.load(file)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def assert_runs_in_onnxruntime_as_in_torch(model: nn.Module, file: Path, x: Tensor) -> None:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        # a value on a threshold could fall on either side of it: random inputs have none there, and then only sums differ
        torch.testing.assert_close(torch.from_numpy(y), model(x))


def operators(graph: onnx.ModelProto) -> set[str]:
    """Return the names of the operators, with the domain of those that are not standard."""
    assert not graph.functions
    return {f"{node.domain}::{node.op_type}".removeprefix("::") for node in graph.graph.node}


def residual() -> nn.Module:
    """Return the network as if trained: with means of 0, a sum of signs often is 0, and then rounding decides its sign."""
    model = Residual()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm3d):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize("rules", QUANTIZERS.values(), ids=QUANTIZERS)
def test_every_quantizer_exports_in_standard_operators(rules: Any, tmp_path: Path):
    converted = convert(residual(), rules)
    graph = exported(converted, tmp_path / "model.onnx")
    assert "Conv" in operators(graph)
    assert not any("::" in operator for operator in operators(graph))
    assert_runs_in_onnxruntime_as_in_torch(converted, tmp_path / "model.onnx", clip())


def test_optional_settings_export(tmp_path: Path):
    weight = {"quantizer": "sign", "scale": "channel", "standardize": True}
    converted = convert(residual(), {"rule": [{"weight": weight, "input": "sign", "shortcut": True, "rprelu": True}]})
    for module in converted.modules():
        if isinstance(module, RPReLU):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -1, 1)
    graph = exported(converted, tmp_path / "model.onnx")
    assert not any("::" in operator for operator in operators(graph))
    assert_runs_in_onnxruntime_as_in_torch(converted, tmp_path / "model.onnx", clip())


@pytest.mark.parametrize("build", [CausalModel, FunctionalConv, StandardizedModel, WeightNormed])
def test_every_kind_of_layer_exports(build, tmp_path: Path):
    converted = convert(build().eval())
    exported(converted, tmp_path / "model.onnx")
    assert_runs_in_onnxruntime_as_in_torch(converted, tmp_path / "model.onnx", clip())


@torch.no_grad()
def test_every_padding_exports(tmp_path: Path):
    # one by one: in a chain of signs a rounded sum now and then falls on the other side of a threshold
    x = clip()
    for layer in convert(Paddings().eval()).convs:
        exported(layer, tmp_path / "layer.onnx", x)
        assert_runs_in_onnxruntime_as_in_torch(layer, tmp_path / "layer.onnx", x)
        x = layer(x)


def test_an_export_takes_any_batch(tmp_path: Path):
    converted = convert(residual(), "default")
    exported(converted, tmp_path / "model.onnx", dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for x in (clip(), torch.cat([clip(), -clip(), clip()])):
        assert_runs_in_onnxruntime_as_in_torch(converted, tmp_path / "model.onnx", x)


def test_weights_in_the_file_are_the_quantized_ones(tmp_path: Path):
    # without a BatchNorm, which the export would multiply into them
    converted = convert(TypeCheck().eval(), {"rule": [{"weight": "sign", "input": "sign"}]})
    graph = exported(converted, tmp_path / "model.onnx")
    kernels = [onnx.numpy_helper.to_array(each) for each in graph.graph.initializer if list(each.dims) == [4, 2, 3, 3, 3]]
    assert [set(kernel.ravel().tolist()) for kernel in kernels] == [{-1.0, 1.0}] * 2

"""Wrappers around a model or a part of it: taken off the whole, left on a part, and put around the converted model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Residual
from small import CHANNELS, assert_equal, binary_layers, clip, convert, every_builder, loss
from torch import nn

import qconvert


@pytest.fixture
def process_group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def wrap(request) -> Any:
    """The wrapper that the test is parametrized with."""
    if "ddp" in request.param:
        request.getfixturevalue("process_group")
    yield WRAPPERS[request.param]
    torch._dynamo.reset()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "ddp": nn.parallel.DistributedDataParallel,
    "compiled": compiled,
    "ddp of compiled": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "compiled data parallel": lambda model: compiled(nn.DataParallel(model)),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS, indirect=True)


@every_wrapper
@every_builder
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_a_wrapped_model_comes_back_bare_and_converted(wrap, build, inplace: bool):
    model = build().eval()
    expected = convert(copy.deepcopy(model))
    wrapped = wrap(model)

    with pytest.warns(UserWarning, match="wrapper is taken off: wrap the converted model again"):
        converted = qconvert.binarize(wrapped, CHANNELS, report=False, inplace=inplace)

    assert (converted is model) is inplace
    assert type(converted).__name__ == build.__name__  # a functional convolution makes it another class of that name
    assert list(converted.state_dict()) == list(expected.state_dict())
    assert_equal([converted(clip())], [expected(clip())])


@every_wrapper
def test_plan_and_profile_look_through_a_wrapper(wrap):
    model = Residual().eval()
    expected = qconvert.plan(model, CHANNELS), qconvert.profile(model, clip())
    wrapped = wrap(model)
    assert (qconvert.plan(wrapped, CHANNELS), qconvert.profile(wrapped, clip())) == expected


@every_wrapper
@every_builder
def test_a_converted_model_can_be_wrapped_and_trained(wrap, build):
    model = convert(build().eval())  # in train mode DataParallel and DDP compute the same; a BatchNorm in eval is exact
    expected = copy.deepcopy(model)
    wrapped = wrap(model)
    y, expected_y = wrapped(clip()), expected(clip())
    loss(y).backward()
    loss(expected_y).backward()
    assert_equal([y.detach()], [expected_y.detach()])
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])


def test_a_compiled_part_is_converted_where_it_is():
    model = Residual().eval()
    expected = convert(copy.deepcopy(model))
    model.blocks[0] = compiled(model.blocks[0])

    converted = convert(model)

    names = [name.replace("._orig_mod", "") for name in binary_layers(converted)]
    assert names == binary_layers(expected)
    assert type(converted.blocks[0]) is type(model.blocks[0])
    assert_equal([converted(clip())], [expected(clip())])
    torch._dynamo.reset()


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("has_run", [False, True], ids=["fresh", "has run"])
def test_a_model_that_compiles_itself_in_place_runs_converted(inplace: bool, has_run: bool):
    model = Residual().eval()
    expected = convert(copy.deepcopy(model))
    model.compile(backend="aot_eager")
    if has_run:  # what has been compiled is the float model
        model(clip())
    converted = convert(model, inplace=inplace)
    assert_equal([converted(clip())], [expected(clip())])
    torch._dynamo.reset()

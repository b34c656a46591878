"""The registered operators `torch.ops.qconvert.*`: torch's own check, memory formats, empty tensors, vmap."""

import importlib
import pkgutil

import pytest
import torch
from torch.library import CustomOpDef, opcheck

import qconvert.layers
import qconvert.quantizations

OPERATORS = {
    "sign": (),
    "approx_sign": (),
    "swish_sign": (5.0,),
    "ste_heaviside": (),
    "ramp": (0.25,),
    "weight_dorefa": (3,),
    "input_dorefa": (3,),
    "ternary": (),
    "lsq": (torch.tensor(0.25), -8, 7, False),
    "gradient_window": (1.0,),
}
# these look at the whole tensor, so a batch of tensors is not one tensor to them
WHOLE_TENSOR = ["weight_dorefa", "ternary"]
ELEMENTWISE = [name for name in OPERATORS if name not in WHOLE_TENSOR]

LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 3, 2, 4, 5),
    "channels_last_3d": lambda: torch.randn(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    "permuted": lambda: torch.randn(4, 3, 5).permute(2, 0, 1),
    "strided": lambda: torch.randn(2, 6, 8)[:, ::2, ::3],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "scalar": lambda: torch.randn(()),
}

every_operator = pytest.mark.parametrize("name", OPERATORS)


def call(name, x):
    return getattr(torch.ops.qconvert, name)(x, *OPERATORS[name])


def test_every_operator_is_tested():
    packages = (qconvert.quantizations, qconvert.layers)
    files = [
        importlib.import_module(f"{p.__name__}.{file.name}") for p in packages for file in pkgutil.iter_modules(p.__path__)
    ]
    operators = {value._name for file in files for value in vars(file).values() if isinstance(value, CustomOpDef)}
    assert operators == {*OPERATORS, "quantized_conv3d"}  # of a whole layer: tests/layers/test_fused.py


def check(name, x, **options):
    settings = [s.to(x.dtype).requires_grad_() if isinstance(s, torch.Tensor) else s for s in OPERATORS[name]]
    opcheck(getattr(torch.ops.qconvert, name).default, (x.detach().requires_grad_(), *settings), **options)


@every_operator
def test_opcheck(name):
    check(name, LAYOUTS["contiguous"]())  # everything: compilation with dynamic shapes and its gradient too


@every_operator
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_opcheck_of_layout(name, layout):
    # the fake tensor, by which compilers plan memory, has the real one's strides
    check(name, LAYOUTS[layout](), test_utils=("test_schema", "test_faketensor"))


@every_operator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_of_dtype(name, dtype):
    check(name, torch.randn(2, 3, dtype=dtype), test_utils=("test_schema", "test_faketensor"))


@every_operator
def test_channels_last_3d_is_kept(name):
    x = LAYOUTS["channels_last_3d"]().requires_grad_()
    y = call(name, x)
    y.backward(torch.ones_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert y.stride() == x.stride() == x.grad.stride()
    # the layout changes where values are, not what they are
    torch.testing.assert_close(y, call(name, x.contiguous()))


@every_operator
def test_result_never_shares_memory_with_the_input(name):
    x = torch.ones(2, 3)  # what most of them map to itself
    assert call(name, x).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_no_values_in_none_out(name):
    x = torch.empty(0, 3, 2, 2, 2, requires_grad=True)
    y = call(name, x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("name", [*ELEMENTWISE, *WHOLE_TENSOR])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # lsq has no vmap of its own: torch loops
def test_vmap_is_a_loop(name, in_dim):
    # slices of different magnitudes along every dimension
    x = (
        torch.randn(3, 4, 5)
        * torch.logspace(-2, 0, 3)[:, None, None]
        * torch.logspace(-2, 0, 4)[:, None]
        * torch.logspace(-2, 0, 5)
    )
    looped = torch.stack([call(name, one) for one in x.unbind(in_dim)])
    assert torch.equal(torch.vmap(lambda one: call(name, one), in_dims=in_dim)(x), looped)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_out_dim(name):
    x = torch.randn(3, 4)
    mapped = torch.vmap(lambda one: call(name, one), in_dims=1, out_dims=1)(x)
    assert torch.equal(mapped, call(name, x))

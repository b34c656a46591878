"""One forward pass of a copy of a model, watched: which module runs, on what shapes, with how many MACs.

It runs under FakeTensorMode, which computes shapes only. Multiply-accumulates come from the formulas of
torch.utils.flop_counter (1 MAC = 2 FLOPs), and belong to the innermost layer that is running.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..errors import InputError, ModelError
from ..example import arguments, does_not_run
from ..rng import preserved_rng
from ..trace import copied, drop_foreign_hooks

Shape = tuple[int, ...]


def rows(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module that has a row of its own: all but those inside a Conv3d, such as its quantizers."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not (inside and name.startswith(inside)):
            yield name, module
            if isinstance(module, nn.Conv3d):
                inside = (*inside, f"{name}.") if name else ("",)


class Runs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What ran: calls, shapes and MACs per module, and the operators without a formula."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = [""]
        self.calls: Counter[str] = Counter()
        self.macs: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.types: dict[str, str] = {}
        self.shapes: dict[str, tuple[Shape | None, Shape | None]] = {}

    def watch(self, model: nn.Module) -> None:
        """Follow which module is running, by hooks, instead of those that a user put on it."""
        drop_foreign_hooks(model)
        for name, module in rows(model):
            self.types[name] = type(module).__name__
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(partial(self._leave, name), with_kwargs=True, always_call=True)

    def _enter(self, name: str, _module: nn.Module, _args: object) -> None:
        self.stack.append(name)

    def _leave(self, name: str, _module: nn.Module, args: object, kwargs: object, output: object) -> None:
        self.stack.pop()
        self.calls[name] += 1
        self.shapes.setdefault(name, (_shape((args, kwargs)), _shape(output)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func._overloadpacket
        formula: Any = flop_registry.get(operator)
        if formula is None and func.namespace == "aten":
            with self:  # under inference_mode, composite operators arrive whole
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if formula is not None:
            self.macs[self.stack[-1]] += formula(*args, **kwargs, out_val=output) // 2
        elif (
            func.namespace != "prim"
            and not func.is_view
            and any(isinstance(value, Tensor) for value in pytree.tree_leaves((args, kwargs)))
        ):
            self.operators[str(operator)] += 1
        return output


def _shape(value: object) -> Shape | None:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return tuple(tensors[0].shape) if tensors else None


def run(model: nn.Module, example_inputs: Any) -> Runs:
    """Run the model once on fake tensors; where that cannot be done, for real on a copy.

    Raises:
        InputError: if the model does not run on the inputs.
        ModelError: if the model cannot be copied.
    """
    with preserved_rng(), _decomposed_attention():
        try:
            return _run_on_shapes(model, example_inputs)
        except Exception:  # noqa: BLE001 (value-dependent code fails in any way; the real run below tells a true failure)
            inputs = pytree.tree_map_only(Tensor, torch.clone, example_inputs)
            try:
                return _watched(copied(model), inputs)
            except ModelError:
                raise
            except Exception as error:
                raise InputError(does_not_run(model, example_inputs, error)) from error


def _run_on_shapes(model: nn.Module, example_inputs: Any) -> Runs:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # every tensor is replaced by a fake one: what the forward writes to a tensor is written to none of the model's
    tensors = (*model.parameters(), *model.buffers())
    shapes = copied(model, {id(tensor): fake.from_tensor(tensor) for tensor in tensors})
    inputs = pytree.tree_map_only(Tensor, fake.from_tensor, example_inputs)
    with fake:
        return _watched(shapes, inputs)


@contextmanager
def _decomposed_attention() -> Iterator[None]:
    """Switch off torch's fused attentions: some of these operators, other ones on each device, have no MAC formula."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _watched(model: nn.Module, inputs: Any) -> Runs:
    """Run the model, a copy that nobody else uses, in evaluation mode."""
    args, kwargs = arguments(inputs)
    runs = Runs()
    runs.watch(model.eval())
    with torch.no_grad(), runs:
        model(*args, **kwargs)
    return runs

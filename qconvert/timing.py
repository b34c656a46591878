"""`benchmark`: how long a model takes before and after, measured side by side on the machine at hand."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from .errors import InputError
from .example import arguments, copied_inputs, does_not_run, example_input
from .packed import pack
from .packed.bit_conv import BitConv3d
from .pictures import new_figure, write
from .pipeline import RulesLike, binarize, check_rules
from .report.document import Document
from .report.table import Cell, Measure, Table
from .trace import copied, unwrapped

FLOAT, PACKED = "float32", "packed"
_WARM_UPS = 2
_BITS_OF_A_WORD = 64
_BATCHED = 5


@dataclass(frozen=True)
class Timing:
    """How long something took, over all rounds.

    Attributes:
        name: what ran.
        milliseconds: the median.
        fastest, slowest: of all rounds, in milliseconds.
        speedup: median of the rounds' ratios, float32's time over its own: both of the same round.
    """

    name: str
    milliseconds: float
    fastest: float
    slowest: float
    speedup: float


@dataclass(frozen=True)
class LayerTiming:
    """How long a packed layer took, beside the float convolution that it has come from.

    Attributes:
        name: the layer's dotted name.
        precision: bits of weights and inputs.
        float_milliseconds, packed_milliseconds: medians. A packed layer that reads floats packs them, too.
        measured: median of the ratios.
        counted: the ratio of the operations, by the convention of 64 bit-operations for one of floats.
    """

    name: str
    precision: str
    float_milliseconds: float
    packed_milliseconds: float
    measured: float
    counted: float


@dataclass(frozen=True)
class Benchmark(Document):
    """What `benchmark` has measured.

    Attributes:
        timings: of the whole model, each way that it was run.
        layers: of each packed layer.
        threads: that torch was set to.
        rounds: how often each ran; in each round all of them, one after another.
    """

    timings: tuple[Timing, ...]
    layers: tuple[LayerTiming, ...]
    threads: int
    rounds: int

    @property
    def title(self) -> str:
        """One line that says what it is about."""
        packed = next(each for each in self.timings if each.name == PACKED)
        return f"Packed: {packed.speedup:.3g} x as fast as float32, {self.threads} threads, median of {self.rounds} rounds."

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def layer_table(self) -> Table:
        """Return one row per packed layer."""
        headers = ("layer", "precision", "float32 ms", "packed ms", "measured", "counted")
        rows: list[tuple[Cell, ...]] = [
            (each.name, each.precision, Measure(each.float_milliseconds), Measure(each.packed_milliseconds),
             Measure(each.measured), Measure(each.counted))
            for each in self.layers
        ]  # fmt: skip
        return Table(headers, tuple(rows))

    def tables(self) -> tuple[Table, ...]:
        """Return the whole model, and the layers."""
        rows: list[tuple[Cell, ...]] = [
            (each.name, *map(Measure, (each.milliseconds, each.fastest, each.slowest, each.speedup)))
            for each in self.timings
        ]
        whole = Table(("model", "ms", "fastest", "slowest", "x float32"), tuple(rows))
        return (whole, self.layer_table()) if self.layers else (whole,)

    def draw(self, path: Path) -> None:
        """Draw a bar for each way that the model was run, with its spread.

        Raises:
            ModelError: if matplotlib is not installed.
            InputError: if the picture cannot be written.
        """
        figure = new_figure(7, 1 + len(self.timings) / 2)
        axes = figure.add_subplot()
        medians = [each.milliseconds for each in self.timings]
        spread = [
            [each.milliseconds - each.fastest for each in self.timings],
            [each.slowest - each.milliseconds for each in self.timings],
        ]
        bars = axes.barh([each.name for each in self.timings], medians, xerr=spread, color="0.7", capsize=3)
        axes.bar_label(bars, [f" {each.milliseconds:.3g} ms, {each.speedup:.3g} x" for each in self.timings], padding=8)
        axes.set_xlim(0, 1.35 * max(each.slowest for each in self.timings))
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds")
        axes.set_title(self.title, fontsize="small")
        write(figure, path)

    def notes(self) -> list[str]:
        """Return how it was measured."""
        rounds = "All of a round run one after another, so that a machine that slows down slows all of them."
        return [f"{rounds} counted: what operations alone would give, one of floats for {_BITS_OF_A_WORD} of bits."]


def benchmark(
    model: nn.Module,
    rules: RulesLike = "default",
    example_inputs: Any = None,
    *,
    rounds: int = 9,
    compiled: bool = False,
) -> Benchmark:
    """Measure a float model, the model that the rules make of it, and that one packed, side by side.

    Args:
        model: the float model. It stays as it is.
        rules: as in `binarize`.
        example_inputs: as in `binarize`: what the models run on.
        rounds: how often each model runs.
        compiled: whether float32 is measured compiled by torch.compile, too, which takes a C++ compiler and minutes.

    Raises:
        RuleError, ModelError: as `binarize`.
        InputError: if there are no example inputs, or the model does not run on them.
    """
    plain = unwrapped(model)
    inputs = example_input(check_rules(rules).model, plain) if example_inputs is None else example_inputs
    if inputs is None:
        raise InputError("nothing to run the model on: pass example_inputs (on the command line --input)")
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds}")
    original = copied(plain).eval()
    converted = binarize(original, rules, report=False).eval()
    packed = pack(converted)
    ways: dict[str, Callable[[], object]] = {
        FLOAT: _run_of(original, inputs),
        "bfloat16": _in_bfloat16(_run_of(original, inputs)),
        "converted": _run_of(converted, inputs),
        PACKED: _run_of(packed, inputs),
    }
    if compiled:
        ways["float32, compiled"] = _run_of(torch.compile(original), inputs)  # type: ignore[arg-type]  # a module
    times = _interleaved(ways, rounds, "Models")
    return Benchmark(_timings(times), _layers(original, packed, inputs, rounds), torch.get_num_threads(), rounds)


def _run_of(model: nn.Module, inputs: Any) -> Callable[[], object]:
    def run() -> object:
        args, kwargs = arguments(copied_inputs(inputs))
        try:
            return model(*args, **kwargs)
        except Exception as error:  # a user's forward may raise anything; it is named as the cause
            raise InputError(does_not_run(model, inputs, error)) from error

    return run


def _in_bfloat16(run: Callable[[], object]) -> Callable[[], object]:
    def cast() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    return cast


@torch.inference_mode()
def _interleaved(ways: Mapping[str, Callable[[], object]], rounds: int, label: str) -> dict[str, list[float]]:
    """Return the milliseconds of each way in each round, and show the progress under a label."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    turns = [(number, name) for number in range(_WARM_UPS + rounds) for name in ways]
    for number, name in track(turns, label, console=Console(stderr=True), transient=True):
        start = time.perf_counter()
        ways[name]()
        if number >= _WARM_UPS:
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def _timings(times: Mapping[str, list[float]]) -> tuple[Timing, ...]:
    return tuple(
        Timing(name, statistics.median(each), min(each), max(each), _ratio(times[FLOAT], each))
        for name, each in times.items()
    )


def _layers(original: nn.Module, packed: nn.Module, inputs: Any, rounds: int) -> tuple[LayerTiming, ...]:
    """Return the timings of each packed layer, on an input of the shape that it has in the model."""
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, BitConv3d)}
    seen = _inputs_of({name: original.get_submodule(name) for name in layers}, _run_of(original, inputs))
    return tuple(_layer(name, layers[name], original.get_submodule(name), x, rounds) for name, x in seen.items())


@torch.inference_mode()
def _inputs_of(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():
            keep = partial(_keep, seen, name)
            stack.callback(layer.register_forward_pre_hook(keep).remove)
        run()
    return seen


def _keep(seen: dict[str, Tensor], name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    seen[name] = inputs[0]


def _layer(name: str, layer: BitConv3d, conv: nn.Module, x: Tensor, rounds: int) -> LayerTiming:
    last = x.contiguous(memory_format=torch.channels_last_3d) if x.dim() == _BATCHED else x
    times = _interleaved({FLOAT: partial(conv, x), PACKED: partial(layer.packed, last)}, rounds, name)
    of_input, of_weight = layer.packed.planes
    return LayerTiming(
        name,
        f"W{of_weight}A{of_input}",
        statistics.median(times[FLOAT]),
        statistics.median(times[PACKED]),
        measured=_ratio(times[FLOAT], times[PACKED]),
        counted=_BITS_OF_A_WORD / (of_input * of_weight),
    )

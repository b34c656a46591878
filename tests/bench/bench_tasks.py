"""Real trainings as tables for docs/results.md: precisions and ablations. Run: make bench-shots, make bench-digits.

What a run has reached is kept in the folder runs, so an interrupted table goes on where it was.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from others import bitorch_layer, by_hand
from tabulate import tabulate
from torch import nn

from qconvert.tasks import Recipe, Task, Training, converted
from qconvert.tasks.run import task as task_named
from qconvert.tasks.run import trained_float_model

RUNS = Path("runs")

WEIGHT = {"quantizer": "sign", "scale": "channel"}
INPUT = {"quantizer": "approxsign", "threshold": "auto"}


def lsq(bits: int, *, signed: bool) -> dict[str, Any]:
    return {"quantizer": "lsq", "bits": bits, "signed": signed}


@dataclass(frozen=True)
class Setup:
    """What a task's table depends on.

    Attributes:
        selects: the selectors of a rule for all layers that are converted.
        ablation_steps: steps of each training of the ablation.
        signed: the selectors of a rule for those that read values below 0, None for none.
        others: rules that keep layers in float.
        around: the optional settings of a layer of 1-bit weights and inputs.
        low_bit_recipe: changes to the task's recipe for 2 and 4 bits: nearer to float, they need smaller steps, and fewer.
    """

    selects: Mapping[str, Any]
    ablation_steps: int
    signed: Mapping[str, Any] | None = None
    others: tuple[Mapping[str, Any], ...] = ()
    around: Mapping[str, Any] = field(default_factory=dict)
    low_bit_recipe: Mapping[str, Any] = field(default_factory=dict)

    def rules(self, weight: Any, inputs: Any, signed_inputs: Any = None, **around: Any) -> dict[str, Any]:
        rules = [{**self.selects, "weight": weight, "input": inputs, **around}]
        if self.signed is not None and signed_inputs is not None:
            rules.append({**self.signed, "input": signed_inputs})
        return {"rule": [*rules, *self.others]}

    def binary_rules(self, weight: Any = WEIGHT, inputs: Any = INPUT) -> dict[str, Any]:
        return self.rules(weight, inputs, **self.around)

    def ablation_recipe(self, **changes: Any) -> dict[str, Any]:
        return {"steps": self.ablation_steps, **changes}


@dataclass(frozen=True)
class Configuration:
    """A row of a table.

    Attributes:
        rules: the rules in a task's setup.
        recipe: changes to the task's recipe, in a task's setup.
        convert: what converts the model in the place of qconvert.
    """

    rules: Callable[[Setup], dict[str, Any]]
    recipe: Callable[[Setup], Mapping[str, Any]] = lambda _: {}
    convert: Callable[[nn.Module, Mapping[str, Any]], nn.Module] | None = None


def low_bit(bits: int) -> Configuration:
    signed, unsigned = lsq(bits, signed=True), lsq(bits, signed=False)
    return Configuration(
        # LSQ's own gradient is 0 outside the range of its codes: no second window
        lambda setup: setup.rules(signed, unsigned, signed, gradient_cancellation_threshold=0),
        lambda setup: setup.low_bit_recipe,
    )


def staged(setup: Setup) -> dict[str, Any]:
    """Activations first: float weights for a third of the ablation's steps."""
    stage = {"steps": setup.ablation_steps // 3, "weight": "identity"}
    return setup.binary_rules() | {"schedule": {"stage": [stage]}}


def with_bitorch(model: nn.Module, rules: Mapping[str, Any]) -> nn.Module:
    return by_hand(model, rules, bitorch_layer, input_quantization="sign")


PRECISIONS = {
    "W1A1": Configuration(Setup.binary_rules),
    "W1A32": Configuration(lambda setup: setup.rules(WEIGHT, "identity")),
    "W2A2": low_bit(2),
    "W4A4": low_bit(4),
    "W1A1, bitorch's layer by hand": Configuration(Setup.binary_rules, convert=with_bitorch),
}

ABLATIONS = {
    "all of it": Configuration(Setup.binary_rules, Setup.ablation_recipe),
    "no threshold": Configuration(lambda setup: setup.binary_rules(inputs="approxsign"), Setup.ablation_recipe),
    "no scale": Configuration(lambda setup: setup.binary_rules(weight="sign"), Setup.ablation_recipe),
    "labels in the place of distillation": Configuration(
        Setup.binary_rules, lambda setup: setup.ablation_recipe(labels=1.0, logits=0.0, features=0.0)
    ),
    "staged: activations first": Configuration(staged, Setup.ablation_recipe),
}

SETUPS = {
    "shots": Setup(
        {"min_in_channels": 4},
        ablation_steps=150,
        signed={"kernel_size": [3, 1, 1]},
        low_bit_recipe={"steps": 150, "lr": 1e-4, "latent_lr": 1.0, "logits": 3.0, "frozen_after": 0.0},
    ),
    "digits": Setup(
        {"layers": "blocks.*"},
        ablation_steps=1000,
        others=({"role": "shortcut", "quantize": False, "reason": "shortcut: a float path"},),
        around={"shortcut": True, "rprelu": True},
        low_bit_recipe={"steps": 4000, "lr": 1e-3, "latent_lr": 1.0},
    ),
}


def main() -> int:
    """Print the tables of a task, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=SETUPS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", action="append", help="names of rows")
    arguments = parser.parse_args()
    chosen = task_named(arguments.task)
    for title, table in (("Precisions", PRECISIONS), ("Ablation", ABLATIONS)):
        rows = [
            row(chosen, name, configuration, arguments.seeds)
            for name, configuration in table.items()
            if not arguments.only or name in arguments.only
        ]
        print(f"{title}\n")
        print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4g"), "\n")
    return 0


def row(chosen: Task, name: str, configuration: Configuration, seeds: int) -> dict[str, Any]:
    """Return what a configuration reaches on the mean of the seeds, beside the float models."""
    results = [result(chosen, name, configuration, seed) for seed in range(seeds)]
    means = {key: statistics.mean(each["reached"][key] for each in results) for key in results[0]["reached"]}
    float_means = {f"float: {key}": statistics.mean(each["float"][key] for each in results) for key in results[0]["float"]}
    minutes = statistics.mean(each["seconds"] for each in results) / 60
    return {"model": name, **means, **float_means, "steps": results[0]["steps"], "minutes": minutes}


def result(chosen: Task, name: str, configuration: Configuration, seed: int) -> dict[str, Any]:
    """Train once, or read what that has reached."""
    folder = RUNS / chosen.name / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    path = folder / "reached.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    recipe = replace(chosen.recipe, **configuration.recipe(SETUPS[chosen.name]))
    teacher = float_model(chosen, seed)
    training = Training(chosen, student(chosen, teacher, configuration, recipe, seed), teacher, recipe, seed)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    print(f"{chosen.name}, {name}, seed {seed}: from step {len(training.losses)}", file=sys.stderr)
    started = time.perf_counter()
    if not training.run(checkpoint):
        sys.exit("interrupted; the same command goes on from here")
    seconds = time.perf_counter() - started
    content = {
        "reached": dict(chosen.evaluate(training.student)),
        "float": dict(chosen.evaluate(teacher)),
        "steps": recipe.steps,
        "seconds": seconds,
    }
    path.write_text(json.dumps(content))
    print(content, file=sys.stderr)
    return content


def float_model(chosen: Task, seed: int) -> nn.Module:
    """Return the float model of a seed; what was trained is kept."""
    model = trained_float_model(chosen, seed, RUNS / chosen.name / f"float-{seed}.pt")
    if model is None:
        sys.exit("interrupted; the same command goes on from here")
    return model


def student(chosen: Task, teacher: nn.Module, configuration: Configuration, recipe: Recipe, seed: int) -> nn.Module:
    rules = configuration.rules(SETUPS[chosen.name])
    if configuration.convert is not None:
        return configuration.convert(teacher, rules)
    return converted(chosen, teacher, rules, seed, recipe)


if __name__ == "__main__":
    sys.exit(main())

"""`train_task` and `evaluate_task`: what `qconvert train` and `qconvert eval` do."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tabulate import tabulate
from torch import nn

from .. import __version__
from ..errors import InputError, did_you_mean
from ..loading import save_weights
from ..pipeline import RulesLike
from .base import Task
from .curves import draw
from .digits import Digits
from .shots import Shots
from .training import Training, converted

TASKS: dict[str, Callable[[], Task]] = {"shots": Shots, "digits": Digits}


def task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        InputError: if there is none.
    """
    if name not in TASKS:
        raise InputError(f"no task {name!r}. Tasks: {', '.join(TASKS)}.{did_you_mean(name, TASKS)}")
    return TASKS[name]()


def train_task(
    name: str,
    rules: RulesLike | None,
    folder: Path,
    *,
    steps: int | None,
    seed: int,
    resume: bool,
    plot: Path | None,
    say: Callable[[str], object],
) -> bool:
    """Convert a task's float model, train it, and measure both; return whether the end was reached.

    Writes ``checkpoint.pt`` into the folder, and at the end ``model.safetensors``. Ctrl-C writes the checkpoint and stops.

    Raises:
        QConvertError: if the task, the rules or the checkpoint do not fit, or a file cannot be written.
    """
    chosen = task(name)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise InputError(f"{checkpoint} is there already: go on from it with --resume, or choose another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error}") from error
    training, teacher = _prepared(chosen, rules, steps, seed)
    if resume:
        training.load(checkpoint)
        say(f"Going on from step {len(training.losses)} of {training.recipe.steps}.")
    if not _with_progress(training, checkpoint):
        say(f"Interrupted after step {len(training.losses)}. Go on with the same command and --resume.")
        return False
    save_weights(training.student, folder / "model.safetensors", {"qconvert": __version__, "task": name})
    reached = {"float": chosen.evaluate(teacher), "trained": chosen.evaluate(training.student)}
    say(_table(reached))
    if plot is not None:
        draw(training.losses, reached, plot)
        say(f"picture written to {plot}")
    return True


def evaluate_task(name: str, rules: RulesLike | None, folder: Path, *, steps: int | None, seed: int) -> str:
    """Return a table of what a task's float model and the model of a checkpoint reach.

    Raises:
        QConvertError: if the task, the rules or the checkpoint do not fit.
    """
    chosen = task(name)
    training, teacher = _prepared(chosen, rules, steps, seed)
    training.load(folder / "checkpoint.pt")
    step = f"step {len(training.losses)}"
    return _table({"float": chosen.evaluate(teacher), step: chosen.evaluate(training.student)})


def _prepared(chosen: Task, rules: RulesLike | None, steps: int | None, seed: int) -> tuple[Training, nn.Module]:
    recipe = chosen.recipe if steps is None else replace(chosen.recipe, steps=steps)
    teacher = chosen.float_model(seed)
    student = converted(chosen, teacher, chosen.rules if rules is None else rules, seed, recipe)
    return Training(chosen, student, teacher, recipe, seed), teacher


def _with_progress(training: Training, checkpoint: Path) -> bool:
    columns = (
        TextColumn("Training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=training.recipe.steps, completed=len(training.losses), loss="")
        return training.run(checkpoint, lambda loss: progress.update(bar, advance=1, loss=f"{loss:.4f}"))


def _table(reached: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for values in reached.values() for name in values))
    rows = [[model, *(f"{values[name]:.4g}" for name in names)] for model, values in reached.items()]
    return tabulate(rows, ["", *names], disable_numparse=True)

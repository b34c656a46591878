"""`train_task` and `evaluate_task`: what `qconvert train` and `qconvert eval` do."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tabulate import tabulate
from torch import nn

from .. import __version__
from ..errors import InputError, did_you_mean
from ..loading import save_weights
from ..packed import pack
from ..pictures import new_figure
from ..pipeline import RulesLike
from .base import Recipe, Task
from .curves import draw
from .digits import Digits
from .shots import Shots
from .training import Training, converted, read_checkpoint

FLOAT, CHECKPOINT = "float.pt", "checkpoint.pt"
"""Checkpoints in a training's folder: of a float model that is trained first, and of the converted one."""

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

    Writes checkpoints into the folder, and at the end ``model.safetensors``. Ctrl-C writes a checkpoint and stops.

    Raises:
        QConvertError: if the task, the rules or the checkpoint do not fit, or a file cannot be written.
    """
    chosen = task(name)
    checkpoint = folder / CHECKPOINT
    has_begun = checkpoint.exists() or (folder / FLOAT).exists()
    if has_begun and not resume:
        raise InputError(f"{folder} has a checkpoint already: go on from it with --resume, or choose another --output")
    if resume and not has_begun:
        raise InputError(f"{folder} has no checkpoint to go on from: leave --resume out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error}") from error
    figure = None if plot is None else new_figure(8, 7)
    recipe = chosen.recipe if steps is None else replace(chosen.recipe, steps=steps)
    teacher = trained_float_model(chosen, seed, folder / FLOAT)
    if teacher is None:
        say("Interrupted while the float model was trained. Go on with the same command and --resume.")
        return False
    training = _training(chosen, teacher, rules, recipe, seed)
    if checkpoint.exists():
        training.load(checkpoint)
        say(f"Going on from step {len(training.losses)} of {recipe.steps}.")
    if not _with_progress(training, checkpoint, "Training", measures=figure is not None):
        say(f"Interrupted after step {len(training.losses)}. Go on with the same command and --resume.")
        return False
    save_weights(training.student, folder / "model.safetensors", {"qconvert": __version__, "task": name})
    reached = _reached(chosen, teacher, "trained", training.student)
    say(_table(reached))
    if figure is not None and plot is not None:
        draw(figure, training.losses, training.measured, reached, plot)
        say(f"picture written to {plot}")
    return True


def trained_float_model(chosen: Task, seed: int, path: Path) -> nn.Module | None:
    """Return the float model of a task, trained here if it is not pretrained, or None if Ctrl-C came before the end.

    Args:
        chosen: the task.
        seed: of the model and its training.
        path: where a checkpoint of that training is written, and where it goes on from.

    Raises:
        ModelError: if the checkpoint is of another training, or cannot be written.
    """
    model = chosen.float_model(seed)
    if chosen.float_recipe is None:
        return model
    training = Training(chosen, model, None, chosen.float_recipe, seed)
    if path.exists():
        training.load(path)
    return model if _with_progress(training, path, "Training the float model") else None


def evaluate_task(name: str, rules: RulesLike | None, folder: Path) -> str:
    """Return a table of what a task's float model and the model of a checkpoint reach, as it is and packed.

    Raises:
        QConvertError: if the task, the rules or the checkpoint do not fit.
    """
    chosen = task(name)
    content = read_checkpoint(folder / CHECKPOINT)
    recipe, seed = Recipe(**content["recipe"]), content["seed"]
    teacher = chosen.float_model(seed)
    if chosen.float_recipe is not None:
        Training(chosen, teacher, None, chosen.float_recipe, seed).load(folder / FLOAT)
    training = _training(chosen, teacher, rules, recipe, seed)
    training.load(folder / CHECKPOINT)
    return _table(_reached(chosen, teacher, f"step {len(training.losses)}", training.student))


def _training(chosen: Task, teacher: nn.Module, rules: RulesLike | None, recipe: Recipe, seed: int) -> Training:
    student = converted(chosen, teacher, chosen.rules if rules is None else rules, seed, recipe)
    return Training(chosen, student, teacher, recipe, seed)


def _reached(chosen: Task, teacher: nn.Module, label: str, student: nn.Module) -> dict[str, Mapping[str, float]]:
    models = {"float": teacher, label: student, "packed": pack(student)}
    return {name: chosen.evaluate(model) for name, model in models.items()}


def _with_progress(training: Training, checkpoint: Path, label: str, *, measures: bool = False) -> bool:
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=training.recipe.steps, completed=len(training.losses), loss="")
        show = partial(progress.update, bar, advance=1)
        return training.run(checkpoint, lambda loss: show(loss=f"{loss:.4f}"), measures=measures)


def _table(reached: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for values in reached.values() for name in values))
    rows = [[model, *(f"{values[name]:.4g}" for name in names)] for model, values in reached.items()]
    return tabulate(rows, ["", *names], disable_numparse=True)

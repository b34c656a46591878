"""The command line: arguments in, report out. What it does is in the library."""

import ast
import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import __version__
from .demo import run_demo
from .errors import InputError, QConvertError, RuleError, did_you_mean
from .loading import build_model, load_checkpoint, save_weights
from .packed import save
from .pipeline import binarize as binarize_model
from .pipeline import check_rules, preview
from .pipeline import plan as plan_model
from .report import Profile, Report
from .report import profile as profile_model
from .rules import bundled_rules
from .starter import starting_rules
from .tables import RuleFile
from .tasks.run import evaluate_task, train_task
from .timing import Benchmark, benchmark

app = typer.Typer(
    help="Convert pretrained video and volumetric PyTorch models to binary and low-bit ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
rules_app = typer.Typer(help="List, show, start and check rule files.", no_args_is_help=True)
app.add_typer(rules_app, name="rules")

Model = Annotated[str, typer.Argument(help="package.module:callable or file.py:callable, called to make the model")]
RulesName = Annotated[str, typer.Option("--rules", "-r", help="Rule file, or name of bundled rules.")]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", help="Shape of an argument, as 1,3,16,112,112 or 1,100,27,48,3:uint8. Repeatable."),
]
Checkpoint = Annotated[Path | None, typer.Option(help="Float weights: .safetensors, or a torch file of tensors.")]
Settings = Annotated[list[str] | None, typer.Option("--set", "-s", help="Argument of the callable, as num_classes=400.")]
ReportFile = Annotated[Path | None, typer.Option("--report", help="Write the report as .html, .json, .md, .csv or .txt.")]


@app.command()
def binarize(
    model: Model,
    rules: RulesName = "default",
    input: Input = None,  # noqa: A002 (the option's name)
    checkpoint: Checkpoint = None,
    settings: Settings = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the weights as .safetensors.")] = None,
    packed: Annotated[Path | None, typer.Option(help="Write a packed file, for qconvert.load, as .safetensors.")] = None,
    report: ReportFile = None,
) -> None:
    """Convert a model by rules and report what that does to parameter bits and FLOPs."""
    for path in (output, packed):
        _check_suffix(path, (".safetensors",))
    _check_suffix(report, tuple(_FORMATS))
    source = _model(model, settings, checkpoint)
    changes = preview(source, rules, _inputs(input))
    typer.echo(changes.to_text())
    if report is not None:
        _write(changes, report)
    if output is None and packed is None:
        return
    converted = binarize_model(source, rules, inplace=True, report=False)
    if packed is not None:
        typer.echo(f"packed file written to {packed}: {save(converted, packed).file_bytes} bytes, for qconvert.load")
    if output is not None:
        save_weights(converted, output, {"qconvert": __version__, "rules": rules})
        typer.echo(f"weights written to {output}: load them into binarize({model}(...), {rules!r})")


@app.command()
def plan(model: Model, rules: RulesName = "default", checkpoint: Checkpoint = None, settings: Settings = None) -> None:
    """Show what would be converted, by which rule and why, without doing it."""
    typer.echo(plan_model(_model(model, settings, checkpoint), rules).to_text())


@app.command()
def profile(
    model: Model,
    input: Input = None,  # noqa: A002 (the option's name)
    checkpoint: Checkpoint = None,
    settings: Settings = None,
    report: ReportFile = None,
) -> None:
    """Report the parameter bits and operations of a model as it is."""
    _check_suffix(report, tuple(_FORMATS))
    costs = profile_model(_model(model, settings, checkpoint), _inputs(input))
    typer.echo(costs.to_text())
    if report is not None:
        _write(costs, report)


@app.command()
def bench(
    model: Model,
    rules: RulesName = "default",
    input: Input = None,  # noqa: A002 (the option's name)
    checkpoint: Checkpoint = None,
    settings: Settings = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each model runs.")] = 9,
    compiled: Annotated[bool, typer.Option("--compiled", help="Measure float32 under torch.compile, too.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the times as .png, .svg or .pdf.")] = None,
    report: ReportFile = None,
) -> None:
    """Measure the model in float, converted and packed, side by side on this machine."""
    _check_suffix(plot, _PICTURES)
    _check_suffix(report, tuple(suffix for suffix, method in _FORMATS.items() if hasattr(Benchmark, method)))
    source = _model(model, settings, checkpoint)
    measured = benchmark(source, rules, _inputs(input), rounds=rounds, compiled=compiled)
    typer.echo(measured.to_text())
    if plot is not None:
        measured.draw(plot)
    if report is not None:
        _write(measured, report)


@app.command()
def demo(frames: Annotated[int, typer.Option(min=100, help="How much of the video.")] = 500) -> None:
    """Convert the pretrained TransNetV2 and run it on a part of its video."""
    run_demo(frames, typer.echo)


TaskName = Annotated[
    str, typer.Argument(help="shots: cuts of a video, with TransNetV2; digits: handwritten digits that move.")
]
TaskRules = Annotated[str | None, typer.Option("--rules", "-r", help="Rule file or bundled rules; default: the task's own.")]
Folder = Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoint and the weights.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default: the task's own.")]
Seed = Annotated[int, typer.Option(min=0, help="Of clips, dropout, and a float model that is trained here.")]


@app.command()
def train(
    task: TaskName,
    output: Folder,
    rules: TaskRules = None,
    steps: Steps = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw loss and metrics as .png, .svg or .pdf.")] = None,
) -> None:
    """Convert a bundled task's float model, train and measure it. Ctrl-C leaves a checkpoint to go on from."""
    _check_suffix(plot, _PICTURES)
    reached_end = train_task(task, rules, output, steps=steps, seed=seed, resume=resume, plot=plot, say=typer.echo)
    if not reached_end:
        sys.exit(128 + signal.SIGINT)


@app.command("eval")
def evaluate(task: TaskName, output: Folder, rules: TaskRules = None) -> None:
    """Measure the model of a checkpoint that `qconvert train` has written, as it is and packed, beside the float model."""
    typer.echo(evaluate_task(task, rules, output))


@rules_app.command("list")
def list_rules() -> None:
    """List the bundled rules."""
    for name, path in bundled_rules().items():
        first_line = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        typer.echo(f"{name:14} {first_line}")


@rules_app.command("show")
def show_rules(name: Annotated[str, typer.Argument(help="Name of bundled rules.")]) -> None:
    """Print bundled rules, with the comments that say why."""
    files = bundled_rules()
    if name not in files:
        raise RuleError(f"no bundled rules {name!r}. Bundled: {', '.join(files)}.{did_you_mean(name, files)}")
    typer.echo(files[name].read_text(encoding="utf-8"), nl=False)


@rules_app.command("new")
def new_rules(model: Model, settings: Settings = None) -> None:
    """Print a rule file to start from, with a rule for each kind of Conv3d that the model has."""
    typer.echo(starting_rules(_model(model, settings, None)), nl=False)


@rules_app.command("check")
def check(
    file: Annotated[str, typer.Argument(help="Rule file, or name of bundled rules.")],
    model: Annotated[str | None, typer.Argument(help="Also match the rules with this model.")] = None,
    settings: Settings = None,
) -> None:
    """Check that a rule file reads, and that every rule of it selects a layer of the model."""
    rules = check_rules(file)
    if model is not None:
        typer.echo(plan_model(_model(model, settings, None), rules).to_text())
    typer.echo(f"{file}: {len(rules.rules)} rules, all fine")


@rules_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of rule files, for editors."""
    typer.echo(json.dumps(RuleFile.model_json_schema(), indent=2))


_PICTURES = (".png", ".svg", ".pdf")
_FORMATS = {".html": "to_html", ".json": "to_json", ".md": "to_markdown", ".csv": "to_csv", ".txt": "to_text"}


def _check_suffix(path: Path | None, allowed: tuple[str, ...]) -> None:
    """Find a wrong file name before the work, not after it."""
    if path is not None and path.suffix not in allowed:
        raise InputError(f"{path}: the file's name must end in {' or '.join(allowed)}")
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")


def _write(document: Report | Profile | Benchmark, path: Path) -> None:
    try:
        path.write_text(getattr(document, _FORMATS[path.suffix])(), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    typer.echo(f"report written to {path}")


def _model(spec: str, settings: list[str] | None, checkpoint: Path | None) -> torch.nn.Module:
    model = build_model(spec, dict(_setting(text) for text in settings or ()))
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InputError(f"--set takes name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a plain word is a string


def _inputs(texts: list[str] | None) -> tuple[torch.Tensor, ...] | None:
    return tuple(_input(text) for text in texts) if texts else None


def _input(text: str) -> torch.Tensor:
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    sizes = shape.split(",")
    if not isinstance(dtype, torch.dtype) or not all(size.strip().isdecimal() for size in sizes):
        raise InputError(f"--input takes sizes and a torch dtype, as 1,3,16,112,112 or 1,100,27,48,3:uint8, got {text!r}")
    try:
        return torch.zeros([int(size) for size in sizes], dtype=dtype)
    except (RuntimeError, OverflowError, TypeError) as error:  # too large a size, too large a tensor
        raise InputError(f"--input {text}: {next(iter(str(error).splitlines()), '')}") from error


def main() -> None:
    """Run the command line. The user's mistakes end with one line on stderr and exit code 2."""
    try:
        app()
    except QConvertError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

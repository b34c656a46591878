"""Trainings of tasks: what comes after an interruption is what would have come without it, and mistakes are named."""

import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from qconvert import InputError, ModelError, RuleError, binarize, pack
from qconvert.cli import app
from qconvert.modes import preserved_modes
from qconvert.pictures import new_figure
from qconvert.tasks import Recipe, Training, converted, run
from qconvert.tasks.curves import draw
from qconvert.tasks.shots import WINDOW, Shots, cuts, f1
from qconvert.tasks.training import CALIBRATION_BATCHES

RULES = {
    "rule": [
        {
            "layers": "3",
            "weight": {"quantizer": "sign", "scale": "channel"},
            "input": {"quantizer": "approxsign", "threshold": "auto"},
        }
    ]
}
STAGES = {"schedule": {"stage": [{"steps": 3, "weight": "identity"}, {"steps": 2, "transition": "linear"}]}}


NAMES = (("float",), ("trained", "step"), ("packed",))
"""What the rows of the table start with."""


class Brightness:
    """Which half of a clip is the brighter one."""

    name = "brightness"
    rules = RULES
    float_recipe = None
    recipe = Recipe(steps=8, batch_size=4, lr=0.01, labels=1.0, logits=0.5, features=0.5)
    comparison = "kl"
    layers = ("4",)

    def float_model(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU()),
            *(nn.Conv3d(4, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU()),
            *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 2)),
        )

    def batch(self, size, generator):
        labels = torch.randint(2, (size,), generator=generator)
        clips = torch.randn(size, 1, 2, 6, 6, generator=generator)
        clips[labels == 1, :, :, 3:] += 1
        return clips, labels

    def answers(self, outputs):
        return outputs

    def loss(self, outputs, clips, labels):
        return nn.functional.cross_entropy(outputs, labels)

    def evaluate(self, model):
        clips, labels = self.batch(20, torch.Generator().manual_seed(9))
        with torch.no_grad(), preserved_modes(model):
            return {"accuracy": (model.eval()(clips).argmax(1) == labels).float().mean().item()}


def training(rules=RULES, recipe=Brightness.recipe, seed=0) -> Training:
    task = Brightness()
    teacher = task.float_model(seed)
    return Training(task, converted(task, teacher, rules, seed, recipe), teacher, recipe, seed)


def steps_until(made: Training, count: int, path: Path | None = None, **settings) -> bool:
    """Train until Ctrl-C, which comes in the middle of the step of that number."""
    batch = made.task.batch
    seen = []

    def counted(*args):
        seen.append(1)
        if len(seen) == count:
            signal.raise_signal(signal.SIGINT)
        return batch(*args)

    made.task.batch = counted
    try:
        return made.run(path, **settings)
    finally:
        del made.task.batch


@pytest.mark.parametrize("rules", [RULES, RULES | STAGES], ids=["plain", "staged"])
@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, rules, count):
    whole = training(rules)
    assert whole.run()
    path = tmp_path / "checkpoint.pt"
    first = training(rules)
    assert not steps_until(first, count, path)
    assert len(first.losses) == count
    torch.rand(3)  # the draws of others are no part of it
    second = training(rules)
    second.load(path)
    assert second.run(path)
    assert second.losses == whole.losses
    for (name, value), expected in zip(
        second.student.state_dict().items(), whole.student.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name


def test_the_seed_decides():
    losses = []
    for seed in (0, 0, 1):
        made = training(seed=seed)
        made.run()
        losses.append(made.losses)
    assert losses[0] == losses[1] != losses[2]


def statistics(made: Training) -> list[Tensor]:
    return [value.clone() for name, value in made.student.named_buffers() if "running" in name]


def test_a_recipe_says_when_statistics_stay_and_nothing_is_dropped_out():
    made = training(recipe=replace(Brightness.recipe, frozen_after=0.5))
    seen = [statistics(made)]
    drops = []
    made.run(advance=lambda _: (seen.append(statistics(made)), drops.append(made.student[8].training)))
    stayed = [all(map(torch.equal, *pair)) for pair in pairwise(seen)]
    assert stayed == [False] * 4 + [True] * 4
    assert drops == [True] * 4 + [False] * 4
    assert made.student.training


def test_the_draws_of_others_are_not_disturbed():
    made = training()
    torch.manual_seed(5)
    made.run()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_an_interruption_leaves_the_handler_as_it_was():
    before = signal.getsignal(signal.SIGINT)
    steps_until(training(), 2)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT raise, which it does not where a shell has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_interruption_is_raised():
    made = training()
    with pytest.raises(KeyboardInterrupt):
        made.run(advance=lambda _: [signal.raise_signal(signal.SIGINT) for _ in range(2)])


def test_a_checkpoint_of_other_rules(tmp_path):
    path = tmp_path / "checkpoint.pt"
    training().save(path)
    with pytest.raises(ModelError, match=r"layer '3' is .*approxsign.* in the checkpoint and .* in this training"):
        training({"rule": [{"layers": "3", "weight": "sign", "input": "sign"}]}).load(path)
    with pytest.raises(ModelError, match=r"does not fit: recipe 'steps' is 8 in the checkpoint and 9 in this training"):
        training(recipe=replace(Brightness.recipe, steps=9)).load(path)
    with pytest.raises(ModelError, match=r"does not fit: task 'seed' is 0 in the checkpoint and 1 in this training"):
        training(seed=1).load(path)


@pytest.mark.parametrize(("saved", "loaded"), [(RULES, RULES | STAGES), (RULES | STAGES, RULES)], ids=["with", "without"])
def test_a_checkpoint_of_another_schedule(tmp_path, saved, loaded):
    path = tmp_path / "checkpoint.pt"
    training(saved).save(path)
    with pytest.raises(ModelError, match=r"does not fit: schedule 'stages' is \[.*\] in the checkpoint and \[.*\] in this"):
        training(loaded).load(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "other tensors"])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    torch.save({"weight": torch.zeros(1)}, path) if content is None else path.write_bytes(content)
    with pytest.raises(ModelError, match=r"checkpoint.pt is no checkpoint"):
        training().load(path)
    with pytest.raises(ModelError, match=r"^no checkpoint .*other.pt$"):
        training().load(tmp_path / "other.pt")


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    made = training()
    made.save(path)
    before = path.read_bytes()
    (tmp_path / "checkpoint.pt.partial").mkdir()
    with pytest.raises(ModelError, match=r"checkpoint.pt cannot be written"):
        made.save(path)
    assert path.read_bytes() == before


def test_nan_is_named_with_its_layer():
    made = training()
    with torch.no_grad():
        made.student[1].weight[0] = float("nan")
    with pytest.raises(InputError, match=r"layer '3'.*NaN"):
        made.run()


def test_a_schedule_longer_than_the_training():
    with pytest.raises(RuleError, match=r"the schedule takes 5 steps and the training 4"):
        training(RULES | STAGES, replace(Brightness.recipe, steps=4))


def test_layers_in_the_order_of_their_sensitivity():
    stage = {"steps": 3, "weight": "identity", "transition": "layerwise", "order": "sensitivity"}
    assert training(RULES | {"schedule": {"stage": [stage]}}).run()


def test_the_model_is_measured_on_the_way(tmp_path):
    recipe = replace(Brightness.recipe, steps=24)
    plain, measured = training(recipe=recipe), training(recipe=recipe)
    assert plain.run()
    assert not steps_until(measured, 9, tmp_path / "checkpoint.pt", measures=True)
    resumed = training(recipe=recipe)
    resumed.load(tmp_path / "checkpoint.pt")
    assert resumed.run(measures=True)
    assert list(resumed.measured) == [3, 5, 8, 10, 12, 15, 17, 20, 22, 24]
    assert resumed.losses == plain.losses
    assert resumed.measured[24] == plain.task.evaluate(plain.student)


def test_nothing_to_learn_from():
    with pytest.raises(InputError, match=r"labels, logits and features are all 0"):
        training(recipe=Recipe(steps=1, batch_size=1, lr=0.1))


def test_no_teacher_to_learn_from():
    task = Brightness()
    with pytest.raises(InputError, match=r"the recipe has a distillation, logits or features: pass a teacher"):
        Training(task, task.float_model(0), None, task.recipe)


def test_a_model_that_qconvert_has_not_converted_is_trained_too():
    task = Brightness()
    student, teacher = task.float_model(1), task.float_model(0)
    made = Training(task, student, teacher, task.recipe)
    assert made.run()
    assert len(made.losses) == task.recipe.steps


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command line with a task that takes no time."""
    monkeypatch.setitem(run.TASKS, Brightness.name, Brightness)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        return CliRunner().invoke(app, arguments)

    return call


def test_train_then_eval(command):
    trained = command("train", "brightness", "-o", "run", "--plot", "loss.png")
    assert trained.exit_code == 0, trained.output
    assert "accuracy" in trained.output
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")
    assert Path("run/model.safetensors").is_file()
    assert {path.name for path in Path("run").iterdir()} == {"checkpoint.pt", "model.safetensors"}
    measured = command("eval", "brightness", "-o", "run")
    assert measured.exit_code == 0
    rows = [[line.split() for line in each.output.splitlines() if line.strip()] for each in (trained, measured)]
    for names in NAMES:
        first, second = (values[-1] for row in rows for values in row if values[0] in names)
        assert first == second, names


def test_train_does_not_write_over_a_checkpoint(command):
    command("train", "brightness", "-o", "run", "--steps", "1")
    again = command("train", "brightness", "-o", "run", "--steps", "1")
    assert isinstance(again.exception, InputError)
    assert "run has a checkpoint already: go on from it with --resume" in str(again.exception)
    assert command("train", "brightness", "-o", "run", "--steps", "1", "--resume").exit_code == 0


def test_eval_knows_steps_and_seed_from_the_checkpoint(command):
    command("train", "brightness", "-o", "run", "--steps", "3", "--seed", "1")
    assert "step 3" in command("eval", "brightness", "-o", "run").output


def test_nothing_to_resume(command):
    assert str(command("train", "brightness", "-o", "run", "--resume").exception) == (
        "run has no checkpoint to go on from: leave --resume out"
    )


def interrupted_at(monkeypatch, number: int) -> None:
    """Let Ctrl-C come in the middle of the step of that number, counted over all trainings."""
    batch, seen = Brightness.batch, []

    def counted(self, size, generator):
        if size == Brightness.recipe.batch_size:
            seen.append(1)
            if len(seen) == number:
                signal.raise_signal(signal.SIGINT)
        return batch(self, size, generator)

    monkeypatch.setattr(Brightness, "batch", counted)


def test_interrupted_it_says_so_and_goes_on(command, monkeypatch):
    whole = command("train", "brightness", "-o", "whole")
    with monkeypatch.context() as patch:
        interrupted_at(patch, CALIBRATION_BATCHES + 3)
        first = command("train", "brightness", "-o", "run")
    assert first.exit_code == 130
    assert "Interrupted after step 3. Go on with the same command and --resume." in first.output
    second = command("train", "brightness", "-o", "run", "--resume")
    assert "Going on from step 3 of 8." in second.output
    assert second.output.endswith(whole.output)


def test_interrupted_while_the_float_model_is_trained_it_goes_on_there(command, monkeypatch):
    monkeypatch.setattr(Brightness, "float_recipe", Recipe(steps=4, batch_size=4, lr=0.01, labels=1.0))
    whole = command("train", "brightness", "-o", "whole")
    with monkeypatch.context() as patch:
        interrupted_at(patch, 2)
        first = command("train", "brightness", "-o", "run")
    assert first.exit_code == 130
    assert "Interrupted while the float model was trained. Go on with the same command and --resume." in first.output
    assert "has a checkpoint already" in str(command("train", "brightness", "-o", "run").exception)
    assert command("train", "brightness", "-o", "run", "--resume").output == whole.output
    assert command("eval", "brightness", "-o", "run").output.split()[-1] == whole.output.split()[-1]


def test_without_matplotlib_it_is_said_before_the_training(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "a picture needs `pip install matplotlib`" in str(
        command("train", "brightness", "-o", "run", "--plot", "loss.png").exception
    )
    assert not Path("run").joinpath("checkpoint.pt").exists()


def test_a_task_that_does_not_exist(command):
    assert (
        str(command("train", "shot", "-o", "run").exception)
        == "no task 'shot'. Tasks: shots, digits, brightness. Did you mean 'shots'?"
    )


def test_a_picture_in_a_format_that_there_is_not(tmp_path):
    with pytest.raises(InputError, match=r"loss.xyz cannot be written"):
        draw(new_figure(8, 5), [1.0, 2.0], {}, {}, tmp_path / "loss.xyz")


def test_the_picture_has_the_losses_and_a_curve_for_each_metric(tmp_path):
    figure = new_figure(8, 5)
    losses = [float(each) for each in range(100, 0, -1)]
    measured = {50: {"f1": 0.5, "correlation": 0.8}, 100: {"f1": 0.75, "correlation": 0.9}}
    draw(figure, losses, measured, {"float": {"f1": 1.0}}, tmp_path / "loss.png")
    top, *metrics = figure.axes
    assert list(top.lines[0].get_ydata()) == losses
    assert list(top.lines[0].get_xdata()) == list(range(1, 101))
    assert (top.lines[1].get_xdata()[0], top.lines[1].get_ydata()[0]) == (50, sum(losses[:50]) / 50)
    assert top.get_title() == "float: f1 1"
    assert [axes.get_ylabel() for axes in metrics] == ["f1", "correlation"]
    assert [list(axes.lines[0].get_xdata()) for axes in metrics] == [[50, 100]] * 2
    assert list(metrics[0].lines[0].get_ydata()) == [0.5, 0.75]


# --- shots ---


def test_cuts_are_the_middles_of_runs():
    probabilities = torch.tensor([0.9, 0.1, 0.6, 0.7, 0.8, 0.5, 0.1, 0.51])
    assert cuts(probabilities) == [0.0, 3.0, 7.0]
    assert cuts(torch.zeros(4)) == []


@pytest.mark.parametrize(
    ("found", "expected", "value"),
    [
        ([10.0, 20.0], [10.0, 22.0], 1.0),
        ([10.0], [13.0], 0.0),
        ([10.0, 11.0], [10.0], 2 / 3),  # one cut counts once
        ([], [5.0], 0.0),
        ([8.0, 10.0], [10.0, 12.0], 1.0),
    ],
)
def test_f1(found, expected, value):
    assert f1(found, expected) == pytest.approx(value)


def test_packing_loses_nothing_of_a_trained_model():
    """What `qconvert train shots` trains for longer."""
    shots = Shots()
    teacher, recipe = shots.float_model(0), replace(shots.recipe, steps=2, features=0.0)
    made = Training(shots, binarize(teacher, shots.rules, report=False).train(), teacher, recipe)
    assert made.run()
    clip, _ = shots.batch(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [shots.answers(model(clip)) for model in (made.student.eval(), pack(made.student))]
    assert torch.equal(*logits)
    assert logits[0].std() > 0


def test_clips_are_of_the_first_part_of_the_video_only():
    shots = Shots()
    shots.frames = torch.zeros(5000, 27, 48, 3, dtype=torch.uint8)
    shots.frames[3700:] = 255
    generator = torch.Generator().manual_seed(0)
    clips, labels = shots.batch(20, generator)
    assert clips.shape == (20, WINDOW, 27, 48, 3)
    assert clips.dtype == torch.uint8
    assert labels is None
    assert clips.max() < 128  # black at the brightest and of the lowest contrast: 128 - 0.7 * 128 + 20 = 58.4
    assert torch.equal(
        shots.batch(2, torch.Generator().manual_seed(1))[0], shots.batch(2, torch.Generator().manual_seed(1))[0]
    )

"""`Training`: a task's converted model while it is trained, which can be put away and gone on with after any step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.lr_scheduler import OneCycleLR

from ..errors import InputError, ModelError
from ..loading import whole_file
from ..pipeline import RulesLike, binarize
from ..rewrite import plan_of
from ..train import Distillation, Schedule, clip_latent_weights, distill, finite, parameter_groups
from ..train.compatible import check_same
from .base import Recipe, Task

CALIBRATION_BATCHES = 8
_SAVED_EVERY = 100
_TIMES_MEASURED = 10


def converted(task: Task, teacher: nn.Module, rules: RulesLike, seed: int, recipe: Recipe) -> nn.Module:
    """Return the task's float model converted by the rules, calibrated on clips of its own."""
    generator = torch.Generator().manual_seed(seed)
    clips = [task.batch(recipe.batch_size, generator)[0] for _ in range(CALIBRATION_BATCHES)]
    return binarize(teacher, rules, calibration_data=clips, report=False)


class Training:
    """A model in training. Everything that happens follows from the model, the recipe and the seed.

    A float model is trained in the same way, and for comparison one of another library's layers.

    Args:
        task: where clips, labels and the loss come from.
        student: the model.
        teacher: the float model, for a distillation.
        recipe: how it is trained.
        seed: of clips and dropout.

    Attributes:
        losses: the loss of each step so far.
        measured: what the model reached on the way, by step.

    Raises:
        RuleError: if the rules of the student have a schedule that is longer than the recipe.
        InputError: if the recipe has no loss, no steps, or a distillation for which there is no teacher.
    """

    def __init__(self, task: Task, student: nn.Module, teacher: nn.Module | None, recipe: Recipe, seed: int = 0) -> None:
        if not (recipe.labels or recipe.logits or recipe.features):
            raise InputError("nothing to learn from: labels, logits and features are all 0")
        if teacher is None and (recipe.logits or recipe.features):
            raise InputError("the recipe has a distillation, logits or features: pass a teacher")
        if recipe.steps < 1:
            raise InputError(f"steps must be at least 1, got {recipe.steps}")
        self.task, self.student, self.teacher, self.recipe, self.seed = task, student, teacher, recipe, seed
        plan = plan_of(student)
        self._rules = {} if plan is None else {each.site.name: each.settings for each in plan.converted}
        has_schedule = plan is not None and bool(plan.rules.schedule)
        self.schedule = self._schedule() if has_schedule else None
        groups = parameter_groups(student, recipe.lr, latent_lr=recipe.latent_lr, added_lr=recipe.added_lr)
        self.optimizer = torch.optim.Adam(groups)
        highest = [group["lr"] for group in groups]
        self._rates = OneCycleLR(self.optimizer, highest, recipe.steps, pct_start=recipe.warm_up, cycle_momentum=False)
        self._generator = torch.Generator().manual_seed(seed)
        self._dropout = torch.Generator().manual_seed(seed).get_state()
        self.losses: list[float] = []
        self.measured: dict[int, dict[str, float]] = {}

    def _schedule(self) -> Schedule:
        clips, _ = self.task.batch(self.recipe.batch_size, torch.Generator().manual_seed(self.seed))
        return Schedule(self.student, batch=clips, total_steps=self.recipe.steps)

    def run(
        self, path: Path | None = None, advance: Callable[[float], object] = lambda _: None, *, measures: bool = False
    ) -> bool:
        """Train to the end, and return whether it has been reached: Ctrl-C ends after the step that is running.

        Args:
            path: where a checkpoint is written now and then, and at the end.
            advance: called with the loss after each step.
            measures: whether the model is measured ten times on the way.

        Raises:
            InputError: at the first value that is NaN or infinite, naming the layer that reads it.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.set_rng_state(self._dropout)
            if self._rules:  # no layer of ours hides NaN otherwise
                stack.enter_context(finite(self.student))
            distillation = self._distillation(stack)
            is_interrupted = stack.enter_context(_until_interrupted())
            while len(self.losses) < self.recipe.steps and not is_interrupted():
                self.losses.append(self._step(distillation))
                self._dropout = torch.get_rng_state()
                advance(self.losses[-1])
                if measures and self._is_measured_now:
                    self.measured[len(self.losses)] = dict(self.task.evaluate(self.student))
                if path is not None and len(self.losses) % _SAVED_EVERY == 0:
                    self.save(path)
        if path is not None:
            self.save(path)
        return len(self.losses) == self.recipe.steps

    @property
    def _is_measured_now(self) -> bool:
        step, steps = len(self.losses), self.recipe.steps
        return step * _TIMES_MEASURED // steps > (step - 1) * _TIMES_MEASURED // steps

    def _distillation(self, stack: ExitStack) -> Distillation | None:
        recipe, task = self.recipe, self.task
        if self.teacher is None or not (recipe.logits or recipe.features):
            return None
        made = distill(
            self.student,
            self.teacher,
            layers=task.layers if recipe.features else (),
            logits=task.comparison if recipe.logits else None,
            logits_weight=recipe.logits,
            features_weight=recipe.features,
            output=task.answers,
        )
        return stack.enter_context(made)

    def _step(self, distillation: Distillation | None) -> float:
        clips, labels = self.task.batch(self.recipe.batch_size, self._generator)
        self._set_modes()
        outputs = self.student(clips)
        losses: list[Tensor] = []
        if self.recipe.labels:
            losses.append(self.recipe.labels * self.task.loss(outputs, clips, labels))
        if distillation is not None:
            losses.append(distillation.loss())
        loss = torch.stack(losses).sum()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        self.optimizer.step()
        clip_latent_weights(self.student)
        self._rates.step()
        if self.schedule is not None:
            self.schedule.step()
        return loss.item()

    def _set_modes(self) -> None:
        is_frozen = len(self.losses) >= self.recipe.frozen_after * self.recipe.steps
        for module in self.student.train().modules():
            if isinstance(module, (_BatchNorm, _DropoutNd)):
                module.train(not is_frozen)

    def save(self, path: Path) -> None:
        """Write a checkpoint. The old file stays until the new one is whole.

        Raises:
            ModelError: if it cannot be written.
        """
        content = {
            "task": self.task.name,
            "rules": self._rules,
            "recipe": vars(self.recipe),
            "seed": self.seed,
            "losses": self.losses,
            "measured": self.measured,
            "schedule": self._schedule_state(),
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rates": self._rates.state_dict(),
            "clips": self._generator.get_state(),
            "dropout": self._dropout,
        }
        with whole_file(path) as partial:
            torch.save(content, partial)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint: what comes then is what would have come without an interruption.

        Raises:
            ModelError: if it is no checkpoint, or of another task, seed, recipe, rules or schedule, saying what differs.
        """
        content = read_checkpoint(path)
        check_same("task", {"name": content["task"], "seed": content["seed"]}, {"name": self.task.name, "seed": self.seed})
        check_same("recipe", content["recipe"], vars(self.recipe))
        check_same("layer", content["rules"], self._rules)
        check_same("schedule", {"stages": _stages(content["schedule"])}, {"stages": _stages(self._schedule_state())})
        if self.schedule is not None:
            self.schedule.load_state_dict(content["schedule"])
        self.student.load_state_dict(content["student"])
        self.optimizer.load_state_dict(content["optimizer"])
        self._rates.load_state_dict(content["rates"])
        self._generator.set_state(content["clips"])
        self._dropout, self.losses, self.measured = content["dropout"], content["losses"], content["measured"]

    def _schedule_state(self) -> dict[str, Any] | None:
        return None if self.schedule is None else self.schedule.state_dict()


def _stages(schedule: dict[str, Any] | None) -> list[Any]:
    return [] if schedule is None else schedule["stages"]


_KEYS = {
    *("task", "seed", "rules", "recipe", "losses", "measured"),
    *("schedule", "student", "optimizer", "rates", "clips", "dropout"),
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what `Training.save` wrote.

    Raises:
        ModelError: if the file is no such checkpoint.
    """
    if not path.is_file():
        raise ModelError(f"no checkpoint {path}")
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:  # a parser fed with any bytes may raise anything; it is named as the cause
        raise ModelError(f"{path} is no checkpoint: {type(error).__name__}") from error
    if not isinstance(content, dict) or content.keys() != _KEYS:
        raise ModelError(f"{path} is no checkpoint of a training")
    return content


@contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C be asked for instead of raised in the middle of a step; the second one is raised."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread, which Ctrl-C does not reach either
        yield lambda: False
        return
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)

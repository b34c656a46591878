"""Moving digits: what is in the clips, what the labels say, and what the network takes and gives."""

import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import qconvert
from qconvert import ModelError
from qconvert.tasks import digits
from qconvert.tasks.digits import Digits, ResNet3d, clips_of


@pytest.fixture
def plain(monkeypatch):
    """Clips without noise and pieces."""
    monkeypatch.setattr(digits, "NOISE", 0.0)
    monkeypatch.setattr(digits, "PIECES", 0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def corner(frame: Tensor) -> tuple[int, int]:
    """Return where the ink of a frame starts."""
    rows, columns = (frame > 0).nonzero(as_tuple=True)
    return int(rows.min()), int(columns.min())


def test_clips_and_labels():
    clips, labels = Digits().batch(3, seeded())
    assert clips.shape == (3, 1, 16, 32, 32)
    assert clips.dtype == torch.float32
    assert labels.shape == (3,)
    assert labels.dtype == torch.int64


def test_every_class_occurs_and_no_other():
    _, labels = Digits().batch(2000, seeded())
    assert labels.unique().tolist() == list(range(40))


def test_no_image_is_trained_and_tested_on():
    (train, _), (test, _) = digits._images()
    images = [{image.numpy().tobytes() for image in part} for part in (train, test)]
    assert (len(train), len(test)) == (1200, 597)
    assert not images[0] & images[1]


def test_the_generator_decides():
    first, again, other = (Digits().batch(4, seeded(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.usefixtures("plain")
def test_the_label_is_digit_and_direction():
    images = torch.ones(10, 16, 16) * torch.arange(1, 11).view(-1, 1, 1) / 10
    clips, labels = clips_of(images, torch.arange(10), 200, seeded())
    to = {(0, 1): 0, (0, -1): 1, (1, 0): 2, (-1, 0): 3}
    for clip, label in zip(clips[:, 0], labels.tolist(), strict=True):
        places = [corner(frame) for frame in clip]
        steps = {(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(places)}
        assert [to[step] for step in steps] == [label % 4]
        assert round(clip.max().item() * 10) - 1 == label // 4
        assert ((clip > 0).sum((1, 2)) == 256).all()  # all of it in sight, in every frame


@pytest.mark.usefixtures("plain")
def test_the_digit_starts_wherever_it_has_room():
    clips, labels = clips_of(torch.ones(1, 16, 16), torch.zeros(1).long(), 2000, seeded())
    starts = {0: set(), 1: set(), 2: set(), 3: set()}
    for clip, label in zip(clips[:, 0], labels.tolist(), strict=True):
        starts[label].add(corner(clip[0]))
    across, forth, back = range(17), (0, 1), (15, 16)
    assert starts[0] == {(row, column) for row in across for column in forth}
    assert starts[1] == {(row, column) for row in across for column in back}
    assert starts[2] == {(row, column) for row in forth for column in across}
    assert starts[3] == {(row, column) for row in back for column in across}


def test_pieces_and_noise_are_added(monkeypatch):
    blank, shown = torch.zeros(1, 16, 16), torch.zeros(1).long()
    monkeypatch.setattr(digits, "PIECES", 0)
    noise, _ = clips_of(blank, shown, 8, seeded())
    assert noise.std().item() == pytest.approx(digits.NOISE, rel=0.02)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.01)
    monkeypatch.setattr(digits, "NOISE", 0.0)
    monkeypatch.setattr(digits, "PIECES", 1)
    full = torch.ones(1, 16, 16)
    clips, _ = clips_of(full, shown, 50, seeded())
    ink = (clips > 0).sum((1, 3, 4))
    assert ink.min() >= 256  # the piece hides nothing of the digit
    assert ink.max() == 256 + 36


def test_network():
    torch.manual_seed(0)
    model = ResNet3d()
    assert model(torch.zeros(2, 1, 16, 32, 32)).shape == (2, 40)
    assert model.blocks[:2](model.stem(torch.zeros(2, 1, 16, 32, 32))).shape == (2, 64, 2, 4, 4)
    plan = qconvert.plan(model, Digits.rules)
    left = {decision.site.name for decision in plan.decisions if decision.site.is_conv3d and not decision.convert}
    assert left == {"stem.0", "blocks.0.shortcut.0", "blocks.1.shortcut.0"}
    assert all(decision.settings["rprelu"] for decision in plan.converted)
    with_shortcut = {decision.site.name for decision in plan.converted if decision.settings["shortcut"]}
    assert with_shortcut == {"blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv1", "blocks.2.conv2"}


def test_layers_that_are_compared_are_there():
    assert set(Digits.layers) <= {name for name, _ in ResNet3d().named_modules()}


class Always(nn.Module):
    """Answers one class, whatever it sees."""

    def __init__(self, answer: int):
        super().__init__()
        self.answer = answer

    def forward(self, clips: Tensor) -> Tensor:
        assert not self.training
        return torch.eye(40)[self.answer].expand(len(clips), 40)


def test_evaluation_counts_right_answers():
    _, labels = digits._test_clips()
    models = [Always(answer) for answer in range(40)]
    shares = [Digits().evaluate(model)["accuracy"] for model in models]
    assert len(labels) == 2000
    assert shares == [labels.tolist().count(answer) / 2000 for answer in range(40)]
    assert all(model.training for model in models)


def test_float_model_is_a_function_of_the_seed():
    before = torch.random.get_rng_state()
    first, again, other = (Digits().float_model(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._images.cache_clear()
    with pytest.raises(ModelError, match=r"the digits need `pip install qconvert\[tasks\]`: "):
        Digits().batch(1, seeded())

"""A report as text, compared with golden files (`pytest tests/report --overwrite-golden` renews them)."""

import re
from collections.abc import Callable

import pytest
import torch
from models import Cache, ValueControlFlow
from torch import nn

import qconvert


class Plain(nn.Module):
    """A stem, a body and a head: what a video model looks like, by operators that every torch calls the same."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, 16, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv3d(16, 32, 3, stride=2), nn.PReLU(32), nn.Conv3d(32, 32, 1, bias=False), nn.PReLU(32)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).amax((2, 3, 4)))


class Awkward(ValueControlFlow):
    """All that a report has notes for: control flow, a dead convolution, a buffer, a shared module, an odd operator."""

    def __init__(self):
        super().__init__()
        self.cached = Cache()
        self.register_buffer("mean", torch.zeros(4))
        self.again = self.bright

    def forward(self, x):
        return torch.fft.fftn(super().forward(x)), self.cached(self.again(x)[:, :2])


_RULES = {
    "rule": [
        {"input": "sign", "weight": {"quantizer": "sign", "scale": "channel"}, "reason": "bulk"},
        {"layers": ["stem", "bright"], "quantize": False, "reason": "reads pixels", "optional": True},
        {"kernel_size": 1, "weight": {"quantizer": "ternary"}, "input": "identity", "reason": "narrow", "optional": True},
    ]
}


def _plain(inputs: bool = True) -> qconvert.Report:
    model = Plain()
    return qconvert.compare(
        model, qconvert.binarize(model, _RULES, report=False), torch.zeros(1, 3, 8, 32, 32) if inputs else None
    )


def _awkward() -> qconvert.Report:
    model = Awkward()
    converted = qconvert.binarize(model, _RULES, report=False)
    return qconvert.compare(model, converted, torch.ones(1, 2, 4, 6, 6))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("plain.txt", lambda: _plain().to_text(), id="plain, text"),
        pytest.param("plain.md", lambda: _plain().to_markdown(), id="plain, markdown"),
        pytest.param("plain.csv", lambda: _plain().to_csv(), id="plain, csv"),
        pytest.param("plain_not_run.txt", lambda: _plain(inputs=False).to_text(), id="plain, not run"),
        pytest.param("plain_profile.txt", lambda: qconvert.profile(Plain()).to_text(), id="plain, profile"),
        pytest.param("awkward.txt", lambda: _awkward().to_text(), id="awkward, text"),
        pytest.param("awkward.md", lambda: _awkward().to_markdown(), id="awkward, markdown"),
    ],
)
def test_golden(golden: Callable[[str, str], None], name: str, text: Callable[[], str]):
    # the line that stopped the trace moves whenever a line is added above it
    golden(name, re.sub(r"\((\w+\.py):\d+\)", r"(\1:LINE)", text()))


def test_text_is_what_print_shows():
    report = _plain()
    assert str(report) == report.to_text()


def test_text_fits_a_terminal():
    assert max(map(len, _plain().to_text().split("1 MAC =")[0].splitlines())) <= 140


def test_lines_have_no_trailing_blanks_and_the_text_one_newline_at_its_end():
    for text in (_plain().to_markdown(), _awkward().to_markdown()):
        assert all(line == line.rstrip() for line in text.splitlines())
        assert text.endswith("\n")
        assert not text.endswith("\n\n")

"""Times side by side: what is run, what is said, and what cannot be run. How long it takes is no test's affair."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qconvert import InputError, benchmark
from qconvert.cli import main

RULES = {
    "model": {"input_shape": [1, 3, 2, 6, 6]},
    "rule": [{"min_in_channels": 4, "weight": "sign", "input": {"quantizer": "sign", "threshold": "auto"}}],
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv3d(3, 64, 3, padding=1), nn.Conv3d(64, 64, 3, padding=1), nn.Linear(64, 2)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        y: Tensor = self.head(self.block(self.stem(x).relu()).mean((2, 3, 4)))
        return y


def test_each_way_is_run_and_the_ratios_are_those_of_the_times() -> None:
    measured = benchmark(Net(), RULES, rounds=3)
    assert [each.name for each in measured.timings] == ["float32", "bfloat16", "converted", "packed"]
    assert all(0 < each.fastest <= each.milliseconds <= each.slowest for each in measured.timings)
    assert measured.timings[0].speedup == 1
    first, *_, packed = measured.timings
    assert first.fastest / packed.slowest <= packed.speedup <= first.slowest / packed.fastest
    assert [(each.name, each.precision, each.counted) for each in measured.layers] == [("block", "W1A1", 64)]
    assert measured.threads == torch.get_num_threads()


def test_float32_is_measured_compiled_too_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(type(model)) or model)
    measured = benchmark(Net(), RULES, rounds=1, compiled=True)
    assert [each.name for each in measured.timings] == ["float32", "bfloat16", "converted", "packed", "float32, compiled"]
    assert compiled == [Net]


def test_the_model_is_left_as_it_was_and_runs_on_what_is_given() -> None:
    model = Net().train()
    benchmark(model, RULES, torch.randn(2, 3, 3, 5, 5), rounds=1)
    assert model.training
    assert model.seen == []
    assert type(model.block) is nn.Conv3d


def test_two_bits_and_two_bits_count_as_four() -> None:
    rules = {
        "rule": [{"min_in_channels": 4, "weight": {"quantizer": "lsq", "bits": 2}, "input": {"quantizer": "lsq", "bits": 2}}]
    }
    (layer,) = benchmark(Net(), rules, torch.randn(1, 3, 2, 6, 6), rounds=1).layers
    assert (layer.precision, layer.counted) == ("W2A2", 16)


def test_bad_input_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to run the model on: pass example_inputs"):
        benchmark(Net(), {"rule": RULES["rule"]})
    with pytest.raises(InputError, match="rounds must be at least 1, got 0"):
        benchmark(Net(), RULES, rounds=0)
    with pytest.raises(InputError, match=r"Net does not run on the example input \(1, 5\)"):
        benchmark(Net(), RULES, torch.zeros(1, 5), rounds=1)


def test_the_command_prints_tables_and_writes_a_report_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nmin_in_channels = 4\nweight = "sign"\ninput = { quantizer = "sign", threshold = "auto" }\n')
    report, plot = tmp_path / "times.json", tmp_path / "times.png"
    arguments = ["bench", f"{Path(__file__)}:Net", "-r", str(rules), "-i", "1,3,2,6,6", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["qconvert", *arguments, "--report", str(report), "--plot", str(plot)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "x float32" in shown
    assert "counted" in shown
    assert len(json.loads(report.read_text())["timings"]) == 4
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_report_that_it_cannot_write_is_found_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["qconvert", "bench", "no.such:model", "--report", str(tmp_path / "x.html")])
    with pytest.raises(SystemExit):
        main()
    assert "must end in .json or .md or .csv or .txt" in capsys.readouterr().err

"""The totals, added up again from everything that a report says about its layers: data, CSV and the printed columns."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from models import DeadConv, FunctionalConv, NeedsValues, SharedModule, TiedParameter, TwoConvs
from torch import nn
from zoo import entry

import qconvert

CLIP = torch.zeros(1, 2, 4, 6, 6)
LEARNED = {"weight": {"quantizer": "sign", "scale": "channel"}, "input": {"quantizer": "sign", "threshold": "channel"}}
MIXED = {
    "rule": [
        {"input": {"quantizer": "inputdorefa", "bits": 4}, "weight": {"quantizer": "weightdorefa", "bits": 4}},
        {"role": "last", **LEARNED},
        {"role": "first", "weight": "ternary", "input": "identity"},
    ]
}
SUMS = ("parameters", "parameter_bits", "buffer_bits", "macs", "flops", "bops")


class Reported(NamedTuple):
    """A conversion, its report, and the profiles of its two sides."""

    models: tuple[nn.Module, nn.Module]
    report: qconvert.Report
    before: qconvert.Profile
    after: qconvert.Profile


def _video(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (entry(name).build(), entry(name).inputs())


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(lambda: (TwoConvs(), CLIP), id="two convs"),
        pytest.param(lambda: (NeedsValues(), CLIP), id="needs values"),
        pytest.param(lambda: (SharedModule(), CLIP), id="shared module"),
        pytest.param(lambda: (TiedParameter(), CLIP), id="tied parameter"),
        pytest.param(lambda: (FunctionalConv(), CLIP), id="functional conv"),
        pytest.param(lambda: (DeadConv(), CLIP), id="dead conv"),
        pytest.param(lambda: (TwoConvs().bfloat16(), CLIP.bfloat16()), id="bfloat16"),
        pytest.param(_video("torchvision r3d_18"), id="r3d_18"),
        pytest.param(_video("monai UNETR"), id="UNETR"),
        pytest.param(_video("pytorchvideo x3d_s"), id="x3d_s"),
    ],
)
def reported(request) -> Reported:
    model, inputs = request.param()
    rules = MIXED if len(list(model.modules())) > 3 else "bitorch"
    after = qconvert.binarize(model, rules, report=False)
    report = qconvert.compare(model, after, inputs)
    return Reported((model, after), report, qconvert.profile(model, inputs), qconvert.profile(after, inputs))


class TestData:
    @pytest.mark.parametrize("side", ["before", "after"])
    def test_report_totals_are_the_sums_of_its_layers(self, reported: Reported, side: str):
        data = reported.report.to_dict()
        layers = [layer[side] for layer in data["layers"]]
        _check_sums(data["totals"][side], layers)

    @pytest.mark.parametrize("side", ["before", "after"])
    def test_profile_totals_are_the_sums_of_its_layers(self, reported: Reported, side: str):
        data = getattr(reported, side).to_dict()
        _check_sums(data["totals"], data["layers"])

    @pytest.mark.parametrize("side", ["before", "after"])
    def test_report_and_profile_agree(self, reported: Reported, side: str):
        assert reported.report.to_dict()["totals"][side] == getattr(reported, side).to_dict()["totals"]

    def test_parameters_and_buffers_are_those_of_the_models(self, reported: Reported):
        for model, profile in zip(reported.models, (reported.before, reported.after), strict=True):
            assert profile.totals.parameters == sum(parameter.numel() for parameter in model.parameters())
            saved = model.state_dict()
            buffers = [saved[name] for name, _ in model.named_buffers() if name in saved]
            assert profile.totals.buffer_bits == sum(8 * buffer.nbytes for buffer in buffers)
        float_bits = sum(8 * parameter.nbytes for parameter in reported.models[0].parameters())
        assert reported.before.totals.parameter_bits == float_bits

    def test_conversion_keeps_the_macs(self, reported: Reported):
        totals = reported.report.to_dict()["totals"]
        assert totals["before"]["macs"] == totals["after"]["macs"] > 0
        assert totals["before"]["bops"] == 0 < totals["after"]["parameter_bits"] < totals["before"]["parameter_bits"]


def _check_sums(totals: dict[str, Any], layers: list[dict[str, Any]]):
    for key in SUMS:
        assert totals[key] == sum(layer[key] for layer in layers), key
    assert totals["float_macs"] == sum(layer["macs"] for layer in layers if not _low_bit(layer))
    assert totals["flops"] == 2 * totals["float_macs"]
    assert totals["bops"] == sum(
        2 * layer["weight_bits"] * layer["input_bits"] * layer["macs"] for layer in layers if _low_bit(layer)
    )
    assert totals["ops"] == totals["flops"] + totals["bops"] / 64
    assert sum(totals["macs_by_precision"].values()) == totals["macs"]
    assert totals["mebibytes"] == (totals["parameter_bits"] + totals["buffer_bits"]) / (8 * 1024 * 1024)


def _low_bit(layer: dict[str, Any]) -> bool:
    return layer["weight_bits"] is not None and max(layer["weight_bits"], layer["input_bits"]) <= 8


class TestCsv:
    """One line per layer, every number exact."""

    def test_report(self, reported: Reported):
        totals = reported.report.to_dict()["totals"]
        sums = _column_sums(reported.report.to_csv(), exact)
        assert sums["parameters"] == totals["after"]["parameters"]
        assert sums["MACs"] == totals["after"]["macs"]
        for side in ("before", "after"):
            assert sums[f"bits {side}"] == totals[side]["parameter_bits"]
            assert sums[f"FLOPs {side}"] == totals[side]["flops"]
        assert sums["BOPs after"] == totals["after"]["bops"]

    def test_profile(self, reported: Reported):
        totals = reported.after.to_dict()["totals"]
        sums = _column_sums(reported.after.to_csv(), exact)
        assert sums == {
            "calls": sums["calls"],
            "parameters": totals["parameters"],
            "bits": totals["parameter_bits"],
            "MACs": totals["macs"],
            "FLOPs": totals["flops"],
            "BOPs": totals["bops"],
        }


def exact(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _column_sums(text: str, number: Callable[[str], int | None]) -> dict[str, int]:
    """The sums of the columns that hold numbers and nothing else."""
    header, *rows = csv.reader(io.StringIO(text))
    columns = {name: [number(row[index]) for row in rows] for index, name in enumerate(header) if name != "layer"}
    return {name: sum(cells) for name, cells in columns.items() if cells and None not in cells}


class TestPrinted:
    """What a reader adds up from the printed columns is the printed total, to half a unit of each last digit."""

    @pytest.mark.parametrize("form", ["to_text", "to_markdown"])
    def test_report(self, reported: Reported, form: str):
        totals = reported.report.to_dict()["totals"]
        table, *_ = printed_tables(getattr(reported.report, form)())
        _check_printed(table, "parameters", totals["after"]["parameters"])
        for side in ("before", "after"):
            _check_printed(table, f"bits {side}", totals[side]["parameter_bits"])
            _check_printed(table, f"FLOPs {side}", totals[side]["flops"])
        _check_printed(table, "BOPs after", totals["after"]["bops"])

    @pytest.mark.parametrize("form", ["to_text", "to_markdown"])
    def test_profile(self, reported: Reported, form: str):
        totals = reported.after.to_dict()["totals"]
        table, *_ = printed_tables(getattr(reported.after, form)())
        printed = {"parameters": "parameters", "bits": "parameter_bits", "MACs": "macs", "FLOPs": "flops", "BOPs": "bops"}
        for header, key in printed.items():
            _check_printed(table, header, totals[key])

    @pytest.mark.parametrize("form", ["to_text", "to_markdown"])
    def test_totals_table(self, reported: Reported, form: str):
        totals = reported.report.to_dict()["totals"]
        _, table = printed_tables(getattr(reported.report, form)())
        labels = {
            "parameters": "parameters",
            "parameter bits": "parameter_bits",
            "buffer bits": "buffer_bits",
            "size (MiB)": "mebibytes",
            "MACs": "macs",
            "FLOPs (2 x float MACs)": "flops",
            "BOPs (2 x W bits x A bits x MACs)": "bops",
            "OPs (FLOPs + BOPs / 64)": "ops",
        }
        rows = {row["total"]: row for row in table}
        for label, key in labels.items():
            for side in ("before", "after"):
                value, tolerance = read(rows[label][side])
                assert abs(value - totals[side][key]) <= tolerance, (label, side)
            before, after = totals["before"][key], totals["after"][key]
            ratio = rows[label]["before / after"]
            assert ratio == (f"{before / after:.2f} x" if before and after else "")
        by_precision = {label.removeprefix("- "): row for label, row in rows.items() if label.startswith("- ")}
        assert by_precision.keys() == totals["before"]["macs_by_precision"].keys() | totals["after"]["macs_by_precision"]

    def test_text_folds_only_layers_without_macs(self, reported: Reported):
        table, _ = printed_tables(reported.report.to_text())
        names = {row["layer"] for row in table}
        layers = reported.report.to_dict()["layers"]
        assert {layer["name"] for layer in layers if layer["is_conv3d"] or layer["macs"]} <= names
        folded = [re.match(r"(\d+) x ", name) for name in names]
        folded_layers = sum(int(match[1]) for match in folded if match)
        assert folded_layers == sum(not layer["is_conv3d"] and not layer["macs"] for layer in layers)


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}


def read(text: str) -> tuple[float, float]:
    """A printed number, and half a unit of its last digit (with room for the floats that this is computed in)."""
    match = re.fullmatch(r"(-?\d+)(?:\.(\d+))? ?([kMGTP]?)", text)
    assert match, text
    whole, decimals, unit = match.groups()
    scale = _UNITS[unit]
    value = float(f"{whole}.{decimals or 0}") * scale
    is_exact = decimals is None and not unit
    return value, 0.0 if is_exact else 0.5 * scale * 10 ** -len(decimals or "") * (1 + 1e-9)


def printed_tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a printed report: by the columns of its rules for a terminal, by its bars for Markdown."""
    lines = text.splitlines()
    tables = []
    for number, line in enumerate(lines):
        if re.fullmatch(r"-+( +-+)*", line) and " " in line:
            spans = [match.span() for match in re.finditer("-+", line)]
            tables.append(list(_rows(lines, number, lambda row, spans=spans: [row[a:b].strip() for a, b in spans])))
        elif re.fullmatch(r"\|[-|: ]+\|", line):
            tables.append(list(_rows(lines, number, lambda row: [cell.strip() for cell in row.strip("|").split("|")])))
    return tables


def _rows(lines: list[str], rule: int, cells: Callable[[str], list[str]]) -> Iterator[dict[str, str]]:
    header = cells(lines[rule - 1])
    for line in lines[rule + 1 :]:
        if not line:
            return
        yield dict(zip(header, cells(line), strict=True))


def _check_printed(table: list[dict[str, str]], header: str, total: int):
    numbers = [read(row[header]) for row in table]
    assert abs(sum(value for value, _ in numbers) - total) <= sum(tolerance for _, tolerance in numbers), header


def test_the_reader_of_this_test_sees_an_error_of_one_unit():
    """If the tolerance were wide, the tests above could not fail."""
    report = qconvert.profile(TwoConvs(), CLIP)
    table, _ = printed_tables(report.to_text())
    total = report.totals.parameters
    _check_printed(table, "parameters", total)
    with pytest.raises(AssertionError):
        _check_printed(table, "parameters", total + 1)


def test_json_is_the_same_data(reported: Reported):
    for document in (reported.report, reported.before):
        assert json.loads(document.to_json()) == _with_lists(document.to_dict())


def _with_lists(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _with_lists(value) for key, value in data.items()}
    return [_with_lists(value) for value in data] if isinstance(data, (list, tuple)) else data

"""What optional settings add: counted by hand, named in the notes, and in the totals."""

import torch
from torch import nn

import qconvert
from qconvert import QConv3d
from qconvert.report.options import Option, options_of

CLIP = torch.zeros(1, 4, 3, 5, 5)
RULES = {"rule": [{"weight": {"quantizer": "sign", "standardize": True}, "input": "sign", "shortcut": True, "rprelu": True}]}
PLAIN = {"rule": [{"weight": "sign", "input": "sign"}]}


def model() -> nn.Module:
    return nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 7, 3), nn.ReLU())


def test_counts_are_those_of_the_parameters_that_are_added():
    report, plain = (qconvert.preview(model(), rules, CLIP) for rules in (RULES, PLAIN))
    added = 3 * (4 + 7)
    assert report.options == (
        Option("standardize", 2),
        Option("shortcut", 1),
        Option("rprelu", 2, parameters=added, parameter_bits=32 * added),
    )
    assert report.after.parameters - plain.after.parameters == added
    assert report.after.parameter_bits - plain.after.parameter_bits == 32 * added
    assert (report.after.macs, report.after.flops, report.after.bops) == (
        plain.after.macs,
        plain.after.flops,
        plain.after.bops,
    )
    rows = {row.layer.name: row.after for row in report.rows}
    before = {row.layer.name: row.after for row in plain.rows}
    assert rows["0"].parameter_bits - before["0"].parameter_bits == 32 * 3 * 4
    assert rows["2"].parameters - before["2"].parameters == 3 * 7


def test_notes_name_each():
    converted = qconvert.binarize(model(), RULES, report=False)
    for document in (qconvert.preview(model(), RULES, CLIP), qconvert.profile(converted)):
        for line in (
            "standardize in 2 layers: no parameters; each forward pass standardizes the latent weights (not among the ",
            "shortcut in 1 layer: no parameters; 1 float addition per output value (not among the FLOPs).",
            "rprelu in 2 layers: 33 parameters, 1,056 bits; 3 float operations per output value (not among the FLOPs).",
        ):
            assert any(note.startswith(line) for note in document.notes())
            assert line in document.to_text()
            assert line in document.to_html()
        expected = {"name": "rprelu", "layers": 2, "parameters": 33, "parameter_bits": 1056}
        assert document.to_dict()["options"][-1] == expected


def test_what_is_off_is_not_mentioned():
    report = qconvert.preview(model(), PLAIN)
    assert report.options == ()
    assert not any("rprelu" in note or "shortcut" in note for note in report.notes())
    assert report.to_dict()["options"] == []


def test_a_shared_rprelu_counts_once_and_in_its_own_dtype():
    one, two = (QConv3d(4, 4, 3, rprelu=True, dtype=torch.float16) for _ in range(2))
    two.rprelu = one.rprelu
    assert options_of(nn.Sequential(one, two, one)) == (Option("rprelu", 2, parameters=12, parameter_bits=12 * 16),)

"""`profile` and `compare`: what they say of which layer, and the keys that programs read."""

import pytest
import torch
from models import DeadConv, FunctionalConv, SharedModule, TwoConvs, ValueControlFlow
from torch import nn
from zoo import entry

import qconvert

CLIP = torch.zeros(1, 2, 4, 6, 6)
SECOND_ONLY = {"rule": [{"layers": "second", "weight": "sign", "input": "sign", "reason": "the large one"}]}
LAYER_KEYS = {
    *("name", "type", "is_conv3d", "precision", "weight_bits", "input_bits", "calls", "input_shape", "output_shape"),
    *("parameters", "parameter_bits", "buffer_bits", "macs", "flops", "bops"),
}
TOTAL_KEYS = {
    *("parameters", "parameter_bits", "buffer_bits", "macs", "float_macs", "flops", "bops", "ops"),
    *("mebibytes", "macs_by_precision"),
}


def _compared(model: nn.Module, rules="bitorch", inputs=CLIP) -> qconvert.Report:
    return qconvert.compare(model, qconvert.binarize(model, rules, report=False), inputs)


def _layers(report: qconvert.Report) -> dict:
    return {layer["name"]: layer for layer in report.to_dict()["layers"]}


class TestKeys:
    """Programs read these: a name that changes breaks them."""

    @pytest.mark.parametrize("inputs", [None, CLIP], ids=["not run", "run"])
    def test_report(self, inputs):
        data = _compared(TwoConvs(), inputs=inputs).to_dict()
        assert data.keys() == {"model", "totals", "layers", "uncounted", "opaque", "overwrites", "options"}
        assert data["totals"].keys() == {"before", "after"}
        assert data["totals"]["before"].keys() == data["totals"]["after"].keys() == TOTAL_KEYS
        for layer in data["layers"]:
            assert layer.keys() == LAYER_KEYS | {"decision", "rule", "reason", "before", "after"}
            assert layer["before"].keys() == layer["after"].keys() == LAYER_KEYS

    @pytest.mark.parametrize("inputs", [None, CLIP], ids=["not run", "run"])
    def test_profile(self, inputs):
        data = qconvert.profile(TwoConvs(), inputs).to_dict()
        assert data.keys() == {"model", "totals", "layers", "uncounted", "options"}
        assert data["totals"].keys() == TOTAL_KEYS
        assert all(layer.keys() == LAYER_KEYS for layer in data["layers"])

    def test_uncounted_and_opaque(self):
        report = _compared(ValueControlFlow())
        assert all(entry.keys() == {"name", "calls", "reason"} for entry in report.to_dict()["uncounted"])
        assert [module.keys() for module in report.to_dict()["opaque"]] == [{"name", "type", "reason"}]


class TestCompare:
    def test_each_layer_has_its_decision_rule_and_reason(self):
        layers = _layers(_compared(TwoConvs(), SECOND_ONLY))
        decided = {name: (layer["decision"], layer["reason"]) for name, layer in layers.items()}
        assert decided == {
            "first": ("float", "no rule selects it"),
            "norm": ("float", "not a Conv3d"),
            "second": ("converted", "the large one"),
            "head": ("float", "not a Conv3d (Linear)"),
        }
        assert [bool(layer["rule"]) for layer in layers.values()] == [False, False, True, False]

    def test_layer_is_shown_as_it_is_now_between_before_and_after(self):
        layer = _layers(_compared(TwoConvs(), SECOND_ONLY))["second"]
        assert (layer["before"]["type"], layer["after"]["type"], layer["type"]) == ("Conv3d", "QConv3d", "QConv3d")
        assert (layer["before"]["precision"], layer["after"]["precision"]) == ("W32A32", "W1A1")
        assert (layer["weight_bits"], layer["input_bits"]) == (1, 1)
        assert layer["before"]["flops"] == layer["after"]["bops"] == 2 * (4 * 2 * 3 * 3) * (8 * 9)
        assert (layer["before"]["bops"], layer["after"]["flops"]) == (0, 0)
        assert (layer["before"]["parameter_bits"], layer["after"]["parameter_bits"]) == (32 * 4 * 8 * 9, 4 * 8 * 9)

    def test_quantizers_inside_a_layer_have_no_rows_of_their_own(self):
        rules = {"rule": [{"layers": "second", "weight": "lsq", "input": {"quantizer": "lsq", "threshold": "channel"}}]}
        assert list(_layers(_compared(TwoConvs(), rules))) == ["first", "norm", "second", "head"]

    def test_title_counts_the_convolutions(self):
        assert _compared(TwoConvs(), SECOND_ONLY).title == "TwoConvs: 2 Conv3d found, 1 converted"
        assert _compared(SharedModule()).title == "SharedModule: 1 Conv3d found, 1 converted"

    def test_subclass_counts_as_a_conv3d(self):
        title = _compared(entry("causal subclass").build()).title
        assert title == "CausalModel: 2 Conv3d found, 2 converted"

    def test_dead_convolution_is_listed_and_converted(self):
        report = _compared(DeadConv())
        layer = _layers(report)["unused"]
        assert (layer["decision"], layer["calls"], layer["macs"]) == ("converted", 0, 0)
        assert layer["after"]["parameter_bits"] == 4 * 2 * 27 + 32 * 4

    def test_layers_come_in_the_order_of_registration(self):
        names = [name for name, _ in TwoConvs().named_children()]
        assert list(_layers(_compared(TwoConvs()))) == names
        # a module's own computation stands where the module does, before its children
        assert list(_layers(_compared(FunctionalConv()))) == ["", "conv", "conv3d"]

    def test_opaque_modules_are_named_with_the_reason(self):
        report = _compared(ValueControlFlow())
        assert [(module.name, module.type) for module in report.opaque] == [("", "ValueControlFlow")]
        assert "Not traceable: the model (ValueControlFlow): TraceError: " in report.to_text()

    def test_models_that_were_not_converted_by_qconvert(self):
        """Any two models compare: without a plan there is nothing to say but float."""
        small = nn.Sequential(nn.Conv3d(2, 2, 1))
        large = nn.Sequential(nn.Conv3d(2, 2, 1), nn.Conv3d(2, 2, 1))
        layers = _layers(qconvert.compare(large, small, CLIP))
        assert layers["1"]["before"]["parameters"] == 2 * 2 + 2
        assert (layers["1"]["after"]["parameters"], layers["1"]["after"]["macs"]) == (0, 0)
        assert {layer["decision"] for layer in layers.values()} == {"float"}
        layers = _layers(qconvert.compare(small, large, CLIP))
        assert (layers["1"]["before"]["parameters"], layers["1"]["before"]["macs"]) == (0, 0)
        assert layers["1"]["after"]["macs"] == (2 * 4 * 6 * 6) * 2

    def test_model_compared_with_itself_changes_nothing(self):
        model = TwoConvs()
        totals = qconvert.compare(model, model, CLIP).to_dict()["totals"]
        assert totals["before"] == totals["after"]

    def test_conversion_in_place_compares_with_a_float_model(self):
        model, converted = TwoConvs(), TwoConvs()
        qconvert.binarize(converted, SECOND_ONLY, inplace=True, report=False)
        assert qconvert.compare(model, converted, CLIP).title == "TwoConvs: 2 Conv3d found, 1 converted"


class TestBinarizePrints:
    def test_the_same_report(self, capsys):
        model = TwoConvs()
        converted = qconvert.binarize(model, SECOND_ONLY, example_inputs=CLIP)
        assert capsys.readouterr().out == f"{qconvert.compare(model, converted, CLIP)}\n"

    def test_nothing_if_asked(self, capsys):
        qconvert.binarize(TwoConvs(), SECOND_ONLY, example_inputs=CLIP, report=False)
        assert capsys.readouterr().out == ""

    def test_input_shape_of_the_rules_is_run(self, capsys):
        qconvert.binarize(TwoConvs(), {"model": {"input_shape": list(CLIP.shape)}, **SECOND_ONLY})
        assert "1 MAC = " in capsys.readouterr().out

    @pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
    def test_input_that_does_not_fit_converts_nothing(self, inplace: bool):
        model = TwoConvs()
        with pytest.raises(qconvert.InputError, match=r"TwoConvs does not run on the example input \(1, 1\)"):
            qconvert.binarize(model, SECOND_ONLY, example_inputs=torch.zeros(1, 1), inplace=inplace)
        assert type(model.second) is nn.Conv3d
        assert "_qconvert_plan" not in vars(model)


class TestWrappers:
    def test_model_inside_a_wrapper_is_profiled(self):
        plain = qconvert.profile(TwoConvs(), CLIP)
        assert qconvert.profile(nn.DataParallel(TwoConvs()), CLIP).to_dict() == plain.to_dict()
        assert qconvert.profile(torch.compile(TwoConvs()), CLIP).to_dict() == plain.to_dict()

    def test_single_convolution(self):
        report = _compared(nn.Conv3d(2, 3, 1))
        (layer,) = report.to_dict()["layers"]
        assert (layer["name"], layer["decision"], layer["macs"]) == ("", "converted", (3 * 4 * 6 * 6) * 2)

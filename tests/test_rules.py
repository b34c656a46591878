"""Rule files: reading, errors, which rule wins, and the rule files that are bundled."""

import ast
import contextlib
import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qconvert.rules
from qconvert import RuleError, bundled_rules, load_rules
from qconvert.rewrite import check_quantizers
from qconvert.rules import match
from qconvert.sites import Site
from qconvert.tables import RuleFile

SITES = (
    Site(
        "stem", "Conv3d", in_channels=3, out_channels=8, kernel_size=(3, 7, 7), parameters=3528, roles=frozenset({"first"})
    ),
    Site("block.conv1", "Conv3d", in_channels=8, out_channels=16, kernel_size=(3, 3, 3), parameters=3456),
    Site("block.conv2", "Causal", in_channels=16, out_channels=16, groups=16, kernel_size=(3, 3, 3), parameters=432),
    Site("block.skip", "Conv3d", "Conv3d", ("alias.skip",), 8, 16, 4, (1, 1, 1), 32, frozenset({"shortcut"})),
    Site("up", "ConvTranspose3d", kind="ConvTranspose3d", in_channels=16, out_channels=8, kernel_size=(2, 2, 2)),
)


def converted(*rules: dict) -> list[str]:
    plan = match(SITES, load_rules({"rule": list(rules)}))
    return [decision.site.name for decision in plan.converted]


def test_rules_imports_no_torch():
    tree = ast.parse(Path(qconvert.rules.__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert "torch" not in imported
    # the modules of the package that it does import have none either
    assert {"errors", "sites", "tables"} <= imported
    for name in ("errors", "sites", "tables"):
        assert "import torch" not in Path(qconvert.rules.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ({}, ["stem", "block.conv1", "block.conv2", "block.skip"]),
        ({"layers": "block.*"}, ["block.conv1", "block.conv2", "block.skip"]),
        ({"layers": ["stem", "*2"]}, ["stem", "block.conv2"]),
        ({"layers": "alias.skip"}, ["block.skip"]),
        ({"type": "Causal"}, ["block.conv2"]),
        ({"type": "C*3d"}, ["stem", "block.conv1", "block.skip"]),
        ({"kernel_size": 3}, ["block.conv1", "block.conv2"]),
        ({"kernel_size": [3, 7, 7]}, ["stem"]),
        ({"groups": "dense"}, ["stem", "block.conv1"]),
        ({"groups": "grouped"}, ["block.skip"]),
        ({"groups": "depthwise"}, ["block.conv2"]),
        ({"role": "first"}, ["stem"]),
        ({"role": "shortcut"}, ["block.skip"]),
        ({"min_in_channels": 9}, ["block.conv2"]),
        ({"max_in_channels": 3}, ["stem"]),
        ({"min_parameters": 3456}, ["stem", "block.conv1"]),
        ({"type": "Conv3d", "kernel_size": 1, "max_in_channels": 8}, ["block.skip"]),
    ],
    ids=str,
)
def test_selectors(selector, names):
    assert converted({**selector, "weight": "sign"}) == names


def test_a_later_rule_overrides_key_by_key():
    rules = load_rules(
        {
            "rule": [
                {"weight": {"quantizer": "lsq", "bits": 4}, "input": "sign", "pad_value": 0, "reason": "all"},
                {"layers": "block.*", "input": "identity", "gradient_cancellation_threshold": 2},
                {"layers": "block.conv1", "weight": "ternary", "reason": "this one"},
                {"role": "first", "quantize": False},
            ]
        }
    )
    stem, conv1, conv2, _, up = match(SITES, rules).decisions
    assert (stem.convert, stem.rule, stem.reason) == (False, "rules, rule 4", "quantize = false")
    assert (conv1.weight.quantizer, conv1.weight.settings, conv1.input.quantizer) == ("ternary", {}, "identity")
    assert (conv1.pad_value, conv1.gradient_cancellation_threshold, conv1.reason) == (0, 2, "this one")
    assert (conv2.weight.quantizer, conv2.weight.settings, conv2.rule) == ("lsq", {"bits": 4}, "rules, rule 2")
    assert (up.convert, up.reason) == (False, "not a Conv3d (ConvTranspose3d)")


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ([{"weight": "sign", "reason": "all"}, {"quantize": False}], "quantize = false"),
        ([{"weight": "sign"}, {"quantize": False, "reason": "no"}], "no"),
        ([{"quantize": False, "reason": "no"}, {"quantize": True}], "no"),  # reason is a key like any other
        ([{"reason": "keep me"}], "keep me"),
        ([{"pad_value": 0}], "no rule sets weight, input or quantize"),
        ([{"quantize": True}], "selected"),
    ],
    ids=str,
)
def test_reason(rules, reason):
    assert match(SITES, load_rules({"rule": rules})).decisions[0].reason == reason


def test_tuples_are_as_good_as_lists():
    rules = {
        "model": {"input_shape": (1, 2)},
        "rule": ({"layers": ("stem", "*2"), "kernel_size": (3, 3, 3), "weight": "sign"},),
    }
    assert [d.site.name for d in match(SITES, load_rules(rules)).converted] == ["block.conv2"]


def test_quantize_false_stays_when_a_later_rule_sets_a_quantizer():
    assert converted({"weight": "sign"}, {"layers": "stem", "quantize": False}, {"input": "identity"})[0] == "block.conv1"


def test_quantize_true_alone_is_sign_and_sign():
    decision = match(SITES, load_rules({"rule": [{"quantize": True}]})).decisions[0]
    assert (decision.convert, decision.weight.quantizer, decision.input.quantizer) == (True, "sign", "sign")
    assert decision.gradient_cancellation_threshold is None
    assert decision.pad_value is None


def test_layers_that_no_rule_selects_stay_float_with_a_reason():
    decisions = match(SITES, load_rules({"rule": [{"layers": "stem", "weight": "sign"}]})).decisions
    assert [decision.reason for decision in decisions[1:4]] == ["no rule selects it"] * 3


def test_blocked_and_converted_sites_are_left_alone():
    sites = (Site("a", "Odd", blocker="has a forward of its own"), Site("b", "QConv3d", converted=True))
    decisions = match(sites, load_rules({"rule": [{"weight": "sign"}]})).decisions
    assert [(decision.convert, decision.reason) for decision in decisions] == [
        (False, "has a forward of its own"),
        (False, "already a QConv3d, left as it is"),
    ]


def stage(**keys: object) -> dict:
    return {"schedule": {"stage": [{"steps": 1, **keys}]}}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"rule": [{}, {"wieght": "sign"}]},
            r"rules, rule 2: unknown key 'wieght'.*Allowed: layers.*Did you mean 'weight'\?",
        ),
        ({"rules": []}, r"rules: unknown key 'rules'.*Did you mean 'rule'\?"),
        ({"model": {"input_shap": [1]}}, r"rules, \[model\]: unknown key 'input_shap'.*Did you mean 'input_shape'\?"),
        ({"model": {"input_shape": [1, "a"]}}, r"input_shape: Input should be a list of sizes.*got \[1, 'a'\]"),
        (
            {"rule": [{"role": "frist"}]},
            r"rule 1: role: .*'first', 'last', .* or 'pointwise', got 'frist'.*Did you mean 'first'\?",
        ),
        ({"rule": [{"groups": "depth"}]}, r"groups: .*'depthwise'.*got 'depth'"),
        ({"rule": [{"quantize": 1}]}, r"quantize: .*boolean, got 1"),
        ({"rule": [{"kernel_size": [3, 3]}]}, r"kernel_size: .*at least 3 items.*got \[3, 3\]"),
        ({"rule": [{"kernel_size": 0}]}, r"kernel_size: .*greater than 0, got 0"),
        ({"rule": [{"weight": {"bits": 1}}]}, r"weight\.quantizer: Field required"),
        ({"rule": [{"weight": {"quantizer": "sign", "scale": "chanel"}}]}, r"weight\.scale: .*Did you mean 'channel'\?"),
        ({"rule": [{"weight": {"quantizer": "sign", "threshold": 1}}]}, "weight takes no 'threshold'"),
        ({"rule": [{"input": {"quantizer": "sign", "scale": "channel"}}]}, "input takes no 'scale'"),
        (
            {"rule": [{"input": {"quantizer": "sign", "threshold": "x"}}]},
            r'input\.threshold: .*"channel", "auto" or a number, got \'x\'',
        ),
        ({"rule": [{"gradient_cancellation_threshold": -1}]}, "greater than or equal to 0, got -1"),
        ({"rule": [{"pad_value": float("inf")}]}, "finite number, got inf"),
        ({"rule": [{"pad_value": "0"}]}, "valid number, got '0'"),
        ({"rule": {"weight": "sign"}}, "rule: Input should be a valid list"),
        ({"rule": ["sign"]}, "rules, rule 1: Input should be a valid dictionary, got 'sign'"),
        ({"schedule": [{"steps": 1}]}, r"rules: schedule: Input should be a valid dictionary"),
        ({"schedule": {"stages": []}}, r"rules, \[schedule\]: unknown key 'stages'. Allowed: stage. Did you mean 'stage'\?"),
        ({"schedule": {"stage": 3}}, r"rules, \[schedule\]: stage: Input should be a valid list, got 3"),
        (
            {"schedule": {"stage": [{"steps": 1}, 3]}},
            r"rules, \[schedule\], stage 2: Input should be a valid dictionary.*, got 3",
        ),
        ({"schedule": {"stage": [{"steps": 1}, {}]}}, r"rules, \[schedule\], stage 2: steps: Field required"),
        (stage(steps=0), r"rules, \[schedule\], stage 1: steps: .*greater than 0, got 0"),
        (stage(steps=1.5), r"steps: Input should be a valid integer, got 1.5"),
        (stage(layer="a"), r"stage 1: unknown key 'layer'\. Allowed: steps, layers, .*Did you mean 'layers'\?"),
        (stage(transition="liner"), r"transition: .*'step', 'linear' or 'layerwise', got 'liner'.*Did you mean 'linear'\?"),
        (stage(order="output"), r'stage 1: order is a setting of transition = "layerwise"'),
        (stage(transition="layerwise", order="first"), r"order: .*'output', 'input' or 'sensitivity', got 'first'"),
        (stage(temperature=[0]), r"temperature: .*at least 2 items.*got \[0\]"),
        (stage(temperature=[0, 1.5]), r"temperature: .*less than or equal to 1, got 1.5"),
        (stage(gradient_cancellation_threshold=-1), "greater than or equal to 0, got -1"),
        (
            stage(weight={"quantizer": "sign", "scale": "channel"}),
            "weight takes no 'scale' in a stage: the layer keeps that",
        ),
        (stage(input={"quantizer": "sign", "threshold": 0.5}), "input takes no 'threshold' in a stage"),
        (stage(weight={"bits": 1}), r"stage 1: weight\.quantizer: Field required"),
        ({"extends": "defalt"}, r"rules: extends: no rule file 'defalt'.*Did you mean 'default'\?"),
    ],
    ids=str,
)
def test_errors_of_a_table(table, message):
    with pytest.raises(RuleError, match=message):
        load_rules(table)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sing", r"rules, rule 1: weight: unknown quantizer 'sing'.*Did you mean 'sign'\?"),
        ({"quantizer": "sign", "bits": 1}, "quantizer 'sign' has no setting 'bits'"),
        ({"quantizer": "lsq", "bit": 4}, r"'lsq' has no setting 'bit'.*Did you mean 'bits'\?"),
        ({"quantizer": "weightdorefa", "bits": 17}, "bits must be a whole number from 1 to 16, got 17"),
        ({"quantizer": "lsq", "bits": 0}, "bits must be a whole number from 2 to 16, got 0"),
        ({"quantizer": "lsq", "bits": "4"}, "got '4'"),
        ({"quantizer": "lsq", "bits": True}, "got True"),
        ({"quantizer": "swishsign", "beta": "high"}, r"'swishsign' does not take \{'beta': 'high'\}"),
        ({"quantizer": "progressive_sign", "initial_scale": "x"}, "could not convert string to float"),
        ({"quantizer": "progressive_sign", "custom_transform": "x"}, "custom_transform must be a function, got 'x'"),
    ],
    ids=str,
)
def test_errors_of_a_quantizer(spec, message):
    with pytest.raises(RuleError, match=message):
        check_quantizers(load_rules({"rule": [{"weight": spec}]}))


def test_errors_of_a_quantizer_of_a_stage():
    with pytest.raises(RuleError, match=r"rules, \[schedule\], stage 2: input: lsq: bits must be .*, got 99"):
        check_quantizers(
            load_rules({"schedule": {"stage": [{"steps": 1}, {"steps": 1, "input": {"quantizer": "lsq", "bits": 99}}]}})
        )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": "blok.conv1"}, r"rules, rule 1: layers: 'blok.conv1' selects no Conv3d.*Did you mean 'block.conv1'\?"),
        ({"layers": ["stem", "head.*"]}, r"layers: 'head.\*' selects no Conv3d\. Nearest: "),
        ({"layers": "up"}, r"'up' selects no Conv3d, only 1 ConvTranspose3d\. Nearest: "),
        ({"type": "*Transpose*"}, r"no Conv3d has all of \{'type': '\*Transpose\*'\}, only 1 ConvTranspose3d\. Add"),
        ({"kernel_size": 5, "role": "first"}, r"no Conv3d has all of \{'kernel_size': \[5, 5, 5\], 'role': 'first'\}"),
    ],
    ids=str,
)
def test_a_rule_must_match(rule, message):
    with pytest.raises(RuleError, match=message):
        match(SITES, load_rules({"rule": [rule]}))
    assert match(SITES, load_rules({"rule": [{**rule, "optional": True}]})).converted == ()


def test_files(tmp_path):
    (tmp_path / "base.toml").write_text('[model]\nfamily = "a"\ninput_shape = [1, 2]\n[[rule]]\nweight = "sign"\n')
    (tmp_path / "top.toml").write_text('extends = "base.toml"\n[model]\nfamily = "b"\n[[rule]]\nrole = "first"\n')
    rules = load_rules(tmp_path / "top.toml")
    assert [label for label, _ in rules.rules] == ["base.toml, rule 1", "top.toml, rule 1"]
    assert (rules.model.family, rules.model.input_shape) == ("b", [1, 2])
    assert load_rules(str(tmp_path / "top.toml")) == rules
    assert load_rules(rules) is rules
    bundled = tmp_path / "on_bundled.toml"
    bundled.write_text('extends = "bitorch"\n')
    assert load_rules(bundled).rules == load_rules("bitorch").rules


def test_a_schedule_replaces_that_of_the_file_extended(tmp_path):
    (tmp_path / "base.toml").write_text('[schedule]\n[[schedule.stage]]\nsteps = 2\nweight = "identity"\n')
    for name, text in {
        "keeps": "",
        "replaces": '[[schedule.stage]]\nsteps = 3\nlayers = "a"\n[[schedule.stage]]\nsteps = 4\ntemperature = [0, 1]\n',
        "drops": "[schedule]\n",
    }.items():
        (tmp_path / f"{name}.toml").write_text(f'extends = "base.toml"\n{text}')
    stages = {
        name: [
            (label, stage.model_dump(exclude_unset=True)) for label, stage in load_rules(tmp_path / f"{name}.toml").schedule
        ]
        for name in ("base", "keeps", "replaces", "drops")
    }
    identity = {"steps": 2, "weight": {"quantizer": "identity"}}
    assert stages["base"] == stages["keeps"] == [("base.toml, [schedule], stage 1", identity)]
    assert stages["replaces"] == [
        ("replaces.toml, [schedule], stage 1", {"steps": 3, "layers": ["a"]}),
        ("replaces.toml, [schedule], stage 2", {"steps": 4, "temperature": [0, 1]}),
    ]
    assert stages["drops"] == []


def test_errors_of_files(tmp_path):
    (tmp_path / "syntax.toml").write_text('[[rule]]\nweight = "sign\n')
    with pytest.raises(RuleError, match=r"syntax.toml: not TOML: .*line 2"):
        load_rules(tmp_path / "syntax.toml")
    (tmp_path / "key.toml").write_text('[[rule]]\nwieght = "sign"\n')
    with pytest.raises(RuleError, match=r"key.toml, rule 1: unknown key 'wieght'"):
        load_rules(tmp_path / "key.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RuleError, match=r"binary.toml: cannot be read"):
        load_rules(tmp_path / "binary.toml")
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    with pytest.raises(RuleError, match=r"extends itself, by way of a.toml -> b.toml"):
        load_rules(tmp_path / "a.toml")
    with pytest.raises(RuleError, match=r"no rule file 'r3d_19'.*Did you mean 'r3d_18'\?"):
        load_rules("r3d_19")
    with pytest.raises(RuleError, match="got int"):
        load_rules(5)
    with pytest.raises(RuleError, match="looks like the text of a rule file"):
        load_rules('[[rule]]\nweight = "sign"\n' * 200)


def test_bundled_rules_are_the_ones_promised_and_all_read():
    names = (
        "default two-step weights-only low-bit bitorch r3d_18 mc3_18 r2plus1d_18 s3d slow_r50 slowfast x3d transnetv2 unet3d"
    )
    assert set(bundled_rules()) == set(names.split())
    for name, path in bundled_rules().items():
        check_quantizers(load_rules(name))
        assert path.read_text(encoding="utf-8").startswith("# "), f"{name} does not say why"


def test_schema_allows_what_the_loader_allows():
    schema = RuleFile.model_json_schema()
    assert set(schema["properties"]) == {"extends", "model", "rule", "schedule"}
    layers = schema["$defs"]["Rule"]["properties"]["layers"]["anyOf"]
    assert {"type": "string"} in layers
    assert json.loads(json.dumps(schema)) == schema


@given(st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=6))
def test_the_last_rule_that_sets_a_key_wins(values):
    rules = [{"optional": True} | ({} if value is None else {"quantize": value}) for value in values]
    expected = next((value for value in reversed(values) if value is not None), False)
    assert bool(converted(*rules)) is expected


@given(
    st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.integers(), st.text(max_size=3), st.lists(st.integers())))
)
def test_any_table_loads_or_raises_a_rule_error(table):
    with contextlib.suppress(RuleError):  # any other error fails the test
        assert len(load_rules({"rule": [table]}).rules) == 1


def test_bundled_files_are_plain_toml():
    for path in bundled_rules().values():
        assert {"rule", "schedule"} & tomllib.loads(path.read_text(encoding="utf-8")).keys()

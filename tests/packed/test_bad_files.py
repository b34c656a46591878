"""A bad file is one clear error: no crash, no partial model, no memory that the file does not have."""

import copy
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import assert_equal
from small_file import converted, fresh, joined, parts, signed, with_table
from torch import nn

import qconvert
from qconvert.errors import ModelError
from qconvert.loading import whole_file


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.safetensors"
    qconvert.save(converted(), path)
    return path.read_bytes()


@pytest.fixture
def file(tmp_path, good) -> Path:
    path = tmp_path / "m.safetensors"
    path.write_bytes(good)
    return path


def refused(path: Path, content: bytes, message: str, model: nn.Module | None = None) -> None:
    path.write_bytes(content)
    model = fresh() if model is None else model
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ModelError, match=message):
        qconvert.load(path, model)
    assert [type(module) for module in model.modules()] == classes
    assert_equal(list(model.state_dict().values()), list(before.values()))


NOT_WHOLE = "is not a safetensors file, or cut off: .* Copy or save it again$"
DAMAGED = "is damaged: its contents do not have the sha256 that it states. Copy or save it again$"


# --- damage ---


def test_good(file):
    qconvert.load(file, fresh())


def test_no_file(tmp_path):
    with pytest.raises(ModelError, match=rf"^no file {tmp_path / 'm.safetensors'}$"):
        qconvert.load(tmp_path / "m.safetensors", fresh())
    with pytest.raises(ModelError, match=rf"^no file {tmp_path}$"):
        qconvert.load(tmp_path, fresh())


def test_cut_off_at_every_length(tmp_path, good):
    path, model = tmp_path / "m.safetensors", fresh()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(ModelError, match=NOT_WHOLE):
            qconvert.load(path, model)


def test_longer_than_it_says(file, good):
    refused(file, good + b"\0", NOT_WHOLE)


@pytest.mark.parametrize("content", [b"PK\3\4" * 99, b"\x80\x02}q\x00.", b"{}", bytes(8), b"\xff" * 64], ids=repr)
def test_not_safetensors(file, content):
    refused(file, content, NOT_WHOLE)


def test_every_bit_of_the_data_flipped(tmp_path, good):
    path, model = tmp_path / "m.safetensors", fresh()
    start = len(good) - len(parts(good)[1])
    for place in range(start, len(good)):
        for bit in (0, place % 8):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            with pytest.raises(ModelError, match=DAMAGED):
                qconvert.load(path, model)


def test_a_bit_of_every_byte_of_the_header_flipped(tmp_path, good):
    path, model, kept = tmp_path / "m.safetensors", fresh(), 0
    for place in range(len(good) - len(parts(good)[1])):
        content = good[:place] + bytes([good[place] ^ 1 << place % 7]) + good[place + 1 :]
        path.write_bytes(content)
        try:
            qconvert.load(path, model)
            assert is_same(content, good)  # JSON may be written in several ways
            kept += 1
        except ModelError:
            pass
    assert kept < 10


def is_same(content: bytes, good: bytes) -> bool:
    return parts(content)[0] == parts(good)[0]


# --- lengths that lie ---


def lying(good: bytes, **tensor) -> bytes:
    header, data = parts(good)
    header["0.weight"] |= tensor
    return joined(header, data)


HEADER_LENGTHS = [2**63, 2**64 - 1, 10**8 + 1, 10**7]
SHAPES = [[2**40, 2**20], [2**62, 4], [2, 10**9], [-1], [2**64, 0]]


@pytest.mark.parametrize("length", HEADER_LENGTHS)
def test_a_header_that_says_to_be_longer_than_the_file(file, good, length):
    refused(file, struct.pack("<Q", length) + good[8:], NOT_WHOLE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_the_file_has_no_room_for(file, good, shape):
    refused(file, lying(good, shape=shape), NOT_WHOLE)


@pytest.mark.parametrize("offsets", [[0, 10**12], [10**12, 10**12 + 4], [4, 0], [-4, 0]], ids=str)
def test_places_beyond_the_file(file, good, offsets):
    refused(file, lying(good, data_offsets=offsets), NOT_WHOLE)


def test_a_weight_whose_stated_shape_is_huge(file, good):
    content = with_table(good, "weights", lambda table: table["0.weight"].update(shape=[2**20] * 5))
    refused(file, content, r"different: 0.weight of shape \(1048576, .*\) instead of \(3, 2, 1, 2, 3\)$")


LOADED = """
import resource, sys
import qconvert, small_file

model = small_file.fresh()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        qconvert.load(path, model)
    except qconvert.QConvertError:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_no_memory_that_the_file_does_not_have(tmp_path, good):
    """In a process of its own: this one may have been larger before."""
    contents = [struct.pack("<Q", length) + good[8:] for length in HEADER_LENGTHS]
    contents += [lying(good, shape=shape) for shape in SHAPES]
    contents.append(with_table(good, "weights", lambda table: table["0.weight"].update(shape=[2**20] * 5)))
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", LOADED, *paths], env=environment, capture_output=True, check=True)
    growth = [int(each) for each in ran.stdout.split()]
    assert len(growth) == len(paths)
    assert max(growth) < 50_000  # KiB


# --- other formats and versions ---


def with_metadata(good: bytes, **changes) -> bytes:
    header, data = parts(good)
    metadata = header["__metadata__"] | changes
    return signed(header | {"__metadata__": {key: value for key, value in metadata.items() if value is not None}}, data)


def test_weights_without_metadata(file):
    safetensors.torch.save_model(converted(), str(file))
    message = r"is not a file of qconvert.save: .* format None, not 'qconvert-packed'. Weights without metadata go into "
    refused(file, file.read_bytes(), message)


@pytest.mark.parametrize("version", ["2", "0", "", "one", None])
def test_another_version(file, good, version):
    said = "" if version is None else version
    message = f"has format version {said!r}, written by qconvert 9.9; this qconvert reads version 1. Update qconvert: "
    refused(file, with_metadata(good, format_version=version, qconvert_version="9.9"), message)


# --- metadata ---

WRONG = {
    "weights": "the metadata is wrong: weights is missing$",
    "layers": "the metadata is wrong: layers is missing$",
    "plan": "the metadata is wrong: plan is missing$",
}


@pytest.mark.parametrize(("key", "message"), WRONG.items())
def test_a_table_is_missing(file, good, key, message):
    refused(file, with_metadata(good, **{key: None}), message)


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "\x00", "nan"], ids=["empty", "open", "deep", "zero", "nan"])
@pytest.mark.parametrize("key", WRONG)
def test_a_table_is_no_json(file, good, key, text):
    refused(file, with_metadata(good, **{key: text}), f"the metadata is wrong: {key}: Invalid JSON: ")


@pytest.mark.parametrize("text", ["3", "[]", '"x"', "true", '{"x": 1}'])
@pytest.mark.parametrize("key", WRONG)
def test_a_table_of_another_type(file, good, key, text):
    refused(file, with_metadata(good, **{key: text}), f"the metadata is wrong: {key}(.x|.source)?: ")


WEIGHTS = [
    ("bits", 99, r"weights.0.weight.bits: Input should be less than or equal to 16, got '99'$"),
    ("bits", 0, r"weights.0.weight.bits: Input should be greater than or equal to 1, got '0'$"),
    ("bits", 3, r"different: 0.weight as bit planes of shape \(2, 5\) instead of \(3, 5\)$"),
    ("bits", "2", r"weights.0.weight.bits: Input should be a valid integer, got '2'$"),
    ("count", 10**9, r"weights.0.weight.count: Input should be less than or equal to 65536, got "),
    ("count", 2, r"0.weight has the code 2, and ternary has 2 levels$"),
    ("divisor", 0, r"weights.0.weight.divisor: Input should be greater than or equal to 1, got '0'$"),
    ("lowest", 10**400, r"weights.0.weight.lowest: "),
    ("unit", "NaN", r"weights.0.weight.unit: Input should be a valid number, got 'NaN'$"),
    ("dtype", "float8", r"weights.0.weight.dtype: Input should be 'float16', 'bfloat16', 'float32' or 'float64'"),
    ("shape", [3, 2, 1, 2], r"weights.0.weight.shape: List should have at least 5 items"),
    ("shape", [3, 2, 1, 2, -3], r"weights.0.weight.shape.4: Input should be greater than or equal to 0, got '-3'$"),
    ("shape", [2, 3, 1, 2, 3], r"different: 0.weight of shape \(2, 3, 1, 2, 3\) instead of \(3, 2, 1, 2, 3\)$"),
    ("colour", "red", r"weights.0.weight.colour: Extra inputs are not permitted, got 'red'$"),
]


@pytest.mark.parametrize(("key", "value", "message"), WEIGHTS, ids=lambda value: str(value)[:20])
def test_what_a_weight_cannot_be(file, good, key, value, message):
    refused(file, with_table(good, "weights", lambda table: table["0.weight"].update({key: value})), message)


LAYERS = [
    ("weight", {"quantizer": "signum"}, "layer '0': unknown quantizer 'signum'. Known: "),
    ("weight", {"quantizer": "lsq", "bits": 99}, "layer '0': lsq: bits must be a whole number from 2 to 16, got 99$"),
    ("input", {"quantizer": "swishsign", "beta": "x"}, "layer '0': quantizer 'swishsign' does not take {'beta': 'x'}: "),
    ("latent_clip", -1.0, "layer '0': latent_clip must be a number above 0 or None, got -1.0$"),
    ("gradient_cancellation_threshold", -1.0, "layer '0': gradient_cancellation_threshold must be "),
    ("shortcut", True, "layer '0': no shortcut: the input cannot be added to the output, 2 -> 3 channels"),
    ("per_channel", ["scale"], "unexpected: 0.activation.threshold, 0.offset$"),
    ("per_channel", ["colour"], "layers.0.per_channel.0: Input should be 'threshold', 'spread', 'scale' or 'offset'"),
    ("input", None, "layer '0': it is a QConv3d, which cannot become what the file says: "),
]


@pytest.mark.parametrize(("key", "value", "message"), LAYERS, ids=lambda value: str(value)[:20])
def test_what_a_layer_cannot_be(file, good, key, value, message):
    refused(file, with_table(good, "layers", lambda table: table["0"].update({key: value})), message)


# --- tensors ---


def renamed(old: str, new: str):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


TENSORS = {
    "missing": (lambda tensors: tensors.pop("1.running_mean"), "does not fit Sequential: missing: 1.running_mean$"),
    "extra": (lambda tensors: tensors.update({"2.bias": torch.zeros(3)}), "does not fit Sequential: unexpected: 2.bias$"),
    "renamed": (renamed("1.bias", "1.biases"), "missing: 1.bias; unexpected: 1.biases$"),
    "no planes": (lambda tensors: tensors.pop("0.weight"), "missing: 0.weight; without a tensor: 0.weight$"),
    "misshaped": (
        lambda tensors: tensors.update({"1.bias": torch.zeros(4)}),
        r"different: 1.bias of shape torch.Size\(\[4\]\) instead of torch.Size\(\[3\]\)$",
    ),
    "integers": (
        lambda tensors: tensors.update({"1.bias": torch.zeros(3, dtype=torch.int32)}),
        "different: 1.bias torch.int32 instead of torch.float32$",
    ),
    "counts": (
        lambda tensors: tensors.update({"1.num_batches_tracked": torch.tensor(3.0)}),
        "different: 1.num_batches_tracked torch.float32 instead of torch.int64$",
    ),
    "short planes": (
        lambda tensors: tensors.update({"0.weight": torch.zeros(2, 4, dtype=torch.uint8)}),
        r"different: 0.weight as bit planes of shape \(2, 4\) instead of \(2, 5\)$",
    ),
    "signed planes": (
        lambda tensors: tensors.update({"0.weight": torch.zeros(2, 5, dtype=torch.int8)}),
        "different: 0.weight as bit planes of torch.int8 instead of torch.uint8$",
    ),
    "code without a level": (
        lambda tensors: tensors.update({"0.weight": torch.full((2, 5), 255, dtype=torch.uint8)}),
        "0.weight has the code 3, and ternary has 3 levels$",
    ),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit(file, good, change, message):
    tensors = safetensors.torch.load(good)
    change(tensors)
    content = safetensors.torch.save(tensors, parts(good)[0]["__metadata__"])
    refused(file, signed(*parts(content)), message)


# --- another model ---


def test_models_of_another_architecture(file, good):
    other = fresh()
    del other[2]
    other.add_module("conv", nn.Conv3d(3, 3, 1))
    message = r"does not fit Sequential: it has no Conv3d '2', which the file converts. Nearest: 0, conv\.$"
    refused(file, good, message, other)
    wide = fresh()
    wide[2] = nn.Conv3d(3, 4, 1, bias=False)
    refused(file, good, r"different: 2.weight of shape \(3, 3, 1, 1, 1\) instead of \(4, 3, 1, 1, 1\)$", wide)
    biased = fresh()
    biased[2] = nn.Conv3d(3, 3, 1)
    refused(file, good, "does not fit Sequential: missing: 2.bias$", biased)
    tied = fresh()
    tied[1].bias = tied[1].weight
    refused(file, good, "one tensor here and several in the file: 1.bias and 1.weight$", tied)
    quantized = fresh()
    quantized.add_module("3", qconvert.QConv3d(3, 3, 1))
    refused(file, good, "'3' is a quantized layer in this model only. Nearest: ", quantized)


def test_a_float_layer_that_shares_the_packed_weight(file, good):
    model = fresh()
    model[1].register_parameter("kernel", model[2].weight)
    refused(file, good, r"2.weight is packed, and '1' \(BatchNorm3d\) computes with it in float$", model)


def test_a_layer_that_cannot_be_converted(file, good):
    model = fresh()
    model[2].forward = model[2].forward
    with pytest.raises(ModelError, match=r"'2', which the file converts, cannot be converted: its forward was replaced "):
        qconvert.load(file, model)


def test_what_is_no_model(file):
    with pytest.raises(ModelError, match=r"^load takes a model or a function that makes it, got str$"):
        qconvert.load(file, "r3d_18")
    with pytest.raises(ModelError, match=r"^expected a torch.nn.Module, got int$"):
        qconvert.load(file, lambda: 3)


def test_a_model_without_values(file):
    with pytest.raises(ModelError, match=r"its '0.weight' is on the meta device and cannot be filled in$"):
        qconvert.load(file, fresh().to("meta"))


# --- saving ---


def test_nothing_to_save(tmp_path):
    with pytest.raises(ModelError, match=r"^Sequential has no QConv3d: convert it with qconvert.binarize first$"):
        qconvert.save(fresh(), tmp_path / "m.safetensors")


def test_dtypes_to_save_in(tmp_path):
    with pytest.raises(ModelError, match=r"^dtype must be torch.bfloat16, torch.float16 or None, got torch.int8$"):
        qconvert.save(converted(), tmp_path / "m.safetensors", dtype=torch.int8)
    model = converted()
    model[1].running_var.fill_(1e6)
    qconvert.save(model, tmp_path / "m.safetensors", dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=r"^'1.running_var' has values beyond the range of torch.float16: leave dtype out"):
        qconvert.save(model, tmp_path / "m.safetensors", dtype=torch.float16)


def test_weights_that_are_not_finite(tmp_path):
    model = converted()
    with torch.no_grad():
        model[2].weight[0] = float("nan")
    with pytest.raises(ModelError, match=r"^layer '2' cannot be stored: nan is none of the 8 levels of its quantizer$"):
        qconvert.save(model, tmp_path / "m.safetensors")


def test_numbers_and_settings_that_json_does_not_have(tmp_path):
    model = converted()
    model[0].pad_value = float("inf")
    with pytest.raises(ModelError, match=r"^layer '0' cannot be stored: pad_value: Input should be a finite number, "):
        qconvert.save(model, tmp_path / "m.safetensors")
    layer = qconvert.QConv3d(2, 3, 1, weight_quantization=qconvert.quantizations.ProgressiveSign(custom_transform=abs))
    with pytest.raises(ModelError, match=r"^a setting cannot be written as JSON: "):
        qconvert.save(layer, tmp_path / "m.safetensors")
    layer = qconvert.QConv3d(2, 3, 1, weight_quantization=qconvert.quantizations.SwishSign(beta=float("inf")))
    with pytest.raises(ModelError, match=r"^a quantizer has settings that JSON does not bring back: "):
        qconvert.save(layer, tmp_path / "m.safetensors")


def test_a_quantizer_that_is_not_registered(tmp_path):
    class MySign(qconvert.quantizations.Sign):
        pass

    layer = qconvert.QConv3d(2, 3, 1, weight_quantization=MySign())
    with pytest.raises(ModelError, match=r"^layer '' cannot be stored: MySign is not the quantizer 'sign': register "):
        qconvert.save(layer, tmp_path / "m.safetensors")


class Noted(nn.Conv3d):
    def get_extra_state(self):
        return {"note": 1}


def test_a_state_dict_with_more_than_tensors(tmp_path):
    model = nn.Sequential(qconvert.QConv3d(2, 3, 1), Noted(3, 3, 1))
    with pytest.raises(ModelError, match=r"^the state dict holds '1._extra_state', a dict: a file can only hold tensors$"):
        qconvert.save(model, tmp_path / "m.safetensors")


def test_a_model_without_values_to_save(tmp_path):
    with pytest.raises(ModelError, match=r"^'0.weight' is on the meta device and has no values: give the model weights"):
        qconvert.save(converted().to("meta"), tmp_path / "m.safetensors", latent=True)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(ModelError, match=r"m.safetensors cannot be written: "):
        qconvert.save(converted(), tmp_path / "none" / "m.safetensors")


def test_no_file_name():
    with pytest.raises(ModelError, match=r"^'\.' names no file to write$"):
        qconvert.save(converted(), "")


def test_an_interruption_leaves_nothing_behind(file, good):
    def interrupted():
        with whole_file(file) as partial:
            partial.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_bytes() == good
    assert list(file.parent.iterdir()) == [file]


def test_leftovers_do_not_disturb(file):
    partial = file.with_name("m.safetensors.partial")
    partial.write_bytes(b"half")
    qconvert.load(file, fresh())
    qconvert.save(converted(), file)
    assert not partial.exists()
    qconvert.load(file, fresh())
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch, qconvert
from small_file import converted, fresh
torch.set_num_threads(1)
path = Path(sys.argv[1])
old, new = converted(), converted()
torch.nn.init.constant_(new[0].bias, 7.0)
qconvert.save(old, path)
random.seed(0)
seen = set()
for _ in range(60):
    child = os.fork()
    if child == 0:
        while True:
            qconvert.save(new, path)
            qconvert.save(old, path)
    time.sleep(random.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.add(qconvert.load(path, fresh)[0].bias[0].item())
assert seen == {old[0].bias[0].item(), 7.0}, seen
"""


def test_killed_at_any_moment(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "m.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- anything ---

WORDS = st.text(max_size=5) | st.sampled_from(["0", "2", "sign"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(table, place=()):
    """Yield every place in a JSON value."""
    yield place
    inner = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for key, value in inner:
        yield from places(value, (*place, key))


def put(table, place, value):
    if not place:
        return value
    changed = copy.copy(table)
    changed[place[0]] = put(table[place[0]], place[1:], value)
    return changed


def loads_or_refuses(path: Path, content: bytes, model: nn.Module) -> None:
    path.write_bytes(content)
    try:
        loaded = qconvert.load(path, model)
    except ModelError:
        return
    loaded(torch.zeros(1, 2, 3, 4, 5))


@given(data=st.data())
@settings(max_examples=settings.default.max_examples * 6)
def test_any_json_in_any_place_of_the_metadata(good, tmp_path_factory, data):
    header, tensors = parts(good)
    key = data.draw(st.sampled_from(["weights", "layers", "plan"]))
    table = json.loads(header["__metadata__"][key])
    place = data.draw(st.sampled_from(list(places(table))))
    header["__metadata__"][key] = json.dumps(put(table, place, data.draw(JSON)))
    loads_or_refuses(tmp_path_factory.getbasetemp() / "any.safetensors", signed(header, tensors), fresh())


@given(edits=st.lists(st.tuples(st.integers(0, 10**5), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=4))
def test_any_bytes_anywhere(good, tmp_path_factory, edits):
    content = good
    for anywhere, new, dropped in edits:
        place = anywhere % (len(content) + 1)
        content = content[:place] + new + content[place + dropped :]
    loads_or_refuses(tmp_path_factory.getbasetemp() / "any.safetensors", content, fresh())

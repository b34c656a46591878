"""A file is what docs/packed-format.md says: read with json, struct and numpy, nothing of qconvert's or safetensors'."""

import hashlib
import json
import struct

import numpy as np
import oracle
import pytest
import torch
from small import CHANNELS
from torch import nn

import qconvert

EDGES = [1, 63, 64, 65, 127, 128]


def parts(path):
    """Return metadata, tensors as (dtype, array of bytes or codes), and the bytes of the header."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    data = content[8 + length :]
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], data[start:end])
    assert sum(len(data) for _, _, data in tensors.values()) == len(data)
    return metadata, tensors, 8 + length


def codes_of(planes, shape, n):
    """Bit by bit, as the page says it."""
    k, row = shape
    codes = []
    for i in range(n):
        code = 0
        for j in range(k):
            code += ((planes[j * row + i // 8] >> (i % 8)) & 1) << j
        codes.append(code)
    return codes


def values_of(codes, weight):
    number = {"float32": np.float32, "float64": np.float64}[weight["dtype"]]
    n = weight["divisor"]
    values = []
    for u in codes:
        if n == 1:
            value = number(weight["lowest"] + weight["step"] * u)
        else:
            value = number(weight["step"]) * (number(u) / number(n)) + number(weight["lowest"] / n)
        values.append(number(weight["unit"]) * value)
    return np.array(values).reshape(weight["shape"])


def expected(quantizer, settings, w, step):
    if quantizer == "sign":
        return oracle.sign(w)
    if quantizer == "ternary":
        return oracle.ternary(w)
    if quantizer == "lsq":
        k = settings["bits"]
        return oracle.lsq(w, step, -(2 ** (k - 1)), 2 ** (k - 1) - 1)
    n = 2 ** settings["bits"] - 1
    t = np.tanh(w)
    return 2 * np.rint(n * (t / (2 * np.abs(t).max()) + 0.5)) / n - 1


KINDS = [("sign", {}), ("ternary", {})]
KINDS += [("lsq", {"bits": k}) for k in range(2, 9)]
KINDS += [("weightdorefa", {"bits": k}) for k in range(1, 9)]


@pytest.mark.parametrize(("quantizer", "settings"), KINDS, ids=str)
@pytest.mark.parametrize(("outputs", "inputs", "groups"), [(3, 5, 1), (6, 4, 2), (1, 1, 1)])
def test_quantized_weights(quantizer, settings, outputs, inputs, groups, tmp_path):
    model = nn.Sequential(nn.Conv3d(inputs, outputs, (1, 2, 3), groups=groups)).double()
    rules = {"rule": [{"weight": {"quantizer": quantizer, **settings}, "input": "sign"}]}
    binary = qconvert.binarize(model, rules, report=False).eval()
    file = qconvert.save(binary, tmp_path / "m.safetensors")

    metadata, tensors, header = parts(file.path)
    weight = json.loads(metadata["weights"])["0.weight"]
    w = model[0].weight.detach().numpy()
    step = np.frombuffer(tensors["0._weight_quantize.step"][2])[0] if quantizer == "lsq" else None
    dtype, shape, planes = tensors["0.weight"]
    values = values_of(codes_of(planes, shape, w.size), weight)

    assert dtype == "U8"
    assert weight["shape"] == list(w.shape)
    np.testing.assert_allclose(values, expected(quantizer, settings, w, step), rtol=1e-12, atol=0)
    q = binary[0]._weight_quantize(binary[0].weight).detach().numpy()
    assert np.array_equal(values, q)
    assert file.header_bytes == header
    assert file.padding_bits == shape[0] * (8 * shape[1] - w.size)
    assert file.padding_bits < 8 * shape[0]


@pytest.mark.parametrize("channels", EDGES)
def test_edges_of_words(channels, tmp_path):
    binary = qconvert.binarize(nn.Sequential(nn.Conv3d(channels, 2, 1)), "bitorch", report=False)
    _, tensors, _ = parts(qconvert.save(binary, tmp_path / "m.safetensors").path)
    _, shape, planes = tensors["0.weight"]
    w = binary[0].weight.detach().numpy().reshape(-1)
    assert codes_of(planes, shape, w.size) == [int(value >= 0) for value in w]
    bits_behind = planes[-1] >> (w.size % 8) if w.size % 8 else 0
    assert bits_behind == 0


def test_metadata_and_checksum(tmp_path):
    binary = qconvert.binarize(nn.Sequential(nn.Conv3d(3, 3, 3), nn.BatchNorm3d(3)), "bitorch", report=False)
    metadata, tensors, _ = parts(qconvert.save(binary, tmp_path / "m.safetensors").path)
    assert metadata["format"] == "qconvert-packed"
    assert metadata["format_version"] == "1"
    assert metadata["qconvert_version"] == qconvert.__version__
    assert metadata.keys() == {"format", "format_version", "qconvert_version", "weights", "layers", "plan", "sha256"}
    assert json.loads(metadata["layers"])["0"]["weight"] == {"quantizer": "sign"}
    plan = json.loads(metadata["plan"])
    assert [(row["layer"], row["convert"]) for row in plan["decisions"]] == [("0", True)]

    stated = metadata.pop("sha256")
    shapes = {name: shape for name, (_, shape, _) in tensors.items()}
    text = json.dumps([metadata, shapes], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(tensors[name][2])
    assert digest.hexdigest() == stated


def test_the_rest_is_in_the_file_as_it_is(tmp_path):
    binary = qconvert.binarize(nn.Sequential(nn.Conv3d(3, 3, 3), nn.BatchNorm3d(3)), CHANNELS, report=False)
    _, tensors, _ = parts(qconvert.save(binary, tmp_path / "m.safetensors").path)
    state = binary.state_dict()
    assert tensors.keys() == state.keys()
    for name in state.keys() - {"0.weight"}:
        assert tensors[name][2] == state[name].numpy().tobytes()
        assert tensors[name][1] == list(state[name].shape)


def test_half_precision_for_the_rest(tmp_path):
    binary = qconvert.binarize(nn.Sequential(nn.Conv3d(3, 3, 3), nn.BatchNorm3d(3)), "bitorch", report=False)
    _, tensors, _ = parts(qconvert.save(binary, tmp_path / "m.safetensors", dtype=torch.bfloat16).path)
    dtypes = {name: dtype for name, (dtype, _, _) in tensors.items()}
    assert dtypes["0.weight"] == "U8"
    assert dtypes["1.num_batches_tracked"] == "I64"
    assert dtypes["1.running_var"] == dtypes["0.bias"] == "BF16"

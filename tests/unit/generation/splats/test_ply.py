"""The PLY that is submitted: its exact header, what other readers see in it, and what is refused."""

from __future__ import annotations

import contextlib
import io
import time
import tracemalloc

import numpy as np
import plyfile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.splats import ply
from generation.splats.gaussians import SH_COEFFICIENTS, Gaussians

FIELDS = ["means", "quats", "log_scales", "logit_opacities", "sh"]


def random_gaussians(n: int, coefficients: int = 1, seed: int = 0) -> Gaussians:
    g = torch.Generator().manual_seed(seed)
    shapes = [(n, 3), (n, 4), (n, 3), (n,), (n, coefficients, 3)]
    return Gaussians(*(torch.randn(shape, generator=g) for shape in shapes))


def same_bits(a: Gaussians, b: Gaussians) -> bool:
    return all(
        getattr(a, f).shape == getattr(b, f).shape
        and torch.equal(getattr(a, f).contiguous().view(torch.int32), getattr(b, f).contiguous().view(torch.int32))
        for f in FIELDS
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 50), st.sampled_from(SH_COEFFICIENTS), st.integers(0, 2**32))
def test_round_trip(n, coefficients, seed):
    gaussians = random_gaussians(n, coefficients, seed)
    assert same_bits(ply.read(ply.write(gaussians)), gaussians)


@given(st.lists(st.floats(width=32), min_size=14, max_size=14))
def test_round_trip_of_any_float(values):
    v = torch.tensor(values, dtype=torch.float32)
    gaussians = Gaussians(v[None, :3], v[None, 3:7], v[None, 7:10], v[10:11], v[None, None, 11:14])
    assert same_bits(ply.read(ply.write(gaussians)), gaussians)


def test_header_bytes():
    header = ply.write(random_gaussians(7)).split(b"end_header\n")[0]
    assert header == (
        b"ply\nformat binary_little_endian 1.0\nelement vertex 7\n"
        b"property float x\nproperty float y\nproperty float z\n"
        b"property float nx\nproperty float ny\nproperty float nz\n"
        b"property float f_dc_0\nproperty float f_dc_1\nproperty float f_dc_2\n"
        b"property float opacity\n"
        b"property float scale_0\nproperty float scale_1\nproperty float scale_2\n"
        b"property float rot_0\nproperty float rot_1\nproperty float rot_2\nproperty float rot_3\n"
    )


def test_header_with_harmonics_counts_them_between_colour_and_opacity():
    lines = ply.write(random_gaussians(1, 16)).split(b"end_header\n")[0].decode().splitlines()
    names = [line.split()[-1] for line in lines[3:]]
    assert names[9:54] == [f"f_rest_{i}" for i in range(45)]
    assert names[54] == "opacity"


@pytest.mark.parametrize("coefficients", SH_COEFFICIENTS)
def test_an_independent_reader_sees_the_same_values(coefficients):
    gaussians = random_gaussians(11, coefficients)
    vertex = plyfile.PlyData.read(io.BytesIO(ply.write(gaussians)))["vertex"]
    assert len(vertex) == 11

    def columns(*names: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([vertex[name] for name in names], axis=1))

    assert torch.equal(columns("x", "y", "z"), gaussians.means)
    assert torch.equal(columns("rot_0", "rot_1", "rot_2", "rot_3"), gaussians.quats)
    assert torch.equal(columns("scale_0", "scale_1", "scale_2"), gaussians.log_scales)
    assert torch.equal(columns("opacity")[:, 0], gaussians.logit_opacities)
    assert torch.equal(columns("f_dc_0", "f_dc_1", "f_dc_2"), gaussians.sh[:, 0])
    assert not columns("nx", "ny", "nz").any()
    rest = coefficients - 1
    for channel in range(3):  # channel-major
        for i in range(rest):
            assert torch.equal(columns(f"f_rest_{channel * rest + i}")[:, 0], gaussians.sh[:, 1 + i, channel])


def header(*lines: str) -> bytes:
    return ("\n".join(lines) + "\nend_header\n").encode()


NAMES = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2"]
NAMES += ["rot_0", "rot_1", "rot_2", "rot_3"]
START = ["ply", "format binary_little_endian 1.0", "element vertex 1"]
PROPERTIES = [f"property float {name}" for name in NAMES]


def test_any_order_and_no_normals():
    names = NAMES[::-1]
    data = header(*START, *(f"property float {name}" for name in names))
    gaussians = ply.read(data + np.arange(14, dtype="<f4").tobytes())
    assert gaussians.means.tolist() == [[13.0, 12.0, 11.0]]
    assert gaussians.quats.tolist() == [[3.0, 2.0, 1.0, 0.0]]
    assert gaussians.sh.tolist() == [[[10.0, 9.0, 8.0]]]


ONE = np.zeros(14, "<f4").tobytes()
HOSTILE = {
    "empty": (b"", "no end_header"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "no end_header"),
    "text with carriage returns": (header(*START, *PROPERTIES).replace(b"\n", b"\r\n") + ONE, "no end_header"),
    "no end of the header": (b"ply\n" + b"format binary_little_endian 1.0\n" * 100_000, "no end_header"),
    "not ASCII": (header(*START, "property float \u00e9") + ONE, "expected 'property float"),
    "text format": (header("ply", "format ascii 1.0", START[2], *PROPERTIES) + ONE, "first two lines"),
    "big endian": (header("ply", "format binary_big_endian 1.0", START[2], *PROPERTIES) + ONE, "first two lines"),
    "comment": (header(*START[:2], "comment made by hand", START[2], *PROPERTIES) + ONE, "third line"),
    "comment later": (header(*START, "comment made by hand", *PROPERTIES) + ONE, "'comment made by hand'"),
    "header ends at once": (header("ply"), "first two lines"),
    "faces": (header(*START, *PROPERTIES, "element face 0") + ONE, "'element face 0'"),
    "double": (header(*START, "property double x", *PROPERTIES[1:]) + ONE + bytes(4), "'property double x'"),
    "list": (header(*START, "property list uchar int x", *PROPERTIES[1:]) + ONE, "'property list uchar int x'"),
    "negative count": (header(*START[:2], "element vertex -1", *PROPERTIES) + ONE, "third line"),
    "digits of another script": (
        header(*START[:2], "element vertex 1", *PROPERTIES).replace(b"vertex 1", "vertex \u0661".encode()) + ONE,
        "third line",
    ),
    "a count of 4,000 digits": (header(*START[:2], "element vertex " + "9" * 4000) + ONE, "third line"),
    "a billion vertices": (header(*START[:2], "element vertex 1000000000", *PROPERTIES) + ONE, "1000000000 vertices"),
    "truncated": (header(*START, *PROPERTIES) + ONE[:-1], "55 bytes of vertices, the header promises 56"),
    "trailing bytes": (header(*START, *PROPERTIES) + ONE + b"\0", "57 bytes of vertices, the header promises 56"),
    "missing property": (header(*START, *PROPERTIES[:-1]) + ONE[:-4], "'rot_3' is missing"),
    "unknown property": (header(*START, *PROPERTIES, "property float w") + ONE + bytes(4), "'w' is unknown"),
    "property twice": (header(*START, *PROPERTIES, "property float x") + ONE + bytes(4), "'x' is declared twice"),
    "two harmonics": (
        header(*START, *PROPERTIES, "property float f_rest_0", "property float f_rest_1") + ONE + bytes(8),
        "2 f_rest properties",
    ),
    "harmonics with a gap": (
        header(*START, *PROPERTIES, *(f"property float f_rest_{i}" for i in range(1, 10))) + ONE + bytes(36),
        "'f_rest_9' is unknown",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_is_refused_quickly_and_in_little_memory(name):
    data, message = HOSTILE[name]
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        ply.read(data)
    assert time.perf_counter() - start < 1.0
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(str(caught.value)) < 300


def test_the_callers_limit_holds():
    data = ply.write(random_gaussians(11))
    assert len(ply.read(data, max_gaussians=11)) == 11
    with pytest.raises(ValueError, match="11 vertices, the limit is 10"):
        ply.read(data, max_gaussians=10)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2000), st.integers(0, 255))
def test_damaged_input_is_read_or_refused_with_a_value_error(noise, place, byte):
    data = bytearray(ply.write(random_gaussians(20)))
    data[place % len(data)] = byte
    for candidate in (bytes(data), bytes(data) + noise, bytes(data[:place]), noise, b"ply\n" + noise):
        with contextlib.suppress(ValueError):
            ply.read(candidate)


def test_gaussians_with_wrong_shapes_are_not_written():
    gaussians = random_gaussians(3)
    gaussians.quats = gaussians.quats[:2]
    with pytest.raises(ValueError, match="quats has shape"):
        ply.write(gaussians)


def test_parameters_in_training_are_written():
    gaussians = random_gaussians(3)
    data = ply.write(gaussians)
    for tensor in gaussians.tensors().values():
        tensor.requires_grad_()
    assert ply.write(gaussians) == data
    ply.read(data).means.add_(1.0)  # the result is its own memory, writable

"""Safetensors files with the dtypes and shapes that params have."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from qwix_train.ptq import safetensors_files


def test_dtypes_shapes_and_metadata_come_back(tmp_path):
    x = np.arange(6).reshape(2, 3)
    names = ("int8", "int32", "int64", "uint8", "bool", "float16", "bfloat16")
    names += ("float32", "float64", "float8_e4m3fn", "float8_e5m2")
    tensors = {name: x.astype(jnp.dtype(name)) for name in names}
    tensors |= {"scalar": np.array(2.5), "transposed": x.T, "empty": x[:0]}
    file = tmp_path / "model.safetensors"
    safetensors_files.write_file(file, tensors, {"key": "value"})
    got, metadata = safetensors_files.read_file(file)
    assert metadata["key"] == "value"
    assert got.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert got[name].dtype == expected.dtype and got[name].shape == expected.shape
        np.testing.assert_array_equal(got[name], expected)


def test_an_unknown_dtype(tmp_path):
    entry = {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}
    header = json.dumps({"x": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(ValueError, match="x in .*model.safetensors has dtype F8_E8M0"):
        safetensors_files.read_file(file)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no model.safetensors in"):
        safetensors_files.read_checkpoint(tmp_path)

"""Checkpoints written, and read, by the library of the compressed-tensors format.

It needs PyTorch, so it runs in an environment of its own, without JAX and without this
package:

    python compressed_tensors_reference.py write FOLDER
    python compressed_tensors_reference.py read FOLDER

`write` makes a checkpoint for each of `SCHEMES`, with what the library decompresses it
to in `reference.npz` beside it. `read` adds that file to each checkpoint in a folder.
"""

import json
import pathlib
import sys

SHAPES = {"layers.0.proj": (24, 64), "layers.1.proj": (10, 96), "head": (5, 64)}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT4 = {**INT8, "num_bits": 4}
TOKEN = {"strategy": "token", "dynamic": True}
GROUP = {"strategy": "group", "group_size": 32}
FLOAT4 = {**FLOAT8, "num_bits": 4}
MX = {**GROUP, "scale_dtype": "torch.uint8"}
NVFP4 = {
    **FLOAT4,
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}
# For each scheme: weights, activations, the dtype of the scales.
SCHEMES = {
    "int8": ({**INT8, "strategy": "channel"}, {**INT8, **TOKEN}, "float32"),
    "int8-bfloat16": ({**INT8, "strategy": "channel"}, {**INT8, **TOKEN}, "bfloat16"),
    "int8-asymmetric": (
        {**INT8, "strategy": "channel", "symmetric": False},
        {**INT8, "strategy": "tensor", "symmetric": False},
        "float32",
    ),
    "int8-static": (
        {**INT8, "strategy": "tensor"},
        {**INT8, "strategy": "tensor"},
        "float32",
    ),
    "int8-packed": ({**INT8, **GROUP}, None, "float16"),
    "int6": ({**INT8, "num_bits": 6, "strategy": "channel"}, INT8 | TOKEN, "float32"),
    "int4": ({**INT4, **GROUP}, None, "bfloat16"),
    "int4-channel": ({**INT4, "strategy": "channel"}, None, "float32"),
    "int4-asymmetric": ({**INT4, **GROUP, "symmetric": False}, None, "float32"),
    "int4-asymmetric-channel": (
        {**INT4, "strategy": "channel", "symmetric": False},
        None,
        "float32",
    ),
    "int2": ({**INT8, "num_bits": 2, **GROUP}, None, "float32"),
    "fp8": ({**FLOAT8, "strategy": "channel"}, {**FLOAT8, **TOKEN}, "bfloat16"),
    "fp8-static": (
        {**FLOAT8, "strategy": "tensor"},
        {**FLOAT8, "strategy": "tensor"},
        "float32",
    ),
    "fp8-weights": ({**FLOAT8, "strategy": "channel"}, None, "float32"),
    "fp8-block": (
        {**FLOAT8, "strategy": "block", "block_structure": [4, 16]},
        {**FLOAT8, **TOKEN},
        "float32",
    ),
    "fp8-block-128": (
        {**FLOAT8, "strategy": "block", "block_structure": [128, 128]},
        {**FLOAT8, **TOKEN},
        "float32",
    ),
    "nvfp4": (NVFP4, None, "bfloat16"),
    "nvfp4-activations": (NVFP4, {**NVFP4, "dynamic": "local"}, "bfloat16"),
    "mxfp4": ({**FLOAT4, **MX}, None, "bfloat16"),
    "mxfp6": ({**FLOAT8, "num_bits": 6, **MX}, None, "bfloat16"),
    "mxfp8": ({**FLOAT8, **MX}, {**FLOAT8, **MX, "dynamic": True}, "bfloat16"),
}
# Schemes that this package refuses.
REFUSED = {
    "int3": ({**INT8, "num_bits": 3, "strategy": "channel"}, None, "float32"),
}


def build(layers):
    """A model of linear and embedding layers: for each name, class, shape and bias."""
    import torch

    model = torch.nn.Module()
    for name, (kind, shape, bias) in layers.items():
        *parents, last = name.split(".")
        module = model
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        if kind == "Linear":
            layer = torch.nn.Linear(shape[1], shape[0], bias)
        else:
            layer = torch.nn.Embedding(*shape)
        module.add_module(last, layer)
    return model


def calibrate(module):
    """Sets the scales and zero points of a layer from its weight."""
    import torch
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, weight = module.quantization_scheme.weights, module.weight.data
    out, columns = weight.shape
    if args.strategy == "tensor":
        parts = weight.reshape(1, -1)
    elif args.strategy == "channel":
        parts = weight[:, None, :]
    elif args.strategy == "block":
        rows, width = args.block_structure
        weight = torch.nn.functional.pad(weight, (0, -columns % width, 0, -out % rows))
        parts = weight.unflatten(1, (-1, width)).unflatten(0, (-1, rows))
        parts = parts.transpose(1, 2).flatten(2)
    else:
        parts = weight.unflatten(1, (-1, args.group_size))
    low, high = parts.amin(-1), parts.amax(-1)
    whole = None
    if args.strategy == "tensor_group":
        whole = generate_gparam(low.min(), high.max())
        module.weight_global_scale.data = whole
    scale, zero = calculate_qparams(low, high, args, whole)
    module.weight_scale.data = scale.to(module.weight_scale.dtype)
    module.weight_zero_point.data = zero
    inputs = module.quantization_scheme.input_activations
    if inputs is not None and inputs.dynamic == "local":
        module.input_global_scale.data.fill_(100)
    elif inputs is not None and not inputs.dynamic:
        module.input_scale.data.fill_(0.03)
        if not inputs.symmetric:
            module.input_zero_point.data.fill_(-5)


def write(folder):
    import torch
    from compressed_tensors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
    )
    from safetensors.torch import save_file

    for seed, (name, scheme) in enumerate({**SCHEMES, **REFUSED}.items()):
        torch.manual_seed(seed)
        weights, activations, dtype = scheme
        layers = {name: ("Linear", shape, True) for name, shape in SHAPES.items()}
        model = build(layers).to(getattr(torch, dtype))
        group = {"targets": ["Linear"], "weights": weights}
        if activations is not None:
            group["input_activations"] = activations
        config = {"config_groups": {"group_0": group}, "ignore": ["head"]}
        config = QuantizationConfig.model_validate(config)
        apply_quantization_config(model, config, show_progress=False)
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                calibrate(module)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        path = pathlib.Path(folder, name)
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"dtype": dtype}))
        state = {key: x.contiguous() for key, x in model.state_dict().items()}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        compressor.update_config(str(path))
        compressor.decompress_model(model)
        save_reference(model, path)


def read(folder):
    for path in sorted(pathlib.Path(folder).iterdir()):
        read_checkpoint(path)


def read_checkpoint(path):
    import torch
    from compressed_tensors import ModelCompressor
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
    )
    from safetensors.torch import load_file

    config = json.loads((path / "config.json").read_text())["quantization_config"]
    bits = {
        target: group["weights"]["num_bits"]
        for group in config["config_groups"].values()
        for target in group["targets"]
    }
    config = QuantizationConfig.model_validate(config)
    state = {}
    for file in path.glob("*.safetensors"):
        state |= load_file(file)
    # The architecture, which a file does not say: of each layer its shape.
    layers, scales = {}, {}
    for key, tensor in state.items():
        layer, _, part = key.rpartition(".")
        if part == "weight_packed" and tensor.dtype == torch.uint8:
            # Such layers have no weight_shape.
            columns = 8 * tensor.shape[1] // bits[layer]
            layers[layer] = "Linear", (tensor.shape[0], columns), False
        elif part in ("weight", "weight_shape") and tensor.ndim < 3:
            shape = tuple(tensor.tolist()) if part == "weight_shape" else tensor.shape
            kind = "Embedding" if "embed" in layer else "Linear"
            layers[layer] = kind, shape, f"{layer}.bias" in state
        elif part == "weight_scale":
            scales[layer] = tensor.dtype
    layers = {name: layer for name, layer in layers.items() if len(layer[1]) == 2}
    model = build(layers)
    for name, dtype in scales.items():
        if dtype.itemsize > 1:
            model.get_submodule(name).to(dtype)
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            compress_module(module)
    own = {key: x for key, x in state.items() if key.rpartition(".")[0] in layers}
    model.load_state_dict(own, strict=True)
    assert {name for name, _ in quantized(model)} == set(scales)
    ModelCompressor(quantization_config=config).decompress_model(model)
    save_reference(model, path)


def quantized(model):
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            yield name, module


def save_reference(model, path):
    import numpy as np

    values = {f"{name}.weight": module.weight for name, module in quantized(model)}
    values = {name: x.detach().float().numpy() for name, x in values.items()}
    np.savez(path / "reference.npz", **values)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](sys.argv[2])

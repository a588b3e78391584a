"""Tensors in the layouts of gpt-oss and DeepSeek-V3, with their values by transformers.

It needs PyTorch, so it runs in an environment of its own, without JAX and without this
package:

    python quantized_tensors_reference.py FOLDER
"""

import json
import pathlib
import sys
import types


def write(folder, tensors, values, config):
    import numpy as np
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    text = json.dumps({"quantization_config": config})
    (folder / "config.json").write_text(text)
    values = {name: x.float().numpy() for name, x in values.items()}
    np.savez(folder / "reference.npz", **values)


def main(folder):
    import torch
    from transformers.integrations import finegrained_fp8, mxfp4
    from transformers.utils.quantization_config import FineGrainedFP8Config

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 135, (3, 8, 2), dtype=torch.uint8)
    values = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    write(
        pathlib.Path(folder, "gpt_oss"),
        {"up_blocks": blocks, "up_scales": scales},
        {"up": values},
        {"quant_method": "mxfp4"},
    )
    config = FineGrainedFP8Config(weight_block_size=(128, 128))
    quantizer = types.SimpleNamespace(quantization_config=config)
    weight = torch.randn(256, 384)
    tensors = finegrained_fp8.Fp8Quantize(quantizer).convert({"a.weight": weight})
    undo = finegrained_fp8.Fp8Dequantize(quantizer)._dequantize_one
    values = undo(tensors["a.weight"], tensors["a.weight_scale_inv"])
    assert (values - weight).abs().max() < 0.2
    config = json.loads(json.dumps(config.to_dict(), default=str))
    write(pathlib.Path(folder, "deepseek"), tensors, {"a.weight": values}, config)


if __name__ == "__main__":
    main(sys.argv[1])

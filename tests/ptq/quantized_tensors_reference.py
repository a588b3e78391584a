"""Tiny gpt-oss and DeepSeek-V3 as their files are, with their values by transformers.

It needs PyTorch, so it runs in an environment of its own, without JAX and without this
package:

    python quantized_tensors_reference.py FOLDER
"""

import json
import pathlib
import sys
import types

SIZES = dict(
    vocab_size=37, num_hidden_layers=2, num_key_value_heads=2, num_experts_per_tok=2
)
GPT_OSS = dict(
    **SIZES,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    head_dim=8,
    num_local_experts=3,
)
DEEPSEEK = dict(
    **SIZES,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=128,
    num_attention_heads=2,
    n_routed_experts=4,
    first_k_dense_replace=1,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_rope_head_dim=32,
    qk_nope_head_dim=32,
    v_head_dim=64,
    n_group=1,
    topk_group=1,
)


def tensors_of(name, cls, sizes, folder):
    """The float tensors of a model, under the names that they have in a file."""
    import torch
    import transformers
    from safetensors.torch import load_file

    config = transformers.AutoConfig.for_model(name, **sizes)
    model = getattr(transformers, cls)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def write(folder, tensors, values, config):
    import numpy as np
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")
    text = json.dumps({"quantization_config": config}, default=str)
    (folder / "config.json").write_text(text)
    values = {name: x.float().numpy() for name, x in values.items()}
    np.savez(folder / "reference.npz", **values)


def main(folder):
    import torch
    from transformers.integrations import finegrained_fp8, mxfp4
    from transformers.utils.quantization_config import FineGrainedFP8Config

    torch.manual_seed(0)
    here = pathlib.Path(folder, "gpt_oss")
    values = tensors_of("gpt_oss", "GptOssForCausalLM", GPT_OSS, here)
    tensors = {}
    for name, x in values.items():
        if x.ndim < 3:
            tensors[name] = x
            continue
        count, columns, rows = x.shape
        shape = count, rows, columns // 32
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(110, 135, shape, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        convert = mxfp4.convert_moe_packed_tensors
        values[name] = convert(blocks, scales, dtype=torch.float32)
        assert values[name].shape == x.shape
    write(here, tensors, values, {"quant_method": "mxfp4"})

    here = pathlib.Path(folder, "deepseek_v3")
    values = tensors_of("deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK, here)
    config = FineGrainedFP8Config(weight_block_size=(128, 128))
    quantizer = types.SimpleNamespace(quantization_config=config)
    undo = finegrained_fp8.Fp8Dequantize(quantizer)._dequantize_one
    tensors = {}
    for name, x in values.items():
        found = {name: x}
        if "_proj" in name:
            found = finegrained_fp8.Fp8Quantize(quantizer).convert({name: x})
        tensors |= found
        if len(found) == 2:
            values[name] = undo(*found.values())
    write(here, tensors, values, {**config.to_dict(), "quant_method": "fp8"})


if __name__ == "__main__":
    main(sys.argv[1])

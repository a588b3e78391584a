"""Mappings for families of models, as data.

They say what each module of a checkpoint is:

* `dense` has a kernel, and perhaps a bias,
* `to_heads` and `from_heads` are dense, with an axis of heads,
* `norm` has a scale, and perhaps a bias,
* `embedding` has a table,
* `experts` are kernels that are stacked when they are read,
* `stacked_experts` are stacked in the file already,
* `router` chooses experts,
* `sinks` are logits of attention that belong to no token.
"""

from __future__ import annotations

import re

from qwix_train.core import tiling
from qwix_train.ptq.hugging_face.places import Place

_DECODER_LAYER = {
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "pre_feedforward_layernorm": "norm",
    "post_feedforward_layernorm": "norm",
    "self_attn.q_proj": "to_heads",
    "self_attn.k_proj": "to_heads",
    "self_attn.v_proj": "to_heads",
    "self_attn.o_proj": "from_heads",
    "self_attn.q_norm": "norm",
    "self_attn.k_norm": "norm",
    "mlp.gate_proj": "dense",
    "mlp.up_proj": "dense",
    "mlp.down_proj": "dense",
}
_EXPERTS = {
    "mlp.gate": "dense",
    "mlp.experts.{expert}.gate_proj": "experts",
    "mlp.experts.{expert}.up_proj": "experts",
    "mlp.experts.{expert}.down_proj": "experts",
}
_MIXTRAL = {
    "block_sparse_moe.gate": "dense",
    "block_sparse_moe.experts.{expert}.w1": "experts",
    "block_sparse_moe.experts.{expert}.w2": "experts",
    "block_sparse_moe.experts.{expert}.w3": "experts",
}
_GPT_OSS = {
    "self_attn": "sinks",
    "mlp.router": "dense",
    "mlp.experts": "stacked_experts",
}
# Of layers with experts, and of those without.
_DEEPSEEK = {
    "self_attn.q_a_proj": "dense",
    "self_attn.q_a_layernorm": "norm",
    "self_attn.q_b_proj": "to_heads",
    "self_attn.kv_a_proj_with_mqa": "dense",
    "self_attn.kv_a_layernorm": "norm",
    "self_attn.kv_b_proj": "to_heads",
    **_EXPERTS,
    "mlp.gate": "router",
    "mlp.shared_experts.gate_proj": "dense",
    "mlp.shared_experts.up_proj": "dense",
    "mlp.shared_experts.down_proj": "dense",
}
_BERT_LAYER = {
    "attention.self.query": "to_heads",
    "attention.self.key": "to_heads",
    "attention.self.value": "to_heads",
    "attention.output.dense": "from_heads",
    "attention.output.LayerNorm": "norm",
    "intermediate.dense": "dense",
    "output.dense": "dense",
    "output.LayerNorm": "norm",
}


def _decoder(layer: dict[str, str]) -> dict[str, str]:
    layers = {f"layers.{{layer}}.{name}": kind for name, kind in layer.items()}
    return {"embed_tokens": "embedding", **layers, "norm": "norm"}


_DECODER = _decoder(_DECODER_LAYER)
_BERT = {
    "embeddings.word_embeddings": "embedding",
    "embeddings.position_embeddings": "embedding",
    "embeddings.token_type_embeddings": "embedding",
    "embeddings.LayerNorm": "norm",
    **{f"encoder.layer.{{layer}}.{name}": kind for name, kind in _BERT_LAYER.items()},
    "pooler.dense": "dense",
}
# For each family, the modules of the model, and the modules beside it.
_FAMILIES = {
    **dict.fromkeys(
        "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text".split(),
        (_DECODER, {"lm_head": "dense"}),
    ),
    "mixtral": (_decoder(_DECODER_LAYER | _MIXTRAL), {"lm_head": "dense"}),
    "gpt_oss": (_decoder(_DECODER_LAYER | _GPT_OSS), {"lm_head": "dense"}),
    "deepseek_v3": (_decoder(_DECODER_LAYER | _DEEPSEEK), {"lm_head": "dense"}),
    "qwen3_moe": (_decoder(_DECODER_LAYER | _EXPERTS), {"lm_head": "dense"}),
    "bert": (_BERT, {"classifier": "dense"}),
}
# Tensors besides params in checkpoints of older versions.
_BUFFERS = ("embeddings.position_ids", "layers.{layer}.self_attn.rotary_emb.inv_freq")

# For each kind, the tensors of a module: the param, and how its axes are made.
_KINDS = {
    "dense": {"weight": ("kernel", "o i -> i o"), "bias": ("bias", "o -> o")},
    "to_heads": {"weight": ("kernel", "o i -> i o"), "bias": ("bias", "o -> o")},
    "from_heads": {"weight": ("kernel", "o i -> i o"), "bias": ("bias", "o -> o")},
    "experts": {"weight": ("kernel", "o i -> expert i o")},
    "stacked_experts": {
        "gate_up_proj": ("gate_up_proj", "expert i o -> expert i o"),
        "gate_up_proj_bias": ("gate_up_proj_bias", "expert o -> expert o"),
        "down_proj": ("down_proj", "expert i o -> expert i o"),
        "down_proj_bias": ("down_proj_bias", "expert o -> expert o"),
    },
    "router": {
        "weight": ("kernel", "o i -> i o"),
        "e_score_correction_bias": ("e_score_correction_bias", "o -> o"),
    },
    "sinks": {"sinks": ("sinks", "heads -> heads")},
    "norm": {"weight": ("scale", "d -> d"), "bias": ("bias", "d -> d")},
    "embedding": {"weight": ("embedding", "n d -> n d")},
}
_SPLIT = {
    **_KINDS,
    "to_heads": {
        "weight": ("kernel", "(heads k) i -> i heads k"),
        "bias": ("bias", "(heads k) -> heads k"),
    },
    "from_heads": {
        "weight": ("kernel", "o (heads k) -> heads k o"),
        "bias": ("bias", "o -> o"),
    },
}


def mapping(
    family: str,
    *,
    layers: str = "layers_{layer}",
    layer_axis: int = 0,
    split_heads: bool = False,
    prefix: str | None = None,
) -> dict[str, Place | None]:
    """Returns the mapping of a family of models, for `load` and `save`.

    The model must have the modules of the checkpoint under their names, with params as
    Flax names them: a dense layer has a `kernel` ``[in, out]`` and a `bias`, a norm a
    `scale`, and an embedding an `embedding`. So ``model.layers.3.mlp.up_proj.weight``
    is ``layers_3/mlp/up_proj/kernel``, and ``model.norm.weight`` is ``norm/scale``. The
    `kernel` of experts is ``[expert, in, out]``, and so are `gate_up_proj` and
    `down_proj` of gpt_oss. A model may have fewer params, such as no biases, or no
    ``lm_head`` if it uses the weights of the embedding.

    The mapping is a dictionary, so you can change entries:
    ``{**mapping("llama"), "lm_head.weight": None}`` does not read a tensor.

    Args:
        family: The ``model_type`` of ``config.json``: llama, mistral, mixtral, qwen2,
            qwen3, qwen3_moe, gemma, gemma2, gemma3_text, gpt_oss, deepseek_v3 or bert.
        layers: The path of a layer: ``"layers_{layer}"``, as Linen names modules in a
            loop, or ``"layers/{layer}"`` for a list of NNX. Without ``{layer}``, as in
            ``"layers"``, layers are stacked, as by ``nn.scan``.
        layer_axis: The axis of params along which layers are stacked.
        split_heads: Whether heads of attention have their own axis, as in
            ``nn.DenseGeneral``: ``[in, heads, head_dim]`` and
            ``[heads, head_dim, out]``.
        prefix: How the names of the model's tensors begin. By default ``"model."``, and
            nothing for bert. A `BertForMaskedLM` has ``"bert."``.

    Raises:
        ValueError: There is no mapping for this family, or its biases have no axis
            ``layer_axis`` for layers.

    >>> from qwix_train.ptq import hugging_face
    >>> llama = hugging_face.mapping("llama", layers="layers", split_heads=True)
    >>> place = llama["model.layers.{layer}.self_attn.q_proj.weight"]
    >>> place.param, place.axes
    ('layers/self_attn/q_proj/kernel', '(heads k) i -> layer i heads k')
    """
    if family not in _FAMILIES:
        raise ValueError(
            f"There is no mapping for {family!r}; there are those of "
            f"{', '.join(sorted(_FAMILIES))}. Write one: a dictionary from the names "
            "of tensors to Places."
        )
    inner, beside = _FAMILIES[family]
    if prefix is None:
        prefix = "" if family == "bert" else "model."
    kinds = _SPLIT if split_heads else _KINDS
    found: dict[str, Place | None] = {prefix + name: None for name in _BUFFERS}
    for module, kind in {**{prefix + m: k for m, k in inner.items()}, **beside}.items():
        path = re.sub(r"(encoder\.)?layers?\.\{layer\}", "{layers}", module)
        path = path.removeprefix(prefix).replace(".{expert}", "").replace(".", "/")
        path = path.replace("{layers}", layers)
        for tensor, (param, axes) in kinds[kind].items():
            if "{layer}" in module and "{layer}" not in layers:
                axes = _stacked(axes, layer_axis)
            place = Place(f"{path}/{param}", axes, optional=True)
            found[f"{module}.{tensor}"] = place
    return found


def _stacked(axes: str, layer_axis: int) -> str:
    tensor, param = axes.split(" -> ")
    names = param.split()
    names.insert(tiling.normalize_axis(layer_axis, len(names) + 1), "layer")
    return f"{tensor} -> {' '.join(names)}"

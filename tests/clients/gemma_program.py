"""A small Gemma 3 of the `gemma` package, quantized by whatever `import qwix` is.

Writes ``results.json`` and ``arrays.npz`` into the folder that is its argument.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import qwix
from flax import linen as nn
from flax import traverse_util
from gemma import gm
from gemma.gm.nn import _config, _modules
from jax import numpy as jnp

CONFIG = _config.TransformerConfig(
    num_embed=64,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    final_logit_softcap=None,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    use_qk_norm=True,
    sliding_window_size=8,
    attention_types=(
        _modules.AttentionType.LOCAL_SLIDING,
        _modules.AttentionType.GLOBAL,
    ),
)
TOKENS = np.random.default_rng(0).integers(2, 64, (2, 12)).astype(np.int32)


class Gemma(gm.nn.Transformer):
    config: _config.TransformerConfig = CONFIG


def draw(rng, shape):
    """Weights whose largest magnitude is positive in every channel.

    A negative one lies between two codes, and compiled programs of `qwix` round it to
    either of them.
    """
    values = np.where(rng.random(shape) < 0.3, 0.4, rng.uniform(-0.3, 0.3, shape))
    return jax.device_put(values.astype(np.float32))


def loss_of(model):
    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1]).logits
        found = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.take_along_axis(found, tokens[:, 1:, None], -1).mean()

    return loss


def main(folder):
    model = Gemma(dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: draw(rng, x.shape), shapes)
    results, arrays = {"float": float(jax.jit(loss_of(model))(params, TOKENS))}, {}

    weights = [qwix.QuantizationRule(module_path=r"layer_.*", weight_qtype="int4")]
    trained = qwix.quantize_model(model, qwix.QtProvider(weights))
    results["weights"] = float(jax.jit(loss_of(trained))(params, TOKENS))

    rules = [
        qwix.QuantizationRule(
            module_path=r"layer_.*", weight_qtype="int8", act_qtype="int8"
        )
    ]
    trained = qwix.quantize_model(model, qwix.QtProvider(rules))
    results["qat"] = float(jax.jit(loss_of(trained))(params, TOKENS))
    served = qwix.quantize_model(model, qwix.PtqProvider(rules))
    shapes = jax.eval_shape(served.init, jax.random.key(0), TOKENS)["params"]
    quantized = qwix.quantize_params(params, shapes)
    results["ptq"] = float(jax.jit(loss_of(served))(quantized, TOKENS))
    types = [type(x).__name__ for x in jax.tree.leaves(quantized, is_leaf=is_aux)]
    results["quantized"] = types.count("WithAux")

    if not qwix.__name__.startswith("qwix_train"):
        # `qwix` 0.1.8 cannot add adapters: it sets an attribute of a frozen module.
        return save(folder, results, arrays)
    # Token by token, with a cache.
    cache = CONFIG.init_cache(batch_size=2, dtype=jnp.float32, cache_length=12)
    step = jax.jit(
        lambda params, token, cache, position, mask: served.apply(
            {"params": params},
            token,
            cache=cache,
            positions=position,
            attention_mask=mask,
        )
    )
    logits = []
    for i in range(TOKENS.shape[1] - 1):
        mask = np.broadcast_to(np.arange(12) <= i, (2, 1, 12))
        position = np.full((2, 1), i, np.int32)
        out = step(quantized, TOKENS[:, i : i + 1], cache, position, mask)
        cache = out.cache
        logits.append(np.asarray(out.logits).reshape(2, 1, -1))
    arrays["decoded"] = np.concatenate(logits, 1)
    arrays["whole"] = np.asarray(
        jax.jit(served.apply)({"params": quantized}, TOKENS[:, :-1]).logits
    )

    adapters = qwix.LoraProvider(module_path=r".*(q_einsum|linear)", rank=2, alpha=4.0)
    adapted = qwix.apply_lora_to_model(model, adapters)
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), TOKENS)["params"]
    flat = traverse_util.flatten_dict(nn.unbox(shapes), sep="/")
    given = traverse_util.flatten_dict(params, sep="/")
    ours = {
        path: draw(rng, x.shape) * path.endswith("lora_a")
        for path, x in flat.items()
        if path not in given
    }
    results["adapters"] = {path: x.shape for path, x in ours.items()}

    @jax.jit
    def lora_step(ours):
        def loss_fn(ours):
            whole = traverse_util.unflatten_dict({**given, **ours}, sep="/")
            return loss_of(adapted)(whole, TOKENS)

        loss, grads = jax.value_and_grad(loss_fn)(ours)
        return loss, jax.tree.map(lambda x, g: x - 0.5 * g, ours, grads)

    results["lora"] = []
    for _ in range(5):
        loss, ours = lora_step(ours)
        results["lora"].append(float(loss))
    save(folder, results, arrays)


def save(folder, results, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    np.savez(folder / "arrays.npz", **arrays)


def is_aux(x):
    return type(x).__name__ == "WithAux"


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))

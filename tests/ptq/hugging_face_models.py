"""Small decoders and BERT in Linen, and a Llama in NNX, under natural names."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """What a `config.json` says, and how the model is written."""

    sizes: dict
    scanned: bool = False
    split_heads: bool = False

    @classmethod
    def of(cls, folder, **options):
        return cls(json.loads((folder / "config.json").read_text()), **options)

    def __hash__(self):
        return hash((json.dumps(self.sizes), self.scanned, self.split_heads))

    def __getattr__(self, name):
        return self.sizes[name]

    @property
    def head_dim(self):
        return (
            self.sizes.get("head_dim") or self.hidden_size // self.num_attention_heads
        )

    @property
    def is_gemma(self):
        return self.model_type.startswith("gemma")

    @property
    def norms_outputs(self):
        return self.model_type in ("gemma2", "gemma3_text")

    @property
    def norms_heads(self):
        return self.model_type.startswith(("qwen3", "gemma3"))

    @property
    def sliding(self):
        """Of each layer, whether it sees a window."""
        kinds = self.sizes.get("layer_types") or [None] * self.num_hidden_layers
        return jnp.array([kind == "sliding_attention" for kind in kinds])

    def theta(self, sliding):
        given = self.rope_parameters
        if "sliding_attention" not in given:
            return given["rope_theta"]
        kinds = given["sliding_attention"], given["full_attention"]
        return jnp.where(sliding, *(kind["rope_theta"] for kind in kinds))


def rms_norm(x, scale, config):
    x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + config.rms_norm_eps)
    return x * (scale + 1 if config.is_gemma else scale)


def capped(x, largest):
    """Logits that stay below a magnitude (arXiv 2408.00118, 2.2)."""
    return x if largest is None else largest * jnp.tanh(x / largest)


def rotated(x, config, sliding=False):
    """Rotary positions (arXiv 2104.09864), the halves of a head being the pairs."""
    half = config.head_dim // 2
    frequency = config.theta(sliding) ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None, None] * frequency
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attended(q, k, v, mask=None, scale=None, largest=None):
    """Attention; heads are axis 2, and several of `q` share one of `k` and `v`."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    weights = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(scale or q.shape[-1])
    weights = capped(weights, largest)
    if mask is not None:
        weights = jnp.where(mask, weights, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(weights), v)


def heads_of(x, count):
    return x.reshape(*x.shape[:2], count, -1)


class RmsNorm(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return rms_norm(x, scale, self.config)


def projection(config, heads, bias, name):
    """To heads: joined in an axis of a kernel, or an axis of their own."""
    if config.split_heads:
        return nn.DenseGeneral((heads, config.head_dim), use_bias=bias, name=name)
    return nn.Dense(heads * config.head_dim, use_bias=bias, name=name)


class SelfAttention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, sliding):
        c = self.config
        bias = c.model_type == "qwen2"

        def project(name, heads):
            return heads_of(projection(c, heads, bias, name)(x), heads)

        q = project("q_proj", c.num_attention_heads)
        k = project("k_proj", c.num_key_value_heads)
        v = project("v_proj", c.num_key_value_heads)
        if c.norms_heads:
            q, k = RmsNorm(c, name="q_norm")(q), RmsNorm(c, name="k_norm")(k)
        distance = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])
        window = c.sizes.get("sliding_window") or x.shape[1]
        y = attended(
            rotated(q, c, sliding),
            rotated(k, c, sliding),
            v,
            (distance >= 0) & (~sliding | (distance < window)),
            c.sizes.get("query_pre_attn_scalar"),
            c.sizes.get("attn_logit_softcapping"),
        )
        out = functools.partial(nn.DenseGeneral, c.hidden_size, use_bias=False)
        if c.split_heads:
            return out(axis=(-2, -1), name="o_proj")(y)
        return out(name="o_proj")(y.reshape(*x.shape[:2], -1))


class Mlp(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, use_bias=False)
        act = jax.nn.gelu if self.config.is_gemma else jax.nn.silu
        gate = dense(self.config.intermediate_size, name="gate_proj")(x)
        up = dense(self.config.intermediate_size, name="up_proj")(x)
        return dense(self.config.hidden_size, name="down_proj")(act(gate) * up)


class Stack(nn.Module):
    """A kernel of each expert."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), self.shape)
        return jnp.einsum("...ei,eio->...eo", x, kernel)


class Experts(nn.Module):
    """All experts, on every token."""

    names: tuple[str, str, str]
    inner: int
    count: int

    @nn.compact
    def __call__(self, x):
        gate, up, down = self.names
        to = self.count, x.shape[-1], self.inner
        back = self.count, self.inner, x.shape[-1]
        x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], self.count, x.shape[-1]))
        hidden = jax.nn.silu(Stack(to, name=gate)(x)) * Stack(to, name=up)(x)
        return Stack(back, name=down)(hidden)


class Mixture(nn.Module):
    """The best experts of each token (arXiv 2401.04088, 2.1)."""

    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        if c.model_type == "mixtral":
            names, inner, normalized = ("w1", "w3", "w2"), c.intermediate_size, True
        else:
            names = "gate_proj", "up_proj", "down_proj"
            inner, normalized = c.moe_intermediate_size, c.norm_topk_prob
        count = c.num_local_experts
        share = jax.nn.softmax(nn.Dense(count, use_bias=False, name="gate")(x))
        least = jax.lax.top_k(share, c.num_experts_per_tok)[0][..., -1:]
        share = jnp.where(share >= least, share, 0)
        if normalized:
            share /= share.sum(-1, keepdims=True)
        outputs = Experts(names, inner, count, name="experts")(x)
        return jnp.einsum("...e,...ed->...d", share, outputs)


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, sliding):
        c = self.config
        norm = functools.partial(RmsNorm, c)
        y = norm(name="input_layernorm")(x)
        y = SelfAttention(c, name="self_attn")(y, sliding)
        if c.norms_outputs:
            x += norm(name="post_attention_layernorm")(y)
            y = Mlp(c, name="mlp")(norm(name="pre_feedforward_layernorm")(x))
            return x + norm(name="post_feedforward_layernorm")(y), None
        x += y
        y = norm(name="post_attention_layernorm")(x)
        if c.model_type == "mixtral":
            return x + Mixture(c, name="block_sparse_moe")(y), None
        mlp = Mixture if c.model_type == "qwen3_moe" else Mlp
        return x + mlp(c, name="mlp")(y), None


class Llama(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens):
        c = self.config
        table = nn.Embed(c.vocab_size, c.hidden_size, name="embed_tokens")
        x = table(tokens)
        if c.is_gemma:
            x = x * math.sqrt(c.hidden_size)
        if c.scanned:
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=c.num_hidden_layers,
            )
            x, _ = layers(c, name="layers")(x, c.sliding)
        else:
            for index in range(c.num_hidden_layers):
                x, _ = Layer(c, name=f"layers_{index}")(x, c.sliding[index])
        x = RmsNorm(c, name="norm")(x)
        if c.tie_word_embeddings:
            logits = table.attend(x)
        else:
            logits = nn.Dense(c.vocab_size, use_bias=False, name="lm_head")(x)
        return capped(logits, c.sizes.get("final_logit_softcapping"))


class NnxNorm(nnx.Module):
    def __init__(self, size, config):
        self.scale, self.config = nnx.Param(jnp.ones(size)), config

    def __call__(self, x):
        return rms_norm(x, self.scale[...], self.config)


class NnxAttention(nnx.Module):
    def __init__(self, config, rngs):
        self.config = c = config
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        query, key = (
            n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads)
        )
        self.q_proj = linear(c.hidden_size, query)
        self.k_proj = linear(c.hidden_size, key)
        self.v_proj = linear(c.hidden_size, key)
        self.o_proj = linear(query, c.hidden_size)

    def __call__(self, x):
        c = self.config
        q = rotated(heads_of(self.q_proj(x), c.num_attention_heads), c)
        k = rotated(heads_of(self.k_proj(x), c.num_key_value_heads), c)
        v = heads_of(self.v_proj(x), c.num_key_value_heads)
        y = attended(q, k, v, jnp.tri(x.shape[1], dtype=bool))
        return self.o_proj(y.reshape(*x.shape[:2], -1))


class NnxMlp(nnx.Module):
    def __init__(self, config, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = linear(size, inner), linear(size, inner)
        self.down_proj = linear(inner, size)

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class NnxLayer(nnx.Module):
    def __init__(self, config, rngs):
        self.input_layernorm = NnxNorm(config.hidden_size, config)
        self.self_attn = NnxAttention(config, rngs)
        self.post_attention_layernorm = NnxNorm(config.hidden_size, config)
        self.mlp = NnxMlp(config, rngs)

    def __call__(self, x):
        x += self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class NnxLlama(nnx.Module):
    """Llama and Mistral."""

    def __init__(self, config, rngs):
        c = config
        self.embed_tokens = nnx.Embed(c.vocab_size, c.hidden_size, rngs=rngs)
        self.layers = nnx.List([NnxLayer(c, rngs) for _ in range(c.num_hidden_layers)])
        self.norm = NnxNorm(c.hidden_size, c)
        self.lm_head = nnx.Linear(
            c.hidden_size, c.vocab_size, use_bias=False, rngs=rngs
        )

    def __call__(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class BertSelf(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        heads = c.num_attention_heads

        def project(name):
            return heads_of(projection(c, heads, True, name)(x), heads)

        y = attended(project("query"), project("key"), project("value"))
        return y if c.split_heads else y.reshape(x.shape)


class BertOutput(nn.Module):
    config: Config
    from_heads: bool = False

    @nn.compact
    def __call__(self, y, x):
        axis = (-2, -1) if self.from_heads and self.config.split_heads else -1
        y = nn.DenseGeneral(self.config.hidden_size, axis=axis, name="dense")(y)
        eps = self.config.layer_norm_eps
        return nn.LayerNorm(epsilon=eps, name="LayerNorm")(y + x)


class BertAttention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        y = BertSelf(self.config, name="self")(x)
        return BertOutput(self.config, from_heads=True, name="output")(y, x)


class Intermediate(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.config.intermediate_size, name="dense")(x)
        return jax.nn.gelu(x, approximate=False)


class BertLayer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        x = BertAttention(self.config, name="attention")(x)
        y = Intermediate(self.config, name="intermediate")(x)
        return BertOutput(self.config, name="output")(y, x)


class Embeddings(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens):
        c = self.config

        def embed(count, name):
            return nn.Embed(count, c.hidden_size, name=name)

        x = embed(c.vocab_size, "word_embeddings")(tokens)
        places = jnp.arange(tokens.shape[1])
        x += embed(c.max_position_embeddings, "position_embeddings")(places)
        x += embed(c.type_vocab_size, "token_type_embeddings")(jnp.zeros_like(tokens))
        return nn.LayerNorm(epsilon=c.layer_norm_eps, name="LayerNorm")(x)


class Pooler(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(x.shape[-1], name="dense")(x[:, 0]))


class Bert(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens):
        x = Embeddings(self.config, name="embeddings")(tokens)
        for index in range(self.config.num_hidden_layers):
            x = BertLayer(self.config, name=f"layers_{index}")(x)
        Pooler(name="pooler")(x)
        return x

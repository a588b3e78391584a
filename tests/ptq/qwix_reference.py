"""Runs `qwix` models on their own params and on params that were converted.

`python -m tests.ptq.qwix_reference FILE` does it in a process of its own, since `qwix`
patches JAX, and writes all that the tests compare.
"""

import dataclasses
import pickle
import sys
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx, traverse_util
from jax import numpy as jnp

import qwix_train
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import WithAux, dequantize, quantize_array
from tests.qat.parity import Attention, Convolution, Mlp, NnxMlp


class Reshaped(nn.Module):
    """A param that is declared in one shape and read in another."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (8, 2, 4))
        return jnp.dot(x, kernel.reshape(8, 8))


class Embedded(nn.Module):
    """A table, which `qwix` keeps in float, and a layer."""

    @nn.compact
    def __call__(self, x):
        table = self.param("embedding", nn.initializers.normal(1.0), (5, 8))
        return nn.Dense(4)(table[jnp.argmax(x, -1) % 5] + x)


@dataclasses.dataclass
class Case:
    model: Any
    rule: dict[str, Any]
    shape: tuple[int, ...] = (6, 8)
    # How this package quantizes what `qwix` does not, or not on these axes.
    how: dict[str, HowToQuantize] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        # The largest magnitude is no tie between two codes, where `qwix` may take the
        # other.
        wide = {"weight_calibration_method": WIDE}
        if "act_qtype" in self.rule:
            wide["act_calibration_method"] = WIDE
        self.rule = {**wide, **self.rule}


WIDE = "absmax,1.1"
READ = {"qtype": "int8", "channelwise_axes": (1,), "calibration_method": WIDE}
INT1 = {"qtype": "int1", "channelwise_axes": (1,), "calibration_method": WIDE}
W8A8 = {"weight_qtype": "int8", "act_qtype": "int8"}
CASES = {
    "int8": Case(Mlp(), W8A8),
    "int8 minmax": Case(
        Mlp(), {**W8A8, "weight_qtype": jnp.int8, "weight_calibration_method": "minmax"}
    ),
    "int3": Case(Mlp(), {"weight_qtype": "int3"}),
    "int1": Case(
        Mlp(),
        {"weight_qtype": "int2"},
        how={f"Dense_{i}/kernel": HowToQuantize(**INT1) for i in range(2)},
    ),
    "int6": Case(Mlp(), {"weight_qtype": "int6", "act_qtype": "int8"}),
    "int4 tiles": Case(Mlp(), {"weight_qtype": "int4", "tile_size": 4}),
    "nf4": Case(Mlp(), {"weight_qtype": "nf4"}),
    "fp8": Case(Mlp(), {"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"}),
    "static": Case(Mlp(), {**W8A8, "act_static_scale": True}),
    "static minmax": Case(
        Mlp(),
        {
            "weight_qtype": jnp.int8,
            "act_qtype": jnp.int8,
            "act_static_scale": True,
            "act_calibration_method": "minmax",
        },
    ),
    "convolution": Case(Convolution(), W8A8, shape=(2, 6, 6)),
    "attention": Case(Attention(), W8A8, shape=(2, 5, 8)),
    "reshaped": Case(
        Reshaped(),
        W8A8,
        how={
            "kernel": HowToQuantize(
                qtype="int8", channelwise_axes=(1, 2), calibration_method=WIDE
            )
        },
    ),
    "embedding": Case(
        Embedded(),
        {"weight_qtype": "int4", "module_path": "Dense_0"},
        how={"embedding": HowToQuantize(qtype="int8", channelwise_axes=(0,))},
    ),
    "nnx int8": Case(NnxMlp, W8A8),
    "nnx nf4": Case(NnxMlp, {"weight_qtype": "nf4"}),
}


def inputs(case: Case) -> jax.Array:
    return jax.random.normal(jax.random.key(5), case.shape)


def our_params(floats: Any, theirs: Any, how: dict[str, HowToQuantize]) -> Any:
    """The params as this package stores them: each quantized in its own shape.

    Args:
        floats: The float params.
        theirs: Their params, for how each is quantized, and for static ranges.
        how: What to do otherwise, by path.
    """
    ours = dict(traverse_util.flatten_dict(floats, sep="/"))
    how = dict(how)
    for path, leaf in traverse_util.flatten_dict(theirs, sep="/").items():
        if type(leaf).__name__ == "WithAux":
            fields = ("qtype", "channelwise_axes", "tiled_axes", "calibration_method")
            same = HowToQuantize(**{name: getattr(leaf.how, name) for name in fields})
            if path not in ours:
                ours[path] = WithAux(leaf.array, same)
            else:
                how.setdefault(path, same)
        elif path not in ours:
            ours[path] = leaf
    for path, stated in how.items():
        ours[path] = WithAux(quantize_array(ours[path], stated), stated)
    return traverse_util.unflatten_dict(ours, sep="/")


def run_linen(case: Case) -> dict[str, Any]:
    import qwix

    from qwix_train.ptq.qwix_trees import from_qwix, to_qwix

    x, key = inputs(case), jax.random.key(0)
    provider = qwix.PtqProvider([qwix.QuantizationRule(**case.rule)])
    model = qwix.quantize_model(case.model, provider)
    floats = jax.jit(case.model.init)(key, x)["params"]
    abstract = jax.eval_shape(model.init, key, x)["params"]
    theirs = qwix.quantize_params(floats, abstract)
    if case.rule.get("act_static_scale"):
        # The ranges are those of the data that the model is initialized on.
        ranges = traverse_util.flatten_dict(model.init(key, x)["params"])
        ranges |= traverse_util.flatten_dict(theirs)
        theirs = traverse_util.unflatten_dict(ranges)
    if "kernel" in case.how:
        # Newer versions of JAX hide from qwix that a reshaped array is a param; this
        # is what it stores where it sees it.
        whole = qwix.quantize(floats["kernel"].reshape(8, 8), **READ)
        with_aux = sys.modules[qwix.PtqProvider.__module__].WithAux
        theirs = {"kernel": with_aux(whole, HowToQuantize(**READ))}
        abstract = jax.eval_shape(lambda: theirs)
    ours = our_params(floats, theirs, case.how)
    outputs = {"theirs": theirs, "converted": to_qwix(ours, abstract)}
    if not case.how:
        outputs["converted without like"] = to_qwix(ours)
    if "embedding" in case.how:
        table = dequantize(ours["embedding"].array)
        outputs["theirs"] = {**theirs, "embedding": table}
    outputs = {
        name: model.apply({"params": params}, x) for name, params in outputs.items()
    }
    if case.rule.get("act_qtype") is None:
        values = jax.tree.map(dequantized, ours, is_leaf=is_quantized)
        outputs["dequantized"] = jax.jit(case.model.apply)({"params": values}, x)
    back = from_qwix(theirs, ours if "kernel" in case.how else None)
    return {"outputs": outputs, "floats": floats, "ours": ours, "back": back}


def run_nnx(case: Case) -> dict[str, Any]:
    import qwix

    from qwix_train.ptq.qwix_trees import from_qwix, to_qwix

    x = inputs(case)
    rule = qwix_train.QuantizationRule(**case.rule)
    our_model = qwix_train.quantize_model(
        case.model(), qwix_train.PtqProvider([rule]), x
    )
    provider = qwix.PtqProvider([qwix.QuantizationRule(**case.rule)])
    float_model = case.model()
    floats = nnx.to_pure_dict(nnx.state(float_model, nnx.Param))
    model = qwix.quantize_model(float_model, provider, x)
    theirs = qwix.quantize_params(floats, model)
    as_tree = {
        layer: {name: getattr(getattr(model, layer), name) for name in params}
        for layer, params in floats.items()
    }
    as_tree = jax.tree.map(
        lambda v: v[...] if isinstance(v, nnx.Variable) else v,
        as_tree,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    ours = our_params(floats, as_tree, {})

    def run(params):
        nnx.update(model, jax.tree.map(jnp.zeros_like, theirs))
        nnx.update(model, params)
        return model(x)

    outputs = {
        "theirs": run(theirs),
        "converted": run(to_qwix(ours, model)),
        "converted model": run(to_qwix(our_model, model)),
        "converted pure dict": run(to_qwix(from_qwix(theirs), model)),
        "converted state": run(from_qwix(nnx.state(model, nnx.Param))),
    }
    back = from_qwix(theirs)
    return {"outputs": outputs, "floats": floats, "ours": ours, "back": back}


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, WithAux)


def dequantized(leaf: Any) -> Any:
    return dequantize(leaf.array) if is_quantized(leaf) else leaf


def arrays(tree: Any) -> Any:
    """The tree with NumPy arrays, so that it can be pickled."""
    return jax.tree.map(np.asarray, tree)


def main(path: str, *names: str) -> None:
    results = {}
    for name in names:
        case = CASES[name]
        run = run_linen if isinstance(case.model, nn.Module) else run_nnx
        results[name] = arrays(run(case))
    with open(path, "wb") as file:
        pickle.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

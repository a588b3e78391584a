"""A model with adapters computes what it does with the adapters merged."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qwix_train import lora
from qwix_train.frontends.model import trace_function
from qwix_train.lora.layout import find_layouts
from qwix_train.planning.planner import make_plan
from qwix_train.trace.function import param_path
from tests.spellings import CASES

LOOKUPS = ("gather",)
PRODUCTS = ("dot_general", "einsum", "conv_general_dilated")


def rules(**kwargs):
    rule = lora.LoraRule(rank=1, alpha=0.5, op_names=LOOKUPS + PRODUCTS, **kwargs)
    return [rule]


def planned(case, rules):
    """A case's traced call and plan, with its params and input as JAX arrays."""
    params = jax.tree.map(jnp.asarray, case.params)
    x = jax.tree.map(jnp.asarray, case.x)
    traced = trace_function(case.function, (params, x), {})
    return traced, make_plan(traced, rules)


def random_adapters(layouts, seed=5):
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(
            rng.uniform(0.5 if path[-1].endswith("magnitude") else -1, 1, shape),
            jnp.float32,
        )
        for layout in layouts.values()
        for path, shape in layout.shapes.items()
    }


def mapped(tree, change):
    """A tree of params with each changed, from its path and value."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, value: change(param_path(keys), value), tree
    )


def reference_weight(layout, weight, adapters):
    """The merged weight in float64, from the definition of an adapter."""
    parts = [np.asarray(adapters[path], np.float64) for path in layout.shapes]
    a, b, *magnitude = parts
    shape = layout.shape
    weight = np.asarray(weight, np.float64)
    whole = np.zeros(shape)
    batch = [axis for axis in layout.a_axes if axis in layout.b_axes]
    lead = [*layout.layers, *batch]
    rest_a = [axis for axis in layout.a_axes if axis not in batch]
    rest_b = [axis for axis in layout.b_axes if axis not in batch]
    a = a.reshape([*(shape[i] for i in [*lead, *rest_a]), layout.rank])
    b = b.reshape([shape[i] for i in lead] + [layout.rank] + [shape[i] for i in rest_b])
    for index in np.ndindex(*shape):
        row = a[tuple(index[i] for i in [*lead, *rest_a])]
        column = b[
            (*(index[i] for i in lead), slice(None), *(index[i] for i in rest_b))
        ]
        whole[index] = weight[index] + layout.scaling * row @ column
    if magnitude:
        norm = np.sqrt((whole**2).sum(layout.contracted))
        gain = np.expand_dims(magnitude[0] / norm, layout.contracted)
        whole = whole * gain
    return whole


# The op contracts a part of an axis of the param.
REFUSED = ("contracted outer part", "contracted inner part")


# Magnitudes go along with every second case.
@pytest.mark.parametrize(
    ("name", "dora"), [(name, i % 2 == 1) for i, name in enumerate(CASES)]
)
@pytest.mark.slow
def test_every_spelling(name, dora):
    case = CASES[name]
    provider = lora.LoraProvider(rules(dora=dora), allow_unmatched=True)
    traced, plan = planned(case, provider.rules)
    if name in REFUSED:
        with pytest.raises(ValueError, match="contracts a part of axis"):
            find_layouts(plan)
        return
    layouts = {path: layout for path, (layout, _) in find_layouts(plan).items()}
    adapters = random_adapters(layouts)

    @jax.jit
    def adapted(adapters):
        return provider.transform(provider.adapt(traced, plan, adapters), plan)

    def merged(path, value):
        if path in layouts:
            dtype = jax.device_put(value).dtype
            value = reference_weight(layouts[path], value, adapters).astype(dtype)
        return value

    got = adapted(adapters)
    want = jax.jit(case.function)(mapped(case.params, merged), case.x)
    tolerance = 2e-2 if "bfloat16" in name else 3e-5
    got, want = np.float64(got), np.float64(want)
    np.testing.assert_allclose(got, want, atol=tolerance * max(1, abs(want).max()))

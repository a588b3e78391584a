"""Checkpoints of float tensors: read, quantized on the way, and written."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import qwix_train
from qwix_train import HowToQuantize
from qwix_train.core.qarray import quantize_array
from qwix_train.ptq import hugging_face, safetensors_files
from qwix_train.ptq.hugging_face import Place
from qwix_train.values import stored

LAYERS, HEADS, HEAD, SIZE = 3, 4, 8, 16
RNG = np.random.default_rng(0)
TENSORS = {
    **{
        f"layers.{i}.{name}": RNG.normal(size=shape).astype(np.float32)
        for i in range(LAYERS)
        for name, shape in {
            "q.weight": (HEADS * HEAD, SIZE),
            "q.bias": (HEADS * HEAD,),
            "o.weight": (SIZE, HEADS * HEAD),
        }.items()
    },
    "norm.weight": RNG.normal(size=SIZE).astype(np.float32),
}
Q = [TENSORS[f"layers.{i}.q.weight"] for i in range(LAYERS)]
O = [TENSORS[f"layers.{i}.o.weight"] for i in range(LAYERS)]  # noqa: E741
B = [TENSORS[f"layers.{i}.q.bias"] for i in range(LAYERS)]
SPLIT = {
    "q": np.stack([x.reshape(HEADS, HEAD, SIZE).transpose(2, 0, 1) for x in Q]),
    "bias": np.stack([x.reshape(HEADS, HEAD) for x in B]),
    "o": np.stack([x.reshape(SIZE, HEADS, HEAD).transpose(1, 2, 0) for x in O], 1),
}
# What is in a file, and as NumPy says that it stands in a model, two ways.
SCANNED = (
    {
        "layers.{layer}.q.weight": Place("layers/q/kernel", "(h k) i -> layer i h k"),
        "layers.{layer}.q.bias": Place("layers/q/bias", "(h k) -> layer h k"),
        "layers.{layer}.o.weight": Place("layers/o/kernel", "o (h k) -> h layer k o"),
        "norm.weight": Place("norm/scale"),
    },
    {
        "layers": {
            "q": {"kernel": SPLIT["q"], "bias": SPLIT["bias"]},
            "o": {"kernel": SPLIT["o"]},
        },
        "norm": {"scale": TENSORS["norm.weight"]},
    },
)
LISTED = (
    {
        "layers.{layer}.q.weight": Place("layers_{layer}/q/kernel", "o i -> i o"),
        "layers.{layer}.q.bias": Place("layers_{layer}/q/bias"),
        "layers.{layer}.o.weight": Place("layers_{layer}/o/kernel", "o i -> i o"),
        "norm.weight": Place("norm/scale"),
    },
    {
        **{
            f"layers_{i}": {"q": {"kernel": Q[i].T, "bias": B[i]}, "o": {"kernel": w.T}}
            for i, w in enumerate(O)
        },
        "norm": {"scale": TENSORS["norm.weight"]},
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("checkpoint")
    save_file(TENSORS, found / "model.safetensors")
    return found


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("mapping, params", [SCANNED, LISTED], ids=["scanned", "list"])
def test_it_is_read_and_written(folder, tmp_path, mapping, params):
    got = hugging_face.load(folder, mapping, params)
    assert_same(got, params)
    hugging_face.save(tmp_path / "one", got, mapping, config={"model_type": "x"})
    assert_same(load_file(tmp_path / "one" / "model.safetensors"), TENSORS)
    assert (tmp_path / "one" / "config.json").read_text().count("model_type") == 1
    hugging_face.save(tmp_path / "many", got, mapping, max_shard_bytes=4096)
    shards = sorted(tmp_path.glob("many/model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert_same({k: x for f in shards for k, x in load_file(f).items()}, TENSORS)
    assert_same(hugging_face.load(tmp_path / "many", mapping, params), params)


def test_it_is_cast_to_the_dtype_of_the_param(folder):
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), SCANNED[1]
    )
    got = hugging_face.load(folder, SCANNED[0], params)
    assert_same(got, jax.tree.map(lambda x: x.astype(jnp.bfloat16), SCANNED[1]))


def test_names_that_are_no_numbers_and_tensors_joined_in_an_axis(tmp_path):
    tensors = {f"mlp.{n}_proj.weight": RNG.normal(size=(6, 4)) for n in ("up", "gate")}
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    gate, up = (tensors[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    values = {"part": ("gate", "up")}
    for axes, expected in (
        ("o i -> part i o", np.stack([gate, up])),
        ("o i -> i (part o)", np.concatenate([gate, up], 1)),
        ("o i -> i (o part)", np.stack([gate, up], -1).reshape(4, 12)),
    ):
        mapping = {"mlp.{part}_proj.weight": Place("kernel", axes, values)}
        sharding = NamedSharding(Mesh(jax.devices()[:2], "x"), PartitionSpec(None, "x"))
        for given in (None, sharding):
            got = hugging_face.load(
                tmp_path, mapping, {"kernel": expected}, shardings=given
            )
            assert_same(got["kernel"], expected)
        hugging_face.save(tmp_path / axes, {"kernel": expected}, mapping)
        assert_same(load_file(tmp_path / axes / "model.safetensors"), tensors)


HOWS = {
    "int8": HowToQuantize(qtype="int8", channelwise_axes=[0, 2, 3]),
    "int4 tiles": HowToQuantize(
        qtype="int4", channelwise_axes=[0, 2, 3], tiled_axes={1: 4}
    ),
    "one scale per layer": HowToQuantize(qtype="int8", channelwise_axes=[0]),
    "minmax, one per layer": HowToQuantize(
        qtype="int4", channelwise_axes=[0], calibration_method="minmax"
    ),
    "one scale for all layers": HowToQuantize(qtype="int8"),
    "fixed": HowToQuantize(qtype="int8", calibration_method="fixed,-3,3"),
    "rms": HowToQuantize(
        qtype="int8", channelwise_axes=[0, 3], calibration_method="rms,3"
    ),
    "nvfp4": HowToQuantize(
        qtype="nvfp4", channelwise_axes=[0, 2, 3], tiled_axes={1: 16}, tensor_axes=[0]
    ),
    "nvfp4, one tensor": HowToQuantize(
        qtype="nvfp4", channelwise_axes=[0, 2, 3], tiled_axes={1: 16}
    ),
}


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_a_stack_has_the_codes_of_the_whole(folder, how):
    mapping, params = SCANNED
    abstract = jax.tree.map(stored.shape_of, params)
    kernel = stored.quantize_param(abstract["layers"]["q"]["kernel"], how)
    abstract["layers"]["q"]["kernel"] = kernel
    got = hugging_face.load(folder, mapping, abstract)
    assert_same(got, qwix_train.quantize_params(params, abstract))
    expected = quantize_array(jnp.asarray(SPLIT["q"]), how)
    assert_same(got["layers"]["q"]["kernel"].array, expected)


@pytest.mark.parametrize(
    "qtype", ["int8", pytest.param("int4", marks=pytest.mark.slow)]
)
def test_onto_a_mesh(folder, qtype):
    mapping, params = SCANNED
    mesh = Mesh(np.reshape(jax.devices(), (2, 4)), ("data", "model"))
    how = HowToQuantize(qtype=qtype, channelwise_axes=[0, 2, 3], tiled_axes={1: 4})
    abstract = jax.tree.map(stored.shape_of, params)
    kernel = stored.quantize_param(abstract["layers"]["q"]["kernel"], how)
    abstract["layers"]["q"]["kernel"] = kernel

    def named(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    by_path = {
        "layers/q/kernel": named(None, "data", "model"),
        "layers/o/kernel": named("model", None, None, "data"),
    }
    tree = {
        "layers": {
            "q": {"kernel": by_path["layers/q/kernel"]},
            "o": by_path["layers/o/kernel"],
        }
    }
    expected = qwix_train.quantize_params(params, abstract)
    for shardings in (by_path.get, tree):
        got = hugging_face.load(folder, mapping, abstract, shardings=shardings)
        assert_same(got, expected)
        array = got["layers"]["q"]["kernel"].array
        assert array.qvalue.sharding.is_equivalent_to(by_path["layers/q/kernel"], 4)
        assert array.scale.sharding.is_equivalent_to(by_path["layers/q/kernel"], 4)
        other = got["layers"]["o"]["kernel"].sharding
        assert other.is_equivalent_to(by_path["layers/o/kernel"], 4)
    with pytest.raises(ValueError, match="sharding for 'layers/k'.* no param"):
        tree["layers"]["k"] = named()
        hugging_face.load(folder, mapping, abstract, shardings=tree)


@pytest.mark.parametrize("layers", [(0,), ()], ids=["by layer", "all layers"])
def test_packed_codes_with_quantized_scales(folder, tmp_path, layers):
    mapping, params = SCANNED
    how = HOWS["int4 tiles"]
    abstract = jax.tree.map(stored.shape_of, params)
    kernel = stored.quantize_param(abstract["layers"]["q"]["kernel"], how)
    abstract["layers"]["q"]["kernel"] = stored.packed(kernel, layers)
    got = hugging_face.load(folder, mapping, abstract)
    expected = stored.packed(stored.quantize_param(SPLIT["q"], how), layers)
    assert_same(got["layers"]["q"]["kernel"], expected)
    assert_same(qwix_train.quantize_params(params, abstract), got)
    qwix_train.ptq.save(tmp_path / "packed", got)
    assert_same(qwix_train.ptq.restore(tmp_path / "packed", abstract), got)


def test_a_device_reads_its_part_alone(folder, monkeypatch):
    """What is read of a file: pages of a mapped array, which are counted here."""
    read = []

    class Counted(np.ndarray):
        def __getitem__(self, index):
            found = super().__getitem__(index)
            read.append(found.size)
            return found

    whole = safetensors_files.TensorInFile.mapped
    monkeypatch.setattr(
        safetensors_files.TensorInFile,
        "mapped",
        lambda tensor: whole(tensor).view(Counted),
    )
    mesh = Mesh(jax.devices()[:4], "x")
    shardings = {
        "layers/q/kernel": NamedSharding(mesh, PartitionSpec(None, None, "x")),
        "layers/o/kernel": NamedSharding(mesh, PartitionSpec("x")),
        "norm/scale": NamedSharding(mesh, PartitionSpec("x")),
        "layers/q/bias": NamedSharding(mesh, PartitionSpec(None, "x")),
    }
    got = hugging_face.load(folder, *SCANNED, shardings=shardings.get)
    assert_same(got, SCANNED[1])
    assert sum(read) == sum(x.size for x in TENSORS.values())
    assert max(read) == HEADS * HEAD * SIZE // 4


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(SIZE, SIZE, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


LINEAR = {
    "fc.{layer}.weight": Place("layers/{layer}/kernel", "o i -> i o"),
    "fc.{layer}.bias": Place("layers/{layer}/bias"),
}


def test_an_nnx_model_with_static_ranges(tmp_path):
    model, x = Mlp(nnx.Rngs(0)), jnp.ones((2, SIZE))
    hugging_face.save(tmp_path, model, LINEAR)
    rules = [
        qwix_train.QuantizationRule(
            weight_qtype="int8", act_qtype="int8", act_static_scale=True
        )
    ]
    absmax = {"sum_of_absmax": jnp.full((1, 1), 2.0), "count": jnp.ones((), jnp.int32)}
    stats = {"layers": {i: {"dot_general0_lhs": absmax} for i in range(2)}}
    expected, tree = qwix_train.ptq.quantize(model, None, rules, x, quant_stats=stats)
    floats = nnx.eval_shape(lambda: Mlp(nnx.Rngs(0)))
    nnx.update(floats, hugging_face.load(tmp_path, LINEAR, floats))
    np.testing.assert_array_equal(floats(x), model(x))
    abstract = nnx.eval_shape(lambda: Mlp(nnx.Rngs(0)))
    got = qwix_train.quantize_model(abstract, qwix_train.PtqProvider(rules), x)
    nnx.update(got, hugging_face.load(tmp_path, LINEAR, got, quant_stats=stats))
    assert_same(qwix_train.ptq.to_tree(got), tree)
    np.testing.assert_array_equal(got(x), expected(x))
    got = qwix_train.quantize_model(abstract, qwix_train.PtqProvider(rules), x)
    with pytest.raises(ValueError, match="2 activations have a static range"):
        hugging_face.load(tmp_path, LINEAR, got)
    with pytest.raises(ValueError, match="These are quantized, or ranges and scales"):
        hugging_face.save(tmp_path / "quantized", got, LINEAR)


def test_all_that_does_not_fit_is_named_at_once(folder):
    mapping, params = SCANNED
    mapping = {
        **mapping,
        "layers.{layer}.q.weight": Place("layers/q/kernel", "o i -> layer i o"),
        "layers.{layer}.o.weight": Place("head/kernel", "o i -> layer i o"),
        "norm.weight": Place("norm/bias"),
        "model.{layer}.weight": Place("nothing/{layer}"),
    }
    params = {
        **params,
        "more": np.ones(2, np.float32),
        "norm": {"bias": np.ones(9, np.float32)},
        "late": {"kernel": np.ones(2, np.float32)},
    }
    mapping["late.weight"] = Place("late/kernel")
    with pytest.raises(ValueError) as error:
        hugging_face.load(folder, mapping, params)
    message = str(error.value)
    for part in (
        "match neither a tensor nor a param: model.{layer}.weight (nothing/{layer})",
        "layers/q/kernel [3, 16, 4, 8] of layers.0.q.weight [32, 16]: 3 axes are named",
        "norm/bias [9] of norm.weight [16]: no axes are given",
        "Missing tensors: late.weight (for late/kernel)",
        "Params without a place in the mapping: layers/o/kernel, more",
        "layers.0.o.weight (the model has no such head/kernel)",
    ):
        assert part in message, (part, message)
    with pytest.raises(ValueError, match=r"norm.weight \(the mapping has no place"):
        hugging_face.load(folder, SCANNED[0] | {"norm.weight": ()}, SCANNED[1])
    params = {"layers": SCANNED[1]["layers"]}
    assert_same(
        hugging_face.load(folder, SCANNED[0] | {"norm.weight": None}, params), params
    )


@pytest.mark.parametrize(
    "axes, message",
    [
        ("o i", "have no '->'"),
        ("o i -> i", "lose o"),
        ("o o -> o", "name an axis twice"),
        ("o [i] -> o i", "are not like"),
    ],
)
def test_axes_are_checked_when_they_are_given(axes, message):
    with pytest.raises(ValueError, match=message):
        Place("kernel", axes)


KERNEL = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize(
    "mapping, message",
    [
        ({"w": Place("l_{n}/k")}, r"lacks: n \(of l_{n}/k, for w\)"),
        ({"{n}": Place("l_{n}/k", values={"m": ["0"]})}, "lacks: m"),
        ({"w": Place("l_0/k"), "{n}": Place("l_1/k")}, "axes '' stack"),
        ({"w": Place("l_0/k"), "w{n}": [Place("l_{n}/k")]}, "with two places"),
    ],
)
def test_a_mapping_that_would_lose_a_param(tmp_path, mapping, message):
    params = {"l_0": {"k": KERNEL}, "l_1": {"k": KERNEL + 1}}
    with pytest.raises(ValueError, match=message):
        hugging_face.save(tmp_path, params, mapping)


def test_two_entries_for_a_tensor(tmp_path):
    mapping = {
        "w.0": Place("a"),
        "w.{n}": Place("b", "i o -> n i o"),
    }
    params = {"a": KERNEL, "b": np.stack([KERNEL, KERNEL])}
    with pytest.raises(ValueError, match=r"two entries in the mapping: w\.0"):
        hugging_face.save(tmp_path, params, mapping)


def test_places_of_a_tensor_have_the_same_numbers(tmp_path):
    mapping = {"w": [Place("embedding"), Place("head", "n d -> d n")]}
    hugging_face.save(
        tmp_path / "tied", {"embedding": KERNEL, "head": KERNEL.T}, mapping
    )
    with pytest.raises(ValueError, match="Tensor w has several places, and head"):
        params = {"embedding": KERNEL, "head": KERNEL.T + 1}
        hugging_face.save(tmp_path / "untied", params, mapping)
    assert not (tmp_path / "untied").exists()


def test_what_cannot_be_saved(tmp_path):
    shape = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    with pytest.raises(TypeError, match="'a' has no values"):
        hugging_face.save(tmp_path, {"a": shape}, {"w": Place("a")})
    for place in "a", ["a"]:
        with pytest.raises(TypeError, match="has 'a' for 'w'. Expected a Place"):
            hugging_face.save(tmp_path, {"a": KERNEL}, {"w": place})  # type: ignore


def test_a_sharding_that_is_none(folder):
    mapping, params = SCANNED
    own = {"layers/q/kernel": "data"}
    with pytest.raises(TypeError, match="sharding of layers/q/kernel is 'data'"):
        hugging_face.load(folder, mapping, params, shardings=own.get)


@pytest.mark.parametrize("values", [(), "up", ("up", "up")])
def test_values_are_texts(values):
    with pytest.raises(ValueError, match="values of 'part' are"):
        Place("kernel", values={"part": values})


def test_the_axis_of_layers():
    axes = {
        axis: hugging_face.mapping("llama", layers="layers", layer_axis=axis)[
            "model.layers.{layer}.input_layernorm.weight"
        ].axes
        for axis in (0, 1, -1)
    }
    assert axes == {0: "d -> layer d", 1: "d -> d layer", -1: "d -> d layer"}
    with pytest.raises(ValueError, match="Axis 2 is out of range"):
        hugging_face.mapping("llama", layers="layers", layer_axis=2)


def test_other_dtypes_are_not_cast(folder):
    params = {**SCANNED[1], "norm": {"scale": np.ones(SIZE, np.int32)}}
    with pytest.raises(ValueError, match="norm.weight .float32, and norm/scale is int"):
        hugging_face.load(folder, SCANNED[0], params)


@pytest.mark.parametrize(
    "numbers,dtype", [([0, 2**40, -5], "int32"), ([0, 300], "int8"), ([-1], "uint8")]
)
def test_integers_are_cast_only_where_they_fit(tmp_path, numbers, dtype):
    save_file({"ids": np.array(numbers)}, tmp_path / "model.safetensors")
    params = {"ids": np.zeros(len(numbers), dtype)}
    message = f"ids: its int64 numbers from .* do not fit into {dtype}"
    with pytest.raises(ValueError, match=message):
        hugging_face.load(tmp_path, {"ids": Place("ids")}, params)
    save_file({"ids": np.array([0, 100])}, tmp_path / "model.safetensors")
    params = {"ids": np.zeros(2, dtype)}
    read = hugging_face.load(tmp_path, {"ids": Place("ids")}, params)["ids"]
    assert read.dtype == dtype and read.tolist() == [0, 100]


def test_a_damaged_tensor_is_found(tmp_path):
    hugging_face.save(tmp_path, LISTED[1], LISTED[0])
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match="is damaged: .* another checksum: norm.weight"
    ):
        hugging_face.load(tmp_path, *LISTED)


def test_what_is_in_the_folder(tmp_path):
    mapping, params = LISTED
    hugging_face.save(tmp_path, params, mapping)
    with pytest.raises(FileExistsError, match="Pass overwrite=True"):
        hugging_face.save(tmp_path, params, mapping)
    hugging_face.save(tmp_path, params, mapping, overwrite=True)
    with pytest.raises(FileExistsError, match="holds model.safetensors, which readers"):
        hugging_face.save(
            tmp_path, params, mapping, max_shard_bytes=4096, overwrite=True
        )
    (tmp_path / "model.safetensors").unlink()
    hugging_face.save(tmp_path, params, mapping, max_shard_bytes=4096)
    missing = sorted(tmp_path.glob("model-0*"))[-1]
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=f"There is no {missing.name}"):
        hugging_face.load(tmp_path, mapping, params)


@pytest.mark.parametrize("family", ["llama", "bert", "mixtral"])
def test_families_name_what_stacked_layers_have(family):
    listed = hugging_face.mapping(family)
    stacked = hugging_face.mapping(family, layers="layers", layer_axis=1)
    assert listed.keys() == stacked.keys()
    for name, place in stacked.items():
        other = listed[name]
        if place is not None and other is not None and "{layer}" in name:
            assert other.param == place.param.replace("layers/", "layers_{layer}/")
            assert place.axes.split("-> ")[1].split()[1] == "layer"
    with pytest.raises(ValueError, match="no mapping for 'gpt'; .* bert, deepseek_v3"):
        hugging_face.mapping("gpt")


MEASURED = """
import json, re, sys
import jax, numpy as np
from qwix_train import HowToQuantize
from qwix_train.ptq import hugging_face
from qwix_train.values import stored

ALL = int(sys.argv[3])

def read(kind, layers):
    struct = jax.ShapeDtypeStruct((layers, 2048, 4096), np.float32)
    how = HowToQuantize(qtype="int8", channelwise_axes=[0, 2])
    param = struct if kind == "float" else stored.quantize_param(struct, how)
    place = hugging_face.Place("kernel", "o i -> layer i o")
    mapping = {"l.{layer}": place}
    if layers == 1:
        mapping |= {f"l.{i}": None for i in range(1, ALL)}
    params = hugging_face.load(sys.argv[1], mapping, {"kernel": param})
    return sum(x.nbytes for x in jax.tree.leaves(params))

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

read(sys.argv[2], 1)
before = peak()
size = read(sys.argv[2], ALL)
print(json.dumps([peak() * 1024 - before * 1024, size]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says the peak of memory")
@pytest.mark.parametrize(("kind", "layers"), [("float", 8), ("int8", 16)])
def test_the_peak_of_memory(tmp_path, kind, layers):
    file, size = tmp_path / "model.safetensors", 4 * 2048 * 4096
    layer = np.random.default_rng(0).normal(size=(4096, 2048)).astype(np.float32)
    save_file({f"l.{i}": layer + i for i in range(layers)}, file)
    script = pathlib.Path(tmp_path / "script.py")
    script.write_text(MEASURED)
    done = subprocess.run(
        [sys.executable, script, file, kind, str(layers)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, result = map(int, done.stdout.strip("[]\n").split(","))
    # XLA's programs for slices, and what `malloc` keeps, come on top.
    assert grown < result + 2 * size + 2**25
    of_layer = size if kind == "float" else size // 4 + 4 * 4096
    assert result == layers * of_layer


def test_a_linen_model_runs_on_it(folder):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.LayerNorm(use_bias=False, name="norm")(x)
            for index in range(LAYERS):
                layer = Layer(name=f"layers_{index}")
                y = layer(y)
            return y

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(HEADS * HEAD, name="q")(x)
            return nn.Dense(SIZE, use_bias=False, name="o")(y)

    x = RNG.normal(size=(2, SIZE)).astype(np.float32)
    rules = [qwix_train.QuantizationRule(weight_qtype="int8")]
    expected, params = qwix_train.ptq.quantize(Model(), LISTED[1], rules, x)
    provider = qwix_train.PtqProvider(rules)
    model = qwix_train.quantize_model(Model(), provider)
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    got = hugging_face.load(folder, LISTED[0], abstract)
    assert_same(got, params)
    wanted = expected.apply({"params": params}, x)
    np.testing.assert_array_equal(model.apply({"params": got}, x), wanted)

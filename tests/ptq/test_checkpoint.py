import concurrent.futures
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qwix_train
from qwix_train import QuantizationRule, as_model
from qwix_train.core.qarray import QArray, WithAux, quantize_array
from qwix_train.ptq import checkpoint
from tests.compare import assert_same

HOWS = [
    *(
        dict(qtype=qtype, channelwise_axes=(1,))
        for qtype in (
            *("int8", "int5", "int4", "int3", "int2", "int1"),
            *("nf4", "float8_e4m3fn", "float8_e5m2"),
        )
    ),
    dict(qtype="int8", channelwise_axes=(1,), calibration_method="minmax"),
    dict(qtype="int4", channelwise_axes=(1,), calibration_method="minmax"),
    dict(qtype="int1", calibration_method="minmax"),
    dict(qtype="int4", channelwise_axes=(1,), tiled_axes={0: 8}),
    dict(qtype="int3", tiled_axes={0: 8, 1: 0.25}, calibration_method="minmax"),
    dict(qtype="nf4", channelwise_axes=(1,), tiled_axes={0: 10}, pad_tiles=True),
]
ID = {"ids": lambda how: " ".join(map(str, how.values()))}


def weight(shape=(32, 24), dtype=jnp.float32, seed=0):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jnp.asarray(x, dtype)


def quantized(shape=(32, 24), dtype=jnp.float32, seed=0, **how):
    how = qwix_train.HowToQuantize(**how)
    return WithAux(quantize_array(weight(shape, dtype, seed), how), how)


def tree(**how):
    """What the params of a quantized model may hold."""
    act = qwix_train.HowToQuantize(qtype="int8")
    return {
        "Dense_0": {
            "kernel": quantized(**how),
            "bias": weight((24,), jnp.bfloat16),
            "dot_general0_lhs_scale": WithAux(jnp.full((1, 1), 0.5), act),
        },
        "layers": {"a.b": {"c/d": jnp.arange(3), "%": jnp.array([True, False])}},
    }


def abstract(params):
    return jax.eval_shape(lambda: params)


def disk_size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "hows",
    [
        pytest.param(HOWS[:1], id="int8"),
        pytest.param(HOWS[1:], id="others", marks=pytest.mark.slow),
    ],
)
def test_what_is_restored_is_what_was_saved(tmp_path, hows):
    params = {str(index): tree(**how) for index, how in enumerate(hows)}
    checkpoint.save(tmp_path / "a", params)
    assert_same(checkpoint.restore(tmp_path / "a"), params)
    assert_same(checkpoint.restore(tmp_path / "a", abstract(params)), params)


def test_a_frozen_dict_and_integer_keys_come_back(tmp_path):
    kernel = quantized(qtype="int4", channelwise_axes=(1,))
    params = FrozenDict({"layers": {0: kernel, 1: weight((3,))}})
    checkpoint.save(tmp_path / "a", params)
    assert_same(checkpoint.restore(tmp_path / "a", abstract(params)), params)
    assert_same(checkpoint.restore(tmp_path / "a"), params.unfreeze())


@pytest.mark.slow
def test_arrays_without_with_aux_of_rank_0_and_of_narrow_dtypes(tmp_path):
    params = {
        "bare": quantized(qtype="int4").array,
        "scalar": QArray(jnp.array(-3, jnp.int4), jnp.array(0.5)),
        "int4": jnp.arange(-3, 4).astype(jnp.int4),
        "uint4": jnp.arange(9, 16).astype(jnp.uint4),
        "wide": QArray(
            jnp.array([[-8, 7, 1]], jnp.int8), jnp.ones((1, 1)), None, "int4"
        ),
        "numpy": np.arange(6, dtype=np.float32).reshape(2, 3),
    }
    checkpoint.save(tmp_path / "a", params)
    assert_same(checkpoint.restore(tmp_path / "a"), params)


def test_boxes_are_not_stored_but_kept_from_the_abstract_params(tmp_path):
    params = tree(qtype="int4", channelwise_axes=(1,))
    q = params["Dense_0"]["kernel"].array
    boxed = WithAux(
        q.replace(
            qvalue=nn.Partitioned(q.qvalue, ("in", "out")),
            scale=nn.LogicallyPartitioned(q.scale, (None, "out")),
        ),
        params["Dense_0"]["kernel"].how,
    )
    params_boxed = {**params, "Dense_0": {**params["Dense_0"], "kernel": boxed}}
    checkpoint.save(tmp_path / "a", params_boxed)
    assert_same(checkpoint.restore(tmp_path / "a"), params)
    restored = checkpoint.restore(tmp_path / "a", abstract(params_boxed))
    assert_same(restored, params_boxed)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "qtype, most", [("int4", 0.5), ("nf4", 0.5), ("int2", 0.25), ("int1", 0.125)]
)
def test_size_on_disk(tmp_path, qtype, most):
    kernels = {
        f"Dense_{i}": {
            "kernel": quantized((512, 512), seed=i, qtype=qtype, channelwise_axes=(1,))
        }
        for i in range(4)
    }
    checkpoint.save(tmp_path / "a", kernels)
    count, scales = 4 * 512 * 512, 4 * 512 * 4
    assert disk_size(tmp_path / "a") <= (most + 0.05) * count + scales


def test_the_manifest_has_rules_plan_versions_and_metadata(tmp_path):
    model = nn.Dense(8)
    rules = [
        qwix_train.QuantizationRule(
            module_path="",
            op_names=("dot_general",),
            weight_qtype=jnp.int4,
            tile_size=4,
        ),
        qwix_train.QuantizationRule(weight_qtype="nf4", tile_size=0.5),
    ]
    plan = qwix_train.plan(model, rules, jnp.ones((2, 16)))
    params = tree(qtype="int4", tiled_axes={0: 8}, channelwise_axes=(1,))
    checkpoint.save(
        tmp_path / "a", params, rules=rules, plan=plan, metadata={"accuracy": 0.5}
    )
    manifest = checkpoint.read_manifest(tmp_path / "a")
    assert list(manifest.rules) == rules
    assert type(manifest.rules[0].tile_size) is int
    assert manifest.plan == json.loads(json.dumps(plan.records()))
    assert manifest.metadata == {"accuracy": 0.5}
    assert manifest.versions["jax"] == jax.__version__
    kernel = {param.name: param for param in manifest.params}["Dense_0/kernel"]
    assert (kernel.shape, kernel.qtype) == ((32, 24), "int4")
    assert kernel.how == params["Dense_0"]["kernel"].how
    assert kernel.arrays["scale"].shape == (4, 24)
    assert kernel.arrays["qvalue"].packed_as == "int4"


def test_noise_functions_are_left_out_and_taken_from_the_model(tmp_path):
    how = dict(qtype="int4", noise_fn=jnp.zeros)
    params = {"kernel": quantized(**how)}
    checkpoint.save(tmp_path / "a", params)
    assert checkpoint.restore(tmp_path / "a")["kernel"].how.noise_fn is None
    assert_same(checkpoint.restore(tmp_path / "a", abstract(params)), params)


SOME = [HOWS[i] for i in (0, 2, 3, 5, 7, 10, 13)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("how", SOME, **ID)
def test_plain_orbax_takes_the_tree(tmp_path, how):
    """But not nf4: TensorStore has no type for its codes, which are uint4."""
    params = tree(**how)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", params)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
        assert_same(checkpointer.restore(tmp_path / "a", like), params)


class TestShards:
    @staticmethod
    def mesh(kind=AxisType.Auto):
        return jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))

    @pytest.mark.parametrize(
        "kind, hows",
        [
            pytest.param(AxisType.Auto, SOME[:1], id="int8"),
            *(
                pytest.param(kind, hows, id=kind.name, marks=pytest.mark.slow)
                for kind, hows in (
                    (AxisType.Auto, [*SOME[1:], HOWS[-1]]),
                    (AxisType.Explicit, SOME[2:4]),
                )
            ),
        ],
    )
    def test_saved_from_a_mesh_and_restored_into_another(self, tmp_path, hows, kind):
        params = {str(i): tree(**how)["Dense_0"] for i, how in enumerate(hows)}
        mesh = self.mesh(kind)
        kernel = NamedSharding(mesh, PartitionSpec("a", "b"))
        checkpoint.save(tmp_path / "a", params)
        shardings = {name: {"kernel": kernel} for name in params}
        first = checkpoint.restore(tmp_path / "a", shardings=shardings)
        assert_same(first, params)
        for layer in first.values():
            q = layer["kernel"].array
            assert q.qvalue.sharding == kernel
            for part in (q.scale, q.zero_point):
                if part is not None:
                    want = [
                        n // s if n % s == 0 else n
                        for n, s in zip(part.shape, (2, 4), strict=True)
                    ]
                    assert list(part.sharding.shard_shape(part.shape)) == want
        checkpoint.save(tmp_path / "b", first)
        turned = NamedSharding(mesh, PartitionSpec(None, ("b", "a")))
        second = checkpoint.restore(tmp_path / "b", shardings=turned.update(spec=()))
        assert_same(second, params)

    def test_small_shards(self, tmp_path):
        """Shards of fewer codes than fill a byte."""
        everywhere = NamedSharding(self.mesh(), PartitionSpec(("a", "b")))
        q = quantized((8,), qtype="int3").array
        q = q.replace(qvalue=jax.device_put(q.qvalue, everywhere))
        checkpoint.save(tmp_path / "a", {"w": q})
        restored = checkpoint.restore(tmp_path / "a", shardings=everywhere)
        assert_same(restored, {"w": q})
        assert restored["w"].qvalue.sharding == everywhere

    def test_shardings_of_the_abstract_params(self, tmp_path):
        params = tree(qtype="int4", channelwise_axes=(1,))
        checkpoint.save(tmp_path / "a", params)
        sharding = NamedSharding(self.mesh(), PartitionSpec(None, "b"))
        like = abstract(params)
        kernel = like["Dense_0"]["kernel"]
        codes = jax.ShapeDtypeStruct((32, 24), jnp.int4, sharding=sharding)
        like["Dense_0"]["kernel"] = WithAux(
            kernel.array.replace(qvalue=codes), kernel.how
        )
        restored = checkpoint.restore(tmp_path / "a", like)
        assert_same(restored, params)
        q = restored["Dense_0"]["kernel"].array
        assert q.qvalue.sharding == q.scale.sharding == sharding
        bias = restored["Dense_0"]["bias"]
        assert bias.sharding.device_set == {jax.devices()[0]}

    def test_a_tree_of_shardings_may_be_as_deep_as_the_arrays(self, tmp_path):
        params = tree(qtype="int4", channelwise_axes=(1,))
        checkpoint.save(tmp_path / "a", params)
        mesh = self.mesh()
        own = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
        restored = checkpoint.restore(tmp_path / "a", shardings=own)
        assert_same(restored, params)
        assert all(len(x.devices()) == 8 for x in jax.tree.leaves(restored))

    def test_names_of_axes_become_shardings(self, tmp_path):
        """What `nn.get_sharding` makes of boxes is a tree that `restore` takes."""
        params = {"kernel": quantized(qtype="int4", channelwise_axes=(1,))}
        checkpoint.save(tmp_path / "a", params)
        q, how = params["kernel"].array, params["kernel"].how
        names = {"qvalue": ("a", "b"), "scale": (None, "b")}
        boxes = {k: nn.Partitioned(getattr(q, k), v) for k, v in names.items()}
        like = abstract({"kernel": WithAux(q.replace(**boxes), how)})
        shardings = nn.get_sharding(like, self.mesh())
        restored = checkpoint.restore(tmp_path / "a", shardings=shardings)
        assert_same(restored, params)
        for part, spec in names.items():
            sharding = getattr(restored["kernel"].array, part).sharding
            assert sharding.spec == PartitionSpec(*spec)

    def test_meshes_without_devices_say_nothing(self, tmp_path):
        params = {"w": quantized(qtype="int4", channelwise_axes=(1,))}
        checkpoint.save(tmp_path / "a", params)
        with jax.set_mesh(self.mesh(AxisType.Explicit)):
            how = params["w"].how
            like = jax.eval_shape(
                lambda: {"w": WithAux(quantize_array(jnp.zeros((32, 24)), how), how)}
            )
            restored = checkpoint.restore(tmp_path / "a", like)
            checkpoint.save(tmp_path / "b", restored)
        assert_same(restored, params)
        assert all(len(x.devices()) == 8 for x in jax.tree.leaves(restored))
        assert_same(checkpoint.restore(tmp_path / "b"), params)

    def test_a_sharding_that_does_not_divide_is_refused(self, tmp_path):
        checkpoint.save(tmp_path / "a", {"w": quantized((6, 6), qtype="int4")})
        sharding = NamedSharding(self.mesh(), PartitionSpec("b"))
        with pytest.raises(ValueError, match=r"Param 'w' of shape \(6, 6\) cannot be"):
            checkpoint.restore(tmp_path / "a", shardings=sharding)

    @pytest.mark.parametrize(
        "shardings, error, message",
        [
            (PartitionSpec("b"), TypeError, r"all params is P.*\('b',?\)"),
            ({"w": {"k": PartitionSpec("b")}}, TypeError, r"of w/k is P.*\('b',?\)"),
            ({"w": "b"}, TypeError, "w is 'b'.* NamedSharding"),
            ({"w": {"l": None}}, ValueError, "'w/l', where .* It has w/k"),
            ({"w": {"k": {"array": None}}}, ValueError, "'w/k/array', where"),
        ],
    )
    def test_shardings_that_would_be_passed_over(
        self, tmp_path, shardings, error, message
    ):
        checkpoint.save(tmp_path / "a", {"w": {"k": quantized((6, 6), qtype="int4")}})
        with pytest.raises(error, match=message):
            checkpoint.restore(tmp_path / "a", shardings=shardings)
        checkpoint.restore(tmp_path / "a", shardings={"w": None})


class TestRefusals:
    def test_other_models(self, tmp_path):
        params = tree(qtype="int4", channelwise_axes=(1,))
        checkpoint.save(tmp_path / "a", params)

        def refused(change):
            like = abstract(params)
            change(like)
            with pytest.raises(ValueError, match="is for another model") as error:
                checkpoint.restore(tmp_path / "a", like)
            assert str(tmp_path / "a") in str(error.value)
            return str(error.value)

        def put(name, value):
            return lambda like: like["Dense_0"].update({name: value})

        text = refused(lambda like: like["Dense_0"].pop("bias"))
        assert "Not in the model: Dense_0/bias." in text
        text = refused(put("other", jax.ShapeDtypeStruct((2,), jnp.float32)))
        assert "Missing in the checkpoint: Dense_0/other." in text
        text = refused(put("bias", jax.ShapeDtypeStruct((25,), jnp.bfloat16)))
        assert "value bfloat16[24], " in text and "value bfloat16[25], " in text
        for how in (
            dict(qtype="int8", channelwise_axes=(1,)),
            dict(qtype="int2", channelwise_axes=(1,)),
            dict(qtype="int4"),
            dict(qtype="int4", channelwise_axes=(1,), tiled_axes={0: 8}),
            dict(qtype="int4", channelwise_axes=(1,), calibration_method="rms,3"),
            dict(qtype="int4", channelwise_axes=(1,), dtype=jnp.bfloat16),
        ):
            text = refused(put("kernel", abstract(quantized(**how))))
            assert "Different: Dense_0/kernel (int4, qvalue int4[32, 24]" in text
        text = refused(put("kernel", jax.ShapeDtypeStruct((32, 24), jnp.float32)))
        assert "in float in the model: Dense_0/kernel. Give the params" in text

    def test_only_what_differs_in_how_a_param_was_quantized_is_printed(self, tmp_path):
        checkpoint.save(tmp_path / "a", tree(qtype="int4", channelwise_axes=(1,)))
        other = tree(qtype="int4", channelwise_axes=(1,), calibration_method="rms,3")
        with pytest.raises(ValueError, match="is for another model") as error:
            checkpoint.restore(tmp_path / "a", other)
        assert ", calibration_method='absmax', but" in str(error.value)
        assert ", calibration_method='rms,3')" in str(error.value)
        assert "channelwise_axes" not in str(error.value)

    def test_params_are_not_saved_with_rules_of_another_type(self, tmp_path):
        params = tree(qtype="int8", channelwise_axes=(1,))
        rules = [QuantizationRule(weight_qtype="int4")]
        with pytest.raises(ValueError, match="kernel has codes of int8, not int4"):
            checkpoint.save(tmp_path / "a", params, rules=rules)
        rules.append(QuantizationRule(weight_qtype="int8"))
        checkpoint.save(tmp_path / "a", params, rules=rules)

    def test_params_are_not_saved_with_a_plan_of_another_type(self, tmp_path):
        x = jax.ShapeDtypeStruct((1, 32), jnp.float32)
        params = {"Dense_0": tree(qtype="int8", channelwise_axes=(1,))["Dense_0"]}
        function = as_model(lambda p, x: x @ p["Dense_0"]["kernel"])
        rules = [QuantizationRule(weight_qtype="int4")]
        floats = {"Dense_0": {"kernel": jax.ShapeDtypeStruct((32, 24), jnp.float32)}}
        planned = qwix_train.plan(function, rules, floats, x)
        with pytest.raises(ValueError, match="kernel has codes of int8, not int4"):
            checkpoint.save(tmp_path / "a", params, plan=planned)

    def test_the_param_whose_array_changed_is_named(self, tmp_path):
        params = {
            name: {"kernel": quantized((64, 64), qtype="int8")} for name in ("x", "y")
        }
        other = {**params, "y": {"kernel": quantized((64, 64), seed=1, qtype="int8")}}
        checkpoint.save(tmp_path / "a", params)
        checkpoint.save(tmp_path / "b", other)
        shutil.rmtree(tmp_path / "a" / "arrays")
        shutil.copytree(tmp_path / "b" / "arrays", tmp_path / "a" / "arrays")
        with pytest.raises(ValueError, match="the arrays of y/kernel have another"):
            checkpoint.restore(tmp_path / "a")

    def test_an_array_that_is_missing_is_named(self, tmp_path):
        params = {name: weight((4,)) for name in ("x", "y")}
        checkpoint.save(tmp_path / "a", params)
        checkpoint.save(tmp_path / "b", {"x": params["x"]})
        shutil.rmtree(tmp_path / "a" / "arrays")
        shutil.copytree(tmp_path / "b" / "arrays", tmp_path / "a" / "arrays")
        with pytest.raises(ValueError, match="the arrays of y cannot be read"):
            checkpoint.restore(tmp_path / "a")

    @pytest.mark.parametrize(
        "old, new, message",
        [
            ('"axis": 1', '"axis": 0', "records of these params were changed: kernel"),
            ('"absmax"', '"minmax"', "records of these params were changed: kernel"),
            ('"step": 10', '"step": 11', "though not in the record of a param"),
            ('"version": 1', '"version": 9', "has format version 9"),
            ('"format": "qwix', '"format": "other', "not one of this package's"),
            ("{", "", "its manifest cannot be read"),
        ],
    )
    def test_edited_manifests(self, tmp_path, old, new, message):
        params = {"kernel": quantized(qtype="int4")}
        checkpoint.save(tmp_path / "a", params, metadata={"step": 10})
        (file,) = (
            f for f in (tmp_path / "a" / "manifest").iterdir() if f.stem == "metadata"
        )
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=message) as error:
            checkpoint.restore(tmp_path / "a")
        assert str(tmp_path / "a") in str(error.value)

    def test_nothing_there_and_not_ours(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint at .*/nothing"):
            checkpoint.restore(tmp_path / "nothing")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "plain", {"w": weight((3,))})
        with pytest.raises(ValueError, match="plain is not a complete checkpoint"):
            checkpoint.restore(tmp_path / "plain")

    @pytest.mark.parametrize(
        "value, error, message",
        [
            ([1, 2], TypeError, "Param 'a/b', value: expected an array, got list"),
            (1.0, TypeError, "Param 'a/b', value: expected an array, got float"),
            (np.array(["x"]), TypeError, "Param 'a/b', value: arrays of dtype <U1"),
            (np.ones(2), TypeError, "Param 'a/b', value: JAX holds no float64"),
            (np.ones(2, np.complex64), TypeError, "arrays of dtype complex64"),
            (jnp.ones(2, jnp.uint2), TypeError, "arrays of dtype uint2"),
            (jax.random.key(0), TypeError, "jax.random.key_data can"),
            (jnp.ones((2, 0)), ValueError, "Param 'a/b' has no elements"),
            (
                QArray(jnp.zeros((2, 2), jnp.int4), jnp.ones((1, 1)), None, "int1"),
                ValueError,
                r"outside of the range of their type in: a/b \(int1\)",
            ),
            (
                QArray(jnp.full((2, 2), 5, jnp.int8), jnp.ones((1, 1)), None, "int3"),
                ValueError,
                r"outside of the range of their type in: a/b \(int3\)",
            ),
        ],
        ids=lambda value: "" if isinstance(value, str) else None,
    )
    def test_what_cannot_be_stored(self, tmp_path, value, error, message):
        with pytest.raises(error, match=message):
            checkpoint.save(tmp_path / "a", {"a": {"b": value}})
        assert not list(tmp_path.iterdir())


class TestSaving:
    def test_what_is_there_is_replaced_only_on_request(self, tmp_path):
        first, second = ({"w": weight((9,), seed=seed)} for seed in (0, 1))
        checkpoint.save(tmp_path / "a", first)
        with pytest.raises(FileExistsError, match="overwrite=True"):
            checkpoint.save(tmp_path / "a", second)
        assert_same(checkpoint.restore(tmp_path / "a"), first)
        checkpoint.save(tmp_path / "a", second, overwrite=True)
        assert_same(checkpoint.restore(tmp_path / "a"), second)
        assert [file.name for file in tmp_path.iterdir()] == ["a"]

    def test_params_may_be_donated_at_once(self, tmp_path):
        params = tree(qtype="int8", channelwise_axes=(1,))
        params["big"] = weight((512, 512))
        host = np.asarray(weight((512, 512)))
        params["host"] = host.copy()
        want = jax.tree.map(np.array, params)
        pending = checkpoint.save_async(tmp_path / "a", params)
        params["host"][:] = 0
        del params["host"]
        scramble = jax.jit(lambda p: jax.tree.map(lambda x: x * 0, p), donate_argnums=0)
        jax.block_until_ready(scramble(params))
        pending.wait_until_finished()
        assert pending.done()
        assert_same(checkpoint.restore(tmp_path / "a"), want)

    def test_a_folder_that_cannot_be_made_is_an_error_at_once(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(NotADirectoryError, match="file"):
            checkpoint.save_async(tmp_path / "file" / "a", {"w": weight((3,))})

    def test_errors_of_the_background_are_raised(self, tmp_path, monkeypatch):
        def fail(self):
            raise OSError("the disk is full")

        monkeypatch.setattr(ocp.AsyncCheckpointer, "close", fail)
        pending = checkpoint.save_async(tmp_path / "a", {"w": weight((3,))})
        with pytest.raises(OSError, match="the disk is full"):
            pending.wait_until_finished()

    def test_several_at_a_time(self, tmp_path):
        trees = [{"w": weight((64, 64), seed=i)} for i in range(4)]
        pending = [
            checkpoint.save_async(tmp_path / str(i), params)
            for i, params in enumerate(trees)
        ]
        concurrent.futures.wait([p._future for p in pending])
        for i, params in enumerate(trees):
            assert_same(checkpoint.restore(tmp_path / str(i)), params)

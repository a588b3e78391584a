"""Checkpoints and processes: another one restores, one is killed, several save."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

import qwix_train
from qwix_train.core.qarray import WithAux, quantize_array
from qwix_train.ptq import checkpoint

HOWS = {
    "int8": dict(channelwise_axes=(1,), calibration_method="minmax"),
    "int4": dict(channelwise_axes=(1,), tiled_axes={0: 8}),
    "int3": dict(channelwise_axes=(1,)),
    "int1": dict(calibration_method="rms,1.5"),
    "nf4": dict(channelwise_axes=(1,)),
    "float8_e4m3fn": dict(channelwise_axes=(0,)),
}


def start(code, *args, **env):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weight(seed=0):
    x = np.random.default_rng(seed).normal(size=(32, 24))
    return jnp.asarray(x, jnp.float32)


@pytest.mark.slow
def test_another_process_restores_the_values(tmp_path):
    params, raw = {}, {}
    for qtype, how in HOWS.items():
        how = qwix_train.HowToQuantize(qtype=qtype, **how)
        array = quantize_array(weight(), how)
        params[qtype] = WithAux(array, how)
        for name in ("qvalue", "scale", "zero_point"):
            if getattr(array, name) is not None:
                part = np.asarray(getattr(array, name))
                raw[f"{qtype}.{name}"] = part.astype(np.float32)
    checkpoint.save(tmp_path / "a", params)
    np.savez(tmp_path / "raw.npz", **raw)
    child = start(
        """
        import sys
        import numpy as np
        from qwix_train.ptq import checkpoint

        params = checkpoint.restore(sys.argv[1])
        seen = set()
        for key, want in np.load(sys.argv[2]).items():
            qtype, name = key.split(".")
            got = getattr(params[qtype].array, name)
            assert (np.asarray(got).astype(np.float32) == want).all(), key
            seen.add(qtype)
        for qtype in sorted(seen):
            print(params[qtype].how)
        """,
        tmp_path / "a",
        tmp_path / "raw.npz",
    )
    out, err = child.communicate()
    assert child.returncode == 0, err
    assert out.split("\n") == [*(str(params[q].how) for q in sorted(HOWS)), ""]


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_checkpoint_or_nothing(tmp_path):
    code = """
    import os, signal, sys
    import numpy as np
    import orbax.checkpoint as ocp
    from qwix_train.ptq import checkpoint

    path, step = sys.argv[1:]

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if step != "new":
        checkpoint.save(path, {"w": np.zeros(9, np.int32)})
    # All is written when `finalize` runs, and Orbax has committed it before `close`.
    if step == "committed":
        ocp.AsyncCheckpointer.close = die
    else:
        ocp.CompositeCheckpointHandler.finalize = die
    checkpoint.save(path, {"w": np.ones(9, np.int32)}, overwrite=True)
    """
    steps = ("new", "written", "committed")
    children = [start(code, tmp_path / step, step) for step in steps]
    for child in children:
        _, err = child.communicate()
        assert child.returncode == -9, err
    with pytest.raises(FileNotFoundError):
        checkpoint.restore(tmp_path / "new")
    for step in steps[1:]:
        assert not checkpoint.restore(tmp_path / step)["w"].any()
    for step in steps:  # What was left beside it is in nobody's way.
        new = {"w": jnp.full(9, 2)}
        checkpoint.save(tmp_path / step, new, overwrite=True)
        assert checkpoint.restore(tmp_path / step)["w"].tolist() == [2] * 9
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(steps)


@pytest.mark.slow
def test_damage_is_noticed_or_harmless(tmp_path):
    """Of each file a byte is flipped, or half is lost, or all, or the file is.

    It is another process, because when Orbax cannot read one array, it drops its other
    reads, and TensorStore complains at any later time.
    """
    code = """
    import json, pathlib, sys
    import jax.numpy as jnp
    import numpy as np
    from qwix_train.core.qarray import quantize
    from qwix_train.ptq import checkpoint

    path = pathlib.Path(sys.argv[1])
    x = np.random.default_rng(0).normal(size=(3, 64, 64)).astype(np.float32)
    params = {f"Dense_{i}": {"kernel": quantize(w, "int4")} for i, w in enumerate(x)}
    want = [np.asarray(p["kernel"].qvalue) for p in params.values()]
    checkpoint.save(path, params)

    def outcome():
        try:
            got = [p["kernel"].qvalue for p in checkpoint.restore(path).values()]
        except ValueError as error:
            return str(error)
        return [(np.asarray(g) == w).all().item() for g, w in zip(got, want)]

    for file in [file for file in path.rglob("*") if file.is_file()]:
        good = file.read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 0xFF
        for data in (flipped, good[: len(good) // 2], b"", None):
            file.unlink()
            if data is not None:
                file.write_bytes(data)
            name = str(file.relative_to(path))
            print(json.dumps([name, len(good), outcome()]))
            file.write_bytes(good)
    print(json.dumps(["none", 0, outcome()]))
    """
    child = start(code, tmp_path / "a")
    out, err = child.communicate()
    assert child.returncode == 0, err[-2000:]
    outcomes = [json.loads(line) for line in out.splitlines()]
    assert outcomes.pop() == ["none", 0, [True] * 3]
    refused = {}
    for name, size, outcome in outcomes:
        if isinstance(outcome, str):
            assert f"{tmp_path / 'a'} " in outcome
            refused[name] = refused.get(name, 0) + 1
            # The file that holds the codes of all the params.
            assert size < 5000 or "the arrays of Dense_" in outcome
        else:
            assert outcome == [True] * 3
    largest = max(outcomes, key=lambda outcome: outcome[1])[0]
    assert refused[largest] == refused["manifest/metadata"] == 4


@pytest.mark.slow
def test_several_processes_save_and_restore_their_shards(tmp_path):
    code = """
    import sys
    import jax
    import jax.numpy as jnp
    import numpy as np

    port, index, path = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from qwix_train.core.qarray import quantize
    from qwix_train.ptq import checkpoint

    assert jax.device_count() == 8 and len(jax.local_devices()) == 4
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = np.random.default_rng(0).normal(size=(32, 24)).astype(np.float32)
    whole = quantize(jnp.asarray(x), "int3", channelwise_axes=(1,))

    def put(array, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    q = whole.replace(
        qvalue=put(whole.qvalue, "a", "b"), scale=put(whole.scale, None, "b")
    )
    for overwrite in (False, True):
        checkpoint.save(path, {"w": q}, overwrite=overwrite)
        for spec in (("a", "b"), (None, "a"), (("a", "b"), None)):
            sharding = NamedSharding(mesh, PartitionSpec(*spec))
            back = checkpoint.restore(path, shardings=sharding)["w"]
            for part in ("qvalue", "scale"):
                for shard in getattr(back, part).addressable_shards:
                    want = np.asarray(getattr(whole, part))[shard.index]
                    assert (np.asarray(shard.data) == want).all()
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    children = [start(code, port, i, tmp_path / "a", **flags) for i in range(2)]
    for child in children:
        _, err = child.communicate(timeout=240)
        assert child.returncode == 0, err
    q = checkpoint.restore(tmp_path / "a")["w"]
    assert q.shape == (32, 24)

"""Weight methods in sequence: one block of a model after the other.

The inputs of each block come from the quantized blocks before it, so the block can make
up for their errors. Only the statistics of one block are held at a time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection
from typing import Any

import jax
from flax import nnx

from qwix_train.files.progress import task
from qwix_train.planning import static_range
from qwix_train.planning.leaves import Path
from qwix_train.ptq.params import by_path, quantize_tree
from qwix_train.ptq.weight_method import Job, WeightMethod, path_among
from qwix_train.ptq.weight_report import WeightReport
from qwix_train.trace.function import param_path
from qwix_train.values import stored


def quantize_in_sequence(
    method: WeightMethod,
    run: Callable[[Any], Any],
    params: Any,
    abstract_quantized_params: Any,
    quant_stats: Any = None,
    *,
    block: str,
    allow_extra_params: bool = False,
    donate: bool = False,
) -> Any:
    r"""Quantizes float params block by block, each on inputs from the blocks before it.

    It runs your loop once for each block, in the order in which the model reads their
    params. In each run the model computes in float, and the params of earlier blocks
    have the values that their codes stand for (times the scale of their input, if the
    method scales it). Only the inputs of this block are collected. Then the block is
    quantized, and its statistics are dropped.

    Each run goes through the whole model, and compiles the step again, so the time is
    that of as many evaluations as there are blocks. Layers that are stacked and
    scanned over are quantized together, with the statistics of all of them. Unstack
    them to quantize one after the other.

    Args:
      method: a `Gptq`, `Awq` or `SmoothQuant`. Its `report` then holds all blocks.
      run: the loop. It takes params of the float model, a tree like `params`, and calls
        steps that `method.wrap` wrapped with them. For an NNX model it begins with
        `nnx.update(model, params)`.
      params: see `quantize_params`.
      abstract_quantized_params: see there. `method.provider` must quantize the model.
      quant_stats: see `quantize_params` of the method.
      block: a regular expression for the module path of a block, such as
        ``r"layers_\d+"``. Params below the same path are one block, such as
        ``layers_0/Dense_0/kernel`` and ``layers_0/Dense_1/kernel``. A param that is not
        below such a path is a block of its own.
      allow_extra_params: see `quantize_params`.
      donate: whether each float array is deleted once it is quantized and no longer
        needed. The values of the codes then take its place in memory.

    Returns:
      The quantized params, as `method.quantize_params` gives them.

    Raises:
      TypeError, ValueError: see `method.quantize_params`; and if no param that is
        quantized is below a path that `block` matches.

    References:
      Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative
      Pre-trained Transformers", section 4 (setup: blocks are quantized one after the
      other, on inputs from the quantized ones), https://arxiv.org/abs/2210.17323

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from qwix_train import QuantizationRule, ptq, quantize_model
      >>> x = jax.random.normal(jax.random.key(0), (64, 16))
      >>> model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(8)])
      >>> variables = model.init(jax.random.key(1), x)
      >>> method = ptq.Gptq([QuantizationRule(weight_qtype="int4")])
      >>> eval_step = method.wrap(jax.jit(model.apply))
      >>> def run(variables):
      ...     for batch in x.reshape(4, 16, 16):
      ...         eval_step(variables, batch)
      >>> quantized_model = quantize_model(model, method.provider)
      >>> abstract = jax.eval_shape(quantized_model.init, jax.random.key(0), x)
      >>> quantized = ptq.quantize_in_sequence(
      ...     method, run, variables, abstract, block=r"layers_\d+"
      ... )
      >>> quantized["params"]["layers_2"]["kernel"].array.qvalue.dtype
      dtype(int4)
    """
    static_range.check_quant_stats(quant_stats)
    flat, target, given = by_path(params, abstract_quantized_params)
    weights = {
        names: param
        for names, param in flat
        if names not in given.used and stored.is_quantized(target.get(names))
    }
    job = Job(method, isinstance(abstract_quantized_params, nnx.Module))
    quantized: dict[Path, Any] = {}
    served: dict[Path, jax.Array] = {}

    def serve(key_path, param):
        return served.get(param_path(key_path), param)

    def quantize_block(block: _Block) -> None:
        method.check_collected()
        paths = {names: path_among(block.seen, names) for names in weights}
        block.check_matches(paths.values())
        for names, path in paths.items():
            if names in quantized or not block.takes(path):
                continue
            param = weights[names]
            quantized[names], values = job.leaf_and_values(
                names, param, target[names], given
            )
            placed = isinstance(param, jax.Array) and param.committed
            served[names] = jax.device_put(values(), param.sharding if placed else None)
            needed = (x is param for other, x in flat if other not in quantized)
            if donate and isinstance(param, jax.Array) and not any(needed):
                jax.block_until_ready((quantized[names], served[names]))
                param.delete()

    def leaf(names, param, target, given):
        if names in quantized:
            return quantized[names]
        return job.leaf(names, param, target, given)

    done: tuple[str, ...] = ()
    try:
        with task("quantizing blocks") as counted:
            while True:
                current = _Block(block, done)
                method.restart(current.takes)
                run(jax.tree_util.tree_map_with_path(serve, params))
                quantize_block(current)
                counted.total = len(set(map(current.name_of, current.seen)))
                counted.advance(current.name)
                if not current.others:
                    break
                done = (*done, current.name)
        tree = quantize_tree(
            params,
            abstract_quantized_params,
            leaf,
            functools.partial(job.finish, quant_stats),
            allow_extra_params=allow_extra_params,
        )
    finally:
        method.restart()
    method.report = WeightReport(method.title, tuple(job.records))
    return tree


class _Block:
    """The params that are quantized after one run; the run says which these are.

    Attributes:
      seen: the paths of all quantized params that the model read.
      name: its module path: that of the first param that was read and is not in an
        earlier block.
      others: whether params of later blocks were read.
    """

    def __init__(self, pattern: str, done: Collection[str]):
        """Takes the pattern, and the names of earlier blocks.

        Args:
          pattern: see `quantize_in_sequence`.
          done: the names.
        """
        self.pattern = pattern
        self.done = done
        self.seen: dict[Path, None] = {}
        self.name = ""
        self.others = False

    def takes(self, path: Path) -> bool:
        """Whether a param is one of the block."""
        self.seen[path] = None
        name = self.name_of(path)
        if name in self.done:
            return False
        self.name = self.name or name
        self.others |= name != self.name
        return name == self.name

    def name_of(self, path: Path) -> str:
        r"""The name of the block of a param.

        >>> block = _Block(r"layers_\d+", done=())
        >>> block.name_of(("layers_10", "up", "kernel")), block.name_of(("head", "w"))
        ('layers_10', 'head/w')
        >>> _Block(r"layers_\d", done=()).name_of(("layers_10", "kernel"))
        'layers_10/kernel'
        """
        name = "/".join(path)
        found = self._match(name)
        return found.group() if found else name

    def _match(self, name: str) -> re.Match[str] | None:
        return re.match(f"(?:{self.pattern})(?=/)", name)

    def check_matches(self, paths: Collection[Path]) -> None:
        """Complains of a pattern that describes no block.

        Raises:
          ValueError: if no param is below a path that it matches.
        """
        names = ["/".join(path) for path in paths]
        if names and not any(map(self._match, names)):
            raise ValueError(
                f"block={self.pattern!r} matches the module path of no param that is "
                f"quantized, such as {names[0]!r}. Give a regular expression for the "
                "path, from its beginning, of the module that is one block."
            )

"""The command line: `python -m qwix_train inspect PATH`, and `convert`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from qwix_train import QuantizationRule, saved
from qwix_train.ptq import hugging_face
from qwix_train.saved import formats


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: those of the command line if None.

    Returns:
      The exit status: 1 if a path cannot be read or written, with the reason on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options), flush=True)
    except BrokenPipeError:  # `| head` has what it wants.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"qwix_train: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m qwix_train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    known = "; ".join(format.what for format in formats.FORMATS)
    inspect = commands.add_parser(
        "inspect",
        help="print the plan, the types, the sizes and the checksums of saved params",
    )
    inspect.add_argument("path", help=known)
    inspect.set_defaults(run=lambda options: saved.describe(options.path))
    convert = commands.add_parser(
        "convert", help="write saved params, or adapters, in another format"
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("source", help=known)
    convert.add_argument("destination", help="the folder to make")
    written = [format.name for format in formats.FORMATS if format.write is not None]
    convert.add_argument("--to", required=True, choices=written, help="the format")
    convert.add_argument(
        "--weights",
        metavar="TYPE",
        help="quantize the matrices to a type, such as int4; or `float`: dequantize",
    )
    convert.add_argument(
        "--tile",
        metavar="SIZE",
        type=_tile,
        help="how many inputs share a scale, such as 32; 128x128: inputs and outputs",
    )
    convert.add_argument(
        "--activations", metavar="TYPE", help="their type when the model runs"
    )
    convert.add_argument(
        "--modules",
        metavar="REGEX",
        help="the modules whose matrices are quantized; all by default",
    )
    convert.add_argument(
        "--family",
        metavar="NAME",
        help="the model_type whose names of tensors are those of Flax modules; see "
        "ptq.hugging_face.mapping",
    )
    convert.add_argument(
        "--layers",
        metavar="PATH",
        help="where a layer of the family is: layers_{layer} by default, and "
        "layers/{layer} for NNX",
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="replace what is at the destination"
    )
    return parser


def _tile(text: str) -> int | dict[int, int]:
    """How many inputs of a matrix share a scale; or how many inputs and outputs."""
    if not re.fullmatch("[1-9][0-9]*(x[1-9][0-9]*)?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size, such as 32, or two, such as 128x128: the inputs, "
            "and the inputs and outputs, that share a scale"
        )
    sizes = [int(size) for size in text.split("x")]
    # The last two axes: those before them number matrices.
    return sizes[0] if len(sizes) == 1 else dict(zip((-2, -1), sizes, strict=True))


def _convert(options: argparse.Namespace) -> str:
    to_float = options.weights == "float"
    mapping = None
    if options.family is not None:
        layers = {} if options.layers is None else {"layers": options.layers}
        mapping = hugging_face.mapping(options.family, **layers)
    elif options.layers is not None:
        raise ValueError(
            "--layers says where the layers of a family are, and no family is given. "
            "Name it, as in --family llama, or leave --layers out."
        )
    saved.convert(
        options.source,
        options.destination,
        options.to,
        rules=_rules(options),
        to_float=to_float,
        mapping=mapping,
        overwrite=options.overwrite,
    )
    summary = saved.describe(options.destination).rstrip().rpartition("\n")[2]
    return f"{options.destination}: {summary}"


def _rules(options: argparse.Namespace) -> list[QuantizationRule]:
    said = {
        "module_path": options.modules,
        "act_qtype": options.activations,
        "tile_size": options.tile,
    }
    given = {field: value for field, value in said.items() if value is not None}
    if options.weights not in (None, "float"):
        return [QuantizationRule(weight_qtype=options.weights, **given)]
    for name in ("modules", "activations", "tile"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name} says how weights are quantized, and none are. Say their "
                f"type, as in --weights int4, or leave --{name} out."
            )
    return []


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m qwix_train inspect PATH`, and `convert`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

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
        help="how many inputs share a scale, such as 32; 128x128: inputs and outputs",
    )
    convert.add_argument(
        "--activations", metavar="TYPE", help="their type when the model runs"
    )
    convert.add_argument(
        "--modules",
        default=".*",
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
        default="layers_{layer}",
        metavar="PATH",
        help="where a layer of the family is; layers/{layer} for NNX",
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="replace what is at the destination"
    )
    return parser


def _convert(options: argparse.Namespace) -> str:
    to_float = options.weights == "float"
    mapping = None
    if options.family is not None:
        mapping = hugging_face.mapping(options.family, layers=options.layers)
    saved.convert(
        options.source,
        options.destination,
        options.to,
        rules=[] if to_float else _rules(options),
        to_float=to_float,
        mapping=mapping,
        overwrite=options.overwrite,
    )
    summary = saved.describe(options.destination).rstrip().rpartition("\n")[2]
    return f"{options.destination}: {summary}"


def _rules(options: argparse.Namespace) -> list[QuantizationRule]:
    if options.weights is None:
        return []
    tile: Any = None
    if options.tile is not None:
        sizes = [int(size) for size in options.tile.split("x")]
        tile = sizes[0] if len(sizes) == 1 else dict(enumerate(sizes))
    return [
        QuantizationRule(
            module_path=options.modules,
            weight_qtype=options.weights,
            act_qtype=options.activations,
            tile_size=tile,
        )
    ]


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m qwix_train inspect PATH`."""

import argparse
import sys
from collections.abc import Sequence

from qwix_train import inspection


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: those of the command line if None.

    Returns:
      The exit status: 1 if the path cannot be read, with the reason on stderr.
    """
    parser = argparse.ArgumentParser("python -m qwix_train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help=inspection.SUMMARY)
    inspect.add_argument("path", help=inspection.FORMATS)
    try:
        print(inspection.describe(parser.parse_args(arguments).path))
    except (ImportError, OSError, ValueError) as error:
        print(f"qwix_train: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

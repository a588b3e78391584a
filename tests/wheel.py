"""Installs a wheel into fresh environments, and runs the README's code with it.

`python -m tests.wheel dist/*.whl /path/to/python3.13 ...`; `make test-wheel` builds the
wheel before, and names an interpreter of each version that it finds.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence

README = pathlib.Path(__file__).parent.parent / "README.md"
# What a stranger does after the ten lines.
EXPORT = """
import os, qwix_train
assert qwix_train.__file__.startswith(os.getcwd()), qwix_train.__file__
files = os.listdir(os.path.dirname(qwix_train.__file__))
assert "py.typed" in files, files
_, quantized = qwix_train.ptq.quantize(model, state.params, rules, images)
qwix_train.ptq.save("export", quantized, rules=rules)
"""


def main(wheel: str, interpreters: Sequence[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)
    for interpreter in interpreters:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name).resolve()
            # The first block is the one-line summary, of names defined further down.
            (folder / "ten_lines.py").write_text("\n".join([*blocks[1:], EXPORT]))
            check(pathlib.Path(wheel).resolve(), folder, interpreter)
        print(f"{wheel}: the README's code runs with it and {interpreter}")


def check(wheel: pathlib.Path, folder: pathlib.Path, interpreter: str) -> None:
    uv = [sys.executable, "-m", "uv", "--quiet"]
    python = str(folder / "env" / "bin" / "python")

    def run(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True)

    run(*uv, "venv", "--python", interpreter, "env")
    run(*uv, "pip", "install", "--python", python, str(wheel))
    # Isolated: neither the checkout nor the user's packages can be imported.
    run(python, "-I", "ten_lines.py")
    run(python, "-I", "-m", "qwix_train", "inspect", "export")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or [sys.executable])

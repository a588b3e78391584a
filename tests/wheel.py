"""Installs a wheel into a fresh environment, and runs the README's code with it.

`python -m tests.wheel dist/*.whl`; `make test-wheel` builds the wheel before.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import venv

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


def main(wheel: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name).resolve()
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"

        def run(*arguments: str) -> None:
            # Isolated: neither the checkout nor the user's packages can be imported.
            command = [str(python), "-I", *arguments]
            subprocess.run(command, cwd=folder, check=True)

        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run(*install, str(pathlib.Path(wheel).resolve()))
        # The first block is the one-line summary, of names defined further down.
        (folder / "ten_lines.py").write_text("\n".join([*blocks[1:], EXPORT]))
        run("ten_lines.py")
        run("-m", "qwix_train", "inspect", "export")
    print(f"{wheel}: the README's code runs with it")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The table of the names of `qwix`, of docs/as_qwix.md.

As a program it writes what the modules of `qwix` have, as JSON; without a path, the
table: `python -m tests.like_qwix.name_table` says what the document should hold.
"""

import dataclasses
import importlib
import inspect
import json
import pathlib
import sys
import tempfile

from qwix_train.like_qwix.modules import MODULES, NEAREST
from tests import reference_process

PATCHING = {
    *("asarray", "conv_general_dilated", "dot", "dot_general", "einsum", "nn_param"),
    *("get_intercept_map", "get_interceptors", "promote_dtype", "ragged_dot"),
    *("process_model_inputs", "process_model_output"),
}
PATCHES = "no methods that patch operations: overriding them is refused"
# Why a name differs, beside what the comparison says itself.
NOTES = {
    "qwix.QArray": "the same fields; what reads them checks them",
    "qwix.einsum": "any number of operands",
    "qwix.quantize_model": (
        "`skip_nnx_init=True` is taken; an NNX model may come without inputs, and with "
        "several methods"
    ),
    "qwix.apply_lora_to_model": "no `kernel_lora_einsum_str`, which is for debugging",
    "qwix.quantize_params": (
        "a param that the model reshapes is stored in the shape that it declares; "
        "`qwix_train.ptq.to_qwix` and `from_qwix` convert"
    ),
    "qwix.process_prequantized_params": "codes of another type are refused, not cast",
    "qwix.LoraProvider": "`model.eval()` of an NNX model ends its dropout",
    "qwix.QuantizationProvider": "for modes of your own: see extending.md",
    "qwix.QuantizationRule": (
        "an `act_qtype` without a `weight_qtype` has no effect, as in `qwix`, and is "
        "warned of"
    ),
    "qwix.QtRule": (
        "gradients are those at the quantized operands; other settings of "
        "`additional_qt_config` are warned of, and have no effect"
    ),
    "qwix.LoraRule": "`dropout=1.0` is warned of",
    "qwix.contrib.awq.WithAwqScale": (
        "a `WithAux`; the scale is a leaf beside it, "
        "`dot_general0_lhs_pre_quant_scale`, as for `qwix_train.ptq.Awq`"
    ),
    "qwix.contrib.awq.AwqCalibrationProvider": "collects second moments, too",
    "qwix.contrib.awq.quantize_params": "the best of what `qwix_train.ptq.Awq` tries",
    "qwix.contrib.calibration.CalibrationProvider": (
        "a class of yours says `stats_of(lhs, weight, rule)`"
    ),
    "qwix.contrib.calibration.CalibratedQuantContext": (
        "holds a `qwix_train.ptq` weight; see there"
    ),
    "qwix.contrib.calibration.extract_calibrated_quant_context": (
        "what `quantize_params_with_calibration` does for each weight"
    ),
    "qwix.contrib.calibration.normalize_weight": "`qwix_train.ptq` views weights so",
    "qwix.contrib.gptq.quantize_params": "by `qwix_train.ptq.Gptq`",
    "qwix.contrib.padded_ptq.PaddedQArray": (
        "a `QArray`, whose last tile may be shorter: no padding is stored. All tiles "
        "are equal where their number divides the axis"
    ),
    "qwix.contrib.padded_ptq.QARRAY_KEEP_PADDED_SHAPE": "nothing is padded",
    "qwix.contrib.padded_ptq.create_quantized_param": "for patched operations",
    "qwix.contrib.padded_ptq.einsum": "any number of operands, by position",
    "qwix.contrib.padded_ptq.get_padded_shape": "nothing is padded",
    "qwix.contrib.padded_ptq.pad_to_shape": "nothing is padded",
    "qwix.contrib.padded_ptq.quantize_act": "`quantize`",
    "qwix.contrib.smooth_quant.SqCalibrationProvider": (
        "factors are those of largest magnitudes, as in the paper"
    ),
    "qwix.contrib.smooth_quant.SqInferenceProvider": (
        "activations are quantized as the rule says; in `qwix` they stay in float"
    ),
    "qwix.contrib.smooth_quant.WithSqScale": (
        "a `WithAux`; the scale is a leaf beside it, as for AWQ"
    ),
    "qwix.contrib.smooth_quant.compute_scales_ratio": (
        "`qwix_train.ptq.SmoothQuant` has it"
    ),
    "qwix.pallas.pallas_call": "no array is padded for a TPU: blocks are as given",
}


def described(value):
    """A name of a module, as JSON."""
    if inspect.ismodule(value):
        return {"kind": "module"}
    found = {"kind": "class" if inspect.isclass(value) else "function"}
    if not callable(value):
        return {"kind": "value"}
    if dataclasses.is_dataclass(value):
        found["fields"] = {
            field.name: shown(
                field.default_factory()
                if field.default is dataclasses.MISSING
                and field.default_factory is not dataclasses.MISSING
                else field.default
            )
            for field in dataclasses.fields(value)
        }
    else:
        found["parameters"] = parameters(value)
    if found["kind"] == "class":
        found["methods"] = [
            name
            for name in dir(value)
            if not name.startswith("_")
            and callable(inspect.getattr_static(value, name, None))
            and any(
                name in vars(base)
                for base in value.__mro__
                if base.__module__.split(".")[0].startswith("qwix")
            )
        ]
    return found


def parameters(value):
    """The parameters of a function or a class, with their kinds and defaults."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return {}
    return {
        name: [parameter.kind.name, shown(parameter.default)]
        for name, parameter in signature.parameters.items()
        if not name.startswith("_")
    }


def shown(value):
    """A default as text that is the same in all processes."""
    if value is inspect.Parameter.empty or value is dataclasses.MISSING:
        return "required"
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    text = repr(value)
    return "an object" if " at 0x" in text or "object object" in text else text


def described_modules(modules):
    """The public names of modules, by the names of `qwix`."""
    found = {}
    for name, target in modules.items():
        module = importlib.import_module(target)
        for attribute, value in sorted(vars(module).items()):
            if attribute.startswith("_") or inspect.ismodule(value):
                continue
            # What a module only imports is not its own, but for the outermost.
            own = getattr(value, "__module__", None) in (name, None)
            listed = attribute in getattr(module, "__all__", ())
            if name == "qwix" or listed or own:
                found[f"{name}.{attribute}"] = described(value)
    return found


def of_qwix():
    """What `qwix` itself has."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "names.json"
        reference_process.run("tests.like_qwix.name_table", path)
        return json.loads(path.read_text("utf-8"))


def differences(theirs, name):
    """What is not here of a name, as a list of sentences; None if the name is not."""
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(MODULES[module]), attribute, None)
    if value is None:
        return None
    mine, found = described(value), []
    for key, word in (("parameters", "parameter"), ("fields", "field")):
        # A dataclass may take the place of a function, and a function of a class.
        have = {**mine.get("parameters", {}), **mine.get("fields", {})}
        for part, default in theirs.get(key, {}).items():
            if default[0].startswith("VAR_"):
                continue
            if part not in have:
                if all(x[0] != "VAR_KEYWORD" for x in have.values()):
                    found.append(f"no {word} `{part}`")
            elif have[part] != default:
                found.append(f"`{part}` is {have[part][-1]}, there {default[-1]}")
    methods = set(theirs.get("methods", ())) - set(mine.get("methods", ()))
    if methods & PATCHING:
        found.append(PATCHES)
    if own := sorted(methods - PATCHING):
        found.append("without " + ", ".join(f"`{x}`" for x in own))
    return found


def rows(theirs):
    """The rows of the table: a name, whether it is here, and what differs."""
    for name, entry in theirs.items():
        found, note = differences(entry, name), NOTES.get(name, "")
        here = "no" if found is None else "yes"
        said = "; ".join([*(found or ()), *([note] if note else [])])
        yield f"| `{name}` | {here} | {said} |"


def table(theirs):
    """The table, as in the document, from what `qwix` has."""
    lines = ["| name | here | what differs |", "| --- | --- | --- |", *rows(theirs)]
    lines += ["", "| module that is not here | nearest |", "| --- | --- |"]
    lines += [f"| `{name}` | {nearest} |" for name, nearest in NEAREST.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        own = {name: name for name in MODULES if name != "qwix.contrib"}
        pathlib.Path(sys.argv[1]).write_text(
            json.dumps(described_modules(own)), "utf-8"
        )
    else:
        sys.stdout.write(table(of_qwix()) + "\n")

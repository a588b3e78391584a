"""Post-training quantization: quantized params, a model that runs on them, files.

`quantize` does everything in one call. In steps: `PtqProvider` for `quantize_model`,
`abstract_params` for the shapes of quantized params, and `quantize_params`. `to_tree`
gives those of an NNX model as a tree. `Gptq`, `Awq` and `SmoothQuant` look at data,
`quantize_in_sequence` block by block.

Files: `save`, `save_async`, `restore`, `read_manifest`; `save_compressed_tensors`,
`load_compressed_tensors`; `hugging_face`, float checkpoints of the hub, quantized on
the way. Trees of `qwix`: `to_qwix`, `from_qwix`.
"""

from qwix_train.ptq import hugging_face as hugging_face
from qwix_train.ptq.awq import Awq as Awq
from qwix_train.ptq.checkpoint import read_manifest as read_manifest
from qwix_train.ptq.checkpoint import restore as restore
from qwix_train.ptq.checkpoint import save as save
from qwix_train.ptq.checkpoint import save_async as save_async
from qwix_train.ptq.compressed_tensors import (
    load_compressed_tensors as load_compressed_tensors,
)
from qwix_train.ptq.compressed_tensors import (
    save_compressed_tensors as save_compressed_tensors,
)
from qwix_train.ptq.gptq import Gptq as Gptq
from qwix_train.ptq.in_sequence import quantize_in_sequence as quantize_in_sequence
from qwix_train.ptq.params import quantize_params as quantize_params
from qwix_train.ptq.provider import PtqProvider as PtqProvider
from qwix_train.ptq.qwix_trees import from_qwix as from_qwix
from qwix_train.ptq.qwix_trees import to_qwix as to_qwix
from qwix_train.ptq.smoothquant import SmoothQuant as SmoothQuant
from qwix_train.ptq.trees import to_tree as to_tree
from qwix_train.ptq.whole_model import abstract_params as abstract_params
from qwix_train.ptq.whole_model import quantize as quantize

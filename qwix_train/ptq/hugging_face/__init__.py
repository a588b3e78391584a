"""Checkpoints as they are on the Hugging Face hub: safetensors files of float tensors.

`load` reads them into a Linen or NNX model, quantized on the way if the model is, and
`save` writes float params. A mapping says where each tensor stands in the model: a
dictionary from the names of tensors to a `Place`. `mapping` gives that of a family of
models.
"""

from qwix_train.ptq.hugging_face.families import mapping as mapping
from qwix_train.ptq.hugging_face.places import Place as Place
from qwix_train.ptq.hugging_face.reading import load as load
from qwix_train.ptq.hugging_face.saving import save as save

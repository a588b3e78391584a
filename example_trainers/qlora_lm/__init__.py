"""A language model, fine-tuned whole, with LoRA and with QLoRA.

    python -m example_trainers.qlora_lm

trains a small decoder-only transformer on the help texts that ship with Python, and
then on the source code of its standard library, in several ways:

* full fine-tuning of all weights,
* LoRA: the weights are frozen, adapters are trained,
* QLoRA: the frozen weights are in nf4 or int4, with double quantization.

The adapters are then merged, and the models exported, restored and evaluated; one of
them writes a sample. It writes a table, a JSON file and a plot. `--framework=nnx`
trains the same model in Flax NNX.

Learning rates were chosen on the validation split of the code, for full fine-tuning and
for LoRA each on its own; QLoRA uses LoRA's. The losses in the table are those of the
test split, which nothing else reads.

`model_linen.py` and `model_nnx.py` hold the model and its ordinary train and eval
steps, the same for all methods. What differs is `create_finetune_state`, and the rules
in `methods.py`.
"""

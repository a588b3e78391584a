"""What each recipe of quantization-aware training recovers, at 4, 3 and 2 bits.

    python -m example_trainers.qat_recipes

trains the convolutional network of `digits_qat` and the language model of
`static_range` in float, from three seeds, quantizes their weights to int4, int3 and
int2 (activations to int8), and fine-tunes them by each recipe:

* QAT: fake quantization with ranges up to the largest weight, from first to last step,
* with a schedule: two bits more at first, then one, then none,
* clipped: ranges that end at twice the root mean square of the weights,
* LSQ: scales that are trained with the weights,
* freezing: weights that oscillate between two levels are frozen at one,
* mixed bits: as many bits on average, distributed by what each layer can afford,
* proximal: the float step, and an optimizer that draws weights to their grid (PARQ).

It writes a table, a JSON file and a plot. On two cores that takes some minutes.

All recipes start from the same float checkpoint of a seed, and train for as many steps,
on the same batches, with the same optimizer. The float model that they are compared
with was trained for these steps, too. Every number is that of an exported model, on
test data, after the last step: the learning rates were chosen by validation data. The
bits of `mixed bits` come from the checkpoint of the first seed.

`tasks.py` holds the models and their ordinary steps, and `methods.py` the recipes: what
a user writes for each.
"""

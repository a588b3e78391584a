"""A language model in int8 with static ranges, collected while its eval loop runs.

    python -m example_trainers.static_range

trains a small transformer on the help texts that ship with Python, in float; collects
the ranges of its activations in its own eval loop; and exports quantized models, whose
loss is measured from the restored files:

* int8 with dynamic ranges, and with the static ranges of each observer,
* int4 weights by rounding to nearest, GPTQ, AWQ and SmoothQuant,
* int8 and int4 weights with static ranges, after QAT that collects ranges as it trains.

It writes a table, a JSON file and plots. On two cores that takes about three minutes.

Ranges and inputs of weights are collected on the validation topics, and the losses in
the table are those of the test topics, which nothing else reads. QAT starts from the
trained float weights, so the table has the float model with as many steps more as its
control. One seed is trained: differences of a few thousandths are noise.

`model.py` holds the model and its ordinary train and eval steps. Quantization is the
`wrap_*` lines in `train.py`, and `quantization.py`.
"""

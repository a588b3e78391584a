"""A language model, trained quantized by several processes as one JAX computation."""

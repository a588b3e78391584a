"""How a traced call comes about: Linen, NNX, plain functions, and whole steps."""

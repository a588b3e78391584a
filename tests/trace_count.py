"""How often a step is traced, and so compiled."""

import functools


def counted(step):
    """A step that counts its traces, and a list that holds one entry for each.

    The size of JAX's own cache is no measure: it is one cache for all functions of a
    process, and forgets the oldest.
    """
    traces: list[None] = []

    @functools.wraps(step)
    def call(*args, **kwargs):
        traces.append(None)
        return step(*args, **kwargs)

    return call, traces

"""What a checkpoint of an NNX model and its optimizer holds."""

from typing import Any

from flax import nnx

State = tuple[Any, nnx.Optimizer]


def to_tree(state: State) -> Any:
    """What a checkpoint holds: not a frozen base, which does not change."""
    model, optimizer = state
    return {
        "params": nnx.to_pure_dict(nnx.state(model, optimizer.wrt)),
        "optimizer": nnx.to_pure_dict(nnx.state(optimizer)),
    }


def from_tree(state: State, tree: Any) -> Any:
    """Puts what a checkpoint held into a model and its optimizer."""
    model, optimizer = state
    for node, held, saved in (
        (model, nnx.state(model, optimizer.wrt), tree["params"]),
        (optimizer, nnx.state(optimizer), tree["optimizer"]),
    ):
        nnx.replace_by_pure_dict(held, saved)
        nnx.update(node, held)
    return state

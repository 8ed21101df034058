"""State that a step may change besides tensors of the model: what optimizers remember, random numbers."""

import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def leaves(key: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield tensors, numbers and words in what may be lists of dictionaries of them, by name."""
    if isinstance(value, Mapping):
        for name, part in sorted(value.items(), key=lambda item: str(item[0])):
            yield from leaves(f"{key}.{name}".lstrip("."), part)
    elif isinstance(value, list | tuple | deque):
        for number, part in enumerate(value):
            yield from leaves(f"{key}.{number}", part)
    elif isinstance(value, np.ndarray):
        yield key, value.tobytes()
    elif isinstance(value, Tensor | int | float | str | bytes):
        yield key, value


def random_state() -> dict[str, Any]:
    """Return the state of all global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to a state of theirs."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])

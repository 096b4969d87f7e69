"""Every source of randomness that a run may touch: saved, restored, and given back untouched to the caller."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators (every CUDA device included), as tensors and numbers."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned.

    Raises:
        ValueError: if the state holds another number of CUDA devices than this machine has: a run resumed there
            would not draw the same numbers.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) != devices:
        raise ValueError(f"the random state is of {len(state['cuda'])} CUDA devices, this machine has {devices}")
    if devices:
        torch.cuda.set_rng_state_all(state["cuda"])


def reseed(seed: int, rank: int) -> None:
    """Give every generator of process `rank` a stream of its own, so that processes drop different places out.

    Process 0 goes on as it was: a single process draws what it always drew.
    """
    if rank == 0:
        return
    words = np.random.SeedSequence([seed, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002
    torch.manual_seed(int(words[2]))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator from `seed` for the length of a block, and give the caller's own state back after it.

    Dropout and initialisation draw from the global generators of torch, so they cannot take an argument; this keeps
    a training run from disturbing the program that called it.
    """
    before = random_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before)

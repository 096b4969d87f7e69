"""Which way a model decodes: by one shared copy of each prompt where a probe shows it equal, else by plain rows."""

import json
import logging

import torch
from torch import Tensor, nn

from plaudit.models.causal_lm import CausalLM
from plaudit.models.probe import tiny_twin
from plaudit.models.states import takes_argument, unwrap
from plaudit.rollout.decoding import SharedPrefixDecoder
from plaudit.rollout.lean import LeanStep, lean_step
from plaudit.rollout.rows import RowsDecoder

logger = logging.getLogger(__name__)

SHARING = ("lean", "shared")
"""The paths that keep one copy of a prompt, fastest first."""

_verdicts: dict[str, str | None] = {}
_FAULTS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError)


def decoding_path(model: CausalLM) -> str:
    """How this model decodes; found out at its first call and logged where it is not the fast way.

    Returns:
        `shared` (one copy of a prompt's keys and values), `lean` (the same with few operations in a step, see
        `plaudit.rollout.lean`), `cached` (rows with the model's own cache) or `plain` (the whole text is read for every
        token).
    """
    found = getattr(model, "_decoding_path", None)
    if found is None:
        found = _choose(model)
        object.__setattr__(model, "_decoding_path", found)
    return str(found)


@torch.no_grad()
def _choose(model: CausalLM) -> str:
    name = type(unwrap(model.model)).__name__
    first = next(model.parameters())
    exact = first.dtype == torch.float32 and not torch.is_autocast_enabled(first.device.type)
    tolerance = 1e-4 if exact else 0.1
    vocabulary = min(1000, model.head[0].shape[0])
    fault: str | None = "the model takes plain rows"
    for path in SHARING if model.packed else ():
        if path == "lean" and lean_step(model.base) is None:
            continue
        fault = twin_fault(model.base, path) or decoding_fault(model.base, path, tolerance, vocabulary)
        if fault is None:
            return path
    slow = decoding_fault(model.base, "cached", tolerance, vocabulary)
    if slow is None:
        logger.warning("%s: every row keeps its own copy of the prompt while decoding, because %s", name, fault)
        return "cached"
    logger.warning("%s: the whole text is read again for every token, because %s; with a cache, %s", name, fault, slow)
    return "plain"


def open_decoder(
    base: nn.Module, prompts: list[list[int]], rows_per_prompt: int, path: str, lean: LeanStep | None = None
) -> SharedPrefixDecoder | RowsDecoder:
    """The decoder of a path (see `decoding_path`) for these prompts; `lean` is the step of the path `lean`.

    Without it (adapters or hooks may have come since the path was chosen) the model's own modules serve.
    """
    if path in SHARING:
        return SharedPrefixDecoder(base, prompts, rows_per_prompt, lean=lean if path == "lean" else None)
    return RowsDecoder(base, prompts, rows_per_prompt, cached=path == "cached")


def twin_fault(base: nn.Module, path: str) -> str | None:
    """The probe of a path on a tiny twin whose window is shorter than the texts, remembered by configuration."""
    config = unwrap(base).config
    key = path + json.dumps(config.to_dict(), sort_keys=True, default=str)  # type: ignore[operator, union-attr]
    if key not in _verdicts:
        try:
            twin = tiny_twin(config)
        except (*_FAULTS, AssertionError) as error:
            _verdicts[key] = f"no twin could be built ({type(error).__name__}: {error})"
        else:
            # The twin is on the CPU, and answers for the code, not for the precision of the moment.
            with torch.autocast("cpu", enabled=False):
                _verdicts[key] = decoding_fault(twin, path, 1e-5, 64)
    return _verdicts[key]


@torch.no_grad()
def decoding_fault(base: nn.Module, path: str, tolerance: float, vocabulary: int = 64) -> str | None:
    """Hold a way of decoding against the plain forward over whole texts.

    Args:
        base: a base model, in evaluation mode.
        path: `lean`, `shared` or `cached`, see `decoding_path`.
        tolerance: largest difference allowed, as a share of the largest state.
        vocabulary: ids are drawn below it.

    Returns:
        None where they agree, otherwise what was wrong.
    """
    generator = torch.Generator().manual_seed(0)
    shared = path in SHARING

    def ids(count: int) -> list[int]:
        return torch.randint(min(3, vocabulary - 1), vocabulary, (count,), generator=generator).tolist()

    prompts = [ids(length) for length in ((9, 3, 1) if shared else (7, 7))]
    device = next(base.parameters()).device
    found: list[Tensor] = []
    texts: list[list[int]] = []
    try:
        lean = lean_step(base, rows=2 * len(prompts), tokens=1024) if path == "lean" else None
        decoder = open_decoder(base, prompts, 2, path, lean)
        found += list(decoder.prefill())
        texts += prompts
        rows = [list(prompts[prompt]) for prompt in decoder.rows]
        for step in range(4):
            tokens = ids(len(rows))
            rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
            found += list(decoder.step(torch.tensor(tokens, device=device)))
            texts += rows
            if step == 1:
                rows = [rows[old] for old in decoder.keep([True, False] + [True] * (len(rows) - 2))]
        wanted = [_last_state(base, text) for text in texts]
    except _FAULTS as error:
        return f"{type(error).__name__}: {error}"
    difference = max((a.float() - b.float()).abs().max().item() for a, b in zip(found, wanted, strict=True))
    scale = max(state.abs().max().item() for state in wanted)
    if not difference <= tolerance * max(scale, 1e-6):
        return f"decoded and plain states differ by {difference:.2g} at a scale of {scale:.2g}"
    return None


def _last_state(base: nn.Module, text: list[int]) -> Tensor:
    ids = torch.tensor([text], device=next(base.parameters()).device)
    options = {"use_cache": False} if takes_argument(base, "use_cache") else {}
    states: Tensor = base(input_ids=ids, **options).last_hidden_state
    return states[0, -1]

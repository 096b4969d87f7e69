"""How a loaded model is told from another: a fingerprint of its weights, and a few scores from when it was saved."""

import hashlib
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from plaudit.data.packing import pack_groups
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup
from plaudit.models.states import unwrap

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel


def weights_fingerprint(backbone: nn.Module) -> str:
    """SHA-256 over names, types, shapes and a CRC-32 of all bytes of the backbone's own weights, adapters left out.

    It tells an accidental change of a single bit; it is no guard against deceit, which could change the description as
    well. CRC-32 reads several times as many bytes a second as SHA-256 where the processor has no
    instruction for the latter.
    """
    digest = hashlib.sha256()
    for name, parameter in unwrap(backbone).named_parameters():
        if "lora_" in name:
            continue
        digest.update(f"{name.replace('.base_layer', '')} {parameter.dtype} {tuple(parameter.shape)} ".encode())
        raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(f"{zlib.crc32(raw.data)}\n".encode())
    return digest.hexdigest()


_CHECK_IDS = ([7, 5, 8, 6], [[9, 4, 7], [5]]), ([6], [[4, 8, 5, 9, 7]])


def _check_batch(model: "RewardModel", table: Any) -> Any:
    groups = []
    for prompt, completions in table:
        if model.causal:
            blocks = [TokenisedBlock(prompt, completions, list(range(len(completions))))]
        else:
            blocks = [TokenisedBlock(prompt, [ids], [slot]) for slot, ids in enumerate(completions)]
        groups.append(TokenisedGroup(tuple(blocks)))
    return pack_groups(groups, causal=model.causal).to(model.device)


@torch.no_grad()
def check_scores(model: "RewardModel") -> dict[str, Any]:
    """A few token ids and the raw scores they get now, so that loading can tell whether it is the same model."""
    training = model.training
    model.eval()
    scores = model(_check_batch(model, _CHECK_IDS)).float().cpu()
    model.train(training)
    return {"ids": _CHECK_IDS, "scores": scores.tolist()}


@torch.no_grad()
def verify_scores(model: "RewardModel", check: dict[str, Any], folder: Path, *, exact: bool) -> None:
    """Hold a loaded model against the scores it was saved with.

    Args:
        model: the loaded model.
        check: what `check_scores` gave.
        folder: named in the error.
        exact: the same float32 weights, so that 1e-4 is the tolerance; otherwise 0.1, for other precisions.

    Raises:
        ValueError: if they differ.
    """
    wanted = torch.tensor(check["scores"])
    scores = model(_check_batch(model, check["ids"])).float().cpu()
    tolerance = (1e-4 if exact else 0.1) * max(1.0, wanted.abs().max().item())
    difference = (scores - wanted).abs().max().item()
    if not difference <= tolerance:
        raise ValueError(
            f"{folder}: the loaded model gives other scores than when it was saved (off by {difference:.3g}); "
            "its files do not belong together"
        )

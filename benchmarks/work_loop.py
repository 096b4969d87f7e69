"""A careful training loop, written by hand: what a good engineer builds from torch and transformers in an hour.

Each completion goes through the network once, as a padded row of its own; the rows of a prompt stay together, prompts
of similar length share a forward pass, and every pair of a prompt is compared from its scores.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lockstep import Turns
from peer_model import load, shared_names
from torch import Tensor, nn

PLACES = 8192
"""Most places (rows times columns) of one forward pass."""


def batches(step: list[dict[str, Any]], places: int = PLACES) -> list[list[dict[str, Any]]]:
    """Prompts sorted by their longest row, in forward passes of at most so many places."""
    result: list[list[dict[str, Any]]] = []
    rows = width = 0
    for group in sorted(step, key=lambda group: -max(map(len, group["rows"]))):
        rows += len(group["rows"])
        if result and rows * width <= places:
            result[-1].append(group)
        else:
            result.append([group])
            rows, width = len(group["rows"]), max(map(len, group["rows"]))
    return result


def padded(groups: list[dict[str, Any]], pad_id: int) -> tuple[Tensor, Tensor]:
    """All rows of some prompts, padded on the right: ids and mask `[B, T]`."""
    rows = [torch.tensor(row) for group in groups for row in group["rows"]]
    lengths = torch.tensor([len(row) for row in rows])
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def batch_loss(model: nn.Module, groups: list[dict[str, Any]], pad_id: int, pairs_of_step: int) -> Tensor:
    """`-Σ log σ(r_w − r_l)` over the pairs of some prompts, over the pairs of the whole step."""
    device = next(model.parameters()).device
    ids, mask = (tensor.to(device) for tensor in padded(groups, pad_id))
    scores = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1)
    better, worse, first = [], [], 0
    for group in groups:
        better += [first + w for w, _ in group["pairs"]]
        worse += [first + loser for _, loser in group["pairs"]]
        first += len(group["rows"])
    differences = scores[torch.tensor(better, device=device)] - scores[torch.tensor(worse, device=device)]
    return -nn.functional.logsigmoid(differences).sum() / pairs_of_step


def main(folder: Path, gradient_file: Path) -> None:
    """Train once through all steps of the folder."""
    settings = json.loads((folder / "steps.json").read_text())
    pairs = settings["workload"]["pairs"]
    model = load(folder).to(settings["changes"].get("device", "cpu")).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"], weight_decay=0.0, fused=True)
    turns = Turns(shared_names(model), gradient_file)
    losses = []
    for step in settings["steps"]:
        parts = []
        for groups in batches(step):
            loss = batch_loss(model, groups, settings["pad_id"], pairs)
            loss.backward()
            parts.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(torch.stack(parts).sum().item())
    turns.finish(losses)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[-1]))

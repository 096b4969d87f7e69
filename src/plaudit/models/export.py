"""`plaudit export`: a reward model as a folder for other people's tools, checked by opening it with them."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from plaudit.core.layout import PackedBatch
from plaudit.data.packing import unpack_rows
from plaudit.models.interop import text_notes
from plaudit.models.lora import has_lora, merge_lora
from plaudit.models.probe import probe_batch
from plaudit.models.quiet import quiet_loading
from plaudit.models.saving import DESCRIPTION, save_reward_model, saved_form
from plaudit.models.shift import fold_shift
from plaudit.models.states import unwrap

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel

TOLERANCE = 1e-5
"""Largest difference of raw scores, relative to the largest score (at least 1), between Plaudit and plain tools."""

_LENGTHS = ((4, (3, 9, 1)), (7, (5, 2)), (2, (6,)))


@dataclass(frozen=True)
class ExportResult:
    """What was written, and what other tools see of it.

    Attributes:
        folder: the folder.
        form: `classifier`, `native`, `own` or `adapter`, see `plaudit.models.saving`.
        opens_plainly: whether `AutoModelForSequenceClassification` opens it; otherwise it refuses.
        difference: largest difference between its raw scores and Plaudit's on probe texts; None where it refuses.
        notes: what should be said aloud, in sentences.
    """

    folder: Path
    form: str
    opens_plainly: bool
    difference: float | None
    notes: tuple[str, ...]


def export_reward_model(
    source: str | Path,
    out: str | Path,
    *,
    merge: bool = False,
    fold: bool = True,
    overwrite: bool = False,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> ExportResult:
    """Write a reward model for other tools; the folder appears whole and checked, or not at all.

    Args:
        source: any folder (or hub name) that `RewardModel.from_pretrained` opens.
        out: the folder to write.
        merge: add adapters into the backbone, so that the folder stands alone.
        fold: make raw scores equal to normalised ones where that is exact (see `plaudit.models.shift.fold_shift`).
        overwrite: replace the model files of a folder that exists; other files in it stay.
        dtype: of the backbone; None is as saved.
        trust_remote_code: whether code in the source may run.

    Returns:
        What was written.

    Raises:
        ValueError: if `out` is in the way or is `source`, the source is no reward model, or the written folder gives
            other scores in plain transformers.
    """
    from plaudit.models.reward_model import RewardModel

    out = Path(out)
    _check_target(source, out, overwrite=overwrite)
    model = RewardModel.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)
    notes = _prepare(model, merge=merge, fold=fold)
    form = saved_form(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        staged = Path(folder) / "model"
        notes += save_reward_model(model, staged, **_origin(source))
        opens_plainly = form in ("classifier", "native")
        difference = None
        if opens_plainly:
            difference, more = _check_plain(model, staged)
            notes += more + text_notes(model)
        else:
            _check_refused(staged)
        _move(staged, out)
    return ExportResult(out, form, opens_plainly, difference, tuple(notes))


def _check_target(source: str | Path, out: Path, *, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder")
    if Path(source).is_dir() and out.resolve() == Path(source).resolve():
        raise ValueError(f"{out} is the model itself; name another folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(
            f"{out} exists and is not empty; name another folder, or replace the model in it (--overwrite)"
        )


def _prepare(model: "RewardModel", *, merge: bool, fold: bool) -> list[str]:
    """Bring the model into the form that other tools see most of; what was done, in sentences."""
    notes = []
    # Plain GPT-2 and its like count positions of left padding too.
    model.tokenizer.padding_side = "right"
    if merge and has_lora(model):
        merge_lora(model)
        notes.append("the adapters were merged into the backbone")
    elif merge:
        notes.append("there are no adapters to merge")
    elif has_lora(model):
        notes.append("the adapters stand apart, which only Plaudit opens; --merge writes a folder that stands alone")
    form = saved_form(model)
    if form == "native":
        # Without it a pipeline returns the sigmoid or softmax of the score.
        native: Any = unwrap(model.backbone)
        native.config.problem_type = "regression"
    if not bool(model.is_normalised):
        return notes
    shift = [round(value, 4) for value in model.normalisation_mean.tolist()]
    exact = form in ("own", "adapter") or next(model.backbone.parameters()).dtype == torch.float32
    if fold and bool(model.normalisation_mean.any()) and exact and fold_shift(model):
        where = "the head's bias" if form in ("own", "adapter") else "the bias of the final normalisation layer"
        notes.append(f"the normalising shift {shift} was folded into {where}: raw scores are normalised ones now")
    elif form == "classifier" and bool(model.head.bias.any()):
        # Raw scores as every tool sees them; the normalised ones, which only Plaudit gives, stay the same.
        bias = model.head.bias.detach().clone()
        with torch.no_grad():
            model.normalisation_mean.sub_(bias)
            model.head.bias.zero_()
        text = [round(value, 4) for value in bias.tolist()]
        notes.append(f"the head's bias {text} went into the normalising shift, since no other tool has a place for it")
    return notes


def _origin(source: str | Path) -> dict[str, Any]:
    """What the source says of its training, to be kept."""
    path = Path(source) / DESCRIPTION
    if not path.is_file():
        return {}
    description = json.loads(path.read_text(encoding="utf-8"))
    return {"data_hash": description.get("data_hash"), "extra": description.get("extra")}


@torch.no_grad()
def _check_plain(model: "RewardModel", folder: Path) -> tuple[float, list[str]]:
    """Open the folder with plain transformers and compare its scores; the largest difference, and what to say."""
    with quiet_loading():
        classifier, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"{folder.name}: weights would be random in plain transformers: {report['missing_keys']}")
    batch = _probe(model)
    wanted = _outputs(model(batch.to(model.device)).cpu())
    if saved_form(model) == "classifier":
        wanted = wanted - model.head.bias.detach().cpu()
    right, left = (_plain_scores(classifier, model, batch, side) for side in ("right", "left"))
    scale = max(1.0, wanted.abs().max().item())
    float32 = classifier.dtype == torch.float32
    allowed = scale * (TOLERANCE if float32 else 5e-2)
    difference = (right - wanted).abs().max().item()
    if not difference <= allowed:
        raise ValueError(
            f"plain transformers gives other scores than Plaudit (off by {difference:.3g}), so nothing was written"
        )
    notes = []
    if not float32:
        notes.append(f"in {classifier.dtype} other tools' scores agree to {difference:.2g}, not to {TOLERANCE:g}")
    if not (left - wanted).abs().max().item() <= 2 * allowed:
        notes.append("pad on the right: this architecture counts the positions of left padding in plain transformers")
    if model.num_outputs > 1:
        notes.append(
            f"the {model.num_outputs} outputs {list(model.attributes)} stand side by side; tools that want one reward "
            f"refuse the folder, and the weights of the total are kept in {DESCRIPTION}"
        )
    return difference, notes


def _check_refused(folder: Path) -> None:
    try:
        with quiet_loading():
            AutoModelForSequenceClassification.from_pretrained(folder)
    except (ValueError, OSError):
        return
    raise ValueError(f"plain transformers opens {folder.name}, though it cannot express the model; nothing was written")


def _probe(model: "RewardModel") -> PackedBatch:
    rows = int(model.backbone.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    batch = probe_batch(model.causal, _LENGTHS, max(5, min(len(model.tokenizer), rows)))
    # Texts end in an end token and hold no padding, as real ones do.
    pad = model.tokenizer.pad_token_id
    batch.input_ids[batch.input_ids == pad] = 3 if pad != 3 else 4
    end = model.text_tokeniser.end_token_id
    if end is not None:
        batch.input_ids[batch.layout.completion_ends - 1] = end
    return batch


def _plain_scores(classifier: Any, model: "RewardModel", batch: PackedBatch, side: str) -> Tensor:
    """`[C, A]`: what plain transformers says of the padded rows of a batch."""
    rows = unpack_rows(batch, model.tokenizer.pad_token_id, side)
    arguments = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask.long()}
    kind = model.text_tokeniser.completion_token_type
    if kind:
        column = torch.arange(rows.input_ids.shape[1])
        answers = (column >= rows.completion_start[:, None]) & (column < rows.completion_end[:, None])
        arguments["token_type_ids"] = answers.long() * kind
    logits: Tensor = classifier.eval()(**arguments).logits
    return logits.float()


def _outputs(scores: Tensor) -> Tensor:
    return scores if scores.ndim == 2 else scores[:, None]


def _move(staged: Path, out: Path) -> None:
    """Put the staged folder in its place; a folder that was there keeps what is no model file."""
    if not out.exists():
        staged.rename(out)
        return
    for old in _model_files(out):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    # The description goes last: a half-moved folder is never taken for a whole one.
    for path in sorted(staged.iterdir(), key=lambda path: path.name == DESCRIPTION):
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)


def _model_files(folder: Path) -> Sequence[Path]:
    patterns = (
        DESCRIPTION, "config.json", "head.safetensors", "backbone", "adapter", "model*.safetensors*",
        "adapter_*", "tokenizer*", "chat_template*", "special_tokens_map.json", "vocab.*", "merges.txt",
    )  # fmt: skip
    return [path for pattern in patterns for path in folder.glob(pattern)]

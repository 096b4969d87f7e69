"""Reward models on disk: folders that other tools open with equal raw scores, or refuse; see `docs/reward-models.md`.

Four forms, named in `plaudit.json` under `form`:

- `classifier`: a last-token decoder, stored as plain transformers' sequence classification model. `AutoModel…`,
  pipelines and servers open it; the bias `b` and the normalisation stand in `plaudit.json`.
- `native`: somebody else's classification model whose own head reads the states; stored as it came.
- `own`: any other aggregation. `config.json` names the model type `plaudit_reward_model`, which plain transformers
  does not know, and the backbone's weights stand under a name that it does not look for: nothing can open the folder
  with a random head.
- `adapter`: adapters beside the name of the backbone they belong to (or the backbone itself where it has no name).
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

import plaudit
from plaudit.models.backbone import (
    DTYPES,
    check_ids,
    fit_tokenizer,
    load_backbone,
    load_tokenizer,
    not_found,
    require_folder_or_hub_name,
)
from plaudit.models.lora import has_lora, merge_lora
from plaudit.models.quiet import quiet_loading
from plaudit.models.states import unwrap
from plaudit.models.verification import check_scores, verify_scores, weights_fingerprint

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel

FORMAT = 1
DESCRIPTION = "plaudit.json"
MODEL_TYPE = "plaudit_reward_model"
VARIANT = "plaudit"
_OURS = (
    DESCRIPTION, "config.json", "head.safetensors", "backbone", "adapter",
    "model.safetensors", "model.safetensors.index.json", "model-*.safetensors",
)  # fmt: skip


def save_reward_model(
    model: "RewardModel",
    folder: str | Path,
    *,
    merge: bool = False,
    data_hash: str | None = None,
    extra: dict[str, Any] | None = None,
) -> list[str]:
    """Save a reward model with its tokenizer.

    `plaudit.json` is removed first and written last, so that a half-written folder is never taken for a whole one.

    Args:
        model: the model; unchanged, except that `merge` merges its adapters for good.
        folder: created if missing; earlier model files in it are replaced, other files stay.
        merge: add adapters into the backbone first, so that the folder stands alone.
        data_hash: hash of the training data, stored.
        extra: anything else that JSON can hold, stored under `extra`.

    Returns:
        What should be said aloud: what other tools will not see, in sentences; empty where nothing is lost.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in _OURS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if merge:
        merge_lora(model)
    notes: list[str] = []
    form = saved_form(model)
    model.tokenizer.save_pretrained(folder)
    with quiet_loading():
        if form == "classifier":
            notes += _save_classifier(model, folder)
        elif form == "native":
            unwrap(model.backbone).save_pretrained(folder)  # type: ignore[operator]
        else:
            _save_own(model, folder, adapter=form == "adapter")
        if check_ids(AutoTokenizer.from_pretrained(folder)) != check_ids(model.tokenizer):
            notes.append(
                "plain AutoTokenizer reads this tokenizer wrongly for this architecture; other tools must open it "
                "with PreTrainedTokenizerFast"
            )
    notes += _what_others_miss(model, form)
    description = _described(model, form) | {"data_hash": data_hash, "notes": notes, "extra": extra or {}}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return notes


def _what_others_miss(model: "RewardModel", form: str) -> list[str]:
    """What plain transformers does not see of a model saved in this form, in sentences."""
    notes: list[str] = []
    if form in ("own", "adapter"):
        read = f" over layers {model.parts.read_layers}" if model.parts.read_layers else ""
        what = "adapters" if form == "adapter" else f"aggregation {model.parts.aggregation!r}{read}"
        notes.append(f"plain transformers cannot express the {what} and refuses this folder; open it with Plaudit")
    elif bool(model.is_normalised) and bool(model.normalisation_mean.any()):
        shift = [round(value, 4) for value in model.normalisation_mean.tolist()]
        notes.append(f"other tools see raw scores: the normalising shift {shift} is kept in {DESCRIPTION}")
    return notes


def _described(model: "RewardModel", form: str) -> dict[str, Any]:
    """What `plaudit.json` says of the model itself, with what it is checked by when it is opened."""
    return {
        "format": FORMAT,
        "form": form,
        "parts": asdict(model.parts),
        "dtype": str(next(model.backbone.parameters()).dtype).removeprefix("torch."),
        "bias": [] if form == "native" else model.head.bias.tolist(),
        "normalisation": {"set": bool(model.is_normalised), "mean": model.normalisation_mean.tolist()}
        | {"std": model.normalisation_std.tolist()},
        "fingerprint": weights_fingerprint(model.backbone) if form == "adapter" else None,
        "check": check_scores(model),
        "tokenizer_check": check_ids(model.tokenizer),
        "versions": {package.__name__: package.__version__ for package in (plaudit, torch, transformers)},
    }


def saved_form(model: "RewardModel") -> str:
    """Which of the four forms this model is saved in."""
    if model.parts.aggregation == "native":
        return "native"
    if has_lora(model):
        return "adapter"
    config: Any = unwrap(model.backbone).config
    known: bool = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    readable = model.parts.aggregation == "last" and not model.parts.read_layers
    if model.causal and readable and known and _empty_classifier(model) is not None:
        return "classifier"
    return "own"


def _empty_classifier(model: "RewardModel") -> Any:
    """The stock classifier of this architecture without weights, or None where its head is not one linear `score`."""
    config: Any = type(unwrap(model.backbone).config).from_dict(unwrap(model.backbone).config.to_dict())  # type: ignore[union-attr, operator]
    config.num_labels = model.num_outputs
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    head: Any = getattr(classifier, "score", None)
    fits = (
        isinstance(head, nn.Linear)
        and getattr(head, "bias", None) is None
        and head.in_features == model.head.in_features
    )
    return classifier if fits and _backbone_attribute(classifier, model) else None


def _backbone_attribute(classifier: Any, model: "RewardModel") -> str | None:
    kind = type(unwrap(model.backbone))
    return next((name for name, child in classifier.named_children() if type(child) is kind), None)


def _save_classifier(model: "RewardModel", folder: Path) -> list[str]:
    classifier = _empty_classifier(model)
    names = list(model.attributes) or ["reward"]
    config = classifier.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    # A pipeline or a server otherwise returns the sigmoid of the score.
    config.problem_type = "regression"
    config.get_text_config().pad_token_id = model.tokenizer.pad_token_id
    backbone: Any = unwrap(model.backbone)
    dtype = next(backbone.parameters()).dtype
    config.dtype = dtype
    setattr(classifier, _backbone_attribute(classifier, model) or "", backbone)
    weight = model.head.weight.detach()
    classifier.score.weight = nn.Parameter(weight, requires_grad=False)
    classifier.save_pretrained(folder)
    notes = []
    if bool(model.head.bias.any()):
        bias = [round(value, 4) for value in model.head.bias.tolist()]
        notes.append(f"decoder classification heads hold no bias: other tools see raw scores without b = {bias}")
    if dtype != torch.float32:
        notes.append(f"the head is float32 and the backbone {dtype}: other tools round the head when they load it")
    return notes


def _save_own(model: "RewardModel", folder: Path, *, adapter: bool) -> None:
    config = {"model_type": MODEL_TYPE, "architectures": ["PlauditRewardModel"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {f"head.{name}": value for name, value in model.head.state_dict().items()}
    tensors |= {f"aggregation.{name}": value for name, value in model.aggregation.state_dict().items()}
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / "head.safetensors")
    plain: Any = unwrap(model.backbone)
    if adapter:
        backbone: Any = model.backbone
        backbone.save_pretrained(folder / "adapter", save_embedding_layers=False)
        if model.parts.backbone_name is not None:
            return
        plain = _without_adapters(model)
    # Without the variant's name no class finds the weights, not even one that is named outright.
    plain.save_pretrained(folder / "backbone", variant=VARIANT)
    (folder / "backbone" / "config.json").rename(folder / "backbone" / "backbone.json")


def _without_adapters(model: "RewardModel") -> Any:
    import copy

    plain: Any = copy.deepcopy(model.backbone)
    return plain.unload()


def load_own(
    folder: Path,
    *,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> "RewardModel":
    """Open a folder that `save_reward_model` wrote, and verify it.

    Args:
        folder: the folder.
        dtype: of the backbone; None is the one it was saved in.
        attn_implementation: `auto`, `packed` or `padded`; None is as saved.
        trust_remote_code: whether code in the folder may run.
        changes: other fields of `RewardModelParts`, e.g. `max_length` or `too_long`.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ValueError: if the folder is damaged, weights are missing, the backbone is another one than the adapters
            belong to, or the model's scores are not those it was saved with.
    """
    from plaudit.models.reward_model import RewardModel

    description = _read_description(folder)
    form = description["form"]
    parts = parts_from(description["parts"], attn_implementation, changes)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code, check=description["tokenizer_check"])
    chosen = dtype or description["dtype"]
    same_dtype = chosen == description["dtype"]
    backbone = _load_backbone(folder, form, parts.backbone_name, chosen, trust_remote_code)
    fit_tokenizer(backbone, tokenizer)
    if same_dtype and form == "adapter" and weights_fingerprint(backbone) != description["fingerprint"]:
        raise ValueError(f"{folder}: the adapters belong to another backbone than {parts.backbone_name!r} is now")
    model = RewardModel(backbone, tokenizer, parts, packed=False if form == "native" else None, initialise=False)
    if form == "adapter":
        import peft

        model.backbone = peft.PeftModel.from_pretrained(backbone, str(folder / "adapter"), is_trainable=True)
    _load_head(model, folder, form, description)
    normalisation = description["normalisation"]
    if normalisation["set"]:
        model.set_normalisation(normalisation["mean"], normalisation["std"])
    model.eval()
    verify_scores(model, description["check"], folder, exact=same_dtype and chosen == "float32")
    return model


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if description.get("format") != FORMAT:
        raise ValueError(f"{path} has format {description.get('format')!r}; this version of Plaudit reads {FORMAT}")
    return description


def parts_from(saved: dict[str, Any], attn_implementation: str | None, changes: dict[str, Any]) -> Any:
    """`RewardModelParts` from what was saved, with some fields changed; unknown fields are an error."""
    from plaudit.models.reward_model import RewardModelParts

    values = {**saved, **changes}
    if attn_implementation is not None:
        values["attn_implementation"] = attn_implementation
    for key in ("attributes", "attribute_weights", "read_layers"):
        values[key] = tuple(values.get(key, ()))
    return RewardModelParts(**values)


def _load_backbone(folder: Path, form: str, name: str | None, dtype: str, trust_remote_code: bool) -> nn.Module:
    if form == "native":
        return load_native(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    if form == "classifier":
        return load_backbone(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    inner = folder / "backbone"
    if not inner.is_dir():
        if name is None:
            raise ValueError(f"{folder}: the folder {inner.name}/ is missing")
        return load_backbone(name, dtype=dtype, trust_remote_code=trust_remote_code)
    values = json.loads((inner / "backbone.json").read_text(encoding="utf-8"))
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return load_backbone(inner, dtype=dtype, trust_remote_code=trust_remote_code, config=config, variant=VARIANT)


def load_native(name: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False) -> nn.Module:
    """A complete sequence classification model.

    Raises:
        ValueError: if weights are missing, so that its head would be random.
    """
    model, report = AutoModelForSequenceClassification.from_pretrained(
        name, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, output_loading_info=True
    )
    missing = sorted(str(key) for key in report["missing_keys"])
    if missing:
        raise ValueError(f"{name}: {len(missing)} weights are missing and would be random, e.g. {missing[:3]}")
    return model  # type: ignore[no-any-return]


def _load_head(model: "RewardModel", folder: Path, form: str, description: dict[str, Any]) -> None:
    if form == "native":
        return
    if form == "classifier":
        tensors = {"head.weight": read_tensor(folder, "score.weight"), "head.bias": torch.tensor(description["bias"])}
    else:
        tensors = load_file(folder / "head.safetensors")
    for prefix, module in (("head.", model.head), ("aggregation.", model.aggregation)):
        mine = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        module.load_state_dict(mine)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a transformers folder."""
    return sorted(path for path in folder.glob("*.safetensors") if path.name != "head.safetensors")


def read_tensor(folder: Path, name: str) -> Tensor:
    """One float32 tensor out of a folder's safetensors files.

    Raises:
        ValueError: if it is in none of them.
    """
    from safetensors import safe_open

    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 (not a dict)
                tensor: Tensor = file.get_tensor(name).float()
                return tensor
    raise ValueError(f"{folder}: no safetensors file holds {name!r}")


def load_reward_model(
    name: str | Path,
    *,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> "RewardModel":
    """Open a reward model: a folder, or a hub name (which downloads it if it is not there yet).

    Args:
        name: folder or hub name; Plaudit's own folders and those of TRL, OpenRLHF, Skywork and the like.
        dtype: of the backbone; None is as saved.
        attn_implementation: `auto`, `packed` or `padded`; None is as saved, or `auto`.
        trust_remote_code: whether code in the folder may run.
        changes: fields of `RewardModelParts` to change, e.g. `max_length` or `template`.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ValueError: see `load_own` and `plaudit.models.foreign.load_foreign`.
    """
    folder = Path(name)
    if not folder.is_dir():
        require_folder_or_hub_name(name)
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name)))
        except OSError as error:
            raise not_found(name, error) from error
    from plaudit.models.foreign import load_foreign

    load = load_own if (folder / DESCRIPTION).is_file() else load_foreign
    with quiet_loading():
        return load(
            folder, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code, **changes
        )

"""`plaudit export`: write a reward model for other tools."""

import sys
from pathlib import Path


def export(
    model: str,
    out: Path,
    *,
    merge: bool = False,
    fold: bool = True,
    overwrite: bool = False,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write a reward model as a folder that other tools open with equal raw scores, or refuse.

    A last-token decoder opens with plain transformers (`AutoModelForSequenceClassification`), its pipelines, TRL and
    servers. Anything else opens with Plaudit only, and everything else refuses it. What was written is opened and
    compared before it takes its place.

    Parameters
    ----------
    model
        Folder (or Hugging Face name) of a reward model, Plaudit's or somebody else's.
    out
        Folder to write.
    merge
        Add LoRA adapters into the backbone, so that the folder stands alone.
    fold
        Fold the normalising shift into the weights where that is exact; otherwise it stays in plaudit.json.
    overwrite
        Replace the model in a folder that exists; other files in it stay.
    dtype
        Number type of the backbone: float32, bfloat16 or float16. By default as saved.
    trust_remote_code
        Let code in the model's folder run.
    """
    from plaudit.models.export import export_reward_model

    result = export_reward_model(
        model, out, merge=merge, fold=fold, overwrite=overwrite, dtype=dtype, trust_remote_code=trust_remote_code
    )
    write = sys.stdout.write
    write(f"{result.folder}: written\n")
    if result.opens_plainly:
        write(
            "opens with AutoModelForSequenceClassification; "
            f"its raw scores differ from Plaudit's by at most {result.difference:.1e} on probe texts\n"
        )
    else:
        write("opens with Plaudit only; plain transformers refuses it (checked)\n")
    for note in result.notes:
        write(f"note: {note}\n")

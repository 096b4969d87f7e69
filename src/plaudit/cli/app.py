"""The command `plaudit`.

A verb is one thin file `cli/<verb>.py`. It is registered below by an import string, so that `plaudit --help` imports
neither the verb nor torch. A verb with a configuration follows this pattern, nothing else:

    '''`plaudit reward`: train a reward model.'''

    from plaudit.cli.verb import Words, run_verb
    from plaudit.configs.reward import RewardTrainingConfig


    def reward(*words: Words) -> None:
        '''Train a reward model from comparisons.'''
        run_verb(
            words, RewardTrainingConfig, "plaudit.training.reward:main", verb="reward", about=reward.__doc__ or ""
        )

The job itself is `def main(config: RewardTrainingConfig, *, dry_run: bool = False) -> …`: importable from Python, and
with `dry_run=True` it prints what the run would need (the resolved configuration has been printed already). With
`positional="model"` plain words (`plaudit evaluate reward MODEL`) fill that key; a list key takes them all.

A verb with two or three options and no configuration is an ordinary cyclopts function (see `cli/doctor.py`). Faults of
the user are raised as `ValueError` (or `OSError`) and become one line on stderr and exit code 2, here and only here.
"""

import ctypes
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.util import find_spec

from cyclopts import App, CycloptsError

import plaudit
from plaudit.cli.faults import describe_fault

VERBS: dict[str, tuple[str, str]] = {
    "doctor": ("plaudit.cli.doctor:doctor", "Say what this machine can do: devices, dtypes, extras, attention."),
    "data inspect": ("plaudit.cli.data:inspect", "Audit a file of comparisons: counts, ties, contradictions, floors."),
    "data convert": ("plaudit.cli.data:convert", "Read any known format and write Plaudit's own records."),
    "sft": ("plaudit.cli.sft:sft", "Supervised fine-tuning on demonstrations."),
    "reward": ("plaudit.cli.reward:reward", "Train a reward model from human judgements."),
    "align": ("plaudit.cli.align:align", "Improve a language model against a reward: PPO, RLOO, GRPO and others."),
    "gym": ("plaudit.cli.gym:gym", "Train an agent in a Gymnasium environment, or evaluate a saved one."),
    "evaluate reward": ("plaudit.cli.evaluate:reward", "Measure a reward model: accuracy, calibration, floors."),
    "evaluate policy": ("plaudit.cli.evaluate:policy", "Measure an aligned model against the one it started from."),
    "score": ("plaudit.cli.score:score", "Score completions from standard input, in order, in constant memory."),
    "generate": ("plaudit.cli.generate:generate", "Answer prompts with a language model, several times each."),
    "chat": ("plaudit.cli.chat:chat", "Talk to a language model by hand."),
    "export": ("plaudit.cli.export:export", "Write a reward model for other tools, and say what cannot be expressed."),
    "demo": ("plaudit.cli.demo:demo", "The built-in world: from rankings to a reward model to a better policy."),
}
"""Verb to its import string and one line of help."""

VERB_GROUPS = {"data": "Look at and convert comparisons.", "evaluate": "Measure a model."}


def registered_verbs() -> list[str]:
    """The verbs whose file is part of this installation."""
    return [verb for verb, (import_string, _) in VERBS.items() if find_spec(import_string.partition(":")[0])]


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user says how OpenMP's threads wait for each other."""


def wait_without_spinning() -> None:
    """Let torch's threads sleep soon while they wait for each other, unless the environment says how they should wait.

    By default they spin. As soon as another process computes, the thread that is waited for has lost its processor to
    those that wait for it, and an operation takes several times as long. Read when torch is loaded, so set before.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = "1000"
        os.environ["KMP_BLOCKTIME"] = "0"


MEMORY = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables by which a user says what the C library does with freed memory."""

# Parameters of glibc's mallopt (malloc.h): the largest block that comes from the heap (32 MiB is the most it takes),
# how much free heap is kept, and how much is asked for at once.
_MALLOPT = {-3: 32 << 20, -1: 512 << 20, -2: 64 << 20}


def keep_freed_memory() -> None:
    """Let glibc keep up to 512 MiB of freed memory for the next tensors, unless the environment says what it should do.

    By default it gives the memory of a step's tensors back to the system and asks for it again in the next step, page
    by page, filled with zeros: up to a fifth of a small model's step. Does nothing with another C library.
    """
    if any(name in os.environ for name in MEMORY):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in _MALLOPT.items():
        mallopt(parameter, value)


def build_app() -> App:
    """The cyclopts application with every verb registered by its import string, none of them imported."""
    app = App(name="plaudit", help=plaudit.__doc__, version=plaudit.__version__, suppress_keyboard_interrupt=False)
    groups: dict[str, App] = {}
    for verb in registered_verbs():
        import_string, about = VERBS[verb]
        parent, name = app, verb
        if " " in verb:
            group, _, name = verb.partition(" ")
            if group not in groups:
                groups[group] = App(name=group, help=VERB_GROUPS[group])
                app.command(groups[group])
            parent = groups[group]
        # A verb with a configuration prints its own help page, which lists every key of it.
        parent.command(import_string, name=name, help=about, **_own_help(verb))
    return app


CONFIGURED_VERBS = frozenset({"sft", "reward", "align", "gym", "evaluate reward", "evaluate policy", "demo"})
"""The verbs whose help page and flags come from a configuration class (`plaudit.cli.verb.run_verb`)."""


def _own_help(verb: str) -> dict[str, list[str]]:
    return {"help_flags": [], "version_flags": []} if verb in CONFIGURED_VERBS else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of `plaudit`.

    Faults of the user (`ValueError`, `OSError`, unknown options, a missing extra, too little memory) end with one line
    on stderr and exit code 2.
    `--traceback`, or `PLAUDIT_TRACEBACK=1`, shows where they came from.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = os.environ.get("PLAUDIT_TRACEBACK", "") not in ("", "0")
    wait_without_spinning()
    keep_freed_memory()
    if "--traceback" in words:
        words.remove("--traceback")
        show_traceback = True
    try:
        build_app()(words, exit_on_error=False, print_error=False, result_action="return_value")
    except BrokenPipeError:
        # The reader of our output has left (`plaudit … | head`): no fault, and nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.stderr.write("plaudit: interrupted\n")
        sys.exit(130)
    except (CycloptsError, ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        lines = describe_fault(error)
        if lines is None:
            raise
        if show_traceback:
            traceback.print_exc()
        # Under torchrun every process may meet the same fault; each line says whose it is.
        process = f"process {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
        for line in lines:
            sys.stderr.write(f"plaudit: {process}{line}\n")
        sys.exit(2)

"""What every verb with a configuration shares: flags, files, `--help`, `--print-config`, `--dry-run`."""

import gc
import importlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Parameter

from plaudit.configs.base import AnyConfig, Config, KeyPath, Layer, dump_config, load_config
from plaudit.configs.flags import parse_flags

Words = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
"""The annotation of a verb's `*words`: everything after the verb, flags included, as it was typed."""

COMMON_OPTIONS = (
    ("--print-config", "Print the resolved configuration as YAML and stop."),
    ("--dry-run", "Print the resolved configuration and what the run would need, and stop."),
    ("--traceback", "Show where an error came from (also PLAUDIT_TRACEBACK=1)."),
    ("--help", "Show this page."),
)


def run_verb(
    words: tuple[str, ...],
    config_class: type[Config],
    main: str,
    *,
    verb: str,
    about: str,
    positional: str | None = None,
) -> None:
    """Put a verb's configuration together and call its job.

    Args:
        words: everything typed after the verb.
        config_class: the verb's configuration.
        main: import string `module:function` of the job; `main(config)` runs it and `main(config, dry_run=True)`
            prints what it would need. Imported only after the configuration is known to be valid. Where what it returns
            has an `exit_code` that is not 0, the command ends with it.
        verb: the words that call the verb, for the help page.
        about: what the verb does, for the help page.
        positional: the configuration key that takes plain words which are no YAML files.

    Raises:
        ConfigError: (a ValueError) when the configuration does not hold.
    """
    options = [word for word in words if word in ("-h", "--help", "--print-config", "--dry-run")]
    if "-h" in options or "--help" in options:
        from plaudit.cli.help import print_verb_help

        print_verb_help(config_class, verb=verb, about=about, positional=positional)
        return
    files, flags = parse_flags(config_class, [word for word in words if word not in options], positional=positional)
    config = load_config(config_class, files, flags)
    if "--print-config" in options:
        sys.stdout.write(dump_config(config))
        return
    if "--dry-run" in options:
        sys.stdout.write(dump_config(config))
        sys.stdout.flush()
        import_string(main)(config, dry_run=True)
        return
    result = import_string(main)(config)
    # A run that a signal stopped has saved what is needed to go on, but whatever needs its result must not start.
    if code := getattr(result, "exit_code", 0):
        sys.exit(code)


def config_of_options(config_class: type[AnyConfig], **options: Any) -> AnyConfig:
    """The configuration that a verb's own options make up; a fault is one line that names the flag.

    Raises:
        ConfigError: (a ValueError) when it does not hold.
    """
    places: dict[KeyPath, str] = {(name,): f"--{name.replace('_', '-')}" for name in options}
    return load_config(config_class, overrides=Layer(options, places))


def import_string(path: str) -> Callable[..., Any]:
    """The object that `module:name` names, imported now.

    Python's collector rests meanwhile, and what was imported is left out of its rounds: torch and transformers make
    hundreds of thousands of objects that live as long as the process, and looking through them again and again takes
    a quarter of the start and nearly all of the exit.
    """
    module, _, name = path.partition(":")
    if module not in sys.modules and gc.isenabled():
        gc.disable()
        try:
            importlib.import_module(module)
            gc.freeze()
        finally:
            gc.enable()
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found

"""`plaudit demo`: the main job on the built-in world."""

from plaudit.cli.verb import Words, run_verb
from plaudit.configs.demo import DemoConfig


def demo(*words: Words) -> None:
    """The built-in world: from people's rankings to a reward model to a better policy, with a report."""
    run_verb(words, DemoConfig, "plaudit.demo.pipeline:main", verb="demo", about=demo.__doc__ or "")

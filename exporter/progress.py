"""How long work tells of its progress: a callback, so that nothing but the command line prints."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is under way, how much is done, of how much

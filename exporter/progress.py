"""How long work tells of its progress: a callback, so that nothing but the command line prints."""

from typing import Protocol


class Progress(Protocol):
    """What is under way, how much of it is done, of how much, and where it is: the name of a site, of a file."""

    def __call__(self, what: str, done: int, of: int, at: str = "", /) -> None: ...


def silent(what: str, done: int, of: int, at: str = "", /) -> None:
    """Tell nobody."""

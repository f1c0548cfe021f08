"""The error of everything that reads or writes a file: one line that says where, what, and the remedy."""


class FormatError(ValueError):
    """`where: what is wrong; remedy`, one line, shown to a person as it is."""

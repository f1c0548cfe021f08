"""The one error a person sees: one line that says where, what, and the remedy. The command line exits 2 on it."""


class VlmqError(Exception):
    """`where: what; remedy`, for instance `val.json: image 42 is missing; put it into images/`."""

"""The one error a person sees: one line that says where, what, and the remedy. The command line catches it and exits 2."""


class VlmqError(Exception):
    """`where: what; remedy`, for instance `val.json: image 42 is missing; put it into images/`."""

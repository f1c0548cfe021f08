"""`python -m vlmq` is `vlmq`, for launchers that start a module."""

from vlmq.cli import main

main()

"""vlmq: export vision-language models to small INT4/INT8 checkpoints that still answer as the original did."""

__version__ = "0.1.0"

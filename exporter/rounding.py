"""Rounding what linears read, as the exported model will: hooks on a model whose weights are dense."""

from collections.abc import Mapping

from torch import Tensor, nn

from vlmq.kernels.grid import Grid, Limits, round_input


class InputRounding:
    """Rounds the inputs of the named linears of a model until `remove()`.

    limits: of each input, None where its range is its own; may be changed while the rounding is on.
    """

    def __init__(self, model: nn.Module, grids: Mapping[str, Grid], limits: Mapping[str, Limits | None]) -> None:
        self.grids, self.limits = dict(grids), dict(limits)
        self._hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: (self._round(name, args[0]), *args[1:])
            )
            for name in grids
        ]

    def _round(self, name: str, x: Tensor) -> Tensor:
        return round_input(x, self.grids[name], self.limits[name])

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

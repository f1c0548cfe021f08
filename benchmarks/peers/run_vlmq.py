"""Make the weights of an export of vlmq dense: `run_vlmq.py OUTPUT`. The export itself is the command line's."""

import sys
from pathlib import Path

from measured import save_dense

from vlmq.exporter.load import load
from vlmq.kernels.linear import QuantizedLinear


def main() -> None:
    output = Path(sys.argv[1])
    model = load(output / "model")
    weights = {name: parameter for name, parameter in model.state_dict().items() if name.endswith(".weight")}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weights[f"{name}.weight"] = module.quantized().dequantize()
    save_dense(output, weights)


if __name__ == "__main__":
    main()

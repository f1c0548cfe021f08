"""Put the measured results into README.md, between its two marks, and docs/results.md: `python benchmarks/readme.py`.

Only benchmarks/results/*.json is shown; nothing is typed by hand.
"""

import json
from pathlib import Path

import common
from scale import METHODS

from vlmq.exporter.demo.splits import prior_accuracy

HOME = Path(__file__).parent.parent
README, MORE = HOME / "README.md", HOME / "docs" / "results.md"
START, END = "<!-- results -->\n", "<!-- /results -->"


def results(name: str) -> tuple[dict, dict]:
    found = json.loads((common.RESULTS / f"{name}.json").read_text())
    return found["results"], found["machine"]


def exports() -> str:
    found, machine = results("exports")
    lines = [
        "## Results",
        "",
        "AWQ, 4 bits, groups of 64, vision encoder, connector and language model, fused qkv included; 2400 questions about 600 "
        "pictures that were neither trained nor calibrated on, of which the best guess that never looks gets "
        f"{prior_accuracy('evaluation'):.1f} % right ({machine['processor']}, {machine['cores']} cores; "
        "`python benchmarks/exports.py`).",
        "",
        "| | " + " | ".join(found) + " |",
        "|---|" + "---|" * len(found),
    ]

    def row(label: str, cell) -> None:
        lines.append(f"| {label} | " + " | ".join(cell(entry) for entry in found.values()) + " |")

    def accuracy(kind: str):
        def cell(entry: dict) -> str:
            score = entry["verdict"]["accuracy"][kind]
            change = score["difference"]
            return (
                f"{score['reference']:.2f} % → {score['export']:.2f} % "
                f"({change['points']:+.2f}, 95 %: {change['low']:+.2f} to {change['high']:+.2f})"
            )

        return cell

    def megabytes(size: float) -> str:
        return f"{size / 1e6:.1f} MB"

    def memory(entry: dict) -> str:
        sides = [entry["verdict"][side]["memory"] for side in ("reference", "export")]
        before, after = (side["loaded"] - side["imported"] for side in sides)
        return f"{megabytes(before)} → {megabytes(after)}"

    def disk(kind: str):
        return lambda entry: (
            f"{megabytes(entry['verdict']['reference']['disk']['safetensors'])} → "
            f"{megabytes(entry['verdict']['export']['disk'][kind])}"
        )

    for kind in ("overall", "yes/no", "number", "other"):
        row(f"accuracy, {kind}", accuracy(kind))
    row("answers with the reference's tokens", lambda entry: f"{100 * entry['verdict']['token_agreement']:.1f} %")
    row(
        "quantized linears against fp16, scales counted",
        lambda entry: f"{entry['sizes']['linears_ratio']:.2f} x smaller",
    )
    row("whole safetensors file", disk("safetensors"))
    row("whole ONNX folder", disk("onnx"))
    row("memory of the loaded model, torch → onnxruntime", memory)
    row(
        "time per answer, torch fp32 → onnxruntime",
        lambda entry: " → ".join(
            f"{1000 * entry['verdict'][side]['seconds_per_answer']:.1f} ms" for side in ("reference", "export")
        ),
    )
    row(
        "onnxruntime's tokens equal torch's, same weights",
        lambda entry: f"{entry['tokens']['equal']} of {entry['tokens']['answers']}",
    )
    row(
        "weights bit-identical in safetensors and ONNX",
        lambda entry: f"{entry['weights']['bit_identical']} of {entry['weights']['safetensors']} linears",
    )
    row("the whole command", lambda entry: f"{entry['seconds']:.0f} s")
    return "\n".join(lines)


def evaluation() -> str:
    """The tables that papers print."""
    found, machine = results("evaluation")
    first = next(iter(found["models"].values()))["reference"]
    lines = [
        f"{first['questions']['samples']} questions in VQAv2's format and {first['captions']['samples']} captions, as "
        "`vlmq evaluate` scores them; the seconds of all answers to the questions, and the memory of the loaded model "
        f"({machine['processor']}, {machine['cores']} cores; all of it in {found['seconds']:.0f} s; "
        "`python benchmarks/evaluation.py`).",
        "",
        "| model | weights | overall | yes/no | number | other | time | memory | CIDEr | SPICE | METEOR |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    reasons = {}
    for model, rows in found["models"].items():
        for label, row in rows.items():
            asked, said = row["questions"], row["captions"]
            scores = [f"{asked['accuracy'][kind]:.2f} %" for kind in ("overall", "yes/no", "number", "other")]
            takes = [f"{asked['seconds']:.1f} s", f"{row['memory']['model'] / 1e6:.1f} MB"]
            captions = [f"{said['CIDEr']['overall']:.3f}"]
            for name in ("SPICE", "METEOR"):
                value = said[name]
                captions.append("-" if isinstance(value, str) else f"{value:.3f}")
                if isinstance(value, str):
                    reasons[name] = value
            weights = f"{'16 bits' if label == 'reference' else f'{label}, 4 bits'} ({row['engine']})"
            lines.append(f"| {' | '.join([model, weights, *scores, *takes, *captions])} |")
    notes = [f"{name}: {reason}." for name, reason in reasons.items()]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def outliers() -> str:
    found, _ = results("outliers")
    lines = [
        "A small model has no outlier channels; these variants were given some, as real language models have, and then trained on "
        "for a while (*tuned*), or not (*rescaled*, where a method only has to undo what was done). 3 bits, groups of 64, "
        "three seeds (`python benchmarks/outliers.py`):",
        "",
        "| model | variant | seed | reference | RTN | AWQ | AWQ - RTN, points (95 %) | KL, RTN | KL, AWQ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        change = row["awq_minus_rtn"]
        lines.append(
            f"| {row['model']} | {row['variant']} | {row['seed']} | {row['reference']:.1f} % | {row['rtn']['accuracy']:.1f} % | "
            f"{row['awq']['accuracy']:.1f} % | {change['points']:+.1f} ({change['low']:+.1f} to {change['high']:+.1f}) | "
            f"{row['rtn']['divergence']:.3f} | {row['awq']['divergence']:.3f} |"
        )
    return "\n".join(lines)


# (method, bits of weights, bits of inputs, granularity) of the rows shown; results/methods.md has them all
SHOWN = (
    ("reference", 16, 16, "-"),
    *((method, 4, 16, "g64") for method in ("rtn", "awq", "gptq", "awq+gptq")),
    *((method, 3, 16, "g64") for method in ("rtn", "awq", "gptq", "awq+gptq")),
    *((method, 2, 16, "g64") for method in ("rtn", "awq", "gptq", "gptaq", "awq+gptq")),
    *((method, 8, 8, "tensor") for method in ("rtn", "smoothquant")),
    *((method, 4, 4, "g64") for method in ("rtn", "smoothquant", "awq+smoothquant", "rotate+gptq", "rotate+awq+gptq")),
)


def methods() -> str:
    found, machine = results("methods")
    models = [(name, variant) for name in ("blip2-mini", "llava-mini") for variant in ("plain", "outliers")]
    lines = [
        "Every method at the same budgets, all components: accuracy in % of 2000 questions, and the divergence (KL, nats) of the "
        f"first token from the reference's, mostly of one seed (the table says which) ({machine['processor']}; `python benchmarks/methods.py`; "
        "[all rows, intervals and verdicts](../benchmarks/results/methods.md)).",
        "",
        "| method | W | A | granularity | " + " | ".join(f"{name}, {variant}" for name, variant in models) + " |",
        "|---|---|---|---|" + "---|" * len(models),
    ]
    for method, weights, inputs, granularity in SHOWN:
        cells = []
        for name, variant in models:
            same = [
                row
                for row in found
                if (row["checkpoint"], row["variant"], row["components"])
                == (name, variant, "-" if weights == 16 else "all")
                and (row["method"], row["weights"], row["inputs"], row["granularity"])
                == (method, weights, inputs, granularity)
                and "accuracy" in row
            ]
            means = (
                [sum(row[figure] for row in same) / len(same) for figure in ("accuracy", "divergence")] if same else []
            )
            cells.append(f"{means[0]:.1f} ({means[1]:.4f})" if means else "")
        lines.append(f"| {method} | {weights} | {inputs} | {granularity} | {' | '.join(cells)} |")
    picture = "![Accuracy against bits per weight, by method](methods.png)"
    return "\n".join([*lines, "", picture])


def consumers() -> str:
    found, machine = results("consumers")
    bits = list(dict.fromkeys(row["bits"] for row in found))
    lines = [
        "Who loads an export, and how many of its greedy answers are those of transformers' model with the dequantized weights in "
        f"float32, by bits ({machine['processor']}; `python benchmarks/consumers.py`; 8 / 4: vision at 8 bits, the rest at 4; vLLM: "
        "[what was checked instead](docs/consumers.md#vllm)):",
        "",
        f"| consumer | layout | family | {' | '.join(bits)} |",
        f"|{'---|' * (3 + len(bits))}",
    ]
    rows: dict[str, dict[str, str]] = {}
    for row in found:
        left = f" ({' and '.join(row['leaves'])} left)" if row["leaves"] else ""
        said = f"{row['same']} of {row['of']}" if row["loads"] else f"no: {row['why'].replace('|', '/')}"
        rows.setdefault(f"{row['consumer']} | {row['layout']} | {row['family']}{left}", {})[row["bits"]] = said
    lines += [f"| {name} | {' | '.join(cells.get(each, '-') for each in bits)} |" for name, cells in rows.items()]
    return "\n".join(lines)


PARTS = {"decoder_model_merged": "decoder, a token", "vision_encoder": "vision encoder, a picture"}


def runtime() -> str:
    """Speed and memory of graphs at true shapes."""
    found, machine = results("runtime")
    lines = [
        "Graphs at the shapes of BLIP-2 with OPT-2.7B, random weights, in onnxruntime on a CPU: one token at batch 1 after "
        f"{found['past']} others, and one picture; g128 is the group, levels are onnxruntime's: 0 multiplies in float32, 4 in "
        f"int8 ({machine['processor']}, {found['threads']} threads; `python benchmarks/runtime.py --layers 32 "
        "--vision-blocks 39`).",
        "",
        "| part | layers | precision | ms | against fp32 | memory of the model | of fp32's | of the memory's rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    whole = {row["part"]: row["model_bytes"] for row in found["rows"] if row["precision"] == "fp32"}
    for row in found["rows"]:
        rate = f"{row['of_bandwidth']:.0%}" if "of_bandwidth" in row else "-"
        share = row["model_bytes"] / whole[row["part"]]
        cells = [PARTS[row["part"]], str(row["count"]), row["precision"], f"{1000 * row['seconds']:.0f}"]
        cells += [f"{row['faster']:.2f} x", f"{row['model_bytes'] / 1e9:.2f} GB", f"{share:.0%}", rate]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def scale(whole: bool) -> str:
    """What exports cost: of whole checkpoints, or of some layers of each transformer."""
    found, machine = results("scale")
    rows = [row for row in found if (row["blocks"] is None and row["scale"] == 1) == whole]
    rows.sort(key=lambda row: (row["shape"], METHODS.index(row["method"]), row["calibrate_in"], row["samples"]))
    what = "of these shapes" if whole else "of so many layers of each transformer at true widths"
    lines = [
        f"Exports of random checkpoints {what}, 4 bits in groups of 128, every component, to safetensors: what the process took, by "
        f"the operating system, beside what `vlmq plan` said ({machine['processor']}, {machine['threads']} thread, with other work "
        "on the machine; `python benchmarks/scale.py`).",
        "",
        "| model | method | samples | processor time | wall time | peak memory | planned | read | written |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        part = row["shape"] + ("" if row["blocks"] is None else f", {row['blocks']} layers")
        times = [f"{row[name] / 60:.1f} min" for name in ("cpu_seconds", "seconds")]
        sizes = [
            f"{row[name] / 1e9:.2f} GB" for name in ("peak_bytes", "planned_bytes", "source_bytes", "written_bytes")
        ]
        method = row["method"] + ("" if row["calibrate_in"] == "float32" else f", {row['calibrate_in']}")
        lines.append(f"| {' | '.join([part, method, str(row['samples']), *times, *sizes])} |")
    return "\n".join(lines)


def peers() -> str:
    """What vlmq and other quantizers take of one machine, and what they leave of one model."""
    found, machine = results("peers")
    lines = [
        "One random LLaVA (Llama 1024 x 8 layers with a 2816 wide MLP, CLIP 512 x 8), the decoder's linears at 4 bits in groups of "
        f"128, symmetric, the same 16 image-text samples ({machine['processor']}, {machine['threads']} threads; the whole process; error: of "
        "the decoder's last hidden states on held-out samples, relative; `python benchmarks/peers.py`, "
        "[what is uneven](../benchmarks/peers/README.md)).",
        "",
        "| tool | what it takes | processor time | wall time | peak memory | error | KL, nats | read again as LLaVA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        ours = row["against"] == name
        over = {key: "" if ours else f" ({row['ratios'][key]:.1f} x)" for key in ("cpu_s", "wall_s", "peak_bytes")}
        cells = [name, row["what"], f"{row['cpu_s']:.0f} s{over['cpu_s']}", f"{row['wall_s']:.0f} s{over['wall_s']}"]
        cells += [f"{row['peak_bytes'] / 1e9:.2f} GB{over['peak_bytes']}", f"{row['errors']['hidden']:.3f}"]
        cells += [f"{row['errors']['kl']:.4f}", "yes" if row["reloads"] else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    before, rest = README.read_text().split(START)
    after = rest.split(END)[1]
    picture = "![Scenes, questions, and what the 16-bit and the 4-bit model answer](docs/answers.png)"
    shown = [exports(), picture, evaluation(), runtime(), scale(whole=True), consumers()]
    README.write_text(before + START + "\n\n".join(shown) + "\n" + END + after)
    title = "# More results\n\nWritten by `python benchmarks/readme.py` from what the benchmarks measured."
    MORE.write_text("\n\n".join([title, methods(), outliers(), scale(whole=False), peers()]) + "\n")


if __name__ == "__main__":
    main()

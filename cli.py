"""The command line: arguments become one value, one call does the work, and the person sees the result.

Heavy imports are inside the commands, so that --help answers at once. Exit codes: 0, 1 (the export does not answer
as the reference did), 2 (bad input), 3 (a fault of vlmq), 130 and 143 (stopped).
"""

import os
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import vlmq
from vlmq.exporter.errors import VlmqError
from vlmq.formats.errors import FormatError
from vlmq.terminal.answers import print_answers, print_stream
from vlmq.terminal.bars import bars, note
from vlmq.terminal.conclusions import conclude, print_json, verdict_json
from vlmq.terminal.flags import bytes_of, group_of, thresholds_of
from vlmq.terminal.recipe_flags import takes_recipe
from vlmq.terminal.stopping import answers_kept, exit_code, kept_to_go_on, listen

DEFAULT_MODEL = "blip2-mini"

app = typer.Typer(
    name="vlmq",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Export vision-language models to INT4/INT8 and prove that they still answer as the original did.",
)

recipe_app = typer.Typer(no_args_is_help=True, help="Show the recipe that flags and a file make.")
app.add_typer(recipe_app, name="recipe")

Model = Annotated[
    str, typer.Argument(help="A checkpoint's folder, a Hub id (user/name), or a demo: blip2-mini, llava-mini.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
Data = Annotated[
    str | None, typer.Option(help="Samples to verify on: VQAv2 or COCO files, a .jsonl, a folder of images.")
]
MaxDrop = Annotated[
    float | None,
    typer.Option(help="Points of accuracy that may be lost; else exit 1.  \\[default: 2 from 4 bits on]"),
]
Thresholds = Annotated[
    list[str] | None,
    typer.Option("--threshold", help="NAME=VALUE of the verdict, such as kl=0.05; may be repeated. See docs."),
]
Format = Annotated[
    Literal["safetensors", "onnx", "both"] | None,
    typer.Option(help="What to write.  \\[default: what the consumer reads; both]"),
]
NumberOfSamples = Annotated[int, typer.Option(help="How many samples to calibrate on.")]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare the export's answers with the reference's.")
]
ActivationMemory = Annotated[
    str, typer.Option(help="Hidden states that wait in memory; more wait on the disk.", metavar="SIZE")
]
Gate = Annotated[
    bool, typer.Option("--gate/--no-gate", help="Load what is written with transformers; exit 1 where it differs.")
]
Device = Annotated[
    str, typer.Option(help="Where blocks are solved: auto, cpu, cuda or cuda:1; auto is a GPU where there is one.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print every row of the verdict.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        typer.echo(f"vlmq {vlmq.__version__}")
        raise typer.Exit


@app.command()
@takes_recipe
def export(
    recipe: Any,
    model: Model = DEFAULT_MODEL,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.  \\[default: MODEL-METHOD-wBITS]")
    ] = None,
    format: Format = None,
    accuracy_level: Annotated[
        Literal["0", "4"], typer.Option(help="onnxruntime's products: 0 in float32, 4 in int8 (faster, less exact).")
    ] = "0",
    calibration: Annotated[
        str | None,
        typer.Option(help="Samples to calibrate on: as --data, or a Hub data set.  \\[default: the demo's; flickr30k]"),
    ] = None,
    samples: NumberOfSamples = 128,
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
    text_only: Annotated[bool, typer.Option("--text-only", help="Allow samples without an image.")] = False,
    gate: Gate = True,
    verify: Verify = True,
    data: Data = None,
    max_drop: MaxDrop = None,
    threshold: Thresholds = None,
    revision: Revision = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.", metavar="SIZE")] = "5GB",
    activation_memory: ActivationMemory = "1GiB",
    device: Device = "auto",
    calibrate_in: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="How blocks run on the samples: bfloat16 is often faster.")
    ] = "float32",
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew where an earlier run was stopped.")] = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model, write it as safetensors and ONNX, and verify it.

    A run that was stopped, however it was, goes on where it was when the same command is given again.
    """
    from vlmq.exporter import consumers
    from vlmq.exporter.pipeline import Request
    from vlmq.exporter.pipeline import export as run_export

    inputs = recipe.activations.grid
    said = {place.bits or recipe.bits for place in (recipe, *recipe.components.values(), *recipe.rules)} - {16}
    bits = f"w{'-'.join(map(str, sorted(said)))}" + (f"a{inputs.bits}" if inputs else "")
    name = output or Path(f"{Path(model).resolve().name}-{recipe.method}-{bits}")
    request = Request(
        model=model,
        output=name,
        recipe=recipe,
        revision=revision,
        formats=format or consumers.formats(recipe.consumer),
        accuracy_level=int(accuracy_level),
        calibration=calibration,
        samples=samples,
        seed=seed,
        text_only=text_only,
        verify=verify,
        data=data,
        thresholds=thresholds_of(threshold, max_drop),
        max_shard_bytes=bytes_of(max_shard_size, "--max-shard-size"),
        activation_memory=bytes_of(activation_memory, "--activation-memory"),
        fresh=fresh,
        gate=gate,
        device=device,
        calibrate_in=calibrate_in,
    )
    with kept_to_go_on(name), bars(as_json) as progress:
        done = run_export(request, progress, note)
    if done is None:
        return
    if as_json:
        verdict = done.verdict and verdict_json(done.verdict)
        misses = list(done.release.misses) if done.release else []
        memory = {"planned": done.planned_memory, "peak": done.peak_memory}
        print_json(
            {"folder": str(done.folder), "note": done.note, "misses": misses, "memory": memory, "verdict": verdict}
        )
    else:
        from vlmq.formats.manifest import sizes

        found = sizes(done.manifest)
        smaller = (  # graphs have a layout of their own
            f", {found.linears_ratio:.2f} x smaller than fp16 with scales "
            f"({found.bits_per_weight:.2f} bits per weight); all weights {found.files_ratio:.2f} x"
            if found.files
            else ""
        )
        typer.echo(f"{done.folder}: {len(done.manifest.tensors)} weights quantized{smaller}")
        planned, peak = (f"{count / 1e9:.2f} GB" for count in (done.planned_memory, done.peak_memory))
        typer.echo(f"memory of this process at its peak: {peak}, {planned} were planned")
        if done.note:
            typer.echo(f"note: {done.note}")
    conclude(done.folder, done.verdict, done.release, as_json, verbose)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that vlmq export wrote.")],
    reference: Annotated[str | None, typer.Option(help="The checkpoint it was made from, if it moved.")] = None,
    data: Data = None,
    max_drop: MaxDrop = None,
    threshold: Thresholds = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps what was measured of a reference, for the next export of it."),
    ] = None,
    gate: Gate = True,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Compare an export with the checkpoint it was made from, and have transformers load it.

    Writes report.json and report.html into its folder.
    """
    from vlmq.exporter.pipeline import verify_folder

    thresholds = thresholds_of(threshold, max_drop)
    with bars(as_json) as progress:
        verdict, release = verify_folder(folder, reference, data, thresholds, progress, cache, gate)
    if as_json:
        print_json(verdict_json(verdict))
    conclude(folder, verdict, release, as_json, verbose)


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="A folder that vlmq export or vlmq convert wrote.")],
    to: Annotated[
        Literal["compressed-tensors", "awq", "gptq", "gptq-v2"],
        typer.Option(help="The layout; awq has 4 bits and one grid, gptq 2, 3, 4 and 8 bits."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.  \\[default: FOLDER-LAYOUT]")
    ] = None,
    gate: Gate = True,
    as_json: AsJson = False,
) -> None:
    """Write an export in another layout, with the same codes, scales and zeros, bit for bit."""
    from vlmq.exporter.convert import convert as run_convert

    with bars(as_json) as progress:
        done = run_convert(folder, to, output or Path(f"{folder.resolve().name}-{to}"), progress, gate)
    if as_json:
        misses = list(done.release.misses) if done.release else []
        print_json({"folder": str(done.folder), "note": done.note, "misses": misses})
        conclude(done.folder, None, done.release, as_json)
        return
    from vlmq.formats.manifest import sizes

    found = sizes(done.manifest)
    typer.echo(
        f"{done.folder}: the same weights as {to}, {found.linears_ratio:.2f} x smaller than fp16 with scales "
        f"({found.bits_per_weight:.2f} bits per weight); all weights {found.files_ratio:.2f} x"
    )
    if done.note:
        typer.echo(f"note: {done.note}")
    conclude(done.folder, None, done.release, as_json)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A folder that vlmq export or vlmq convert wrote.")],
    repository: Annotated[str, typer.Argument(help="user/name on the Hub; made where it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository for your eyes only.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the folder and list its files; push none.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made where it is not there.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The Hub's name of the source, for the card, where that was a folder.")
    ] = None,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Push what was not verified, or failed; the card says so.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Push an export to the Hugging Face Hub, with its card; given again, it goes on where it was stopped."""
    from vlmq.formats.hub import push as run_push

    with bars(as_json) as progress:
        done = run_push(folder, repository, private, dry_run, revision, allow_unverified, base_model, progress)
    if as_json:
        print_json(asdict(done))
        return
    total = f"{len(done.files)} files, {sum(done.files.values()) / 1e6:,.1f} MB"
    if dry_run:
        for name, size in done.files.items():
            typer.echo(f"{size:>15,}  {name}")
        typer.echo(f"{repository}: would be given {total}; nothing was pushed")
    else:
        typer.echo(f"{done.url}: has {total}, at commit {done.commit}")
    for name in done.left:
        typer.echo(f"note: {name} is not part of the export and is not pushed", err=True)


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="A folder that vlmq export wrote, or a checkpoint's.")],
    image: Annotated[list[Path], typer.Option(help="The picture; may be repeated, for a batch.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A question about it; without one, it is described. May be repeated.")
    ] = None,
    engine: Annotated[
        Literal["onnx", "torch"] | None, typer.Option(help="\\[default: onnx where the folder has it]")
    ] = None,
    provider: Annotated[Literal["cpu", "cuda"], typer.Option(help="What onnxruntime computes on.")] = "cpu",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 30,
    temperature: Annotated[float, typer.Option(help="Draw tokens, the freer the higher; 0 takes the likeliest.")] = 0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that are so likely together.")] = 1,
    seed: Annotated[int, typer.Option(help="The same answers for the same seed.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it is said.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the prompt as it is, without the family's template.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask an exported model about a picture, or about several at once."""
    from vlmq.exporter.runtime import Sampling, engine_of, without_torch

    sampling = Sampling(temperature, top_k, top_p, seed)
    engine = engine or engine_of(folder)
    if engine == "onnx":
        without_torch()
    from vlmq.exporter import asking

    asked = (folder, image, prompt or [], engine, max_new_tokens, raw, sampling, provider)
    if stream:
        print_stream(asking.stream(*asked), as_json)
    else:
        print_answers(asking.ask(*asked), as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="An export, a checkpoint, a demo, a Hub id, or a file of results.")],
    task: Annotated[
        str | None,
        typer.Option(help="vqav2, gqa, vizwiz, scienceqa, coco, flickr30k, or coco-retrieval, flickr30k-retrieval."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The task's official files, a folder or Hub name of `datasets`, or demo.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask so many of the questions, always the same.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Results, a sample a line.  \\[default: MODEL-TASK.jsonl]")] = None,
    against: Annotated[Path | None, typer.Option(help="Results of another model, to compare with.")] = None,
    split: Annotated[str | None, typer.Option(help="Which of several splits.")] = None,
    engine: Annotated[
        Literal["onnx", "torch"] | None, typer.Option(help="\\[default: onnx where the folder has it]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="\\[default: what 2 GiB of caches allow]", min=1)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="\\[default: the task's, 20 or 30]", min=1)] = None,
    instruction: Annotated[str | None, typer.Option(help="A line after every question: how to answer.")] = None,
    with_image: Annotated[bool, typer.Option("--with-image", help="Leave out questions about text alone.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count bad samples as failed, and go on.")] = False,
    rerank: Annotated[int, typer.Option(help="Retrieval: so many are looked at by the matching head.", min=0)] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew where --out has answers already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score a model on a benchmark, and tell whether it differs from another beyond noise.

    A run that was ended goes on where its results file ends when the same command is given again.
    """
    from vlmq.exporter.evaluation import records
    from vlmq.exporter.evaluation.comparison import compare
    from vlmq.exporter.evaluation.summary import summarise
    from vlmq.terminal.evaluation import print_evaluation

    if model.endswith(".jsonl"):
        if task or data or out:
            raise VlmqError(f"{model}: results are there already; leave out --task, --data and --out")
        results = records.read(Path(model))
    else:
        from vlmq.exporter.evaluation.evaluate import Request
        from vlmq.exporter.evaluation.evaluate import evaluate as run_evaluation

        if task is None or data is None:
            raise VlmqError(f"{model}: no --{'task' if task is None else 'data'}; say what to ask it")
        request = Request(
            model=model,
            task=task,
            data=data,
            out=out or Path(f"{Path(model).resolve().name}-{task}.jsonl"),
            split=split,
            limit=limit,
            engine=engine,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            instruction=instruction,
            with_image=with_image,
            skip_bad=skip_bad,
            rerank=rerank,
            fresh=fresh,
        )
        if against:
            records.read(against)  # what is wrong with it is known before hours of work
        with answers_kept(request.out), bars(as_json) as progress:
            results = run_evaluation(request, progress)
    comparison = compare(results, records.read(against)) if against else None
    print_evaluation(summarise(results), comparison, as_json)


@recipe_app.command()
@takes_recipe
def show(
    recipe: Any,
    model: Annotated[str | None, typer.Argument(help="Check it against a model as well; a config is enough.")] = None,
    revision: Revision = None,
) -> None:
    """Print the recipe that flags and file make, in full, as a file that --recipe reads; nothing is computed."""
    import yaml

    if model:
        from vlmq.exporter.inspection import check

        check(model, recipe, revision)
    typer.echo(yaml.safe_dump(recipe.content(), sort_keys=False, default_flow_style=None, width=120), nl=False)


@app.command()
@takes_recipe
def inspect(
    recipe: Any,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's components, blocks and linears, and what a recipe would do to each; a config is enough."""
    from vlmq.exporter.inspection import inspect as look
    from vlmq.terminal.inspection import print_tree

    found = look(model, recipe, revision)
    if as_json:
        print_json(asdict(found) | {"before": found.before, "after": found.after})
    else:
        print_tree(found)


@app.command()
@takes_recipe
def plan(
    recipe: Any,
    model: Model = DEFAULT_MODEL,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the export would be written.")] = Path("out"),
    format: Format = None,
    samples: NumberOfSamples = 128,
    gate: Gate = True,
    verify: Verify = True,
    activation_memory: ActivationMemory = "1GiB",
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Say what an export would make, and what memory and disk it would take; a config is enough. Exit 2: too much."""
    from vlmq.exporter import consumers
    from vlmq.exporter.pipeline import Request
    from vlmq.exporter.pipeline import plan as planned
    from vlmq.exporter.planning.plan import as_dict, refuse
    from vlmq.terminal.plan import print_plan

    formats, waiting = format or consumers.formats(recipe.consumer), bytes_of(activation_memory, "--activation-memory")
    found = planned(
        Request(
            model,
            output,
            recipe,
            revision,
            formats,
            samples=samples,
            verify=verify,
            gate=gate,
            activation_memory=waiting,
        )
    )
    if as_json:
        print_json(as_dict(found))
    else:
        print_plan(found)
    refuse(found)


@app.command()
def importance(
    scores: Annotated[list[Path], typer.Argument(help="CSV files of scores: NAME_bits columns and the target.")],
    target: Annotated[str, typer.Option(help="The column that bits are to explain.")] = "CIDEr",
    output: Annotated[
        Path | None,
        typer.Option("--output", "--out", "-o", help="Folder to write.  \\[default: importance-TARGET]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="What forests and resamples are drawn with.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Tell from a table of scores which component's bits matter, and how sure that is; write plots."""
    from vlmq.exporter.search.importance import analyse
    from vlmq.terminal.importance import print_shares

    output = output or Path(f"importance-{target}".replace(os.sep, "-"))
    with bars(as_json) as progress:
        found = analyse(scores, target, output, seed, progress)
    for warning in (warning for table in found for warning in table.warnings):
        typer.echo(f"vlmq: warning: {warning}", err=True)
    if as_json:
        print_json({"folder": str(output), "seed": seed, "tables": [asdict(table) for table in found]})
    else:
        for table in found:
            print_shares(table)
        typer.echo(f"{output}: importance.json, consensus.png, measures.png")


Task = Annotated[str, typer.Option(help="What models are scored by: vqa, captions, gqa, vizwiz, scienceqa.")]
Calibrated = Annotated[
    str | None,
    typer.Option(help="Samples to calibrate on: as --data, or a Hub data set.  \\[default: the demo's; flickr30k]"),
]


@app.command()
def sweep(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, a Hub id (user/name), or a demo.")],
    grid: Annotated[Path, typer.Option(help="What is tried (YAML). See docs/sweep.md.")],
    output: Annotated[
        Path, typer.Option("--out", "--output", "-o", help="Folder of the sweep; it goes on from there.")
    ],
    task: Task = "vqa",
    calibration: Calibrated = None,
    samples: NumberOfSamples = 128,
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
    data: Data = None,
    questions: Annotated[
        int | None, typer.Option(help="How many samples of --data are asked, from the first.  \\[default: all]", min=1)
    ] = None,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="Calibrate each component on the quantized ones before it, as export does."),
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes, of one thread each; 1: this one.")] = 1,
    engine: Annotated[Literal["process", "ray"], typer.Option(help="Where the work is done.")] = "process",
    ray_address: Annotated[
        str | None, typer.Option(help="A running Ray cluster, such as auto.  \\[default: one of --workers cores, here]")
    ] = None,
    device: Device = "auto",
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Score every configuration of a grid, with nothing quantized or scored twice; write tables and plots.

    A sweep that was stopped, however it was, goes on where it was when the same command is given again. Exit 1: some
    configuration failed, twice.
    """
    from vlmq.exporter.search.sweep import Request
    from vlmq.exporter.search.sweep import sweep as run_sweep

    request = Request(
        model=model,
        grid=grid,
        output=output,
        task=task,
        revision=revision,
        calibration=calibration,
        samples=samples,
        seed=seed,
        data=data,
        questions=questions,
        sequential=sequential,
        workers=workers,
        engine=engine,
        address=ray_address,
        device=device,
    )
    with bars(as_json) as progress:
        done = run_sweep(request, progress)
    for name, message in done.failures.items():
        typer.echo(f"vlmq: warning: {name}: {message}", err=True)
    if as_json:
        print_json({**asdict(done), "folder": str(done.folder)})
    else:
        typer.echo(
            f"{done.folder}: {len(done.rows)} rows, {done.distinct} distinct configurations of {done.pieces} "
            f"quantized components; {', '.join(done.files)}"
        )
    if done.failures:
        raise typer.Exit(1)


@app.command()
@takes_recipe
def allocate(
    recipe: Any,
    model: Model = DEFAULT_MODEL,
    budget: Annotated[
        str, typer.Option(help="3.8bpw (of the blocks' linears), 40% (of all weights' bytes) or 2GiB (of all weights).")
    ] = "4bpw",
    output: Annotated[Path | None, typer.Option("--output", "--out", "-o", help="Recipe to write.")] = None,
    task: Task = "vqa",
    groups: Annotated[
        str | None, typer.Option(help="Group sizes to choose from too, such as 32,64,128.  \\[default: the recipe's]")
    ] = None,
    format: Annotated[
        Literal["safetensors", "onnx", "both"], typer.Option(help="What the export is to be: graphs hold 2, 4, 8 bits.")
    ] = "safetensors",
    calibration: Calibrated = None,
    samples: NumberOfSamples = 128,
    asked: Annotated[int, typer.Option(min=1, help="Samples drawn, of which the task's are asked what changes.")] = 512,
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
    device: Device = "auto",
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Choose bits for every linear within a budget, where they matter most; print or write a recipe for export.

    The recipe flags say method and grids. What they leave at 16 bits stays there; other bits are chosen anew.
    """
    import yaml

    from vlmq.exporter.search.allocate import Request, in_words
    from vlmq.exporter.search.allocate import allocate as run_allocate

    if output and output.exists():
        raise VlmqError(f"{output}: exists already; choose another --output or remove it")
    if output and not output.parent.is_dir():
        raise VlmqError(f"{output.parent}: no such folder; create it or choose another --output")
    sizes = tuple(group_of(each) for each in groups.split(",")) if groups else ()
    request = Request(model, budget, recipe, task, sizes, format, revision, calibration, samples, asked, seed, device)
    with bars(as_json) as progress:
        found = run_allocate(request, progress)
    content = found.recipe.content()
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    words = in_words(found)
    if output:
        part = output.with_name(f".{output.name}.part")
        part.write_text("".join(f"# {line}\n" for line in words) + text, encoding="utf-8")
        part.rename(output)
    if as_json:
        print_json({**asdict(found), "recipe": content})
        return
    if not output:
        typer.echo(text, nl=False)
    for line in (*words, *([str(output)] if output else [])):
        typer.echo(line, err=not output)


def main() -> None:
    """Run the command line; what a person did wrong is one line and exit code 2."""
    listen()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except Exception as error:
        if code := exit_code():
            raise SystemExit(code) from None
        if not isinstance(error, VlmqError | FormatError):
            traceback.print_exception(error)
            raise SystemExit(3) from None
        typer.echo(f"vlmq: {' '.join(str(error).split())}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

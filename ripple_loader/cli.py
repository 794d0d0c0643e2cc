"""The `ripple` command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ripple_loader.registry import ACTIVE_RULES, BUNDLES, CACHE_POLICIES, PLACEMENTS
from ripple_loader.studies import commands

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Run language models larger than memory by streaming linked MLP neurons from flash.",
)

Recipe = Annotated[Path | None, typer.Option("--config", "-c", help="YAML recipe; options given here win.")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """Print an error that the user can correct as one sentence, and exit with code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:  # an error of the operating system
            message = f"{error.filename}: {error.strerror}"
        typer.echo(f"ripple: {' '.join(message.split())}", err=True)
        raise typer.Exit(2) from None


def _section(recipe: Path | None, name: str, options: dict[str, Any]) -> dict[str, Any]:
    from ripple_loader.config import read_recipe

    given = {key: value for key, value in options.items() if value is not None}
    return (read_recipe(recipe).get(name, {}) if recipe else {}) | given


def _calibration(path: str) -> Iterable[Any]:
    """The texts, or the dataset's rows, of a calibration set; read no further than they are used."""
    if path.startswith("hub:") or Path(path).is_dir():
        return _dataset(path)
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"`calibration` must be a .jsonl or text file, a saved dataset or hub:NAME, but {path} does "
            "not exist."
        )
    return _jsonl(path) if path.endswith(".jsonl") else _text(path)


def _dataset(path: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"`calibration` {path} needs Hugging Face datasets: pip install datasets.") from None
    if path.startswith("hub:"):
        name, _, split = path.removeprefix("hub:").partition(":")
        return datasets.load_dataset(name, split=split or "train", streaming=True)
    try:
        dataset = datasets.load_from_disk(path)
    except FileNotFoundError:
        raise ValueError(
            f"`calibration` must be a file or a folder of `Dataset.save_to_disk`, but {path} is neither."
        ) from None
    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(
            f"`calibration` must be one split, but {path} holds {', '.join(dataset)}: give the folder of one."
        )
    return dataset


def _jsonl(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f'{path} must have {{"text": ...}} on each line, but line {number} does not.'
                ) from None


def _text(path: str) -> Iterator[str]:
    """Pieces of whole lines, of about a MiB."""
    with open(path, encoding="utf-8") as file:
        while lines := file.readlines(1 << 20):
            yield "".join(lines)


Model = Annotated[str | None, typer.Argument(help="Model directory, or hub id.")]
Revision = commands.Revision
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text to trace: .jsonl with `text`, a text file, a folder that `Dataset.save_to_disk` made, or "
        "hub:NAME[:SPLIT]."
    ),
]
Out = Annotated[str | None, typer.Option(help="Directory to write; it must not exist.")]
Tokens = Annotated[int | None, typer.Option(help="Calibration tokens.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens of a calibration sequence.")]
Active = Annotated[
    str | None,
    typer.Option(
        help=f"Which neurons count as active where the activation has no exact zeros: {ACTIVE_RULES.names()}."
    ),
]
ActiveShare = Annotated[float | None, typer.Option(help="The share that `active` refers to.")]


def _settings(
    recipe: Path | None, options: dict[str, Any], needed: tuple[str, ...]
) -> tuple[Any, dict[str, Any]]:
    """A ReorderConfig and the paths, from the recipe and the options given."""
    from ripple_loader.config import ReorderConfig

    options = _section(recipe, "reorder", options)
    paths = {name: options.pop(name, None) for name in ("model", "calibration", "trace", "out")}
    for name in needed:
        if paths[name] is None:
            raise ValueError(f"`{name}` must be given, on the command line or in the recipe.")
    return ReorderConfig.from_options(options), paths


@app.command(
    epilog="Examples:\n\n"
    "ripple trace SmolLM2-135M-Instruct --calibration train.jsonl --out out/trace\n\n"
    "accelerate launch --num_processes 2 --no_python ripple trace --config configs/ripple/smollm2.yaml "
    "--out out/trace"
)
def trace(
    model: Model = None,
    calibration: Calibration = None,
    out: Out = None,
    config: Recipe = None,
    tokens: Tokens = None,
    sequence_length: SequenceLength = None,
    active: Active = None,
    active_share: ActiveShare = None,
    revision: Revision = None,
) -> None:
    """Record which neurons are active on a text; after an interruption, run it again to resume."""
    given = locals()
    del given["revision"]
    with _user_errors():
        from ripple_loader.offline.calibration import cut_sequences
        from ripple_loader.offline.reordering import open_reorderable
        from ripple_loader.offline.trace import trace_source

        settings, paths = _settings(given.pop("config"), given, ("model", "calibration", "out"))
        source = open_reorderable(paths["model"], revision)
        sequences = cut_sequences(source, _calibration(paths["calibration"]), settings)
        trace_source(source, sequences, settings, Path(paths["out"]))
        typer.echo(paths["out"])


def _check_traced(trace: str | None, options: dict[str, Any]) -> None:
    """ValueError for options of a trace beside a finished one."""
    given = [name for name, value in options.items() if value is not None]
    if trace is not None and given:
        raise ValueError(
            f"`{given[0]}` must not be given beside `trace`, because the trace has its own: leave one of "
            "them out."
        )


@app.command(
    epilog="Examples:\n\n"
    "ripple reorder SmolLM2-135M-Instruct --calibration train.jsonl --out out/smollm2\n\n"
    "ripple reorder SmolLM2-135M-Instruct --trace out/trace --bundles int8 --out out/smollm2-int8\n\n"
    "ripple reorder --config configs/ripple/smollm2.yaml"
)
def reorder(
    model: Model = None,
    calibration: Calibration = None,
    out: Out = None,
    config: Recipe = None,
    trace: Annotated[
        str | None, typer.Option(help="Directory that `ripple trace` wrote, instead of a calibration text.")
    ] = None,
    placement: Annotated[str | None, typer.Option(help=f"{PLACEMENTS.names()}.")] = None,
    tokens: Tokens = None,
    sequence_length: SequenceLength = None,
    active: Active = None,
    active_share: ActiveShare = None,
    partners: Annotated[int | None, typer.Option(help="Co-activation partners kept for each neuron.")] = None,
    two_opt: Annotated[bool | None, typer.Option(help="Improve a linked or spectral order by 2-opt.")] = None,
    hot_share: Annotated[
        float | None,
        typer.Option(help="Share of all neurons that is pinned in memory: the most active ones."),
    ] = None,
    predictor: Annotated[
        float | None,
        typer.Option(
            help="Rank of a ReLU model's predictors, as a share of the hidden size; 0 leaves them out."
        ),
    ] = None,
    bundles: Annotated[str | None, typer.Option(help=f"Stored as one of: {BUNDLES.names()}.")] = None,
    sketches: Annotated[
        bool | None, typer.Option(help="Store the sketches that select neurons; not needed with `keep` 1.")
    ] = None,
    sidecar_only: Annotated[
        bool | None, typer.Option(help="Stream from the original weight files instead of a copy of them.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Layers placed at once.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random placement.")] = None,
    revision: Revision = None,
    variant: Annotated[str | None, typer.Option(help="Of the weight files, such as fp16.")] = None,
) -> None:
    """Write a streaming copy of a model, in which neurons that are active together are stored together."""
    given = locals()
    source = {name: given.pop(name) for name in ("revision", "variant")}
    with _user_errors():
        from ripple_loader.offline.reordering import reorder as run

        of_a_trace = ("tokens", "sequence_length", "active", "active_share")
        _check_traced(trace, {name: given[name] for name in of_a_trace})
        settings, paths = _settings(given.pop("config"), given, ("model", "out"))
        texts = None if paths["calibration"] is None else _calibration(paths["calibration"])
        run(paths["model"], paths["out"], texts, settings, trace=paths["trace"], **source)
        typer.echo(paths["out"])


@app.command(
    epilog='Examples:\n\nripple generate out/smollm2 "The with statement" --dram-budget 128MiB --keep 0.5\n\n'
    'ripple generate out/smollm2-ripple "The with statement" --config configs/ripple/smollm2.yaml'
)
def generate(
    directory: Annotated[str, typer.Argument(help="Directory that `ripple reorder` wrote, or hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    config: Recipe = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    dram_budget: Annotated[
        str | None, typer.Option(help='Bytes, "128MiB", or "25%" of the MLP weights.')
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of neurons computed per token; 1 is exact.")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(help="Share of a ReLU model's active neurons to find; 1 is exact.")
    ] = None,
    adjacency: Annotated[
        float | None,
        typer.Option(
            help="Share of a neuron's estimated contribution that is its pair's mean; 0 keeps each by itself."
        ),
    ] = None,
    merge_gap: Annotated[
        str | None, typer.Option(help="Unneeded bytes to read in order to join two reads, or auto.")
    ] = None,
    buffer: Annotated[str | None, typer.Option(help="Size of a read buffer, or auto.")] = None,
    queue_depth: Annotated[int | None, typer.Option(help="Reads in flight.")] = None,
    io_engine: Annotated[str | None, typer.Option(help="auto, aio or threads.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="auto, dense (read all neurons, in order) or sparse (select some).")
    ] = None,
    prefetch: Annotated[
        bool | None, typer.Option(help="Read ahead the neurons that the next layer will probably select.")
    ] = None,
    cache_policy: Annotated[str | None, typer.Option(help=f"{CACHE_POLICIES.names()}.")] = None,
    check_reads: Annotated[
        bool | None, typer.Option(help="Check the checksums of what is read as it is read.")
    ] = None,
    verify: Annotated[bool | None, typer.Option(help="Check all checksums first.")] = None,
    revision: Revision = None,
) -> None:
    """Generate text, greedily, with the MLPs streamed from disk; a line of numbers goes to stderr."""
    given = locals()
    of_the_run = {name: given.pop(name) for name in ("directory", "prompt", "max_new_tokens", "revision")}
    with _user_errors():
        from ripple_loader.config import RippleConfig

        options = _section(given.pop("config"), "load", given)
        _generate(**of_the_run, config=RippleConfig.from_options(options))


def _generate(directory: str, prompt: str, config: Any, max_new_tokens: int, revision: str | None) -> None:
    import time

    from transformers import AutoConfig

    from ripple_loader.checkpoint.hub import local_directory
    from ripple_loader.checkpoint.source import load_tokenizer
    from ripple_loader.format.layout import SIDECAR
    from ripple_loader.format.sidecar import Sidecar
    from ripple_loader.model.classes import is_encoder_decoder, model_class

    folder = local_directory(directory, revision=revision, also=[SIDECAR])
    Sidecar(folder)  # report its errors before transformers reports its own
    tokenizer = load_tokenizer(folder)
    loader = model_class(AutoConfig.from_pretrained(folder))
    model = loader.from_pretrained(folder, quantization_config=config)
    inputs = tokenizer(prompt, return_tensors="pt")
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    seconds = time.perf_counter() - start
    typer.echo(tokenizer.decode(output[0], skip_special_tokens=True))
    prompted = 1 if is_encoder_decoder(model.config) else inputs.input_ids.shape[1]
    new = output.shape[1] - prompted
    typer.echo(f"{new / seconds:.2f} tokens/s; {model.ripple_report.summary()}", err=True)


@app.command(epilog="Example:\n\nripple inspect out/smollm2 --verify")
def inspect(
    directory: Annotated[str, typer.Argument(help="Reordered directory.")],
    verify: Annotated[bool, typer.Option(help="Check every checksum and the weights beside it.")] = False,
) -> None:
    """Print the header of a sidecar as JSON."""
    with _user_errors():
        from ripple_loader.format.sidecar import Sidecar

        sidecar = Sidecar(directory)
        if verify:
            sidecar.verify()
            sidecar.check_weights()
        typer.echo(json.dumps(asdict(sidecar.header), indent=1))


@app.command(
    epilog="Examples:\n\nripple verify out/smollm2\n\n"
    "ripple verify out/smollm2 --original SmolLM2-135M-Instruct"
)
def verify(
    directory: Annotated[str, typer.Argument(help="Reordered directory.")],
    original: Annotated[str | None, typer.Option(help="Directory or hub id of the original model.")] = None,
    revision: Revision = None,
) -> None:
    """Prove that a reordered directory is whole and, given the original, that nothing was lost."""
    with _user_errors():
        from ripple_loader.offline.verification import verify as run

        for check, result in run(directory, original, revision=revision):
            typer.echo(f"{check}: {result}")


app.command(
    epilog="Examples:\n\nripple simulate opt-350m --trace out/trace\n\n"
    "ripple simulate opt-350m --trace out/trace --device ufs-4.0 --cache 0.25 --json out/ufs.json"
)(_user_errors()(commands.simulate))
app.command(
    epilog="Example:\n\nripple report opt-350m --trace out/trace --device ufs-4.0 --out out/ripple.html"
)(_user_errors()(commands.report))


@app.command(epilog="Examples:\n\nripple probe out/smollm2\n\nripple probe out --seconds 10")
def probe(
    path: Annotated[str, typer.Argument(help="A directory or file on the drive.")] = ".",
    seconds: Annotated[float, typer.Option(help="About how long to read.")] = 3.0,
) -> None:
    """Measure what reads from a drive cost, and save it for all models that are streamed from that drive."""
    with _user_errors():
        from ripple_loader.storage.probing import describe
        from ripple_loader.storage.probing import probe as run

        profile = run(path, seconds=seconds)
        saved = profile.save()
        describe(profile)
        typer.echo(str(saved))


def main() -> None:
    app()

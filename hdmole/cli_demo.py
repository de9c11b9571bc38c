"""`hdmole demo`: the built-in demo model and its speech."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hdmole.console import Json, Model, echo_json, errors, fail, load_model, make_folder

demo = typer.Typer(help="The built-in demo model.", no_args_is_help=True)


@demo.command("build")
def demo_build(
    out: Annotated[Path | None, typer.Option(help="Folder of the released model; assets/demo or assets/real by default.")] = None,
    real: Annotated[
        bool,
        typer.Option("--real", help="Adapt Whisper base to the people of --real-speech in place of training the demo model."),
    ] = False,
    real_speech: Annotated[
        list[Path] | None, typer.Option(help="Folder of real recordings with a manifest.jsonl; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    scale: Annotated[float, typer.Option(help="Share of the recipe's data, for a quick trial.")] = 1.0,
    work: Annotated[Path | None, typer.Option(help="Where stages keep what they made; run again to resume.")] = None,
    released: Annotated[
        Path | None,
        typer.Option(help="A released model, such as assets/demo, whose weights are taken in place of training."),
    ] = None,
    methods: Annotated[str, typer.Option(help="With --real: comma-separated.")] = "lora,hdmole,full,hdmole-extended",
    epochs: Annotated[float, typer.Option(help="With --real: passes over the training speech.")] = 1.0,
    search: Annotated[bool, typer.Option("--search", help="With --real: try three learning rates for each method.")] = False,
    processes: Annotated[int, typer.Option(help="With --real: how many methods are trained at once.", min=1)] = 1,
) -> None:
    """Train the demo model from scratch (about two and a half hours on 2 cores).

    With --real, adapt Whisper base to real speakers instead. Run the command again after an
    interruption, and it continues.
    """
    kind = "real" if real else "demo"
    out, work = out or Path("assets") / kind, work or Path("build") / kind
    make_folder(work, "--work")

    def report(text: str) -> None:
        errors.print(text, markup=False)

    try:
        if real:
            from hdmole.demo import real as recipe

            chosen = [m.strip() for m in methods.split(",") if m.strip()]
            recipe.build(
                out, real_speech or [], seed, scale, work, report, chosen, epochs=epochs, search=search, processes=processes
            )
        else:
            from hdmole.demo.build import build

            build(out, real_speech or [], seed, scale, work, report, released)
    except (ValueError, OSError) as error:
        fail(error)


@demo.command("sums")
def demo_sums(model: Annotated[Path, typer.Option(help="Folder of a model.")] = Path("assets/demo")) -> None:
    """Write the SHA-256 sums of a model's files, which loading checks, into the folder."""
    from hdmole.speech.loading import write_sums

    if not (model / "config.json").is_file():
        fail(f"The folder {model} holds no model.")
    try:
        typer.echo(write_sums(model))
    except (ValueError, OSError) as error:
        fail(error)


@demo.command("samples")
def demo_samples(
    model: Annotated[Path, typer.Option(help="Folder of a demo model with its results.")] = Path("assets/demo"),
) -> None:
    """Choose the model's samples anew, from the test speech of its results, so that methods differ
    on them.
    """
    import pandas as pd

    from hdmole.demo.samples import write_samples
    from hdmole.files import write_text
    from hdmole.speech.asr import ASR
    from hdmole.study.results import SUMMARY, UTTERANCES, load

    try:
        results, rows = load(model / "results"), pd.read_parquet(model / "results" / UTTERANCES)
        results.samples = write_samples(ASR.load(model), rows, model / "samples", results.provenance.seed, typer.echo)
        write_text(model / "results" / SUMMARY, results.to_json() + "\n")
    except (ValueError, OSError) as error:
        fail(error)


@demo.command("conflicts")
def demo_conflicts(
    out: Annotated[Path, typer.Option(help="Folder of the speech, for the data of a comparison.")] = Path("build/conflicts"),
    work: Annotated[Path, typer.Option(help="Work folder of 'hdmole demo build', whose base is taken.")] = Path("build/demo"),
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    scale: Annotated[float, typer.Option(help="Share of the speech, for a quick trial.")] = 1.0,
) -> None:
    """Make speech in twelve conflicting accents, for a comparison.

    In each of these accents the same sound stands for a different phoneme.
    """
    make_folder(out, "--out")
    from hdmole.demo.build import conflicts

    try:
        conflicts(work, out, seed, scale, lambda text: errors.print(text, markup=False))
    except (ValueError, OSError) as error:
        fail(error)


@demo.command("people")
def demo_people(
    out: Annotated[Path, typer.Option(help="Folder of the speech, for the data of a comparison.")] = Path("build/people"),
    work: Annotated[Path, typer.Option(help="Work folder of 'hdmole demo build' with real speech.")] = Path("build/demo"),
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Make the speech for runs/people.toml: real people as the target, synthetic speech as the
    source.
    """
    make_folder(out, "--out")
    from hdmole.demo.people import people

    try:
        people(work, out, seed, lambda text: errors.print(text, markup=False))
    except (ValueError, OSError) as error:
        fail(error)


@demo.command("recognisers")
def demo_recognisers(
    work: Annotated[Path, typer.Option(help="Work folder of 'hdmole demo build'.")] = Path("build/demo"),
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Train two more accent recognisers, an early and a better one, for runs/paper.toml."""
    from hdmole.demo.recognisers import recognisers

    try:
        recognisers(work, seed, lambda text: errors.print(text, markup=False))
    except (ValueError, OSError) as error:
        fail(error)


@demo.command("info")
def demo_info(
    model: Model = "demo",
    as_json: Json = False,
    readme: Annotated[Path | None, typer.Option(help="Bring the results table of this README up to date.")] = None,
) -> None:
    """What the demo model is: sizes, methods, accents and measured results."""
    asr = load_model(model)
    from hdmole.study.results import SUMMARY, load
    from hdmole.study.tables import markdown_table, update_readme

    size = sum(f.stat().st_size for f in asr.folder.rglob("*") if f.is_file())
    parts = {name: sum(p.numel() for p in module.parameters()) for name, module in asr.models["base"].named_children()}
    info: dict[str, Any] = {
        "folder": str(asr.folder),
        "megabytes": round(size / 1e6, 1),
        "parameters": parts,
        "trainable": {m: asr.trainable(m) for m in asr.methods},
        "accents": asr.accents,
        "device": str(asr.device),
    }
    folder = asr.folder / "results"
    try:
        if readme is not None:
            update_readme(readme, folder)
        results = load(folder) if (folder / SUMMARY).is_file() else None
    except (ValueError, OSError) as error:
        fail(error)
    if as_json:
        echo_json({**info, "results": results and results.to_dict()})
        return
    typer.echo(f"{info['folder']}: {info['megabytes']} MB, on {info['device']}")
    typer.echo("Parameters: " + ", ".join(f"{k} {v:,}" for k, v in parts.items()))
    typer.echo("Accents: " + ", ".join(asr.accents))
    if results is not None:
        typer.echo("\n" + markdown_table(results))
        origin = results.provenance
        typer.echo(f"\nMeasured {origin.date} by `{origin.command}` on {origin.machine}.")

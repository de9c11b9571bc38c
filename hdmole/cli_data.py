"""`hdmole data`: corpora as manifests, and what is in a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdmole.console import TASK, Json, echo_json, errors, fail, load_model, make_folder, progress_bar

data = typer.Typer(help="Corpora as manifests, and what is in a manifest.", no_args_is_help=True)


@data.command("import")
def data_import(
    kind: Annotated[
        str,
        typer.Argument(
            help="kaldi, nemo, lhotse, csv, huggingface, commonvoice, kespeech, aishell, aishell2, wenetspeech, l2arctic, edacc, "
            "speechocean762 or timit; docs/data.md says which files belong where."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder of the corpus, or its manifest or table.")],
    out: Annotated[Path, typer.Option(help="The manifest that is written, such as train.jsonl.")],
    split: Annotated[str, typer.Option(help="The part of the corpus, such as train.")] = "",
    groups: Annotated[
        Path | None,
        typer.Option("--map", help="CSV file with the columns from and to, which groups accents; * stands for all others."),
    ] = None,
    accent: Annotated[
        str, typer.Option(help="Accent of recordings for which the corpus names none; otherwise they are left out.")
    ] = "",
    column: Annotated[
        list[str] | None, typer.Option(help="Where the corpus has something, such as accent=region or text=words; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a corpus into a manifest, a file of JSON lines with audio, text, accent and speaker.

    Audio is not copied and not opened, except audio that a Hugging Face dataset embeds. Recordings
    without a file, a text or an accent are left out and counted.
    """
    from hdmole.corpora.importing import import_corpus
    from hdmole.corpora.rows import FIELDS

    columns = dict(pair.partition("=")[::2] for pair in column or [])
    if unknown := [pair for pair in column or [] if pair.partition("=")[0] not in FIELDS or not pair.partition("=")[2]]:
        fail(f"--column {unknown[0]} is not understood; write NAME=COLUMN with one of {', '.join(FIELDS)} as NAME.")
    if out.is_dir():
        fail(f"{out} is a folder; give the name of a manifest to write, such as {out / 'train.jsonl'}.")
    make_folder(out.parent)
    with progress_bar("Reading") as bar:
        try:
            found = import_corpus(
                kind,
                folder,
                out,
                split=split,
                accents=groups,
                accent=accent,
                columns=columns,
                progress=lambda done: bar.update(TASK, completed=done),
            )
        except (ValueError, OSError) as error:
            fail(error)
    for reason, count in found.left_out.items():
        errors.print(f"Left out, {reason}: {count:,}, the first is {found.first_left_out[reason]}", markup=False)
    if as_json:
        echo_json(found.to_dict())
        return
    typer.echo(f"{found.recordings:,} recordings of {found.speakers:,} speakers -> {out}")
    for name, count in sorted(found.accents.items(), key=lambda item: -item[1]):
        typer.echo(f"  {name:<40} {count:>9,}")


@data.command("check")
def data_check(
    manifests: Annotated[list[Path], typer.Argument(help="Manifests; several are also compared, such as train, dev and test.")],
    model: Annotated[
        str, typer.Option(help="demo, real, a model folder, or a name on the hub: accents that it does not route by are counted.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Decode every recording of manifests once, and say what is in them and what is wrong.

    Counted are hours, speakers, accents, lengths, sample rates, files that are missing or cannot be
    read, empty texts, equal recordings, and speakers, recordings and texts on both sides. The exit
    status is 1 if a recording cannot be used, or a speaker or a recording is on both sides.
    """
    from hdmole.corpora.check import check_manifests, report

    accents = load_model(model).accents if model else ()
    with progress_bar("Checking") as bar:

        def show(name: str, done: int) -> None:
            bar.update(TASK, description=f"Checking {name}", completed=done)

        try:
            found = check_manifests(manifests, accents, show)
        except (ValueError, OSError) as error:
            fail(error)
    if as_json:
        echo_json(found.to_dict())
    else:
        typer.echo(report(found))
    if found.bad:
        raise typer.Exit(1)

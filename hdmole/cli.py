"""The command line; `hdmole --help` lists the commands.

torch is imported only by the commands that need it. What commands share is in `hdmole/console.py`,
`hdmole demo` in `hdmole/cli_demo.py`, and `hdmole data` in `hdmole/cli_data.py`.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hdmole.cli_data import data
from hdmole.cli_demo import demo
from hdmole.console import (
    TASK,
    AccentOption,
    Adapters,
    Json,
    Method,
    Model,
    Revision,
    echo_json,
    errors,
    fail,
    load_model,
    make_folder,
    progress_bar,
)
from hdmole.errors import UserError
from hdmole.files import write_between, written
from hdmole.settings import app_command_line, keep_password, settings

app = typer.Typer(
    help="Mixture of LoRA experts with hierarchical routing and dynamic thresholds, for accented speech.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(demo, name="demo")
app.add_typer(data, name="data")
models = typer.Typer(help="The families of models, and pretrained weights that models build on.", invoke_without_command=True)
app.add_typer(models, name="models")
accents = typer.Typer(help="Accent recognisers, which route.", no_args_is_help=True)
app.add_typer(accents, name="accents")
bench = typer.Typer(help="Speed on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@app.command()
def transcribe(
    audio: Annotated[list[Path], typer.Argument(help="Audio files: wav, flac, mp3, ogg/opus, m4a, mp4, webm.")],
    model: Model = "demo",
    adapter: Adapters = None,
    revision: Revision = "",
    method: Method = "",
    accent: AccentOption = "auto",
    as_json: Json = False,
) -> None:
    """Transcribe recordings.

    With --json also word times and confidences, accent and routing. The exit status is 1 if a
    recording failed.
    """
    from hdmole.speech.audio import decode
    from hdmole.speech.transcript import AT_ONCE

    asr = load_model(model, adapter, revision)
    method = method or asr.default
    try:
        longest = settings().seconds
        asr.check_method(method)
        asr.check_accent(accent)
    except ValueError as error:
        fail(error)
    results: list[dict[str, Any]] = []
    with progress_bar("Transcribing", len(audio)) as progress:
        for start in range(0, len(audio), AT_ONCE):
            paths = audio[start : start + AT_ONCE]
            found: dict[Path, Any] = {}
            for path in paths:
                try:
                    found[path] = decode(path, max_seconds=longest)
                except UserError as error:
                    found[path] = error
            sounds = {path: sound for path, sound in found.items() if not isinstance(sound, UserError)}
            try:
                found.update(zip(sounds, asr.transcribe_all(list(sounds.values()), method, accent), strict=True))
            except UserError as error:
                found.update(dict.fromkeys(sounds, error))
            for path in paths:
                heard = found[path]
                if isinstance(heard, UserError):
                    results.append({"file": str(path), "error": str(heard), "code": heard.code})
                    errors.print(f"{path}: {heard}", markup=False)
                else:
                    results.append({"file": str(path), **heard.to_dict()})
                    if not as_json:
                        if heard.in_domain["verdict"] is False:
                            errors.print(f"{path}: {warning(heard.in_domain)}", style="yellow", markup=False)
                        progress.stop()  # otherwise a terminal would show the line behind the bar
                        typer.echo(f"{path}\t{heard.text}" if len(audio) > 1 else heard.text)
                        progress.start()
                progress.advance(TASK)
    if as_json:
        echo_json(results)
    if any("error" in r for r in results):
        raise typer.Exit(1)


def warning(in_domain: dict[str, Any]) -> str:
    """The sentence shown before the transcript of audio outside what the model was made for."""
    reasons = "; ".join(in_domain["reasons"]) or "several signs together"
    return f"This audio is probably outside what the model was made for ({reasons}). Do not trust the transcript."


@app.command("trace")
def trace_command(
    audio: Annotated[Path, typer.Argument(help="An audio file.")],
    out: Annotated[Path, typer.Option(help="Where to write the trace, a parquet file.")],
    model: Model = "demo",
    adapter: Adapters = None,
    revision: Revision = "",
    method: Annotated[str, typer.Option(help="An HDMoLE adapter of the model; by default hdmole, or the first.")] = "",
    accent: AccentOption = "auto",
) -> None:
    """Write the routing of one recording, frame by frame and layer by layer, as a tidy table."""
    from hdmole.speech.audio import decode

    if out.is_dir():
        fail(f"{out} is a folder; give the name of a parquet file to write.")
    make_folder(out.parent)
    asr = load_model(model, adapter, revision)
    with errors.status("Tracing ..."):
        try:
            method = method or asr.default
            asr.gate(method)
            heard = asr.transcribe(decode(audio), method, accent, want_trace=True)
            assert heard.trace is not None
            with written(out) as part:
                heard.trace.save(part)
        except (ValueError, OSError) as error:
            fail(error)
    if heard.in_domain["verdict"] is False:
        errors.print(warning(heard.in_domain), style="yellow", markup=False)
    typer.echo(f"{heard.text}\n{len(heard.trace.layer_names)} layers, {heard.seconds:.1f} s -> {out}")


@app.command()
def evaluate(
    manifest: Annotated[
        Path, typer.Option(help="JSON lines with audio (relative to the file), text, accent, optionally speaker.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for utterances.parquet and summary.json.")],
    methods: Annotated[str, typer.Option(help="Comma-separated; by default all that the model has.")] = "",
    model: Model = "demo",
    adapter: Adapters = None,
    revision: Revision = "",
    accent: AccentOption = "auto",
    as_json: Json = False,
) -> None:
    """Measure word error rates of several methods on your recordings, with 95 % intervals.

    The exit status is 1 if a recording failed. Run the command again after an interruption, and it
    continues. Under torchrun or accelerate launch, several processes share the recordings.
    """
    make_folder(out)
    from hdmole.processes import team

    team()  # the model is loaded on the GPU of this process
    asr = load_model(model, adapter, revision)
    from hdmole.study.evaluate import evaluate as run
    from hdmole.study.tables import accent_table, markdown_table

    chosen = [m.strip() for m in methods.split(",") if m.strip()] if methods else asr.methods
    with progress_bar("Evaluating") as bar:

        def report(done: float, total: int) -> None:
            bar.update(TASK, completed=done, total=total)

        try:
            results = run(asr, manifest, chosen, out, accent=accent, progress=report)
        except (ValueError, OSError) as error:
            fail(error)
        except KeyboardInterrupt:
            errors.print(f"Stopped; what was heard is kept in {out}, the same command goes on from there.", markup=False)
            raise typer.Exit(130) from None
    if results is None:  # the first process has them
        return
    for row in results.failed:
        errors.print(f"{row.audio}: {row.error}", markup=False)
    typer.echo(results.to_json() if as_json else f"{markdown_table(results)}\n\n{accent_table(results)}")
    if results.failed:
        raise typer.Exit(1)


@app.command("compare")
def compare_command(
    config: Annotated[Path, typer.Option(help="TOML file: speech, methods, seeds, learning rates; runs/main.toml is one.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; run again to go on where it was cut off.")],
    model: Annotated[
        str, typer.Option(help="A model in place of the configuration's: demo, real, a folder, or a name on the hub.")
    ] = "",
    revision: Revision = "",
    readme: Annotated[Path | None, typer.Option(help="Bring the comparison's table in this README up to date.")] = None,
    processes: Annotated[int, typer.Option(help="How many runs are trained at once; they share cores and GPU.", min=1)] = 1,
    together: Annotated[
        bool, typer.Option("--together", help="Under torchrun or accelerate launch, all processes train each run together.")
    ] = False,
    accumulation: Annotated[
        int, typer.Option(help="Parts of a batch that are computed one after the other, to need less memory.", min=1)
    ] = 1,
) -> None:
    """Train methods from one frozen base over several seeds, and compare them.

    The results say which method is better, by how much, and with what interval.
    """
    if together and processes > 1:
        fail("--together is for the processes of torchrun or accelerate launch; leave out --processes.")
    make_folder(out)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from hdmole.study.compare import compare
    from hdmole.study.tables import claim_lines, markdown_table, update_readme

    try:
        results = compare(
            config, out, lambda text: errors.print(text, markup=False), processes, model=model, revision=revision or None,
            together=together, accumulation=accumulation,
        )  # fmt: skip
        if results is not None:
            typer.echo(f"{markdown_table(results)}\n\n{claim_lines(results.claims)}")
            if readme is not None:
                update_readme(readme, out, "comparison")
    except (ValueError, OSError) as error:
        fail(error)


@app.command("export")
def export_command(
    out: Annotated[Path, typer.Option(help="Folder of the LoRA adapter.")],
    accent: Annotated[str, typer.Option(help="Name of an accent, which then has probability 1.")] = "",
    posterior: Annotated[
        Path | None, typer.Option(help='JSON file with the probabilities of accents, such as {"german": 0.7, "scottish": 0.3}.')
    ] = None,
    speech: Annotated[
        Path | None,
        typer.Option(
            help="Manifest of recordings over which gates are averaged; of --accent only those in this accent are taken."
        ),
    ] = None,
    model: Model = "demo",
    adapter: Adapters = None,
    revision: Revision = "",
    method: Annotated[str, typer.Option(help="An HDMoLE adapter of the model; by default hdmole, or the first.")] = "",
    as_json: Json = False,
) -> None:
    """Write an HDMoLE adapter for one accent as a plain PEFT LoRA, for engines that serve LoRA.

    It is equal to the adapter only if the gate does not change from frame to frame: with
    routing="global", thresholds per layer, and this posterior for all utterances. The paper's local
    router reads every frame, so there the LoRA is an approximation: each layer gets the mean of its
    gate over the recordings of --speech. How far both are apart on these recordings is printed, and
    written to export.json.
    """
    if bool(accent) == (posterior is not None):
        fail("Give either --accent or --posterior.")
    make_folder(out)
    asr = load_model(model, adapter, revision)
    from hdmole.speech.manifest import read_manifest
    from hdmole.study.export import ExportError, export, one_hot, read_posterior

    try:
        asr.gate(method := method or asr.default)
        pi = one_hot(asr, accent) if posterior is None else read_posterior(posterior, asr.accents)
        lines = [line for line in read_manifest(speech) if accent in ("", line.accent)] if speech else []
        if speech and not lines:
            raise ExportError(
                "export.other_speech", "{name} has no recording in the accent {accent}.", name=speech, accent=accent
            )
        with progress_bar("Exporting", 2 * len(lines)) as bar:
            found = export(asr, method, pi, out, lines, lambda done: bar.update(TASK, completed=done))
    except (ValueError, OSError) as error:
        fail(error)
    if as_json:
        echo_json(found)
        return
    typer.echo(f"LoRA of rank {found['rank']} -> {out}")
    if found["exact"]:
        typer.echo("It is equal to the adapter under this posterior.")
    else:
        typer.echo(
            f"It is an approximation: the mean gates of its layers miss {found['gate_missed']:.1f} % of the adapter's gate."
        )
    if lines:
        typer.echo(
            f"Recordings: {found['recordings']}. Their word error rate is {found['wer']['base']:.1f} % with the frozen base, "
            f"{found['wer']['adapter']:.1f} % with the adapter under this posterior and {found['wer']['lora']:.1f} % with the LoRA. "
            f"Adapter and LoRA differ in {found['words_differ']:.1f} % of the words."
        )


@app.command()
def verdicts(
    folder: Annotated[Path, typer.Argument(help="Results folder that `hdmole compare` or `hdmole evaluate` wrote.")],
) -> None:
    """Judge the claims about HDMoLE anew, from the utterances of a results folder."""
    from hdmole.study.claims import judge
    from hdmole.study.tables import claim_lines

    try:
        typer.echo(claim_lines(judge(folder)))
    except (ValueError, OSError) as error:
        fail(error)


@accents.command("train")
def accents_train(
    manifest: Annotated[Path, typer.Argument(help="JSON lines with audio, text, accent and speaker; general is no accent.")],
    out: Annotated[Path, typer.Option(help="Folder of the recogniser.")],
    model: Model = "demo",
    revision: Revision = "",
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    as_json: Json = False,
) -> None:
    """Train an accent recogniser on the frozen encoder of a model.

    Of each accent, some speakers are held out: on some of them the recogniser is calibrated, on the
    others accuracy and calibration are measured. These are printed and written to accents.json.
    """
    make_folder(out)
    asr = load_model(model, revision=revision)
    from hdmole.speech.manifest import read_manifest
    from hdmole.study.accents import train_accents

    try:
        found = train_accents(asr, read_manifest(manifest), out, seed, lambda text: errors.print(text, markup=False))
    except (ValueError, OSError) as error:
        fail(error)
    if as_json:
        echo_json(found)
        return
    typer.echo(f"{'accent':<20} utterances speakers accuracy confidence calibration error")
    for name, row in {**found["accents"], "all": found}.items():
        typer.echo(
            f"{name:<20} {row['utterances']:10} {row['speakers']:8} {100 * row['accuracy']:6.1f} % {100 * row['confidence']:8.1f} % "
            f"{100 * row['ece']:15.1f} %"
        )


@bench.command("decode")
def bench_decode(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Recordings to transcribe; without any, a sample is decoded.")
    ] = None,
    model: Model = "demo",
    adapter: Adapters = None,
    revision: Revision = "",
    rounds: Annotated[int, typer.Option(help="How often everything is timed.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """Time every method of a model on this machine: decoding a sample, or transcribing recordings."""
    asr = load_model(model, adapter, revision)
    from hdmole.speech.audio import decode
    from hdmole.study.bench import bench as time_decoding

    with errors.status("Timing ..."):
        try:
            found = time_decoding(asr, rounds, [decode(file) for file in files or []])
        except (ValueError, UserError) as error:
            fail(error)
    if as_json:
        echo_json(found)
        return
    typer.echo(f"{f'{len(files)} recordings' if files else 'Decoding a sample'}: median of {rounds}")
    for name, times in found["transcription"].items():
        typer.echo(f"  {name:<26} {1000 * times['seconds']:9.2f} ms   x{times['ratio']:.2f}, {times['rtf']:.3f} x real time")


@bench.command("layer")
def bench_one_layer(
    file: Annotated[Path | None, typer.Option("--json", help="JSON file that gets every figure.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="How long each case is measured.", min=0)] = 1.0,
    within: Annotated[float, typer.Option(help="No case begins after so many seconds.")] = 3600.0,
    width: Annotated[list[int] | None, typer.Option(help="Width of the layer; may be repeated.")] = None,
    docs: Annotated[Path | None, typer.Option(help="Page that gets the tables of all files beside --json.")] = None,
) -> None:
    """Time one layer beside LoRA and other mixtures of LoRA experts, on this machine."""
    from hdmole.study.bench_layer import WIDTHS, bench_layer, speed_tables

    try:
        bench_layer(device, seconds, tuple(width or WIDTHS), within, file, typer.echo)
        if docs is not None and file is not None:
            write_between(docs, "speed", speed_tables(file.parent))
    except (RuntimeError, OSError, UserError) as error:
        fail(error)


@models.callback()
def models_table(context: typer.Context) -> None:
    """The families of speech models that can be used, and what was tested with them."""
    if context.invoked_subcommand is None:
        from hdmole.models.family import FAMILIES

        rows = [(entry.name, kind, f"hdmole/models/{entry.file}.py", entry.tested) for kind, entry in FAMILIES.items()]
        heads = ("Family", "model_type", "File", "Tested")
        widths = [max(len(row[k]) for row in [heads, *rows]) for k in range(3)]
        for row in [heads, *rows]:
            typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)))


@models.command("get")
def models_get(
    name: Annotated[str, typer.Argument(help="whisper-base: OpenAI's Whisper base (MIT licence), 145 MB.")] = "whisper-base",
    folder: Annotated[Path | None, typer.Option(help="A folder that may hold it already.")] = None,
) -> None:
    """Find pretrained weights, or download them to the user's cache. Prints their folder."""
    with errors.status("Looking for the weights ...") as status:
        from transformers.utils import logging

        from hdmole.models.pretrained import get

        logging.disable_progress_bar()

        def report(text: str) -> None:
            status.update(escape(text))
            if not errors.is_terminal:
                errors.print(text, markup=False)

        try:
            found = get(name, folder, report)
        except (ValueError, OSError) as error:
            fail(error)
    typer.echo(found)


@app.command("app")
def app_command(
    port: Annotated[int, typer.Option(help="Port of the web server.")] = 8501,
    model: Annotated[
        str,
        typer.Option(
            envvar="HDMOLE_MODEL",
            help="real, demo, a model folder, or the name of a repository on the Hugging Face hub; by default real where its "
            "weights are, and visitors may choose demo.",
        ),
    ] = "",
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Folder whose results, manifests and recordings visitors may open by path; repeatable."),
    ] = None,
    address: Annotated[
        str, typer.Option(help="Address of this machine at which the app listens and is visited; by default nobody else can.")
    ] = "localhost",
    limits: Annotated[
        Path | None, typer.Option("--settings", envvar="HDMOLE_SETTINGS", help="File with other limits; docs/app.md lists them.")
    ] = None,
    password: Annotated[
        bool, typer.Option("--password", help="Ask for a password now, and then every visitor; or set HDMOLE_PASSWORD.")
    ] = False,
) -> None:
    """Start the web app on this machine; Ctrl-C ends it."""
    main = Path(__file__).resolve().parent.parent / "app" / "main.py"
    if not main.is_file():
        fail("The app is not installed with the package; clone the repository and run 'make app' there.")
    # the app runs in the repository's folder, so the path must not be relative
    os.environ["HDMOLE_MODEL"] = str(Path(model).resolve()) if model and Path(model).is_dir() else model
    keep_password(typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True) if password else "")
    try:
        command = app_command_line(main, address, port, data or [], limits)
    except UserError as error:
        fail(error)
    os.chdir(main.parent.parent)
    os.execv(sys.executable, command)


if __name__ == "__main__":
    app()

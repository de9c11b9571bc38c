"""The command line; `hdmole --help` lists the commands.

Results go to standard output, progress and warnings to standard error, so that the output of
`--json` can be piped. torch is imported only by the commands that need it.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from hdmole.errors import UserError
from hdmole.files import write_between, written
from hdmole.settings import app_command_line, keep_password, settings

if TYPE_CHECKING:
    from hdmole.speech.asr import ASR

app = typer.Typer(
    help="Mixture of LoRA experts with hierarchical routing and dynamic thresholds, for accented speech.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
demo = typer.Typer(help="The built-in demo model.", no_args_is_help=True)
app.add_typer(demo, name="demo")
models = typer.Typer(help="The families of models, and pretrained weights that models build on.", invoke_without_command=True)
app.add_typer(models, name="models")
bench = typer.Typer(help="Speed on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
errors = Console(stderr=True, soft_wrap=True, highlight=False)
_TASK = TaskID(0)  # the one task of `_progress`
_AT_ONCE = 8  # recordings that are transcribed at once

Model = Annotated[str, typer.Option(help="demo, real, a model folder, or the name of a repository on the Hugging Face hub.")]
Adapters = Annotated[
    list[Path] | None, typer.Option("--adapter", help="Folder of a PEFT adapter, a method under the folder's name; repeatable.")
]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of the repository on the hub.")]
Method = Annotated[
    str,
    typer.Option(help="base, lora, full, hdmole, or another adapter; by default hdmole, another HDMoLE adapter, or the last."),
]
AccentOption = Annotated[str, typer.Option(help="auto, or the name of an accent to route by.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]


def _fail(message: object) -> NoReturn:
    errors.print(f"[bold red]Error:[/] {escape(str(message))}")
    raise typer.Exit(1)


def _echo_json(value: object) -> None:
    """Write JSON to standard output. It never holds NaN or infinity, which are no JSON."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        _fail("The result holds values that are no numbers, so the model is damaged; copy it again.")
    typer.echo(text.encode(errors="replace"))


def _make_folder(folder: Path, option: str = "--out") -> None:
    """Make the folder for results. If it cannot be written to, end the command before any work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"The folder {folder} cannot be made ({error.strerror}); choose another {option}.")
    if not os.access(folder, os.W_OK):
        _fail(f"The folder {folder} may not be written to; choose another {option}.")


@contextmanager
def _progress(what: str, total: int | None = None) -> Iterator[Progress]:
    """A progress bar with one task on standard error, if that is a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        progress.add_task(what, total=total)
        yield progress


def _load(model: str, adapters: list[Path] | None = None, revision: str = "") -> ASR:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers warns about itself
    with errors.status(f"Loading the model {escape(model)} ...") as status:
        from transformers.utils import logging

        from hdmole.speech.asr import ASR
        from hdmole.speech.loading import fetch_base

        logging.disable_progress_bar()
        try:
            fetch_base(model, lambda text: status.update(escape(text)), revision or None)
            asr = ASR.load(model, adapters=adapters or [], revision=revision or None)
        except (ValueError, OSError) as error:
            _fail(error)
    errors.print(f"Model {model} on {asr.device}", style="dim", markup=False)
    return asr


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

    asr = _load(model, adapter, revision)
    method = method or asr.default
    try:
        longest = settings().seconds
        asr.check_method(method)
        asr.check_accent(accent)
    except ValueError as error:
        _fail(error)
    results: list[dict[str, Any]] = []
    with _progress("Transcribing", len(audio)) as progress:
        for start in range(0, len(audio), _AT_ONCE):
            paths = audio[start : start + _AT_ONCE]
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
                progress.advance(_TASK)
    if as_json:
        _echo_json(results)
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
        _fail(f"{out} is a folder; give the name of a parquet file to write.")
    _make_folder(out.parent)
    asr = _load(model, adapter, revision)
    with errors.status("Tracing ..."):
        try:
            method = method or asr.default
            asr.gate(method)
            heard = asr.transcribe(decode(audio), method, accent, want_trace=True)
            assert heard.trace is not None
            with written(out) as part:
                heard.trace.save(part)
        except (ValueError, OSError) as error:
            _fail(error)
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
    continues.
    """
    _make_folder(out)
    asr = _load(model, adapter, revision)
    from hdmole.study.evaluate import evaluate as run
    from hdmole.study.tables import accent_table, markdown_table

    chosen = [m.strip() for m in methods.split(",") if m.strip()] if methods else asr.methods
    with _progress("Evaluating") as bar:

        def report(done: float, total: int) -> None:
            bar.update(_TASK, completed=done, total=total)

        try:
            results = run(asr, manifest, chosen, out, accent=accent, progress=report)
        except (ValueError, OSError) as error:
            _fail(error)
        except KeyboardInterrupt:
            errors.print(f"Stopped; what was heard is kept in {out}, the same command goes on from there.", markup=False)
            raise typer.Exit(130) from None
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
) -> None:
    """Train methods from one frozen base over several seeds, and compare them.

    The results say which method is better, by how much, and with what interval.
    """
    _make_folder(out)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from hdmole.study.compare import compare
    from hdmole.study.tables import claim_lines, markdown_table, update_readme

    try:
        results = compare(
            config, out, lambda text: errors.print(text, markup=False), processes, model=model, revision=revision or None
        )
        if results is not None:
            typer.echo(f"{markdown_table(results)}\n\n{claim_lines(results.claims)}")
            if readme is not None:
                update_readme(readme, out, "comparison")
    except (ValueError, OSError) as error:
        _fail(error)


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
        _fail(error)


@bench.command("decode")
def bench_decode(
    model: Model = "demo",
    adapter: Adapters = None,
    revision: Revision = "",
    rounds: Annotated[int, typer.Option(help="How often everything is timed.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """Time decoding a sample by every method of a model, on this machine."""
    asr = _load(model, adapter, revision)
    from hdmole.study.bench import bench as time_decoding

    with errors.status("Timing ..."):
        try:
            found = time_decoding(asr, rounds)
        except ValueError as error:
            _fail(error)
    if as_json:
        _echo_json(found)
        return
    typer.echo(f"Decoding a sample: median of {rounds}")
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
        _fail(error)


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
            _fail(error)
    typer.echo(found)


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
    _make_folder(work, "--work")

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
        _fail(error)


@demo.command("sums")
def demo_sums(model: Annotated[Path, typer.Option(help="Folder of a model.")] = Path("assets/demo")) -> None:
    """Write the SHA-256 sums of a model's files, which loading checks, into the folder."""
    from hdmole.speech.loading import write_sums

    if not (model / "config.json").is_file():
        _fail(f"The folder {model} holds no model.")
    try:
        typer.echo(write_sums(model))
    except (ValueError, OSError) as error:
        _fail(error)


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
        _fail(error)


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
    _make_folder(out, "--out")
    from hdmole.demo.build import conflicts

    try:
        conflicts(work, out, seed, scale, lambda text: errors.print(text, markup=False))
    except (ValueError, OSError) as error:
        _fail(error)


@demo.command("people")
def demo_people(
    out: Annotated[Path, typer.Option(help="Folder of the speech, for the data of a comparison.")] = Path("build/people"),
    work: Annotated[Path, typer.Option(help="Work folder of 'hdmole demo build' with real speech.")] = Path("build/demo"),
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Make the speech for runs/people.toml: real people as the target, synthetic speech as the
    source.
    """
    _make_folder(out, "--out")
    from hdmole.demo.people import people

    try:
        people(work, out, seed, lambda text: errors.print(text, markup=False))
    except (ValueError, OSError) as error:
        _fail(error)


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
        _fail(error)


@demo.command("info")
def demo_info(
    model: Model = "demo",
    as_json: Json = False,
    readme: Annotated[Path | None, typer.Option(help="Bring the results table of this README up to date.")] = None,
) -> None:
    """What the demo model is: sizes, methods, accents and measured results."""
    asr = _load(model)
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
        _fail(error)
    if as_json:
        _echo_json({**info, "results": results and results.to_dict()})
        return
    typer.echo(f"{info['folder']}: {info['megabytes']} MB, on {info['device']}")
    typer.echo("Parameters: " + ", ".join(f"{k} {v:,}" for k, v in parts.items()))
    typer.echo("Accents: " + ", ".join(asr.accents))
    if results is not None:
        typer.echo("\n" + markdown_table(results))
        origin = results.provenance
        typer.echo(f"\nMeasured {origin.date} by `{origin.command}` on {origin.machine}.")


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
        _fail("The app is not installed with the package; clone the repository and run 'make app' there.")
    # the app runs in the repository's folder, so the path must not be relative
    os.environ["HDMOLE_MODEL"] = str(Path(model).resolve()) if model and Path(model).is_dir() else model
    keep_password(typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True) if password else "")
    try:
        command = app_command_line(main, address, port, data or [], limits)
    except UserError as error:
        _fail(error)
    os.chdir(main.parent.parent)
    os.execv(sys.executable, command)


if __name__ == "__main__":
    app()

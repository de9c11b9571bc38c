"""What the commands of the command line share: options, messages, progress, loading a model.

Results go to standard output, progress and warnings to standard error, so that the output of
`--json` can be piped.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from hdmole.speech.asr import ASR

errors = Console(stderr=True, soft_wrap=True, highlight=False)
TASK = TaskID(0)  # the one task of `progress_bar`

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


def fail(message: object) -> NoReturn:
    """End the command with a message and exit status 1."""
    errors.print(f"[bold red]Error:[/] {escape(str(message))}")
    raise typer.Exit(1)


def echo_json(value: object) -> None:
    """Write JSON to standard output. It never holds NaN or infinity, which are no JSON."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        fail("The result holds values that are no numbers, so the model is damaged; copy it again.")
    typer.echo(text.encode(errors="replace"))


def make_folder(folder: Path, option: str = "--out") -> None:
    """Make the folder for results. If it cannot be written to, end the command before any work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"The folder {folder} cannot be made ({error.strerror}); choose another {option}.")
    if not os.access(folder, os.W_OK):
        fail(f"The folder {folder} may not be written to; choose another {option}.")


@contextmanager
def progress_bar(what: str, total: int | None = None) -> Iterator[Progress]:
    """A progress bar with one task on standard error, if that is a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        progress.add_task(what, total=total)
        yield progress


def load_model(model: str, adapters: list[Path] | None = None, revision: str = "") -> ASR:
    """Load a model, as `ASR.load`; its pretrained base is downloaded first if need be."""
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
            fail(error)
    errors.print(f"Model {model} on {asr.device}", style="dim", markup=False)
    return asr

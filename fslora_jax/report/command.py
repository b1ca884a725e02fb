"""``fslora report``: a run or a study as one page, and its figures for paper."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

from fslora_jax.arguments import parse
from fslora_jax.errors import UserError
from fslora_jax.report.charts import Chart, all_charts
from fslora_jax.report.collect import read_subject
from fslora_jax.report.page import render
from fslora_jax.report.paper import draw_charts
from fslora_jax.report.tables import Tables, tabulate
from fslora_jax.rundir import write_atomically


@dataclasses.dataclass
class Report:
    """Write runs or studies as one HTML page that needs no network, and the same figures as PNG and PDF.

    The page begins with the study's question and the answer in words and numbers. Runs that are not finished are
    shown as far as they are. Several folders are compared on one page.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or --out folders of studies."""
    out: Path | None = None
    """The page; by default report.html in the only folder, or here where there are several."""
    figures: Path | None = None
    """Folder of the figures for paper; by default beside the page, such as report_figures."""
    watch: int | None = None
    """Write the page anew every so many seconds until all runs have finished; it reloads itself."""


def report_command(argv: Sequence[str]) -> None:
    """Writes the page once, or again and again."""
    args = parse(Report, "fslora report", Report.__doc__ or "", argv)
    folders: tuple[Path, ...] = args.folders
    if not folders:
        raise UserError("report: no folder; expected fslora report RUN_OR_STUDY... [--out report.html]")
    if args.watch is not None and args.watch < 1:
        raise UserError(f"watch: found {args.watch}, expected at least 1 second")
    out = args.out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    figures = args.figures or out.with_name(f"{out.stem}_figures")
    known = ""
    try:
        while True:
            page, finished, drawn = make_page(folders, args.watch)
            if page != known:
                write_page(out, page)
                draw_charts(*drawn, figures)
                print(f"report: {out}, figures: {figures}", flush=True)
                known = page
            if args.watch is None or finished:
                return
            time.sleep(args.watch)
    except KeyboardInterrupt:
        print(f"report: {out} stays as it is")


def make_page(folders: Sequence[Path], watch: int | None) -> tuple[str, bool, tuple[list[Chart], Tables]]:
    """The page as it is now, whether all runs have finished, and what is drawn on it."""
    subject = read_subject(folders)
    tables = tabulate(subject)
    charts = all_charts(subject, tables)
    finished = all(run.state in ("finished", "diverged", "unreadable") for run in subject.runs)
    return render(subject, tables, charts, None if finished else watch), finished, (charts, tables)


def write_page(out: Path, page: str) -> None:
    """The page, whole or not at all."""
    if out.is_dir():
        raise UserError(f"{out}: is a folder; expected a file for --out, such as {out / 'report.html'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written: {error.strerror}; make room or choose another --out"
        ) from None

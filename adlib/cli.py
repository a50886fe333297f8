"""The command `adlib`: run, list, fetch, assets, check. What is slow to import is imported by the command that needs it."""

import shlex
import sys
from typing import Annotated

import typer

app = typer.Typer(
    name="adlib",
    help="A course that runs: from the raw logs of a shop to a judged ad. Start with `adlib check`, then `adlib run`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COLOURS = {"completed": "green", "running": "cyan", "waiting": "dim", "not run": "yellow", "interrupted": "yellow"}


Option = typer.Option
Folder = Annotated[str | None, Option("--notebooks", metavar="FOLDER", help="Other lessons, such as your own copy.")]
Lessons = Annotated[
    list[str] | None,
    typer.Argument(help='"03", "03_ctr_modeling" or "01-03"; without it all.', show_default=False),
]
Parameter = Annotated[
    list[str] | None,
    Option("--parameter", "-p", metavar="NAME=VALUE", help="Set a parameter in all lessons that have it."),
]
Names = Annotated[
    list[str] | None,
    typer.Argument(help="Assets by name; without it those of a default run.", show_default=False),
]


@app.command()
def run(
    lessons: Lessons = None,
    parameter: Parameter = None,
    profile: Annotated[str | None, Option(help="A file of notebooks/profiles: cpu, workshop or gpu.")] = None,
    data: Annotated[str | None, Option(metavar="FOLDER", help="Your own tables instead of the market.")] = None,
    jobs: Annotated[
        int, Option(min=1, help="Lessons at a time; above 1, one more may overlap with the lesson it follows.")
    ] = 2,
    out: Annotated[str, Option(help="Where the results go.")] = "runs/latest",
    force: Annotated[bool, Option("--force", help="Run also what has not changed.")] = False,
    save: Annotated[bool, Option("--save", help="Write the outputs back into the notebooks, to commit them.")] = False,
    notebooks: Folder = None,
    timeout: Annotated[float | None, Option(metavar="MINUTES", help="End a lesson that takes longer.")] = None,
):
    """Run lessons in order and write a report that opens without a network.

    What has not changed since the last run into the same folder is not run again, so an interrupted run is resumed by the same command.

    **Examples**

    - `adlib run` runs the whole course; then open `runs/latest/index.html`.
    - `adlib run 03 -p seed=1` runs one lesson with another seed.
    - `adlib run 01-03 --data my_shop/ --out runs/my_shop` runs three lessons on your own tables.
    - `adlib run --profile workshop` is smaller, for ninety minutes with a class.
    """
    from adlib import course, results

    if save and (parameter or profile or data):
        raise course.CourseError("--save keeps the outputs of the default run: leave out -p, --profile and --data.")
    asked = {"parameters": parameter or (), "profile": profile, "data": data, "out": out, "folder": notebooks}
    with _Progress() as progress:
        try:
            limit = timeout and timeout * 60
            found = course.run(lessons or (), **asked, jobs=jobs, force=force, timeout=limit, tell=progress.show)
        except KeyboardInterrupt:
            progress.close()
            typer.secho(
                "Interrupted. Finished lessons are kept; the same command goes on from here.", fg="yellow", err=True
            )
            raise typer.Exit(130) from None
    for result in found.values():
        if result.failure:
            _failure(result, **asked)
    for path in results.save(found, out, notebooks) if save else ():
        typer.echo(f"saved {path.name}")
    typer.echo(f"Report: {out}/index.html")
    raise typer.Exit(0 if all(r.status == "completed" for r in found.values()) else 1)


def _failure(result, parameters, profile, data, out, folder):
    """Print what failed in at most five lines: lesson, cell, error, source line, how to look and go on."""
    words = [word for text in parameters for word in ("-p", text)]
    given = {
        "--profile": profile,
        "--data": data,
        "--notebooks": folder,
        "--out": out if out != "runs/latest" else None,
    }
    words += [word for option, value in given.items() if value for word in (option, value)]
    typer.echo(err=True)
    for line, colour in zip(result.failure, ["red", None, "red", None], strict=False):
        typer.secho(line, fg=colour, err=True)
    if result.status != "not run":
        again = shlex.join(["adlib", "run", result.lesson, *words])
        typer.echo(f"full traceback: {out}/{result.lesson}/notebook.html; again: {again}", err=True)


class _Progress:
    """A live table in a terminal, a line a change elsewhere (a log file, CI)."""

    def __init__(self):
        from rich.console import Console
        from rich.live import Live

        self.console, self.results, self.said = Console(), {}, {}
        self.live = (
            Live(console=self.console, refresh_per_second=4, get_renderable=self._table)
            if self.console.is_terminal
            else None
        )

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Leave the last state on the screen."""
        if self.live:
            self.live.stop()

    def show(self, result):
        """Take note of a result that changed."""
        self.results[result.lesson] = result
        state = self._state(result)
        if not self.live and result.status != "waiting" and self.said.get(result.lesson) != result.status:
            self.said[result.lesson] = result.status
            self.console.print(f"{result.lesson:28} {state}", highlight=False)

    def _state(self, result):
        colour = COLOURS.get(result.status, "red")
        missed = sum(not c["ok"] for c in result.checks)
        more = {
            "running": f"{result.cells}/{result.of} cells" if self.live else "",
            "waiting": "",
            "not run": "; ".join(result.failure[-1:]),
        }
        text = more.get(result.status, f"{result.seconds:.0f} s" + (", unchanged" if result.reused else ""))
        return f"[{colour}]{result.status}[/] {text}" + (f", [yellow]{missed} checks did not hold[/]" if missed else "")

    def _table(self):
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for result in list(self.results.values()):
            table.add_row(result.lesson, self._state(result))
        return table


@app.command("list")
def list_lessons(
    parameters: Annotated[bool, Option("--parameters", help="Show each lesson's parameters too.")] = False,
    notebooks: Folder = None,
):
    """Show the lessons: question, minutes, which they need, and with --parameters what you can set.

    **Example**: `adlib list --parameters`
    """
    from adlib import syllabus

    table = _Table("Lesson", "Question", "Minutes", "Needs")
    every = syllabus.lessons(notebooks)
    for x in every:
        table.add(x.name, x.question, str(x.minutes), ", ".join(n[:2] for n in x.needs))
    table.print()
    for x in every if parameters else ():
        table = _Table("Parameter", "Type", "Default", "What it does", title=x.name)
        for p in x.parameters.values():
            table.add(p.name, p.type + (" | None" if p.optional else ""), repr(p.default), p.help)
        table.print()


@app.command()
def fetch(
    names: Names = None,
    mirror: Annotated[str | None, Option(metavar="FOLDER", help="Also lay them out here, such as on a stick.")] = None,
):
    """Fetch real data and models into the cache; every file is checked by its hash.

    **Examples**

    - `adlib fetch` fetches what a default run needs: 181 MB to download, 217 MB on disk.
    - `adlib fetch upworthy` fetches one more data set; the lessons that use it then show one more section.
    - `adlib fetch --mirror /media/stick` fills a stick; learners set `ADLIB_MIRROR=/media/stick` and need no network.
    """
    from adlib import assets

    reports = assets.build_mirror(mirror, names) if mirror else assets.fetch(names)
    table = _Table("Asset", "From", "MB", "Seconds")
    for report in reports:
        table.add(report.name, report.source, f"{report.bytes / 1e6:.1f}", f"{report.seconds:.1f}")
    table.print()


@app.command("assets")
def show_assets():
    """Show all real data sets and models: what they are, licence, size, whether they are here, which lessons use them."""
    from adlib import assets

    table = _Table("Asset", "What it is", "Licence", "MB", "Here", "Lessons")
    for row in assets.status():
        here = (
            f"[green]yes[/] ({row.where})"
            if row.here
            else f"no ({row.where})" + (" [yellow]default[/]" if row.default else "")
        )
        table.add(
            row.name,
            row.title,
            row.licence,
            f"{row.bytes / 1e6:.1f}",
            here,
            " ".join(name[:2] for name in row.lessons),
            markup=4,
        )
    table.print()


@app.command()
def check():
    """Is this machine ready? Python, packages, disk, memory, cores, device, kernel, assets; for a teacher, the evening before.

    Prints the command that mends each point, and ends with exit code 1 if one is open.
    """
    from adlib import readiness

    found = readiness.findings()
    for item in found:
        sign, colour = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", None)}[item.ok]
        typer.secho(f"{sign} {item.what}: {item.found}", fg=colour)
        if item.ok is False:
            typer.echo(f"    mend it: {item.fix}")
    open_points = sum(item.ok is False for item in found)
    typer.echo("Ready: go on with `adlib run`." if not open_points else f"{open_points} points are open.")
    raise typer.Exit(1 if open_points else 0)


class _Table:
    """A table whose cells are text, not markup, except where said so."""

    def __init__(self, *columns, title=None):
        from rich.table import Table

        self.table = Table(
            *columns, title=title, title_justify="left", box=None, header_style="bold", padding=(0, 2, 0, 0)
        )

    def add(self, *cells, markup=None):
        """Add a row; the cell number `markup` may hold rich's markup."""
        from rich.markup import escape

        self.table.add_row(*(cell if i == markup else escape(cell) for i, cell in enumerate(cells)))

    def print(self):
        """Print the table."""
        from rich.console import Console

        Console().print(self.table)


def main():
    """Run the command line; an error of this package is one sentence on stderr and exit code 2, without a traceback."""
    try:
        app()
    except Exception as error:
        if not type(error).__module__.startswith("adlib."):
            raise
        typer.secho(f"{error}", fg="red", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

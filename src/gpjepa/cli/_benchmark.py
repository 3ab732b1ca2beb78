"""The command of the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._common import command, output, records

if TYPE_CHECKING:
    from gpjepa import benchmark


@command
def run_benchmark(
    config: Annotated[
        str | None, typer.Argument(help="A preset by name, or a YAML file.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory; an interrupted run resumes there.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the files that it names; by default beside it.")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="Run this method only; can be repeated.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Number of seeds, instead of those it names.", min=1)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check files, options and splits; run nothing.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if any method failed, not the focus only.")
    ] = False,
    list_presets: Annotated[
        bool, typer.Option("--list-presets", help="Name the presets that come along.")
    ] = False,
) -> None:
    """Compare methods on held-out perturbations, and write a report."""
    from gpjepa import benchmark

    if list_presets:
        found = {name: benchmark.BenchmarkConfig.read(name) for name in benchmark.presets()}
        for name, preset in found.items():
            output.say(f"{name}: {preset.title}")
        output.result({name: preset.title for name, preset in found.items()})
        return
    how = "Say what to run and where to: gpjepa benchmark smoke --out DIRECTORY"
    if config is None:
        raise ValueError(how)
    read = benchmark.BenchmarkConfig.read(config, data).narrowed(methods, seeds)
    if check:
        _check(read)
        return
    if out is None:
        raise ValueError(how)
    result = benchmark.run(read, out, progress=output.shown)
    n = result.runs["status"].value_counts()
    for status in ("failed", "not run"):
        if status in n:
            output.say(
                f"{n[status]} of {len(result.runs)} cells of the grid: {status}; the report says why."
            )
    output.say(f"Wrote {out}/: report.html, report.md, table.csv, scores.csv, runs.csv, splits/.")
    output.result({"out": out, "status": n.to_dict(), "table": records(result.table())})
    lost = result.failed(focus_only=not strict)
    if len(lost):
        first = lost.iloc[0]
        output.say(
            f"[bold]{first['method']} {first['status']}[/] on {first['split']}: {first['reason']}"
        )
        raise typer.Exit(1)


def _check(config: benchmark.BenchmarkConfig) -> None:
    """Everything that can be wrong before anything is trained."""
    config.check()
    splits = {}
    for data in config.data:
        splits[data.name] = len(data.make_splits(*data.load_joined()).splits)
        data.read_gene_sets()
        for features in data.features:
            features.read()
    problems = [p for m in config.methods if (p := m.problem())]
    for name, n in splits.items():
        output.say(f"{name}: {n} splits, {len(config.methods)} methods.")
    for problem in problems:
        output.say(f"Will not run: {problem}")
    found = {"splits": splits, "methods": len(config.methods), "not_run": problems}
    output.result(found)
    if any(m.title == config.focus and m.problem() for m in config.methods):
        raise typer.Exit(1)


COMMANDS = {"benchmark": run_benchmark}

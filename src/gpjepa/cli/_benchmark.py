"""Commands of the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import command, output, records


@command
def run_benchmark(
    config: Annotated[str, typer.Argument(help="A preset by name, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="Directory; an interrupted run resumes there.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the files that it names; by default beside it.")
    ] = None,
    envs: Annotated[
        Path | None, typer.Option(help="Folder of what gpjepa benchmark-env made.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the configuration and the splits; run nothing.")
    ] = False,
) -> None:
    """Compare methods on held-out perturbations, and write a report."""
    from gpjepa import benchmark

    read = benchmark.BenchmarkConfig.read(config, data)
    if check:
        splits = {d.name: len(d.make_splits(*d.load_joined()).splits) for d in read.data}
        for name, n in splits.items():
            output.say(f"{name}: {n} splits, {len(read.methods)} methods.")
        output.result({"splits": splits, "methods": len(read.methods)})
        return
    result = benchmark.run(read, out, envs=envs)
    n = int((result.runs["status"] != "run").sum())
    if n:
        output.say(
            f"{n} of {len(result.runs)} cells of the grid were not run; the report says why."
        )
    output.say(f"Wrote {out}/: report.html, report.md, table.csv, scores.csv, runs.csv, splits/.")
    output.result({"out": out, "not_run": n, "table": records(result.table())})


@command
def benchmark_env(
    method: Annotated[str, typer.Argument(help="A published method, such as GEARS.")],
    envs: Annotated[Path, typer.Option(help="Folder of the environments; it is made in there.")],
    with_python: Annotated[
        str | None, typer.Option(help="Interpreter to make it with; by default this one.")
    ] = None,
    torch: Annotated[
        str | None, typer.Option(help="Version of torch to install first, such as a CPU build.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Seconds after which it is given up.")] = 1_800,
) -> None:
    """Make the environment that a published method runs in."""
    import sys

    from gpjepa.benchmark import make_environment

    made = envs / method
    make_environment(method, made, with_python or sys.executable, torch, limit)
    output.say(f"Made {made}/. Now {method} runs with gpjepa benchmark ... --envs {envs}")
    output.result({"made": made})


COMMANDS = {"benchmark": run_benchmark, "benchmark-env": benchmark_env}

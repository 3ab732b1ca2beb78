"""Commands that choose perturbations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ._common import Overwrite, Seed, check_outputs, command, load, output, records, table
from ._model import check_model

if TYPE_CHECKING:
    from gpjepa.planning import Goal

ModelDir = Annotated[Path, typer.Argument(help="Directory of a trained model.")]
Up = Annotated[
    list[str] | None, typer.Option("--up", help="Gene that should go up; can be repeated.")
]
Down = Annotated[
    list[str] | None, typer.Option("--down", help="Gene that should go down; can be repeated.")
]
GoalFile = Annotated[
    Path | None,
    typer.Option(
        "--goal",
        help="Wanted cells with raw counts (.h5ad), or a wanted effect (.csv with the columns gene and "
        "effect).",
    ),
]
Context = Annotated[
    str | None, typer.Option(help="Context of the effects; optional if the model has only one.")
]
Threshold = Annotated[float | None, typer.Option(help="Score that counts as success.")]
Out = Annotated[Path | None, typer.Option(help="File for the table (.csv).")]
LeaveAlone = Annotated[
    list[str] | None, typer.Option(help="Gene that should not change; can be repeated.")
]
UnchangedIn = Annotated[
    list[str] | None,
    typer.Option(help="Context in which nothing should change; can be repeated."),
]
MaxChange = Annotated[float | None, typer.Option(help="Largest side effect.")]
Forbidden = Annotated[
    list[str] | None, typer.Option(help="Target that must not be used; can be repeated.")
]


@command
def plan(
    model_dir: ModelDir,
    goal: GoalFile = None,
    up: Up = None,
    down: Down = None,
    context: Context = None,
    max_targets: Annotated[int, typer.Option(help="Targets in a combination.", min=1)] = 2,
    leave_alone: LeaveAlone = None,
    unchanged_in: UnchangedIn = None,
    max_change: MaxChange = None,
    forbidden: Forbidden = None,
    risk: Annotated[
        Literal["mean", "expected", "quantile", "success"],
        typer.Option(help="What the best are ordered by."),
    ] = "mean",
    threshold: Threshold = None,
    out: Out = None,
    figure: Annotated[Path | None, typer.Option(help="File for a figure (.png or .pdf).")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Rank perturbations by how well they meet a goal; of more than two targets, search for the best."""
    from gpjepa._files import written_whole

    check_outputs(overwrite, (out, (".csv",), "--out"), (figure, (".png", ".pdf"), "--figure"))
    wanted = _goal(goal, up, down)
    from gpjepa import planning

    limits = planning.Constraints(
        leave_alone=leave_alone or (),
        unchanged_in=unchanged_in or (),
        max_change=max_change,
        forbidden=forbidden or (),
        max_targets=max_targets,
    )
    options: dict[str, Any] = {
        "context": context,
        "constraints": limits,
        "risk": risk,
        "threshold": threshold,
        "seed": seed,
    }
    model = _loaded(model_dir)
    if max_targets > 2:
        ranking = planning.plan(model, wanted, max_targets, **options).ranking
    else:
        ranking = planning.rank(model, wanted, **options)
    known = ranking.table()
    shown = known if len(known) else ranking.extrapolated()
    columns = ["perturbation", "regime", "score", "expected", "lower", "upper", "p_success"]
    columns += [c for c in ("side_effect", "feasible") if c in shown]
    output.say(f"Score: {ranking.unit}.")
    output.say(table(shown[columns].head(10), f"The best of {ranking.n_candidates:,} candidates"))
    output.say(f"{ranking.why()!r}")
    if out is not None:
        with written_whole(out) as draft:
            ranking.frame.to_csv(draft, index=False)
        output.say(f"Wrote {len(ranking.frame):,} candidates to {out}.")
    if figure is not None:
        with written_whole(figure) as draft:
            ranking.plot().savefig(draft, dpi=150, format=figure.suffix[1:])
        output.say(f"Wrote a figure to {figure}.")
    output.result({"best": ranking.best, "unit": ranking.unit, "table": records(shown.head(50))})


@command
def design(
    model_dir: ModelDir,
    n: Annotated[int, typer.Option("-n", help="Perturbations to measure.", min=1)] = 10,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="What may be measured; can be repeated. By default all pairs left."),
    ] = None,
    goal: GoalFile = None,
    up: Up = None,
    down: Down = None,
    threshold: Threshold = None,
    context: Context = None,
    n_cells: Annotated[int, typer.Option(help="Cells of each perturbation.", min=1)] = 100,
    out: Out = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Choose what to measure next: to learn most or, with a goal, to succeed."""
    from gpjepa._files import written_whole

    check_outputs(overwrite, (out, (".csv",), "--out"))
    wanted = _goal(goal, up, down) if goal is not None or up or down else None
    from gpjepa import planning

    found = planning.design(
        _loaded(model_dir),
        n,
        candidate,
        goal=wanted,
        threshold=threshold,
        context=context,
        n_cells=n_cells,
        seed=seed,
    )
    output.say(f"Reached: {found.measure}; random, lower and upper: of random choices.")
    output.say(table(found.table(), f"{n} perturbations to measure"))
    if not found.differs:
        output.say("Nothing distinguishes the candidates: the order is arbitrary.")
    if out is not None:
        with written_whole(out) as draft:
            found.table().to_csv(draft, index=False)
        output.say(f"Wrote {out}.")
    output.result({"measure": found.measure, "table": records(found.table())})


def _goal(file: Path | None, up: list[str] | None, down: list[str] | None) -> Goal:
    """What the options ask for; refused before anything is loaded."""
    if file is not None and (up or down):
        raise ValueError("Give either --goal FILE, or genes with --up and --down, not both.")
    if file is None and not (up or down):
        raise ValueError("Say what is wanted: --goal FILE, or genes with --up and --down.")
    if file is None:
        from gpjepa.planning import Signature

        return Signature(up or (), down or ())
    if not file.exists():
        raise ValueError(f"There is no file {file}.")
    from gpjepa.planning import TowardsCells, TowardsEffect

    if file.suffix == ".csv":
        import pandas as pd

        frame = pd.read_csv(file)
        if not {"gene", "effect"} <= {*frame}:
            raise ValueError(f"{file} needs the columns gene and effect; it has {list(frame)}.")
        return TowardsEffect(pd.Series(frame["effect"].to_numpy(float), frame["gene"].astype(str)))
    return TowardsCells(load(str(file)))


def _loaded(path: Path) -> Any:
    check_model(path)
    from gpjepa import GPJEPA

    return GPJEPA.load(str(path), adata=False)


COMMANDS = {"plan": plan, "design": design}

"""The command line: ``gpjepa demo``, ``train``, ``predict``, ``simulate``, ``benchmark``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from gpjepa.benchmark import Comparison

app = typer.Typer(
    help="Predict how single cells respond to perturbations, and say how sure it is.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)
console = Console()

Data = Annotated[str, typer.Argument(help="Data set by name, or a .h5ad or .zarr file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Layer = Annotated[str | None, typer.Option(help="Layer with raw counts.")]
PerturbationKey = Annotated[str, typer.Option(help="Column of obs with the perturbations.")]
Control = Annotated[list[str], typer.Option(help="Label of control cells; can be repeated.")]
ContextKey = Annotated[str | None, typer.Option(help="Column of obs with the context.")]
BatchKey = Annotated[str | None, typer.Option(help="Column of obs with the batch.")]
DosageKey = Annotated[str | None, typer.Option(help="Column of obs with the dose.")]
LibraryKey = Annotated[str | None, typer.Option(help="Column of obs with whole-cell counts.")]
Separator = Annotated[str, typer.Option(help="What joins targets; empty for single targets.")]
Strip = Annotated[str | None, typer.Option(help="Regular expression removed from targets.")]
GeneSets = Annotated[
    list[str] | None,
    typer.Option(help="GMT file with gene sets, features of targets never perturbed; repeatable."),
]
Seed = Annotated[int, typer.Option(help="Seed.")]


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """Tell what the user can mend in a sentence instead of a traceback."""

    @functools.wraps(command)
    def told(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, KeyError, TypeError, OSError, ImportError, RuntimeError) as error:
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            Console(stderr=True).print(
                f"[bold red]Error:[/] {escape(str(text))}", highlight=False, soft_wrap=True
            )
            raise typer.Exit(1) from error

    return told


def _load(data: str) -> Any:
    from anndata import AnnData

    from gpjepa import datasets

    adata = datasets.load(data)
    if not isinstance(adata, AnnData):
        raise TypeError(f"{data} holds {type(adata).__name__}; give one modality as AnnData.")
    return adata


def _setup(
    layer: str | None, perturbation_key: str, control: list[str], context_key: str | None,
    batch_key: str | None, dosage_key: str | None, library_size_key: str | None, separator: str,
    strip: str | None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "layer": layer, "perturbation_key": perturbation_key, "control": control,
        "context_key": context_key, "batch_key": batch_key, "dosage_key": dosage_key,
        "library_size_key": library_size_key, "separator": separator or None, "strip": strip,
    }  # fmt: skip


def _model(gene_sets: list[str] | None) -> dict[str, Any]:
    """Arguments of the model; a target in none of the sets takes the mean effect."""
    from gpjepa.perturbations import TargetFeatures

    if not gene_sets:
        return {}
    features = TargetFeatures.from_gene_sets(gene_sets)
    return {"target_features": features, "missing_features": "mean"}


@app.command()
@_told
def demo(
    data: Annotated[str | None, typer.Argument(help="Your own data; simulated by default.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("gpjepa-demo"),
    seeds: Annotated[int, typer.Option(help="Runs, each with its own seed.", min=1)] = 1,
    hold_out: Annotated[list[str] | None, typer.Option(help="Perturbation to hold out.")] = None,
    hold_out_context: Annotated[str | None, typer.Option(help="Context to hold out.")] = None,
    perturbation_key: PerturbationKey = "perturbation",
    control: Control = ["control"],  # noqa: B006
    context_key: ContextKey = None,
    library_size_key: LibraryKey = None,
    gene_sets: GeneSets = None,
    overwrite: Overwrite = False,
) -> None:
    """Hold perturbations out, train, predict them, and compare with baselines and the truth."""
    from gpjepa._files import check_free, written_whole

    check_free(out, overwrite)
    if data is None and (hold_out or hold_out_context is not None):
        raise ValueError("--hold-out is for your own data; say which: gpjepa demo DATA ...")
    if data is not None and not hold_out and hold_out_context is None:
        raise ValueError(
            "Say what to hold out of your data: --hold-out A+B, or --hold-out-context."
        )
    setup = {
        "perturbation_key": perturbation_key, "control": control, "context_key": context_key,
        "library_size_key": library_size_key,
    }  # fmt: skip
    model = _model(gene_sets)
    adata = None if data is None else _load(data)
    results = []
    for seed in range(seeds):
        console.print(f"[bold]Run {seed + 1} of {seeds}[/] (seed {seed})")
        results.append(_run(adata, hold_out, hold_out_context, setup, model, seed))
        console.print(_rich_table([results[-1]], f"Seed {seed}"))
        if not results[-1].model.gate_:
            console.print("The gate is 0: too few perturbations to judge the network by.")
        for regime, gate in results[-1].model.gate_.items():
            console.print(
                f"Gate of {regime}: {gate['gate']:.2g}. Squared error inside training, "
                f"{gate['n_units']} held out: anchor {gate['error_anchor']:.1f}, network "
                f"{gate['error_network']:.1f}, gated {gate['error_gated']:.1f}.",
                soft_wrap=True,
            )
    if seeds > 1:
        console.print(_rich_table(results, f"Mean over {seeds} seeds"))
    with written_whole(out) as draft:
        draft.mkdir()
        _write(results, draft)
    console.print(f"Wrote {out}/: table.csv, scores.csv, predicted.h5ad, model/, three figures.")


def _run(
    adata: Any, hold_out: list[str] | None, hold_out_context: str | None, setup: dict, model: dict,
    seed: int,
) -> Comparison:  # fmt: skip
    from gpjepa import benchmark, datasets

    if adata is None:
        adata = datasets.simulate(12_000, seed=seed)
        rows = adata.uns["simulation"]["rows"]
        combinations = rows.loc[rows["interaction"] != "single", "perturbation"]
        hold_out = list(combinations.sample(12, random_state=seed))
        setup = {}
    return benchmark.compare(
        adata, hold_out, hold_out_context=hold_out_context, seed=seed, setup=setup, model=model
    )


def _rich_table(results: list[Comparison], title: str) -> Any:
    from rich.table import Table

    from gpjepa.benchmark import COMPARED, METRICS

    n = len(results[0].rows)
    table = Table(title=f"{title}: {n} held-out perturbation{'s' if n > 1 else ''}")
    table.add_column("method")
    table.add_column("error ÷ no change", justify="right")
    for name in COMPARED:
        table.add_column(METRICS[name].label, justify="right")
    mean = sum(r.table for r in results) / len(results)
    for method, row in mean.iterrows():
        values = [row["relative_error"], *(row[name] for name in COMPARED)]
        style = "bold" if method == "GP-JEPA" else None
        table.add_row(str(method), *("–" if v != v else f"{v:.3f}" for v in values), style=style)
    return table


def _write(results: list[Comparison], out: Path) -> None:
    import pandas as pd

    from gpjepa import plotting

    tables = [r.table.assign(seed=i).reset_index() for i, r in enumerate(results)]
    pd.concat(tables).to_csv(out / "table.csv", index=False)
    scores = pd.concat([r.scores.assign(seed=i) for i, r in enumerate(results)])
    scores.to_csv(out / "scores.csv", index=False)
    first = results[0]
    first.predicted.write_h5ad(out / "predicted.h5ad", compression="gzip")
    first.model.save(str(out / "model"))
    # The held-out perturbation with the median error: neither the best nor the worst.
    mine = first.scores[first.scores["method"] == "GP-JEPA"].reset_index(drop=True)
    row = int(mine["squared_error"].rank(method="first").sub(len(mine) / 2).abs().idxmin())
    plotting.method_errors(scores).savefig(out / "errors.png", dpi=150)
    plotting.effect_scatter(first, row).savefig(out / "effects.png", dpi=150)
    plotting.top_genes(first, row).savefig(out / "genes.png", dpi=150)


@app.command()
@_told
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory for the model.")],
    layer: Layer = None,
    perturbation_key: PerturbationKey = "perturbation",
    control: Control = ["control"],  # noqa: B006
    context_key: ContextKey = None,
    batch_key: BatchKey = None,
    dosage_key: DosageKey = None,
    library_size_key: LibraryKey = None,
    separator: Separator = "+",
    strip: Strip = None,
    max_epochs: Annotated[int | None, typer.Option(help="Epochs of stages B and C.")] = None,
    pretrain_epochs: Annotated[int | None, typer.Option(help="Epochs of stage A.")] = None,
    gene_sets: GeneSets = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a model and save it with the control cells that predictions start from."""
    from gpjepa._files import check_free, written_whole

    check_free(out, overwrite)
    options = _model(gene_sets)
    adata = _load(data)
    import scvi

    from gpjepa import GPJEPA

    setup = _setup(
        layer, perturbation_key, control, context_key, batch_key, dosage_key, library_size_key,
        separator, strip,
    )  # fmt: skip
    scvi.settings.seed = seed
    GPJEPA.setup_anndata(adata, **setup)
    model = GPJEPA(adata, **options)
    model.train(max_epochs, pretrain_epochs)
    with written_whole(out) as draft:
        model.save(str(draft))
        model.control_cells().write_h5ad(draft / "controls.h5ad", compression="gzip")
    console.print(f"Wrote {out}/. Try: gpjepa predict {out} PERTURBATION --out cells.h5ad")


@app.command()
@_told
def predict(
    model_dir: Annotated[Path, typer.Argument(help="Directory of a trained model.")],
    perturbations: Annotated[list[str], typer.Argument(help='Such as "KLF1+MAP2K6".')],
    out: Annotated[Path, typer.Option(help="File for the predicted cells (.h5ad).")],
    data: Annotated[str | None, typer.Option(help="Other control cells to start from.")] = None,
    context: Annotated[list[str] | None, typer.Option(help="Context; can be repeated.")] = None,
    n_samples: Annotated[int | None, typer.Option(help="Cells per perturbation.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Predict the cells that perturbations make of control cells."""
    from gpjepa._files import check_free, written_whole

    check_free(out, overwrite)
    if out.suffix != ".h5ad":
        raise ValueError(f"--out {out} must end in .h5ad.")
    from gpjepa import GPJEPA

    model = GPJEPA.load(str(model_dir), adata=False)
    controls = model_dir / "controls.h5ad"
    if data is None and not controls.exists():
        raise ValueError(
            f"{model_dir} has no control cells (controls.h5ad): give some with --data."
        )
    cells = model.predict_perturbation(
        _load(data or str(controls)), perturbations, context=context or None,
        n_samples=n_samples, seed=seed,
    )  # fmt: skip
    with written_whole(out) as draft:
        cells.write_h5ad(draft, compression="gzip")
    for _, row in cells.uns["gpjepa"]["effects"].iterrows():
        console.print(f"{row['perturbation']} in {row['context']}: regime {row['regime']}")
    console.print(f"Wrote {cells.n_obs} cells to {out}.")


@app.command()
@_told
def simulate(
    out: Annotated[Path, typer.Option(help="File for the cells (.h5ad).")],
    n_cells: Annotated[int, typer.Option(help="Cells.")] = 6_000,
    n_genes: Annotated[int, typer.Option(help="Genes.")] = 1_000,
    n_targets: Annotated[int, typer.Option(help="Regulators perturbed alone.")] = 24,
    n_combinations: Annotated[int, typer.Option(help="Pairs perturbed together.")] = 36,
    n_contexts: Annotated[int, typer.Option(help="Contexts.")] = 1,
    n_batches: Annotated[int, typer.Option(help="Batches.")] = 1,
    mode: Annotated[str, typer.Option(help="activation or repression.")] = "activation",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Simulate a Perturb-seq screen with known truth."""
    from gpjepa import datasets
    from gpjepa._files import check_free, written_whole

    check_free(out, overwrite)
    adata = datasets.simulate(
        n_cells, n_genes, n_targets=n_targets, n_combinations=n_combinations,
        n_contexts=n_contexts, n_batches=n_batches, mode=mode, seed=seed,  # type: ignore[arg-type]
    )  # fmt: skip
    with written_whole(out) as draft:
        adata.write_h5ad(draft, compression="gzip")
    console.print(f"Wrote {adata.n_obs} cells x {adata.n_vars} genes to {out}.")


@app.command("benchmark")
@_told
def run_benchmark(
    config: Annotated[str, typer.Argument(help="A preset by name, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="Directory; a run that was stopped goes on there.")],
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
        for each in read.data:
            manifest = each.make_splits(*each.load_joined())
            console.print(
                f"{each.name}: {len(manifest.splits)} splits, {len(read.methods)} methods."
            )
        return
    result = benchmark.run(read, out, envs=envs)
    n = (result.runs["status"] != "run").sum()
    if n:
        console.print(
            f"{n} of {len(result.runs)} cells of the grid were not run; the report says why."
        )
    console.print(
        f"Wrote {out}/: report.html, report.md, table.csv, scores.csv, runs.csv, splits/."
    )


@app.command("benchmark-env")
@_told
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

    make_environment(method, envs / method, with_python or sys.executable, torch, limit)
    console.print(
        f"Made {envs / method}/. Now {method} runs with gpjepa benchmark ... --envs {envs}"
    )

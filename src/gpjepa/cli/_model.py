"""Commands of the model."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ._common import (
    WORDS,
    Accelerator,
    BatchSize,
    Data,
    Encoder,
    GeneSets,
    Overwrite,
    Seed,
    check_outputs,
    command,
    load,
    model_arguments,
    output,
    records,
    table,
)

if TYPE_CHECKING:
    from gpjepa.benchmark import Comparison

CONTROLS = "controls.h5ad"


@command
def demo(
    data: Annotated[str | None, typer.Argument(help="Your own data; simulated by default.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("gpjepa-demo"),
    seeds: Annotated[int, typer.Option(help="Runs, each with its own seed.", min=1)] = 1,
    hold_out: Annotated[
        list[str] | None, typer.Option(help="Perturbation to hold out; can be repeated.")
    ] = None,
    hold_out_context: Annotated[str | None, typer.Option(help="Context to hold out.")] = None,
    setup: Any = None,
    encoder: Encoder = "mlp",
    batch_size: BatchSize = 256,
    accelerator: Accelerator = "auto",
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
    model = {"encoder": encoder, **model_arguments(gene_sets)}
    training = {"batch_size": batch_size, "accelerator": accelerator}
    adata = None if data is None else load(data)
    results = []
    for seed in range(seeds):
        output.say(f"[bold]Run {seed + 1} of {seeds}[/] (seed {seed})")
        results.append(_compared(adata, hold_out, hold_out_context, setup, model, training, seed))
        output.say(_compared_table([results[-1]], f"Seed {seed}"))
        output.say("[bold]What training measured on perturbations of its own:[/]")
        output.say(results[-1].model.summary())
    output.say(WORDS)
    if seeds > 1:
        output.say(_compared_table(results, f"Mean over {seeds} seeds"))
    with written_whole(out) as draft:
        draft.mkdir()
        _write(results, draft)
    label = results[0].rows[0][1]
    output.say(
        f"Wrote {out}/: table.csv, scores.csv, predicted.h5ad, model/, three figures. Next: "
        f"gpjepa predict {out / 'model'} {shlex.quote(label)} --out cells.h5ad"
    )
    output.result({"out": out, "table": records(_means(results))})


def _compared(
    adata: Any,
    hold_out: list[str] | None,
    hold_out_context: str | None,
    setup: dict,
    model: dict,
    training: dict,
    seed: int,
) -> Comparison:
    from gpjepa import benchmark, datasets

    if adata is None:
        adata = datasets.simulate(12_000, seed=seed)
        rows = adata.uns["simulation"]["rows"]
        combinations = rows.loc[rows["interaction"] != "single", "perturbation"]
        hold_out = list(combinations.sample(12, random_state=seed))
        setup = {}
    return benchmark.compare(
        adata,
        hold_out,
        hold_out_context=hold_out_context,
        seed=seed,
        setup=setup,
        model=model,
        train={"enable_progress_bar": output.shown, **training},
    )


def _means(results: list[Comparison]) -> Any:
    """Every metric of every method, averaged over runs."""
    return (sum(r.table for r in results) / len(results)).reset_index()


def _compared_table(results: list[Comparison], title: str) -> Any:
    from gpjepa.benchmark import COMPARED, METRICS

    n = len(results[0].rows)
    names = {m: METRICS[m].label for m in COMPARED} | {"relative_error": "error ÷ no change"}
    what = f"{title}: {n} held-out perturbation{'s' if n > 1 else ''}"
    return table(_means(results).rename(columns=names), what, bold="GP-JEPA")


def _write(results: list[Comparison], out: Path) -> None:
    import pandas as pd

    from gpjepa import plotting

    tables = [r.table.assign(seed=i).reset_index() for i, r in enumerate(results)]
    pd.concat(tables).to_csv(out / "table.csv", index=False)
    scores = pd.concat([r.scores.assign(seed=i) for i, r in enumerate(results)])
    scores.to_csv(out / "scores.csv", index=False)
    first = results[0]
    first.predicted.write_h5ad(out / "predicted.h5ad", compression="gzip")
    _save(first.model, out / "model")
    # The held-out perturbation with the median error: neither the best nor the worst.
    mine = first.scores[first.scores["method"] == "GP-JEPA"].reset_index(drop=True)
    row = int(mine["squared_error"].rank(method="first").sub(len(mine) / 2).abs().idxmin())
    plotting.method_errors(scores).savefig(out / "errors.png", dpi=150)
    effects = first.effects_of(row)
    plotting.effect_scatter(effects, title=first.title(row)).savefig(out / "effects.png", dpi=150)
    plotting.top_genes(effects, title=first.title(row)).savefig(out / "genes.png", dpi=150)


def _save(model: Any, out: Path) -> None:
    """A model, and the control cells that predictions start from."""
    model.save(str(out))
    model.control_cells().write_h5ad(out / CONTROLS, compression="gzip")


@command
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory for the model.")],
    setup: Any = None,
    encoder: Encoder = "mlp",
    pretrained: Annotated[
        Path | None, typer.Option(help="Directory of a saved model whose encoder to start from.")
    ] = None,
    max_epochs: Annotated[int | None, typer.Option(help="Epochs of stages B and C.")] = None,
    pretrain_epochs: Annotated[int | None, typer.Option(help="Epochs of stage A.")] = None,
    batch_size: BatchSize = 256,
    accelerator: Accelerator = "auto",
    gene_sets: GeneSets = None,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Directory in which every epoch leaves a checkpoint.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoints, if there are any.")
    ] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a model, and save it with the control cells that predictions start from."""
    from gpjepa._files import check_free, written_whole

    check_free(out, overwrite)
    if pretrained is not None:
        check_model(pretrained)
    options = model_arguments(gene_sets)
    adata = load(data)
    import scvi

    from gpjepa import GPJEPA

    scvi.settings.seed = seed
    GPJEPA.setup_anndata(adata, **setup)
    model = GPJEPA(adata, encoder=encoder, pretrained=pretrained, **options)
    model.train(
        max_epochs,
        pretrain_epochs,
        batch_size=batch_size,
        accelerator=accelerator,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        enable_progress_bar=output.shown,
    )
    with written_whole(out) as draft:
        _save(model, draft)
    output.say(model.summary())
    output.say(WORDS)
    label = shlex.quote(str(model.get_perturbation_representation().index[0]))
    output.say(f"Wrote {out}/. Next: gpjepa predict {out} {label} --out cells.h5ad")
    assert model.response_ is not None
    judged = model.response_.judged
    errors = None if judged.errors.empty else records(judged.relative().reset_index())
    output.result({"out": out, "summary": model.summary(), "errors": errors})


def check_model(path: Path) -> None:
    """Refuse what is no saved model, before anything heavy is imported."""
    if not (path / "model.pt").is_file():
        raise ValueError(f"{path} is not the directory of a saved model: it has no file model.pt.")


@command
def predict(
    model_dir: Annotated[Path, typer.Argument(help="Directory of a trained model.")],
    perturbations: Annotated[
        list[str], typer.Argument(help="What to predict, such as KLF1+MAP2K6.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="File for the predicted cells (.h5ad or .zarr).")
    ] = None,
    effects: Annotated[
        Path | None,
        typer.Option(help="File for the mean effect of every gene, with its interval (.csv)."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Other control cells to start from.")] = None,
    context: Annotated[
        list[str] | None, typer.Option(help="Context to predict in; can be repeated.")
    ] = None,
    gate: Annotated[
        Literal["auto", "0", "1"],
        typer.Option(help="Share of the network: 0 is the closed-form anchor alone, 1 all of it."),
    ] = "auto",
    n_samples: Annotated[
        int | None, typer.Option(help="Cells per perturbation and context.", min=1)
    ] = None,
    accelerator: Accelerator = "auto",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Predict mean effects of perturbations, and the perturbed cells."""
    from gpjepa._files import written_whole

    if out is None and effects is None:
        raise ValueError("Say what to write: --out FILE.h5ad (cells), --effects FILE.csv, or both.")
    if out is None and (data is not None or n_samples is not None):
        raise ValueError("--data and --n-samples are for predicted cells: add --out FILE.h5ad.")
    check_outputs(overwrite, (out, (".h5ad", ".zarr"), "--out"), (effects, (".csv",), "--effects"))
    check_model(model_dir)
    controls = model_dir / CONTROLS
    if out is not None and data is None and not controls.exists():
        raise ValueError(f"{model_dir} has no control cells ({CONTROLS}): give some with --data.")
    from gpjepa import GPJEPA
    from gpjepa.model import REGIMES

    model = GPJEPA.load(str(model_dir), adata=False, accelerator=accelerator)
    chosen: Literal["auto", 0, 1] = "auto" if gate == "auto" else 1 if gate == "1" else 0
    frame = model.predict_effects(perturbations, context or None, gate=chosen)
    written = []
    if out is not None:
        with written_whole(out) as draft:
            cells = model.predict_perturbation(
                load(data or str(controls)),
                perturbations,
                context=context or None,
                n_samples=n_samples,
                out=draft,
                seed=seed,
                gate=chosen,
            )
            cells.file.close()
            if out.is_dir():  # a store of the same name, of which nothing is to be left
                shutil.rmtree(out)
        written.append(f"{cells.n_obs} cells to {out}")
    if effects is not None:
        with written_whole(effects) as draft:
            frame.to_csv(draft, index=False)
        written.append(f"effects of {frame['gene'].nunique()} genes to {effects}")
    rows = frame.groupby(["perturbation", "context"], sort=False, as_index=False).agg(
        regime=("regime", "first"), genes_changed=("lower", "size")
    )
    rows["genes_changed"] = [_n_changed(frame, *pair) for pair in rows.iloc[:, :2].to_numpy()]
    output.say(
        table(
            rows.rename(columns={"genes_changed": "genes whose interval excludes 0"}), "Predicted"
        )
    )
    for regime in rows["regime"].unique():
        output.say(f"{regime}: {REGIMES.get(regime, 'the control itself')}.")
    output.say(f"Wrote {' and '.join(written)}.")
    output.result({"out": out, "effects": effects, "predicted": records(rows)})


def _n_changed(frame: Any, perturbation: str, context: str) -> int:
    """Genes whose interval excludes no change."""
    mine = frame[(frame["perturbation"] == perturbation) & (frame["context"] == context)]
    return int(((mine["lower"] > 0) | (mine["upper"] < 0)).sum())


@command
def simulate(
    out: Annotated[Path, typer.Option(help="File for the cells (.h5ad).")],
    n_cells: Annotated[int, typer.Option(help="Number of cells.")] = 6_000,
    n_genes: Annotated[int, typer.Option(help="Number of genes.")] = 1_000,
    n_targets: Annotated[int, typer.Option(help="Regulators that are perturbed alone.")] = 24,
    n_combinations: Annotated[int, typer.Option(help="Pairs that are perturbed together.")] = 36,
    n_contexts: Annotated[int, typer.Option(help="Number of contexts.")] = 1,
    n_batches: Annotated[int, typer.Option(help="Number of batches.")] = 1,
    n_doses: Annotated[int, typer.Option(help="Doses of each; without combinations.")] = 1,
    mode: Annotated[
        Literal["activation", "repression"], typer.Option(help="What a perturbation does.")
    ] = "activation",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Simulate a Perturb-seq screen with known truth."""
    from gpjepa import datasets
    from gpjepa._files import check_free, written_whole

    check_free(out, overwrite)
    adata = datasets.simulate(
        n_cells,
        n_genes,
        n_targets=n_targets,
        n_combinations=n_combinations,
        n_contexts=n_contexts,
        n_batches=n_batches,
        n_doses=n_doses,
        mode=mode,
        seed=seed,
    )
    with written_whole(out) as draft:
        adata.write_h5ad(draft, compression="gzip")
    output.say(f"Wrote {adata.n_obs} cells × {adata.n_vars} genes to {out}.")
    output.result({"out": out, "n_cells": adata.n_obs, "n_genes": adata.n_vars})


COMMANDS = {"demo": demo, "train": train, "predict": predict, "simulate": simulate}

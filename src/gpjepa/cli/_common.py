"""What all commands share: options, output, and errors in the words of the command line."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import logging
import re
import shlex
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

Data = Annotated[str, typer.Argument(help="A data set by name, or a .h5ad or .zarr file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
GeneSets = Annotated[
    list[str] | None,
    typer.Option(
        help="GMT file with gene sets, from which targets that were never perturbed are "
        "predicted; can be repeated."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.", min=0)]
BatchSize = Annotated[int, typer.Option(help="Cells in a mini-batch.")]
Encoder = Annotated[
    Literal["mlp", "perceiver", "transformer", "components"],
    typer.Option(help="Kind of encoder of cell states."),
]
WORDS = (
    "Words: the anchor is the closed-form part, in which simple baselines (experts) are weighted; "
    "networks add to it as far as the gate is open. Stage A learns cell states, stages B and C "
    "populations and counts. All: https://gpjepa.readthedocs.io/en/latest/glossary.html"
)
Accelerator = Annotated[str, typer.Option(help="Where to compute: auto, cpu, gpu or mps.")]

_LABELS: dict[str, tuple[Any, Any]] = {
    "layer": (
        Annotated[
            str | None,
            typer.Option(help="Layer with raw counts; by default 'counts' if there, else X."),
        ],
        None,
    ),
    "perturbation_key": (
        Annotated[str, typer.Option(help="Column of obs with the perturbations.")],
        "perturbation",
    ),
    "control": (
        Annotated[
            list[str] | None,
            typer.Option(help="Label of control cells; can be repeated. By default 'control'."),
        ],
        None,
    ),
    "control_pattern": (
        Annotated[
            list[str] | None,
            typer.Option(
                help="Regular expression that matches labels of "
                "control cells whole; can be repeated."
            ),
        ],
        None,
    ),
    "context_key": (
        Annotated[
            str | None,
            typer.Option(help="Column of obs with the context: cell line, cell type, donor."),
        ],
        None,
    ),
    "batch_key": (Annotated[str | None, typer.Option(help="Column of obs with the batch.")], None),
    "replicate_key": (
        Annotated[str | None, typer.Option(help="Column of obs with guides, animals or wells.")],
        None,
    ),
    "dosage_key": (Annotated[str | None, typer.Option(help="Column of obs with the dose.")], None),
    "library_size_key": (
        Annotated[
            str | None,
            typer.Option(
                help="Column of obs with the counts of the whole cell, where genes are a subset."
            ),
        ],
        None,
    ),
    "separator": (
        Annotated[str, typer.Option(help="What joins targets; empty if labels hold one target.")],
        "+",
    ),
    "strip": (
        Annotated[
            str | None,
            typer.Option(
                help="Regular expression taken off every target, for guide suffixes: '_g[0-9]+$'."
            ),
        ],
        None,
    ),
    "drop": (
        Annotated[
            list[str] | None, typer.Option(help="Label of cells to leave out; can be repeated.")
        ],
        None,
    ),
    "rename": (
        Annotated[
            list[str] | None,
            typer.Option(help="A target with another spelling, OLD=NEW; can be repeated."),
        ],
        None,
    ),
    "targets": (
        Annotated[
            list[str] | None,
            typer.Option(
                help="Name that is a target although it does not look like one; can be repeated."
            ),
        ],
        None,
    ),
    "dose_pattern": (
        Annotated[
            str | None,
            typer.Option(
                help="Regular expression with the groups dose and unit, for doses inside labels."
            ),
        ],
        None,
    ),
}
_ARGUMENTS = {
    *_LABELS,
    "overwrite",
    "context",
    "gate",
    "n_samples",
    "batch_size",
    "max_epochs",
    "pretrain_epochs",
    "encoder",
    "pretrained",
    "accelerator",
    "seed",
}


class Output:
    """What a command prints: to people, to programs (``--json``), or nothing (``--quiet``)."""

    def __init__(self) -> None:
        self.quiet = self.as_json = False

    @property
    def shown(self) -> bool:
        """Whether anything but the result is printed."""
        return not (self.quiet or self.as_json)

    def say(self, *what: Any) -> None:
        """Print for people."""
        if self.shown:
            Console().print(*what, soft_wrap=True, highlight=False)

    def result(self, content: Mapping[str, Any]) -> None:
        """Print for programs."""
        if self.as_json:
            typer.echo(json.dumps(content, default=str, allow_nan=False))


output = Output()


def records(frame: Any) -> list[dict[str, Any]]:
    """Rows of a table, with null where a value is missing."""
    return json.loads(frame.to_json(orient="records"))


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command: the parameter ``setup`` becomes the options that say how data are written.

    Errors that the user can fix are a sentence, not a traceback.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [p for name, p in signature.parameters.items() if name != "setup"]
    labels = _LABELS if "setup" in signature.parameters else {}
    added = {
        **labels,
        "quiet": (
            Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")],
            False,
        ),
        "as_json": (
            Annotated[bool, typer.Option("--json", help="Print the result as JSON.")],
            False,
        ),
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=keyword) for p in own] + [
        inspect.Parameter(name, keyword, default=default, annotation=annotation)
        for name, (annotation, default) in added.items()
    ]

    @functools.wraps(function)
    def told(**given: Any) -> None:
        output.quiet, output.as_json = given.pop("quiet"), given.pop("as_json")
        with warnings.catch_warnings():
            _hush()
            try:
                if labels:
                    given["setup"] = _setup({name: given.pop(name) for name in labels})
                function(**given)
            except (ValueError, KeyError, TypeError, OSError, ImportError, RuntimeError) as error:
                _print("bold red", "Error", error)
                raise typer.Exit(1) from error

    told.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    told.__annotations__ = {p.name: p.annotation for p in parameters}
    return told


def _hush() -> None:
    """Warnings as a sentence, and nothing of what libraries say to programmers."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    for name in ("lightning.fabric.utilities.seed", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if not output.quiet:
            _print("yellow", "Warning", message)

    warnings.showwarning = show


def _print(style: str, what: str, message: Any) -> None:
    console = Console(stderr=True)
    text = in_options(message)
    console.print(f"[{style}]{what}:[/] {escape(text)}", highlight=False, soft_wrap=True)


def in_options(message: Any) -> str:
    """A message with options in the place of Python's arguments."""
    changes = getattr(message, "changes", None)
    if changes is None:
        text = message.args[0] if getattr(message, "args", None) else message
        return _translated(str(text if isinstance(message, KeyError | Warning) else message))
    call = " ".join(option for name, value in changes.items() for option in _options(name, value))
    parts = message.said, f"add {call}." if call else "", message.otherwise
    return " ".join(filter(None, [_translated(parts[0]), parts[1], _translated(parts[2])]))


def _options(name: str, value: Any) -> list[str]:
    """An argument as options."""
    if isinstance(value, Mapping):
        value = [f"{old}={new}" for old, new in value.items()]
    found = []
    for each in value if isinstance(value, list | tuple) else [value]:
        pattern = isinstance(each, re.Pattern)
        option = f"--{name.replace('_', '-')}" + ("-pattern" if pattern else "")
        text = each.pattern if isinstance(each, re.Pattern) else "" if each is None else str(each)
        found.append(f"{option} {shlex.quote(text)}")
    return found


def _translated(text: str) -> str:
    """``name='value'`` and ``name=[...]`` of known arguments as options."""
    names = "|".join(sorted(_ARGUMENTS, key=len, reverse=True))

    def option(match: re.Match[str]) -> str:
        bare = f"--{match[1].replace('_', '-')}"
        if match[2].startswith("re.compile("):
            pattern = match[2].removeprefix("re.compile(").removesuffix(")")
            return f"{bare}-pattern {pattern.removeprefix('r')}"
        try:
            value = ast.literal_eval(match[2])
        except (ValueError, SyntaxError):
            return bare
        if value is None:
            return match[0]  # no option has such a value
        whole = isinstance(value, bool) or value in (Ellipsis, [Ellipsis])
        return bare if whole else " ".join(_options(match[1], value))

    quoted = r"'[^']*'|\"[^\"]*\""
    value = (
        rf"\[(?:{quoted}|[^\]'\"])*\]|{quoted}|re\.compile\(r?(?:{quoted})\)|\.\.\.|"
        r"-?\d+(?:\.\d+)?|None|True|(?=[\s.,;:)]|$)"
    )
    text = re.sub(rf"(?<!-)\b({names})=({value})", option, text)
    return re.sub(r"call with (?=--)", "add ", text)


def _setup(given: dict[str, Any]) -> dict[str, Any]:
    """The options as arguments of ``GPJEPA.setup_anndata``."""
    patterns = []
    for pattern in given.pop("control_pattern") or ():
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"--control-pattern {pattern} is not a regular expression: {error}."
            ) from error
    control = [*(given["control"] or ()), *patterns] or ["control"]
    renamed = [pair.partition("=") for pair in given["rename"] or ()]
    wrong = [old for old, equals, new in renamed if not (equals and old and new)]
    if wrong:
        raise ValueError(f"--rename {wrong[0]}: expected OLD=NEW, such as --rename klf1=KLF1.")
    return {
        **given,
        "control": control,
        "separator": given["separator"] or None,
        "drop": given["drop"] or (),
        "targets": given["targets"] or (),
        "rename": {old: new for old, _, new in renamed},
    }


def check_outputs(overwrite: bool, *outputs: tuple[Path | None, tuple[str, ...], str]) -> None:
    """Refuse files that are there, or end in another way than their option says."""
    from gpjepa._files import check_free

    for path, suffixes, option in outputs:
        if path is not None:
            check_free(path, overwrite)
            if path.suffix not in suffixes:
                raise ValueError(f"{option} {path} must end in {' or '.join(suffixes)}.")


def load(data: str) -> Any:
    """The cells of a data set or file."""
    from anndata import AnnData

    from gpjepa import datasets

    adata = datasets.load(data)
    if not isinstance(adata, AnnData):
        raise TypeError(
            f"{data} holds a MuData with the modalities {list(adata.mod)}; write the RNA to a file of "
            "its own, with the labels in its obs: mdata['rna'].write_h5ad('rna.h5ad')."
        )
    return adata


def model_arguments(gene_sets: list[str] | None) -> dict[str, Any]:
    """Arguments of the model; a target in none of the sets takes the mean effect."""
    from gpjepa.perturbations import TargetFeatures

    if not gene_sets:
        return {}
    features = TargetFeatures.from_gene_sets(gene_sets)
    return {"target_features": features, "missing_features": "mean"}


def table(frame: Any, title: str, bold: str | None = None) -> Any:
    """A data frame as a table for the terminal."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(frame.columns):
        shown.add_column(str(column), justify="left" if i == 0 else "right")
    for _, row in frame.iterrows():
        cells = [
            f"{v:.3f}" if isinstance(v, float) and v == v else "–" if v != v else str(v)
            for v in row
        ]
        shown.add_row(*cells, style="bold" if cells[0] == bold else None)
    return shown

"""Files and directories that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse a target that exists, before any long work."""
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} already exists. Choose another name, or replace it with --overwrite."
        )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it at the end; for a file or a directory.

    Of a directory that exists, files of the same names are replaced and others stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as part:
        # Same suffix: writers choose a format by it.
        draft = Path(part) / path.name
        yield draft
        if not (path.is_dir() and draft.is_dir()):
            os.replace(draft, path)
            return
        for file in sorted(f for f in draft.rglob("*") if f.is_file()):
            to = path / file.relative_to(draft)
            to.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, to)

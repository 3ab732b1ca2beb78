"""Where cells come from: data sets by name, files, the simulator; and their preparation."""

from ._join import join
from ._load import available, load
from ._prepare import prepare
from ._simulate import simulate

__all__ = ["available", "join", "load", "prepare", "simulate"]

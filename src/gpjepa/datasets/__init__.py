"""Where cells come from: data sets by name, files, the simulator; and their preparation."""

from ._join import join
from ._load import available, load
from ._prepare import prepare
from ._random_screens import RandomScreen, random_screen
from ._simulate import simulate

__all__ = [
    "RandomScreen",
    "available",
    "join",
    "load",
    "prepare",
    "random_screen",
    "simulate",
]

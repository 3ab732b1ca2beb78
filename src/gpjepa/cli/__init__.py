"""The command line: ``gpjepa demo``, ``train``, ``predict``, ``simulate``, ``benchmark``."""

from ._app import app

__all__ = ["app"]

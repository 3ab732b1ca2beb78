"""The network that comes with the package."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from gpjepa.effects import ROLES
from gpjepa.nn import ResponseNetwork

_SIZES = ("n_roles", "n_hidden", "n_expert")
PRETRAINED = Path(__file__).parent / "pretrained.safetensors"


def save_network(network: ResponseNetwork, path: str | Path, made_by: str = "") -> None:
    """Write a response network.

    Parameters
    ----------
    network
        The network.
    path
        A file, which is replaced if it is there.
    made_by
        The command that made it.
    """
    path = Path(path)
    sizes = {name: getattr(network, name) for name in _SIZES}
    held = {"sizes": sizes, "roles": list(ROLES), "made_by": made_by, "version": version("gpjepa")}
    new = path.with_name(path.name + ".new")
    save_file(network.state_dict(), new, {"gpjepa": json.dumps(held)})
    new.replace(path)


def load_network(path: str | Path = PRETRAINED) -> ResponseNetwork:
    """Read a response network, by default the one that comes with the package.

    Raises
    ------
    ValueError
        If it is no response network, or reads other experts than this version of the package has.
    """
    try:
        with safe_open(path, "pt") as file:
            held = json.loads((file.metadata() or {}).get("gpjepa", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} holds no response network: {error}") from error
    if held.get("roles") != list(ROLES):
        raise ValueError(
            f"{path} holds no response network of this version: it reads other experts. Train it again "
            "with gpjepa.response.pretrain."
        )
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and replaced
        network = ResponseNetwork(**held["sizes"])
    network.load_state_dict(load_file(path))
    return network.eval()

"""The network that comes with the package."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gpjepa.effects import ROLES
from gpjepa.nn import ResponseNetwork

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
    held = {"n_hidden": network.n_hidden, "roles": list(ROLES), "made_by": made_by}
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
    with safe_open(path, "pt") as file:
        held = json.loads((file.metadata() or {}).get("gpjepa", "{}"))
    if held.get("roles") != list(ROLES):
        raise ValueError(
            f"{path} holds no response network of this version: it reads other experts. Train it again "
            "with gpjepa.response.pretrain."
        )
    network = ResponseNetwork(len(ROLES), held["n_hidden"])
    network.load_state_dict(load_file(path))
    return network.eval()

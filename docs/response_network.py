"""Train the response network that comes with the package: docs/response.md.

python docs/response_network.py [OUT]   # about half an hour on two CPU cores
"""

import sys
from pathlib import Path

from gpjepa.response import pretrain, save_network

if __name__ == "__main__":
    package = Path(__file__).parents[1] / "src" / "gpjepa" / "response" / "pretrained.safetensors"
    network = pretrain()
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else package
    save_network(network, out, "python docs/response_network.py")

"""The multilingual autoencoder of the token method (thesis 3.2.2).

It brings states of a multilingual encoder to the width of the teacher's, and back.

Legend: N states · H width of a state · K width of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from clseave_cli.core.config import Code
from clseave_cli.core.models.folder import seal, unsealed
from clseave_cli.core.models.weights import load_weights, save_weights
from clseave_cli.errors import ModelError

FORMAT = "autoencoder"
_WEIGHTS = "autoencoder.safetensors"


def coder(state_width: int, code_width: int, code: Code) -> nn.Sequential:
    """What makes codes of states: H → K, one layer (thesis 3.2.2: with a ReLU behind it)."""
    return nn.Sequential(nn.Linear(state_width, code_width), *_activation(code))


class Autoencoder(nn.Module):
    """Linear H → K, Linear K → H, each with a ReLU behind it unless the code is linear.

    Attributes:
        encoder: makes codes of states.
        decoder: makes states of codes.
        widths: H and K.
        code: whether there are ReLUs.
    """

    def __init__(self, state_width: int, code_width: int, code: Code = "relu") -> None:
        super().__init__()
        self.encoder = coder(state_width, code_width, code)
        self.decoder = nn.Sequential(nn.Linear(code_width, state_width), *_activation(code))
        self.widths = state_width, code_width
        self.code = code

    def forward(self, states: Tensor) -> Tensor:
        """(N, H) states as they come back from their codes."""
        restored: Tensor = self.decoder(self.encoder(states))
        return restored


def save_autoencoder(autoencoder: Autoencoder, folder: Path, *, languages: Sequence[str]) -> str:
    """Writes an autoencoder into an existing folder; returns its fingerprint."""
    save_weights(autoencoder, folder / _WEIGHTS)
    state_width, code_width = autoencoder.widths
    return seal(
        folder,
        FORMAT,
        {
            "languages": list(languages),
            "state_width": state_width,
            "code_width": code_width,
            "code": autoencoder.code,
        },
    )


def load_autoencoder(folder: Path, wanted: Autoencoder) -> tuple[Autoencoder, str]:
    """Loads a folder that `save_autoencoder` wrote, in eval mode.

    Args:
        folder: the autoencoder's folder.
        wanted: one of the shape it must have; the weights are put there.

    Returns:
        `wanted`, and the folder's fingerprint.

    Raises:
        ModelError: missing, damaged, or of another shape.
    """
    with unsealed(folder, FORMAT) as config:
        found = config["state_width"], config["code_width"], config["code"]
        if found != (*wanted.widths, wanted.code):
            raise ModelError(
                f"{folder}: an autoencoder of {found[0]} to {found[1]}, code {found[2]}; needed "
                f"here: {wanted.widths[0]} to {wanted.widths[1]}, code {wanted.code} "
                "(--student, --teacher and --code decide)."
            )
        load_weights(wanted, folder / _WEIGHTS)
    return wanted.eval(), str(config["fingerprint"])


def _activation(code: Code) -> list[nn.Module]:
    return [nn.ReLU()] if code == "relu" else []

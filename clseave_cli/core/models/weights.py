"""The weights of one module as a safetensors file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from clseave_cli.errors import ModelError


@contextmanager
def quiet() -> Iterator[None]:
    """Holds transformers' own bars and warnings back: `progress.Progress` tells of the work."""
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def save_weights(module: nn.Module, path: Path) -> None:
    """Writes a module's weights and buffers as safetensors."""
    save_file({name: part.detach().cpu().contiguous() for name, part in _state(module)}, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Reads what `save_weights` wrote.

    Raises:
        ModelError: the file is damaged or belongs to another architecture.
    """
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: does not fit the model ({reason}).") from None


def load_linear(path: Path) -> nn.Linear:
    """A linear layer without bias from what `save_weights` wrote, of whatever size it has.

    Raises:
        ModelError: the file is missing, damaged, or holds something else.
    """
    try:
        weight = load_file(path)["weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    except (SafetensorError, KeyError, IndexError, OSError) as error:
        raise ModelError(f"{path}: no projection in it ({str(error).splitlines()[0]}).") from None
    load_weights(linear, path)
    return linear


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.state_dict().items())

"""Reading weights, our files and Hugging Face folders alike: only what fits and is finite.

Names are hub ids or local folders in Hugging Face layout. Code in a model's repository is never
run, and only safetensors are read: pickled weights could run code. What a configuration promises
is compared with what the weight files hold before anything is built, so that a few bytes of JSON
cannot take all memory.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging

from clseave_cli.core.data.hub import hub_answers, hub_reason
from clseave_cli.core.files import read_json
from clseave_cli.errors import ClseaveError, ModelError

#: `name` or `organisation/name`; anything else can only be a folder, and the hub is not asked.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
#: What a model of the hub may promise: its files are not here before it is built.
_MOST_TENSORS, _MOST_NUMBERS = 10_000, 10**11
_MOST_LABELS = 10_000
#: ALBERT shares its layers, and its word vectors are narrow: its sizes promise up to four times
#: the numbers that are stored.
_SHARED = 4
#: A safetensors file begins with the length of its header.
_LENGTH_BYTES = 8
#: Tensors named in an error.
_NAMED = 3


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
    state = module.state_dict()
    save_file({name: part.detach().cpu().contiguous() for name, part in state.items()}, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Reads what `save_weights` wrote.

    Args:
        module: may be on the meta device: its memory is then taken once its shapes are confirmed.
        path: the file.

    Raises:
        ModelError: the file is damaged, holds numbers that are not finite, or belongs to another
            architecture.
    """
    wanted = module.state_dict()
    try:
        state = {
            name: value.clone().to(wanted[name].dtype) if name in wanted else value
            for name, value in load_file(path).items()
        }
        module.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ModelError(f"{path}: does not fit the model ({first_line(error)}).") from None
    require_finite(module, path)


def load_linear(path: Path) -> nn.Linear:
    """A linear layer without bias from what `save_weights` wrote, of whatever size it has.

    Raises:
        ModelError: the file is missing, damaged, or holds something else.
    """
    try:
        height, width = load_file(path)["weight"].shape
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ModelError(f"{path}: no projection in it ({first_line(error)}).") from None
    linear = nn.Linear(width, height, bias=False, device="meta")
    load_weights(linear, path)
    return linear


def require_finite(module: nn.Module, source: str | Path) -> None:
    """Refuses weights with which every answer would be NaN.

    Raises:
        ModelError: a weight or buffer is infinite or not a number; names the first.
    """
    for name, value in module.state_dict().items():
        if not (value.is_floating_point() and value.numel()):
            continue
        # One pass without a copy; where there is a NaN, it is both bounds.
        if not all(math.isfinite(bound) for bound in torch.aminmax(value)):
            raise ModelError(
                f"{source}: {name} holds numbers that are not finite (NaN or infinity); copy the "
                "model again or train it again."
            )


def load(
    name: str | Path, loader: Callable[..., Any], *, may_lack: str | None = None, **arguments: Any
) -> Any:
    """What one of transformers' `from_pretrained` makes of a hub id or folder.

    Args:
        name: the hub id or folder.
        loader: `from_pretrained` of a configuration, a model, a tokenizer or a processor.
        may_lack: how the names of tensors begin that need not be in the files.
        arguments: passed on; `attn_implementation` is needed for a model.

    Raises:
        ModelError: it cannot be found, read or reached; its weights do not fit its architecture or
            are not finite; or its sizes are not those of its files.
    """
    if not Path(name).is_dir() and (isinstance(name, Path) or not _HUB_ID.fullmatch(name)):
        raise ModelError(f"{name}: no such model folder.")
    is_local = Path(name).is_dir()
    attention = arguments.pop("attn_implementation", None)
    arguments["trust_remote_code"] = False
    try:
        if is_local:
            _require_plausible(Path(name))
        else:
            arguments["local_files_only"] = not hub_answers()
        with quiet():
            if attention is None:  # no model
                return loader(str(name), **arguments)
            of_config = getattr(loader.__self__, "config_class", None) or AutoConfig  # type: ignore[attr-defined]
            config = of_config.from_pretrained(str(name), **arguments)
            # A kernel named in the file would be fetched from the hub and run.
            config._attn_implementation = attention
            loaded, report = loader(str(name), config=config, output_loading_info=True, **arguments)
    except ClseaveError:
        raise
    except Exception as error:  # a damaged file shows in any of them; tokenizers raises plain ones
        where = "folder" if is_local else "neither a folder here nor loadable as a hub id"
        reason = first_line(error) if is_local else hub_reason(error)
        raise ModelError(f"{name}: cannot be loaded ({where}: {reason}).") from None
    _require_all_used(loaded, report, name, may_lack)
    require_finite(loaded, name)
    return loaded


def first_line(error: Exception) -> str:
    """An exception of another library, short enough for a one-line message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else repr(error)[:200]


def _require_all_used(
    model: nn.Module, report: dict[str, Any], name: str | Path, may_lack: str | None
) -> None:
    """Refuses weights that are another architecture's; a head that is left out is none.

    Raises:
        ModelError: tensors of the model are missing from the files, or tensors of the files belong
            into the model and have no place there.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    parts = {part for part, _ in model.named_children()}
    buffers = {buffer for buffer, _ in model.named_buffers()}
    unexpected = [
        key
        for key in map(str, report["unexpected_keys"])
        if key.removeprefix(prefix).split(".")[0] in parts
        and not {key, key.removeprefix(prefix)} & buffers
    ]
    missing = [str(key) for key in report["missing_keys"]]
    if may_lack is not None:
        missing = [key for key in missing if not key.startswith(may_lack)]
    for what, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            shown = ", ".join(sorted(keys)[:_NAMED])
            more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
            raise ModelError(
                f"{name}: its weights do not fit its config.json; {what}: {shown}{more}. Take the "
                "files of one model."
            )


def _require_plausible(folder: Path) -> None:
    """Refuses a folder whose configuration promises more than its weight files hold.

    Raises:
        ModelError: it does, or something in it is no regular file.
    """
    for path in folder.iterdir():
        kind = path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise ModelError(f"{path}: not a regular file; a model folder holds nothing else.")
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: holds an adapter; merge it into its model and save that.")
    config = folder / "config.json"
    if not config.exists():
        return
    shapes = [shape for path in folder.glob("model*.safetensors") for shape in _shapes(path)]
    num_numbers = sum(map(math.prod, shapes)) if shapes else _MOST_NUMBERS
    num_tensors = len(shapes) or _MOST_TENSORS
    for part in _objects(read_json(config)):
        sizes = {
            key: value
            for key, value in part.items()
            if type(value) is int and value > 0 and not key.endswith("_token_id")
        }
        for key, size in sizes.items():
            limit = num_tensors if "layers" in key else num_numbers
            limit = min(limit, _MOST_LABELS) if key == "num_labels" else limit
            if size > limit:
                raise ModelError(f"{config}: {key} is {size}; its weight files hold less.")
        width = sizes.get("hidden_size", 0)
        patches = sizes.get("image_size", 0) // sizes.get("patch_size", 1)
        inner = max(sizes.get("intermediate_size", 0), sizes.get("vocab_size", 0), width)
        if max(width * inner, patches**2) > _SHARED * num_numbers:
            raise ModelError(f"{config}: its sizes are far larger than its weight files.")


def _shapes(path: Path) -> list[list[int]]:
    """The shapes of the tensors in a safetensors file, from its header alone.

    Raises:
        ModelError: it has no such header.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if length > path.stat().st_size:
                raise ValueError
            header = json.loads(stream.read(length))
        return [value["shape"] for key, value in header.items() if key != "__metadata__"]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise ModelError(f"{path}: damaged, not a safetensors file; copy it again.") from None


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """The objects in a JSON document, the inner ones too."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _objects(inner)

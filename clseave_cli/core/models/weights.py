"""Loading weights, from our files and Hugging Face models: they must fit and be finite.

Names are hub ids or local folders in Hugging Face layout. Code in a model's repository is never
run, and only safetensors are read, because pickled weights could run code. The sizes in a
configuration are compared with those of the weight files before a model is built, so that a few
bytes of JSON cannot exhaust the memory.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig
from transformers.utils import logging

from clseave_cli.core.data.hub import hub_answers, hub_reason
from clseave_cli.core.files import read_json
from clseave_cli.errors import ClseaveError, ModelError

#: `name` or `organisation/name`; anything else can only be a folder.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
#: Limits for a folder without safetensors; the last one holds for any.
_MAX_TENSORS, _MAX_NUMBERS, _MAX_LABELS = 10_000, 10**11, 10_000
#: ALBERT shares its layers and has narrow word vectors, so its sizes suggest up to four times the
#: numbers that are stored.
_SHARING = 4
#: Tensors named in an error.
_NUM_NAMED = 3


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bars and warnings; `progress.Progress` reports instead."""
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
    """Reads what `save_weights` wrote into a module, which may be on the meta device.

    Raises:
        ModelError: the file is damaged, does not fit the module, or has non-finite numbers.
    """
    expected = module.state_dict()
    try:
        state = {
            name: value.clone().to(expected[name].dtype) if name in expected else value
            for name, value in load_file(path).items()
        }
        module.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ModelError(f"{path}: does not fit the model ({first_line(error)}).") from None
    require_finite(module, path)


def load_linear(path: Path) -> nn.Linear:
    """Reads a linear layer without bias, of any size, that `save_weights` wrote.

    Raises:
        ModelError: the file is missing, damaged, or contains something else.
    """
    try:
        height, width = load_file(path)["weight"].shape
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ModelError(f"{path}: contains no projection ({first_line(error)}).") from None
    linear = nn.Linear(width, height, bias=False, device="meta")
    load_weights(linear, path)
    return linear


def require_finite(module: nn.Module, source: str | Path) -> None:
    """Refuses weights that would make every answer NaN.

    Raises:
        ModelError: a weight or buffer is infinite or NaN; names the first.
    """
    for name, value in module.state_dict().items():
        if not (value.is_floating_point() and value.numel()):
            continue
        # One pass without a copy; a NaN becomes both bounds.
        if not all(math.isfinite(bound) for bound in torch.aminmax(value)):
            raise ModelError(
                f"{source}: {name} holds numbers that are not finite (NaN or infinity); copy the "
                "model again or train it again."
            )


def load(name: str | Path, loader: Callable[..., Any], **arguments: Any) -> Any:
    """Calls `from_pretrained` of a configuration, tokenizer or processor.

    Raises:
        ModelError: it cannot be found, read or reached; or a folder's configuration is not that of
            its weights.
    """
    is_local = Path(name).is_dir()
    if not is_local and (isinstance(name, Path) or not _HUB_ID.fullmatch(name)):
        raise ModelError(f"{name}: no such model folder.")
    try:
        if is_local:
            _require_plausible(Path(name))
        else:
            arguments["local_files_only"] = not hub_answers()
        with quiet():
            return loader(str(name), trust_remote_code=False, **arguments)
    except ClseaveError:
        raise
    except Exception as error:  # damaged files raise all kinds; tokenizers raises plain ones
        where = "folder" if is_local else "neither a folder here nor loadable as a hub id"
        reason = first_line(error) if is_local else hub_reason(error)
        raise ModelError(f"{name}: cannot be loaded ({where}: {reason}).") from None


def load_model(
    name: str | Path,
    loader: Callable[..., Any],
    *,
    optional: str | None = None,
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> Any:
    """Calls `from_pretrained` of a model; tensors with the prefix `optional` may be missing.

    Raises:
        ModelError: as `load`; or its weights do not fit its configuration, or are not finite.
    """
    config_class = getattr(loader.__self__, "config_class", None) or AutoConfig  # type: ignore[attr-defined]
    config = load(name, config_class.from_pretrained)
    parts = [getattr(config, f"{part}_config", config) for part in ("text", "vision")]
    kinds = [MODEL_MAPPING.get(type(part), None) for part in parts]
    has_sdpa = all(getattr(kind, "_supports_sdpa", True) for kind in kinds)  # DeBERTa has none
    # Always set: a kernel named in the file would be fetched from the hub and run.
    config._attn_implementation = "sdpa" if has_sdpa else "eager"
    arguments |= {"config": config, "dtype": dtype, "use_safetensors": True}
    model, report = load(name, loader, output_loading_info=True, **arguments)
    _require_matching(model, report, name, optional)
    require_finite(model, name)
    return model


def first_line(error: Exception) -> str:
    """An exception of another library, short enough for a one-line message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else repr(error)[:200]


def _require_matching(
    model: nn.Module, report: dict[str, Any], name: str | Path, optional: str | None
) -> None:
    """Refuses weights of another architecture; those of a head that the model lacks are ignored."""
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
    if optional is not None:
        missing = [key for key in missing if not key.startswith(optional)]
    for what, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            shown = ", ".join(sorted(keys)[:_NUM_NAMED])
            more = f" and {len(keys) - _NUM_NAMED} more" if len(keys) > _NUM_NAMED else ""
            raise ModelError(
                f"{name}: its weights do not fit its config.json; {what}: {shown}{more}. Take the "
                "files of one model."
            )


def _require_plausible(folder: Path) -> None:
    """Refuses special files, adapters, and sizes larger than the weight files."""
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
    num_numbers = sum(map(math.prod, shapes)) if shapes else _MAX_NUMBERS
    num_tensors = len(shapes) or _MAX_TENSORS
    for part in _objects(read_json(config)):
        sizes = {
            key: value
            for key, value in part.items()
            if type(value) is int and value > 0 and not key.endswith("_token_id")
        }
        for key, size in sizes.items():
            limit = num_tensors if "layers" in key else num_numbers
            if size > (min(limit, _MAX_LABELS) if key == "num_labels" else limit):
                raise ModelError(f"{config}: {key} is {size}; its weight files hold less.")
        width = sizes.get("hidden_size", 0)
        patches = sizes.get("image_size", 0) // sizes.get("patch_size", 1)
        inner = max(sizes.get("intermediate_size", 0), sizes.get("vocab_size", 0), width)
        if max(width * inner, patches**2) > _SHARING * num_numbers:
            raise ModelError(f"{config}: its sizes are far larger than its weight files.")


def _shapes(path: Path) -> list[list[int]]:
    """The shapes of the tensors in a safetensors file, from its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return [part.get_shape() for part in map(file.get_slice, file.keys())]
    except SafetensorError:
        raise ModelError(f"{path}: damaged, not a safetensors file; copy it again.") from None


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yields all objects in a JSON document, nested ones too."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _objects(inner)

"""Weights by local path or hub name: single checkpoint files, and models that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffalign.errors import UserError


def checkpoint_file(source: str) -> Path:
    """Return the local path of a checkpoint file, downloading it where it is named on the hub.

    Args:
        source: local path, or USER/REPOSITORY/FILE.

    Raises:
        UserError: if there is no such file, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    parts = source.split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise UserError(f"no checkpoint at {source}; give a file, or USER/REPOSITORY/FILE on the hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2]))
    except Exception as problem:
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(
            f"cannot get {parts[2]} of {'/'.join(parts[:2])} from the hub ({reason}); "
            "download it where the hub can be reached and give its path as NAME@PATH"
        ) from problem


@contextmanager
def pretrained(what: str, source: str) -> Iterator[None]:
    """Turn what transformers raises while it loads into one message that says what to do.

    Args:
        what: what is loaded, for example "the CLIP model".
        source: local folder or hub name.

    Raises:
        UserError: if the source is neither a folder nor to be had from the hub, or is not what it should be.
    """
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as problem:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(".")
        if Path(source).is_dir():
            told = f"cannot load {what} from the folder {source}: {reason}; name a folder that holds all of it"
        elif source.startswith((".", "/", "~")) or source.count("/") > 1:
            told = f"cannot load {what} {source}: there is no such folder; name a folder, or USER/REPOSITORY on the hub"
        elif isinstance(problem, OSError):
            told = (
                f"cannot load {what} {source}: there is no such folder, and the hub does not give it ({reason}); "
                f"name a downloaded folder, or first run: hf download {source} (after hf auth login if it is gated)"
            )
        else:
            told = f"cannot load {what} {source}: {reason}"
        raise UserError(told) from problem

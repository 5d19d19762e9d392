"""Single checkpoint files by local path or hub name."""

from __future__ import annotations

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

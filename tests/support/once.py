"""What several test processes need, made by the first that asks."""

import os

from filelock import FileLock  # torch requires it


def made_once(tmp_path_factory, name, make):
    """Path of `name` in the session's folder, where `make(path)` has written it (a file, or a folder)."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path, unfinished = folder / name, folder / f"{name}.new"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(unfinished)
            os.replace(unfinished, path)
    return path

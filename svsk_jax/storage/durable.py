"""Writes that outlast a power cut: on the disk before they take their name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """fsync one file, or a folder's own entries (only POSIX systems open folders)."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent) / name)
        sync(Path(parent))


def rename(source: Path, target: Path) -> None:
    """Give `source`, which is synced, the name `target`: after a power cut it has the one or the other."""
    os.replace(source, target)
    sync(target.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there; its entry in the one above is then synced."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync(folder.parent)


@contextmanager
def durable_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. When the block ends well `path` is that file, whole and on the disk;
    when it does not, nothing is left. A process killed meanwhile leaves `<name>.partial`."""
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        sync(partial)
        rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise

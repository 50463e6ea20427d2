"""One run at a time on an output folder."""

import contextlib
import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold `.<name>.lock` beside `output` for as long as the block runs.

    The lock is `flock` on that file, which the kernel drops with the process, however it ends; what the file
    says (process and host) is for people. Where the file system has no locks it warns and goes on.

    Raises:
        FileExistsError: another run holds it.
    """
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.parent / f".{output.name}.lock"
    stream = _acquire(path, output)
    try:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        stream.close()


def _acquire(path: Path, output: Path) -> TextIO:
    while True:
        stream = path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            stream.close()
            raise FileExistsError(
                f"output {output}: {holder} is writing to it; wait for its end, or give another --output"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                stream.close()
                raise
            warnings.warn(
                f"{path.parent}: this file system has no locks; see to it that no two runs write to {output}",
                stacklevel=4,
            )
        # A run that ended meanwhile has removed the file that was opened here.
        if _is_still(stream, path):
            return stream
        stream.close()


def _is_still(stream: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False

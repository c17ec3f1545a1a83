"""One run per output folder: a lock that the system lets go when its process ends, however it ends."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TextIO

from accelerate.logging import get_logger

from diffusers_srepa.errors import ConfigurationError


logger = get_logger(__name__)

LOCK_FILE = ".run.lock"


class RunLock:
    """An exclusive lock on an output folder.

    Args:
        folder (`Path`): made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: TextIO | None = None

    def acquire(self) -> None:
        """Take the lock, or warn where the file system has no locks.

        Raises:
            ConfigurationError: another process has it.
        """
        try:
            import fcntl
        except ImportError:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / LOCK_FILE).open("a+")
        try:
            # `lockf`, not `flock`: loader processes that outlive a killed run must not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning(
                    f"the folder {self.folder} cannot be locked ({error.strerror}): start one run in it only."
                )
                return
            raise ConfigurationError(
                f"the output folder {self.folder} is in use by a run that goes on ({holder}): stop that run first, or "
                "set another --output_dir."
            ) from None
        if not self._is_current(file):
            # The holder of the lock took the file away between opening and locking.
            file.close()
            self.acquire()
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file

    def _is_current(self, file: TextIO) -> bool:
        # Compared without opening it again: closing any handle of a file lets its `lockf` lock go.
        path = self.folder / LOCK_FILE
        return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())

    def release(self) -> None:
        """Let the lock go and take its file away."""
        if self._file is not None:
            (self.folder / LOCK_FILE).unlink(missing_ok=True)
            self._file.close()
            self._file = None

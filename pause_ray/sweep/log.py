"""What a search asked, was told and stopped: ``search.jsonl`` in the sweep's folder. Knows files and no meaning of an event.

One JSON object a line, on disk before ``append`` returns, written by one process: the sweep's driver. A process that dies
while appending leaves at most a last line without its end; readers pass over it, and the next append cuts it off.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from pause_ray.search_record import SEARCH_LOG
from pause_ray.spec import JsonObject
from pause_ray.storage import read_json_lines, space_errors


class SearchLog:
    """The events of one sweep's search, oldest first."""

    def __init__(self, folder: Path) -> None:
        """Name the log of the sweep in ``folder``; neither has to exist yet."""
        self.path = folder / SEARCH_LOG
        self._cut = False

    def events(self) -> list[JsonObject]:
        """Every event that was written to its end; none if there is no log yet.

        Raises:
            StorageError: a line that is no event, which no interrupted run leaves behind.
        """
        return read_json_lines(self.path)

    def append(self, event: JsonObject) -> None:
        """Add one event, plain JSON data with its kind under ``event``; on return it is on disk.

        Raises:
            StorageError: disk full or not writable; the log is then as it was before.
        """
        line = (json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with space_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._cut:
                self._cut_half_line()
            with self.path.open("ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    written = 0
                    while written < len(line):
                        written += file.write(line[written:])
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise

    def _cut_half_line(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            written = self.path.read_bytes()
            os.truncate(self.path, written.rfind(b"\n") + 1)
        self._cut = True

"""metrics.jsonl: what happened at which step of a run."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.files import append, atomic_write


class History:
    """metrics.jsonl: a line of JSON for each record, {"step": ...}."""

    def __init__(self, path: Path):
        self.path = path

    def lines(self) -> Iterator[tuple[int, str]]:
        """Each line with its step, but for those that a kill or a full disk has cut short."""
        text = ""
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8-sig", errors="replace")
        for line in text.splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                yield json.loads(line)["step"], line

    def has_preview(self, step: int) -> bool:
        """Whether there is a preview of the network after this step."""
        return any(at == step and '"picture"' in line for at, line in self.lines())

    def drop_after(self, step: int) -> None:
        """Take out the lines of later steps, which were lost and will be taken again."""
        if self.path.exists():
            kept = "".join(f"{line}\n" for at, line in self.lines() if at <= step)
            with atomic_write(self.path) as temporary:
                temporary.write_text(kept, encoding="utf-8")

    def write(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """Add a line with the numbers and the text among `values`.

        Raises:
            UserError: the file can't be written.
        """
        kept = {k: v for k, v in values.items() if isinstance(v, (int, float, str))}
        append(self.path, json.dumps({"step": step, "epoch": epoch} | kept) + "\n")

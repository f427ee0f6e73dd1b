"""metrics.jsonl: what happened at which step of a run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.files import append, atomic_write, read_lines


class History:
    """metrics.jsonl: a line of JSON for each record, {"step": ...}."""

    def __init__(self, path: Path):
        self.path = path

    def records(self) -> Iterator[dict[str, Any]]:
        """All of them, but for damaged lines."""
        for record in read_lines(self.path):
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record

    def has_preview(self, step: int) -> bool:
        """Whether there is a preview of the network after this step."""
        return any(r["step"] == step and "picture" in r for r in self.records())

    def drop_after(self, step: int) -> None:
        """Take out the lines of later steps, which were lost and will be taken again."""
        if self.path.exists():
            kept = "".join(f"{json.dumps(r)}\n" for r in self.records() if r["step"] <= step)
            with atomic_write(self.path) as temporary:
                temporary.write_text(kept, encoding="utf-8")

    def write(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """Add a line with the numbers and the text among `values`."""
        kept = {k: v for k, v in values.items() if isinstance(v, (int, float, str))}
        append(self.path, json.dumps({"step": step, "epoch": epoch} | kept) + "\n")

"""The folder of one command's results, marked by a JSON file: only ever its own."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ResultFolder:
    """A folder that one kind of run may fill, and fill again."""

    path: Path
    mark: str
    """Name of the JSON file with the results, which says whose folder it is."""
    kind: str
    """Whose results they are, with its article, for messages: `a demo`."""
    others: tuple[str, ...] = ()
    """Names of what a run writes beside `mark`; the next run removes them."""

    def open(self) -> None:
        """Make the folder ready; what an earlier run wrote is removed, nothing else.

        Raises:
            FileExistsError: If it is a file or holds something without the mark.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"output {self.path} is a file; choose another: --output DIR.")
        if self.path.exists() and any(self.path.iterdir()) and not self._mark.is_file():
            raise FileExistsError(
                f"output folder {self.path} holds files but no {self.mark}, so they are not from "
                f"{self.kind} and stay as they are; choose another: --output DIR."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        for name in self.others:
            (self.path / name).unlink(missing_ok=True)
        self.write({"finished": False})

    def write(self, result: dict[str, Any]) -> None:
        """Write the results, which are also the mark, all at once."""
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        partial = self._mark.with_name(f".{self.mark}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self._mark)

    @property
    def _mark(self) -> Path:
        return self.path / self.mark

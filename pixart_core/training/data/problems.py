"""What is wrong with a data set, collected, so that one run names all of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

_SHOWN = 5


@dataclass
class Problems:
    """Rows that cannot be used. Each line names the file and says what is wrong with it."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)

    def __len__(self) -> int:
        return len(self.lines)

    def summary(self, shown: int = _SHOWN) -> str:
        """The first few lines and how many follow."""
        rest = len(self.lines) - shown
        return "; ".join(self.lines[:shown]) + (f"; and {rest} more" if rest > 0 else "")

    def settle(self, folder: object, skip: bool, then: str) -> None:
        """Nothing without problems; with `skip` a warning, else ValueError that ends in `then`."""
        if not self.lines:
            return
        count = len(self.lines)
        what = f"{count} {'problem' if count == 1 else 'problems'} in {folder}: {self.summary()}"
        if not skip:
            raise ValueError(f"{what}. {then}")
        logger.warning("%s. They are left out", what)

"""The `pixart` command; without its optional packages, the words that say how to get them."""

from __future__ import annotations

import sys

from .extras import how_to_install

__all__ = ["app"]

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ModuleNotFoundError as error:
    _missing = error.name

    def app() -> None:
        """Stand in for the command where typer or rich is missing."""
        sys.stderr.write(f"pixart needs {_missing}, which is not installed: "
                         f"{how_to_install('cli')}\n")
        raise SystemExit(1)
else:
    from .commands import app

if __name__ == "__main__":
    app()

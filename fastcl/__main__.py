"""The command line, ``fastcl`` or ``python -m fastcl``; without the `train` extra it says so."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the trainer's commands, or say in one line what is not installed."""
    try:
        from fastcl.train.__main__ import app
    except ImportError as error:
        sys.exit(f"error: {error}")
    app()


if __name__ == "__main__":
    main()

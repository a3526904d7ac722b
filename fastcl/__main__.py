"""The command line, ``fastcl`` or ``python -m fastcl``; without the `train` extra it says so."""

from __future__ import annotations

import sys

# What the extra `train` installs, as it is imported.
EXTRA = ("kornia", "matplotlib", "rich", "sklearn", "threadpoolctl", "tokenizers", "typer")


def main() -> None:
    """Run the trainer's commands, or say in one line what is not installed."""
    try:
        from fastcl.train.__main__ import app
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:  # a bug, here or in one of them: its traceback says where
            raise
        sys.exit(f"error: {error}")
    app()


if __name__ == "__main__":
    main()

"""A small trainer that runs the losses end to end: ``fastcl train --method simclr``.

From Python: ``train(new_config(method="clip", epochs=20), out="runs/mine")``.
"""

from importlib.util import find_spec

_NEEDS = ("kornia", "matplotlib", "rich", "sklearn", "threadpoolctl", "tokenizers", "typer")
_missing = [name for name in _NEEDS if find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"fastcl.train needs {', '.join(_missing)}, not installed here: install fastcl with its "
        "extra `train`, as in pip install '.[train]' from its source folder",
        name=_missing[0],
    )

from fastcl.train.config import Config, TrainError  # noqa: E402
from fastcl.train.methods import METHODS, Method, StepOutput, register  # noqa: E402
from fastcl.train.run import new_config, resume, train  # noqa: E402

__all__ = [
    "METHODS",
    "Config",
    "Method",
    "StepOutput",
    "TrainError",
    "new_config",
    "register",
    "resume",
    "train",
]

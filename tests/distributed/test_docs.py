"""The script of docs/distributed.md, run as the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_the_example_runs_and_is_one_process(tmp_path: Path) -> None:
    """And prints the losses that one process prints: of the whole batch, step by step."""
    page = PAGE.read_text("utf-8")
    (script,) = re.findall(r"^```python\n(# train\.py\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"^torchrun (.*) train\.py$", page, re.MULTILINE)
    torch_seed = script.replace("encoder =", "torch.manual_seed(0)\nencoder =")
    told = torch_seed + (
        "    whole = fastcl.distributed.sum_over_ranks(loss, dist.group.WORLD) / world\n"
        "    print('loss', step, f'{whole.item():.9f}', flush=True) if rank == 0 else None\n"
    )
    (tmp_path / "train.py").write_text(told)
    printed = []
    for options in (command.split(), ["--nproc-per-node", "1"]):
        run = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, "train.py"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(PAGE.parents[1]), "OMP_NUM_THREADS": "1", "PATH": ""},
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert run.returncode == 0, run.stderr
        printed.append([float(x) for x in re.findall(r"^loss \d (\S+)$", run.stdout, re.MULTILINE)])
    together, alone = printed
    assert len(together) == 3
    for a, b in zip(together, alone, strict=True):
        assert abs(a - b) < 1e-6  # float32, whose rows are multiplied in other numbers

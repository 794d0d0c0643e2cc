"""The README's snippets run as printed, from a folder that holds the assets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def test_there_is_one_snippet_for_each_package():
    imported = [re.search(r"lemo_trainer|ripple_loader|ollie_compile", snippet) for snippet in SNIPPETS]
    assert [match and match[0] for match in imported] == ["lemo_trainer", "ripple_loader", "ollie_compile"]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["lemo", "ripple", "ollie"])
def test_snippet_runs(snippet, tmp_path):
    assets = Path(os.environ.get("LRO_CACHE", ROOT / ".cache" / "assets"))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "assets").symlink_to(assets)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

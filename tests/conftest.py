from __future__ import annotations

import pytest

LONG = ("test_readme.py", "test_distributed.py")  # minutes in other processes, while few tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that no worker is left alone with them at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)

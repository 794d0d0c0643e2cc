import pytest


@pytest.fixture(autouse=True)
def _no_wrong_candidate(caplog):
    """A candidate that fails verification fails the test, unless the test expects it and clears the log."""
    yield
    dropped = [record.getMessage() for record in caplog.records if "dropped, it" in record.getMessage()]
    assert not dropped, dropped[0]

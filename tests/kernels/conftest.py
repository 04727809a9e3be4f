import pytest

from dtr_kernels.compiled import library
from tests.kernels.cases import implementations


@pytest.fixture(params=implementations())
def implementation(request, monkeypatch):
    """The test runs once on each implementation of the serving entry points."""
    if request.param == "torch":
        monkeypatch.setenv("DTR_KERNELS_COMPILED", "0")
    else:
        monkeypatch.setenv("DTR_KERNELS_MARCH", request.param)
    library._load.cache_clear()
    assert library.is_available() == (request.param != "torch"), library.unavailable_reason()
    yield request.param
    monkeypatch.undo()
    library._load.cache_clear()

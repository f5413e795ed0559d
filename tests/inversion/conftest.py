from __future__ import annotations

import pytest

from tests.inversion.worlds import make_world


@pytest.fixture(
    scope="module", params=[("sd", "epsilon"), ("sdxl", "v_prediction"), ("pixart", "epsilon")], ids="-".join
)
def some_world(request, tmp_path_factory):
    return make_world(tmp_path_factory, *request.param)


@pytest.fixture(scope="module")
def epsilon_world(tmp_path_factory):
    return make_world(tmp_path_factory, "sd", "epsilon")

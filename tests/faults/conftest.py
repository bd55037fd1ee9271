"""What the tests of faults share: inputs of the chain's commands, made once a session."""

from __future__ import annotations

import pytest

from tests.faults.chain import Inputs
from tests.faults.inputs import write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Rows, a tiny model, a published checkpoint, a pipeline."""
    found = Inputs(tmp_path_factory.mktemp("faults") / "inputs")
    write_inputs(found)
    return found

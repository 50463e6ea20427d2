"""What libraries say that a user of svsk has no use for."""

import logging
import re
from pathlib import Path

import pytest
import transformers


@pytest.mark.parametrize("is_told", [False, True])
def test_transformers_does_not_tell_that_torch_is_missing(is_told):
    """The line as this version of it has it, and no other."""
    text = "Something else was not found"
    if not is_told:
        found = re.search(r'"(PyTorch was not found[^"]*)"', Path(transformers.__file__).read_text("utf-8"))
        assert found is not None
        text = found[1]
    record = logging.LogRecord("transformers", logging.WARNING, "", 0, text, None, None)
    assert bool(logging.getLogger("transformers").filter(record)) == is_told

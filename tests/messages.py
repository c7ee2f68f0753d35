"""What a refusal says."""

import pytest

from fastvitc.errors import CheckpointError


def one_line_of(call, *args):
    with pytest.raises(CheckpointError) as raised:
        call(*args)
    message = str(raised.value)
    assert message
    assert "\n" not in message
    return message

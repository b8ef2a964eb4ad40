"""How a refusal of what strangers wrote looks: one printable sentence."""

import sys
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

from miga_engine.errors import MigaError

quickly = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured through Linux's /proc")


def refusal(load: Callable[[], object], kind: type[MigaError] = MigaError) -> str:
    """The sentence that `load` is refused with."""
    with pytest.raises(kind) as raised:
        load()
    sentence = str(raised.value)
    assert sentence.isprintable()
    assert len(sentence) < 2000
    return sentence


def passes_or_is_refused(load: Callable[[], object]) -> None:
    try:
        load()
    except MigaError as error:
        sentence = str(error)
    else:
        return
    assert sentence.isprintable()
    assert 20 <= len(sentence) <= 2000

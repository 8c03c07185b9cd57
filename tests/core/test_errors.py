"""Exceptions travel through Ray, so each must survive pickling with its message."""

from __future__ import annotations

import pickle

import pytest

from pause_ray.core import errors

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PauseRayError)]


@pytest.mark.parametrize("kind", ALL)
def test_an_exception_survives_pickling(kind: type[errors.PauseRayError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("what, and what to do")))
    assert type(copy) is kind
    assert str(copy) == "what, and what to do"

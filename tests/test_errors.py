"""Errors cross process boundaries as what they are."""

import pickle

import pytest

from dasd_lite import errors
from dasd_lite.errors import DasdError, MissingExtraError, remote_error

KINDS = [DasdError, *DasdError.__subclasses__()]


def test_every_kind_of_error_is_known():
    assert {kind.__name__ for kind in KINDS} == {name for name in vars(errors) if name.endswith("Error")}


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_that_another_process_reports_is_of_the_same_kind(kind):
    error = remote_error(kind.__name__, "rank 1: no room")
    assert type(error) is kind
    assert str(error) == "rank 1: no room"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (kind, "rank 1: no room")


def test_an_error_of_an_unknown_kind_stays_one_that_a_user_can_fix():
    error = remote_error("NoSuchError", "text")
    assert (type(error), str(error)) == (DasdError, "text")


def test_a_missing_package_names_the_command_that_installs_it():
    error = MissingExtraError("train", "torch")
    assert str(error) == "torch is not installed; run: pip install 'dasd-lite[train]'"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (MissingExtraError, str(error))

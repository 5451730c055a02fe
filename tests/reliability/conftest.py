"""The fault table's bookkeeping: every row is a test that counts its variants."""

import json
import os
from collections.abc import Callable

import pytest

from minillm.errors import NumericError, UserError


def refused(work: Callable[[], object], *parts: str, kind: type = UserError) -> bool | str:
    """True if `work` ends in the user's error, one line that holds all the parts and a remedy;
    else what came instead."""
    try:
        work()
    except (UserError, NumericError) as error:
        line = str(error)
        missing = [part for part in (*parts, "; ") if part not in line]
        if isinstance(error, kind) and not missing and "\n" not in line:
            return True
        return f"{type(error).__name__}: {line} (lacks {missing})"
    except Exception as error:
        return f"a traceback: {type(error).__name__}: {error}"
    return "nothing was raised"


@pytest.fixture
def tally():
    """tally(row, {variant: True or what went wrong}, note): notes the count, then asserts it."""

    def count(row: str, found: dict, note: str = "") -> None:
        held = sum(result is True for result in found.values())
        if path := os.environ.get("RELIABILITY_TALLY"):
            with open(path, "a") as file:
                file.write(json.dumps([row, held, len(found), note]) + "\n")
        wrong = {name: result for name, result in found.items() if result is not True}
        assert not wrong, f"{row}: {held}/{len(found)}: {wrong}"

    return count

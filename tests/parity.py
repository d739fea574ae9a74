"""The parity rule under its short name; it and its one table of tolerances are in fastmbconv.parity."""

from fastmbconv.parity import ATOL, FACTOR, assert_parity, relative_error

__all__ = ["ATOL", "FACTOR", "assert_parity", "relative_error"]

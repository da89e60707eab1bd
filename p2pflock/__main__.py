"""`python -m p2pflock` is the same as `p2pflock`."""

from __future__ import annotations

from p2pflock.cli.main import run

if __name__ == "__main__":
    run()

"""The one exception that means "the user can fix this": shown as a message, never as a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake in the user's input. The text says where (file, row or key), what was found and what to do.

    In a run of several processes rank 0 shows it; set `one_rank_only` where only this rank can have met it.
    """

    one_rank_only: bool = False


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit: 0 or its return value, 2 with one message for a `UserError`, 130 for Ctrl-C."""
    try:
        code = main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or error.one_rank_only:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(code or 0)

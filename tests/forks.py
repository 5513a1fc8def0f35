"""Cases in processes of their own, all after the same first imports, which are paid for once.

Run as a script it imports what comes first and forks for each case.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path


def run_cases(first: str, cases: dict[str, str]) -> dict[str, str]:
    """Return what the code of each case prints after `first`, or its traceback."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, json.dumps([first, cases])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def _run(code: str) -> str:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {"__name__": "__main__"})
    except BaseException:
        return printed.getvalue() + traceback.format_exc()
    return printed.getvalue().strip()


def _run_apart(code: str) -> str:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, _run(code)[-8000:].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        printed = pipe.read()
    os.wait()
    return printed


def _main() -> None:
    warnings.simplefilter("ignore")
    sys.path[0] = str(Path(__file__).parents[1])
    first, cases = json.loads(sys.argv[1])
    exec(first, {})
    print(json.dumps({name: _run_apart(code) for name, code in cases.items()}))


if __name__ == "__main__":
    _main()

"""A script: run each of some cases in a process of its own, all after the same first imports.

python import_orders.py JOB: JSON with `first`, the imports, and `cases`, code by name. Prints, as
JSON, what each case printed, or its traceback. The processes are forks: imports are paid for once.
"""

import contextlib
import io
import json
import os
import sys
import traceback
import warnings


def run(code):
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {"__name__": "__main__"})
    except BaseException:
        return traceback.format_exc()
    return printed.getvalue().strip()


def run_apart(code):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, run(code)[-4000:].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        printed = pipe.read()
    os.wait()
    return printed


def main():
    warnings.simplefilter("ignore")
    job = json.loads(sys.argv[1])
    exec(job["first"], {})
    assert "peft" not in sys.modules, "each case imports it in its own way"
    print(json.dumps({name: run_apart(code) for name, code in job["cases"].items()}))


if __name__ == "__main__":
    main()

"""Runs many short commands at the price of one start: importing torch and its company takes longer than most of them.

    python warm.py serve SOCKET            imports once, then forks for every command it is sent
    python warm.py plaudit SOCKET WORD …   does there what `plaudit WORD …` does
    python warm.py code SOCKET TEXT        does there what `python -c TEXT` does

The fork takes over the caller's folder, environment and open files, and the caller its exit code.
"""

import importlib
import json
import os
import runpy
import socket
import sys
import tempfile
import traceback

IMPORTED_ONCE = (
    "plaudit.demo.pipeline",
    "plaudit.evaluation.score_job",
    "plaudit.models.export",
    "datasets",
    "matplotlib.pyplot",
    "scipy.stats",
    "sklearn.feature_extraction.text",
    "sklearn.linear_model",
)


def ask(address: str, kind: str, words: list[str]) -> int:
    """Send one command to the server and wait: its exit code."""
    request = json.dumps({"kind": kind, "words": words, "folder": os.getcwd(), "environment": dict(os.environ)})
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(address)
        socket.send_fds(caller, [len(request.encode()).to_bytes(8, "big")], [0, 1, 2])
        caller.sendall(request.encode())
        return int.from_bytes(caller.recv(1) or b"\x01", "big")


def serve(address: str) -> None:
    """Answer commands, one after the other, until terminated."""
    for name in IMPORTED_ONCE:
        importlib.import_module(name)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            caller, _ = server.accept()
            with caller:
                size, files, _, _ = socket.recv_fds(caller, 8, 3)
                request = b""
                while len(request) < int.from_bytes(size, "big"):
                    request += caller.recv(65536)
                child = os.fork()
                if child == 0:
                    os._exit(obey(json.loads(request), files))
                for file in files:
                    os.close(file)
                caller.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256]))


def obey(request: dict[str, object], files: list[int]) -> int:
    """In the fork: become the command, and give its exit code."""
    for target, file in enumerate(files):
        os.dup2(file, target)
    os.chdir(str(request["folder"]))
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[arg-type]
    words = [str(word) for word in request["words"]]  # type: ignore[attr-defined]
    code: object = 0
    try:
        if request["kind"] == "plaudit":
            from plaudit.cli.app import main

            sys.argv = ["plaudit", *words]
            main(words)
        else:
            with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as script:
                script.write(words[0])
                script.flush()
                sys.path.insert(0, "")  # as with `python -c`: modules in the folder can be imported
                runpy.run_path(script.name, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    kind, address, *rest = sys.argv[1:]
    if kind == "serve":
        serve(address)
    else:
        sys.exit(ask(address, kind, rest))

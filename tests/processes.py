"""Real processes of one job on this machine, and a server of files that answers ranges."""

import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WORKER = Path(__file__).with_name("process_worker.py")


def free_port():
    """Below those that the system gives to connections, which could take it before the job's first process does."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("localhost", port))
            return port
    raise RuntimeError("no free port between 20000 and 32000")


class Job:
    """`count` processes that run a task of process_worker.py, or another script, on this machine."""

    def __init__(self, task, directory, count, devices, *arguments):
        port = free_port()
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        environment = {**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}
        environment["PYTHONPATH"] = os.pathsep.join([str(WORKER.parents[1]), str(WORKER.parent)])
        script, task = (task, []) if task.endswith(".py") else (WORKER, [task])
        self.logs = [Path(directory) / f"{Path(script).stem}{''.join(task)}-{i}.log" for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            command = [sys.executable, "-u", str(script), *task, str(i), str(count), str(port), str(directory), *map(str, arguments)]
            with log.open("wb") as file:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))

    def wait(self, timeout=300):
        """The exit codes, negative for a signal. Whatever still runs after `timeout` seconds is killed and fails the test."""
        end = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()

    def finish(self, timeout=300):
        """All processes ended well, or the test fails with what they said."""
        try:
            codes = self.wait(timeout)
        except subprocess.TimeoutExpired:
            codes = ["timeout"]
        assert codes == [0] * len(self.processes), "\n".join(f"== {log.name}\n{log.read_text()[-4000:]}" for log in self.logs)

    def kill(self, number):
        self.processes[number].send_signal(signal.SIGKILL)


@contextmanager
def serving(directory, ranges=True, faults=None, ill=None):
    """A server of `directory`: its URL, and the list of what it has sent, (path, bytes). faults: {file name: bytes it seems to have}. ill:
    a function of a range's first byte to a status to answer with, "cut" to hang up in the middle of the answer, or None."""
    sent = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            path = Path(directory) / self.path.lstrip("/")
            if not path.is_file():
                return self.send_error(404)
            size = min(path.stat().st_size, (faults or {}).get(path.name, math.inf))
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if ranges else None
            if found:
                start, stop = int(found[1]), min(int(found[2]) + 1, size)
                if start >= size:
                    return self.send_error(416)
                trouble = ill and ill(start)
                if isinstance(trouble, int):
                    return self.send_error(trouble)
                cut = trouble == "cut"
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            else:
                start, stop, cut = 0, size, False
                self.send_response(200)
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if self.command == "GET":
                sent.append((path.name, stop - start))
                with path.open("rb") as file:
                    file.seek(start)
                    self.wfile.write(file.read((stop - start) // (2 if cut else 1)))

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # with its 5 a burst of requests waits a second for the second attempt

        def handle_error(self, *args):
            pass  # a client that hangs up

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

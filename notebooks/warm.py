"""Kernels that have imported already what takes seconds to import, for the notebooks that one `make` runs.

A process imports the libraries once and forks a kernel for each notebook; it ends with the make that it was begun for.
It imports nothing of this repository, so that no kernel has another version of it than a fresh one. Where it cannot be
had, a kernel starts as Jupyter starts it.
"""

import fcntl
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent / "_build"
LIBRARIES = (
    "ipykernel.kernelapp", "matplotlib.pyplot", "matplotlib_inline.backend_inline", "pandas", "tabulate", "torch",
    "torchvision", "timm", "accelerate", "fvcore.nn", "scipy.stats", "sklearn.metrics", "tqdm", "yaml",
)  # fmt: skip


class Forked:
    """As much of `subprocess.Popen` as Jupyter asks of a kernel, of one that is no child of this process."""

    stdin = stdout = stderr = None

    def __init__(self, pid):
        self.pid, self.returncode = pid, None

    def poll(self):
        if self.returncode is None:
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                self.returncode = 0
        return self.returncode

    wait = poll  # Jupyter polls before it waits

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def kernel(make, command, env, cwd):
    """Ask for a kernel.

    Args:
        make: the number of the process with which the one that forks begins and ends.
        command: how Jupyter would start the kernel.
        env, cwd: its environment and its folder.

    Returns:
        `Forked`.

    Raises:
        OSError, ValueError: none is to be had.
    """
    if sys.platform != "linux":
        raise OSError("a process that has imported so much can be forked on Linux alone")
    HERE.mkdir(exist_ok=True)
    address = Path(os.path.relpath(HERE / f"warm-{make}"))  # a socket's may be no longer than 100 characters
    with open(HERE / "warm.lock", "w") as lock, socket.socket(socket.AF_UNIX) as client:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several that begin at once begins it
        try:
            client.connect(str(address))
        except OSError:
            begin(make, address, env)
            client.connect(str(address))
        fcntl.flock(lock, fcntl.LOCK_UN)
        wish = {"arguments": command[command.index("-f") :], "env": env, "cwd": cwd}
        client.settimeout(120)
        client.sendall(json.dumps(wish).encode() + b"\n")
        return Forked(int(client.makefile().readline()))


def begin(make, address, env):
    """Start the process that forks, which listens from the start and answers when it has imported all."""
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        before = os.umask(0o077)  # nobody else may ask
        try:
            server.bind(str(address))
        finally:
            os.umask(before)
        server.listen(64)
        subprocess.Popen(
            [sys.executable, __file__, str(make), str(address.resolve()), str(server.fileno())], pass_fds=[server.fileno()],
            env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def serve(make, address, listening):
    """Fork a kernel for each wish until make is gone."""
    server = socket.socket(fileno=listening)
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError:  # a notebook that needs it will say so
            pass
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # kernels that end leave nothing to wait for
    server.settimeout(1)
    while alive(make):
        try:
            client = server.accept()[0]
        except TimeoutError:
            continue
        with client:
            client.settimeout(10)
            try:
                wish = json.loads(client.makefile().readline())
            except (OSError, ValueError):
                continue
            parent, pid = os.getpid(), os.fork()
            if not pid:
                server.close()
                client.close()
                return wish, parent  # in the kernel
            os.setpgid(pid, pid)  # Jupyter ends a kernel with its group
            client.sendall(f"{pid}\n".encode())
    address.unlink(missing_ok=True)
    return None


def become(wish, parent):
    """Be the kernel that is wished for; it ends with its parent."""
    from ipykernel.kernelapp import IPKernelApp

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(wish["env"])
    os.chdir(wish["cwd"])
    sys.path[:] = [*filter(None, wish["env"].get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
    IPKernelApp.launch_instance([*wish["arguments"], f"--IPKernelApp.parent_handle={parent}"])


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as a kernel sets it
    del sys.path[0]  # this folder, which is the notebooks' own
    wish = serve(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    if wish:
        become(*wish)

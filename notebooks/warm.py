"""Kernels forked from a process that has imported already what takes seconds to import.

Jupyter asks a provisioner for its kernels; this one asks no new Python, but the one that it is in. That has imported
nothing of this repository: a file that changes meanwhile must be what a later notebook imports.
"""

import asyncio
import atexit
import gc
import importlib
import multiprocessing
import os
import signal
import warnings
from importlib.metadata import EntryPoint

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

LIBRARIES = (
    "accelerate", "fvcore.nn", "ipykernel.kernelapp", "matplotlib.pyplot", "papermill", "seaborn", "sklearn.metrics", "timm",
    "transformers",
)  # fmt: skip


def load():
    """Import what notebooks import, and have Jupyter fork its kernels from this process from now on."""
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as a kernel has it from its start
    with warnings.catch_warnings(action="ignore"):
        for name in LIBRARIES:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a million objects, none of them garbage, that no fork's collector looks at or copies
    atexit.register(gc.unfreeze)
    factory = KernelProvisionerFactory.instance()
    factory.provisioners["warm"] = EntryPoint("warm", f"{__name__}:Warm", KernelProvisionerFactory.GROUP_NAME)
    factory.default_provisioner_name = "warm"


class Forked(multiprocessing.get_context("fork").Process):
    """A process with what Jupyter asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def poll(self):
        return self.exitcode

    def wait(self):
        self.join()
        return self.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


class Warm(LocalProvisioner):
    """A kernel on this machine, forked."""

    async def launch_kernel(self, cmd, **kwargs):
        arguments = [*cmd[cmd.index("-f") :], f"--IPKernelApp.parent_handle={os.getpid()}"]
        self.process = Forked(target=kernel, args=(arguments, kwargs["env"], kwargs.get("cwd") or os.getcwd()))
        self.process.start()
        self.pid = self.pgid = self.process.pid
        os.setpgid(self.pid, self.pid)  # Jupyter ends a kernel with its group
        return self.connection_info

    async def send_signal(self, signum):
        if signum != signal.SIGINT:  # which Jupyter sends before it asks a kernel to end, and disturbs its last answer
            await super().send_signal(signum)


def kernel(arguments, env, cwd):
    """Be a kernel of those arguments, environment and folder."""
    from ipykernel.kernelapp import IPKernelApp

    signal.set_wakeup_fd(-1)  # this and the handler are of the process that was forked
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    asyncio.set_event_loop(asyncio.new_event_loop())  # the old one runs in the process that was forked
    IPKernelApp.launch_instance(arguments)

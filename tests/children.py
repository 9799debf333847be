"""Run commands, scripts and notebooks in forked processes that share one set of imports.

Each call still gets a process of its own, so exit codes, signals, output and module state are those of a
command in a shell. A start takes a tenth of a second instead of several seconds.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parent.parent
MODULES = [
    "accelerate",
    "bitvae.cli",
    "matplotlib.pyplot",
    "nbdev.test",
    "papermill",
    "scipy.linalg",
    "skimage.metrics",
    "bitvae.evaluation",
    "bitvae.token_dataset",
    "bitvae.training",
    "bitvae.viewer.app",
    "torch.utils.tensorboard",
    "torchvision.models",
]
servers = multiprocessing.get_context("forkserver")
servers.set_forkserver_preload(MODULES)


def work(function, arguments, environment, out, err):
    "Call a function in a child with its standard output and error in files; its result is the exit code."
    import torch

    multiprocessing.set_start_method(None, force=True)  # the platform's default, not "forkserver"
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # the library was loaded earlier
    for descriptor, file in ((1, out), (2, err)):
        opened = os.open(file, os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    try:
        code = function(*arguments)
    finally:
        atexit._run_exitfuncs()  # multiprocessing skips them; temporary folders would stay
    sys.exit(code)


class Child:
    "A function call in a forked process."

    def __init__(self, function, *arguments, **env):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("out", "err")]
        for file in self.files:
            file.touch()
        self.process = servers.Process(
            target=work, args=(function, arguments, {**os.environ, **env}, *self.files)
        )
        self.process.start()

    def kill(self):
        "Send SIGKILL and return the exit code."
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    def finish(self):
        "Wait for the end; return exit code and output as `subprocess.run` does."
        self.process.join()
        out, err = (file.read_text() for file in self.files)
        return CompletedProcess((), self.process.exitcode, out, err)


def call(function, *arguments, **env):
    "Call a function in a child and wait for it."
    return Child(function, *arguments, **env).finish()


def command_line(*arguments):
    "Run the command `bitvae` in this process."
    from bitvae.cli import main

    sys.argv = ["bitvae", *arguments]
    return main(arguments)


def bitvae(*arguments, **env):
    "Run the command `bitvae` in a child and wait for it."
    return call(command_line, *map(str, arguments), **env)


def script(file, *arguments):
    "Run a Python file in this process."
    sys.argv = [str(file), *map(str, arguments)]
    runpy.run_path(str(file), run_name="__main__")


def run_cells(file, parameters=None):
    """Run the cells of a notebook in this process as `nbdev_test --path` does; exit with 1 if one fails.

    Papermill puts in parameters, values by their names.
    """
    import nbformat
    from nbdev.test import nbdev_test
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    with tempfile.TemporaryDirectory() as folder:
        if parameters:
            notebook = parameterize_notebook(load_notebook_node(file), parameters)
            file = Path(folder, Path(file).name)
            nbformat.write(notebook, file)
        nbdev_test(path=file, n_workers=0)


def free_port():
    "Return a TCP port that is free now."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(processes, function, *arguments, **env):
    "Start a function as the processes of one torch.distributed group, in torchrun's environment."
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    group["LOCAL_WORLD_SIZE"] = group["WORLD_SIZE"]
    if processes == 1:
        group = {}
    return [
        Child(
            function, *arguments, **env, **group, **({"RANK": str(r), "LOCAL_RANK": str(r)} if group else {})
        )
        for r in range(processes)
    ]

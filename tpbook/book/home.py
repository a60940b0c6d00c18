"""Where the book lies, so that its notebooks run from any folder.

Chapter: :doc:`/book/notation`
"""

import os
from pathlib import Path


def find():
    """The checkout of the book: around the working folder, else around the package. → Path

    Raises:
        FileNotFoundError: there is none, as where only the package was installed.
    """
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[2]):
        if (folder / "_toc.yml").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise FileNotFoundError(
        f"the notebooks read files of the book's repository, and neither {Path.cwd()} nor the package lies in a "
        "checkout of it: start in one, or install the package from one by `pip install -e .[book]`"
    )


def enter():
    """Make the checkout's `notebooks` the working folder: paths in a notebook are meant from there. → Path of it"""
    folder = find() / "notebooks"
    os.chdir(folder)
    return folder

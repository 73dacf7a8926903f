"""Runs notebooks from top to bottom and keeps what they show: ``python notebooks/execute.py [FILE ...]``.

Without a file, all of this folder. ``RUN=FOLDER`` in the environment names the run that they look at.
"""

import pathlib
import sys

import nbclient
import nbformat

for name in sys.argv[1:] or sorted(pathlib.Path(__file__).parent.glob("*.ipynb")):
    path = pathlib.Path(name)
    print(path, "...", flush=True)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=1800,
        record_timing=False,  # times would differ at each execution
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)

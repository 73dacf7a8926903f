"""Execute notebooks from top to bottom and save their outputs: ``python notebooks/execute.py [FILE ...]``.

Without files, execute all notebooks of this folder. The environment variable ``RUN`` names the run folder that
``quickstart.ipynb`` shows.
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
        record_timing=False,  # timings would differ in each execution
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)

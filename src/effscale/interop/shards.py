"""Tensors that an index distributes over several files."""

from collections.abc import Mapping

import numpy as np

from effscale.interop.tensors import FolderError, TensorInfo, Tensors


class Shards:
    """Several containers as one; see ``effscale.interop.tensors.Tensors``.

    If the files have effscale's metadata, it is the same in all of them.

    A tensor in a file that the index does not name is listed, too; the reader of the model decides
    whether it is unexpected.

    Args:
        where: The index, for error messages.
        files: The containers by their file's name.
        weight_map: Which file contains each tensor.

    Raises:
        FolderError: A file lacks a tensor that it should contain, or two files contain a tensor that the
            index does not name.
    """

    def __init__(self, where: str, files: Mapping[str, Tensors], weight_map: Mapping[str, str]):
        self._files, self._where = files, where
        self._file_of = dict(weight_map)
        absent = [name for name, file in weight_map.items() if name not in files[file].infos]
        if absent:
            name = absent[0]
            raise FolderError(
                f"{where!r}: does not match its files: {len(absent)} tensors are not "
                f"where it lists them, the first is {name!r} in {weight_map[name]!r}. Download both again."
            )
        for file, tensors in files.items():
            for name in tensors.infos.keys() - weight_map.keys():
                if name in self._file_of:
                    raise FolderError(
                        f"{where!r}: does not name {name!r}, which both {self._file_of[name]!r} and "
                        f"{file!r} contain. Download both again."
                    )
                self._file_of[name] = file
        self.metadata: Mapping[str, str] = self._common_metadata()
        self.infos: Mapping[str, TensorInfo] = {
            name: files[file].infos[name] for name, file in self._file_of.items()
        }

    def _common_metadata(self) -> Mapping[str, str]:
        """Return the metadata that effscale wrote to the header of every file."""
        found = {name: getattr(file, "metadata", {}) for name, file in self._files.items()}
        if not found:
            return {}
        first = next(iter(found))
        for name, metadata in found.items():
            if metadata != found[first]:
                raise FolderError(
                    f"{self._where!r}: {first!r} and {name!r} belong to different saves, by their metadata. Download all of them again."
                )
        return found[first]

    def read(self, name: str) -> np.ndarray:
        """Read one tensor from the file that contains it."""
        if name not in self.infos:
            raise FolderError(f"{self._where!r}: no tensor {name!r} in its files.")
        return self._files[self._file_of[name]].read(name)

"""Tensors that give their memory back for a while and keep what they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Offloaded:
    """Frees the storages behind some tensors; `restore` brings them back.

    Tensors stay the objects they are, so modules, views of one another and stages that hold them
    need not know; only their addresses change, and nothing may read them in between. keep: tensors
    whose values are copied to main memory; drop: those that come back as zeros. Values that change
    after `restore` are not copied again.
    """

    def __init__(self, keep: Iterable[Tensor], drop: Iterable[Tensor]) -> None:
        self._kept = {
            pointer: (storage, _copied(storage)) for pointer, storage in _storages(keep).items()
        }
        self._dropped = _storages(drop)
        self._sizes = {p: storage.nbytes() for p, storage in self._dropped.items()}
        self.free()

    def free(self) -> None:
        """Gives the memory back, also after a `restore` that found too little of it."""
        for storage, _ in self._kept.values():
            storage.resize_(0)
        for storage in self._dropped.values():
            storage.resize_(0)

    def restore(self) -> None:
        """Takes the memory again; raises torch's OutOfMemoryError where it is gone."""
        for storage, copy in self._kept.values():
            storage.resize_(copy.nbytes)
            _bytes_of(storage).copy_(copy)
        for pointer, storage in self._dropped.items():
            storage.resize_(self._sizes[pointer])
            _bytes_of(storage).zero_()


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in found if storage.nbytes()}


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage)


def _copied(storage: torch.UntypedStorage) -> Tensor:
    values = _bytes_of(storage)
    copy = torch.empty(values.shape, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
    return copy.copy_(values)

"""Keys and values of the tokens already read, kept per layer while generating."""

from __future__ import annotations

from torch import Tensor


class LayerCache:
    """Keys and values [B, K, length, C] of one layer, in buffers of `capacity` tokens that are filled in place."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' [B, K, S, C] and return all keys and values so far."""
        end = self.length + keys.shape[2]
        assert end <= self.capacity, "generation stops at the context length before the cache is full"
        if self._keys is None or self._values is None:
            shape = (keys.shape[0], keys.shape[1], self.capacity, keys.shape[3])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

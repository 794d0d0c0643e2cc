"""The neuron cache of one MLP, a file for each policy: a `NeuronCache` that registers its name."""

from ripple_loader.online.cache import linked as linked
from ripple_loader.online.cache import lru as lru
from ripple_loader.online.cache import s3fifo as s3fifo
from ripple_loader.online.cache.base import Admission, NeuronCache, Slots, make_cache

__all__ = ["Admission", "NeuronCache", "Slots", "make_cache"]

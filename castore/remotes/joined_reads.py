"""Objects that lie next to each other in a bundle, read together: a request costs as long as some megabytes do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from castore.format.bundle import Place
from castore.format.ids import ObjectId

MAX_BYTES = 8 << 20
"""The most that is read at once: eight of these may be in memory at a time."""


@dataclass(slots=True)
class JoinedRead:
    """The frames at ``places``, one after another in a bundle: read when one is first asked for."""

    places: Mapping[ObjectId, Place]
    _frames: dict[ObjectId, bytes] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, object_id: ObjectId, read: Callable[[Place], bytes]) -> bytes | None:
        """Return a frame, not yet verified; None for one that was taken before, or that reading together failed for.

        ``read`` returns the bytes at a place in the bundle. Its errors are raised once, to whoever asks first.
        """
        with self._lock:
            if self._frames is None:
                self._frames = {}
                start = min(place.offset for place in self.places.values())
                stop = max(place.offset + place.length for place in self.places.values())
                data = memoryview(read(Place(start, stop - start)))
                for known_id, place in self.places.items():
                    self._frames[known_id] = bytes(data[place.offset - start : place.offset - start + place.length])
            return self._frames.pop(object_id, None)


def plan(places: Mapping[ObjectId, Place]) -> dict[ObjectId, JoinedRead]:
    """Return the joined read of each object of one bundle that has neighbours among ``places``.

    >>> a, b, c = (ObjectId(digit * 64) for digit in "abc")
    >>> reads = plan({a: Place(16, 10), b: Place(26, 5), c: Place(90, 5)})
    >>> reads[a] is reads[b], c in reads
    (True, False)
    """
    groups: list[dict[ObjectId, Place]] = []
    size = end = 0
    for object_id, place in sorted(places.items(), key=lambda item: item[1].offset):
        if not groups or place.offset != end or size + place.length > MAX_BYTES:
            groups.append({})
            size = 0
        groups[-1][object_id] = place
        size, end = size + place.length, place.offset + place.length
    joined = [JoinedRead(group) for group in groups if len(group) > 1]
    return {object_id: read for read in joined for object_id in read.places}

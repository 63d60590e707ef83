"""TensorBoard's event files, read back by their published framing."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def scalars(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """{(tag, step): (value, wall time)} of the one file in a folder: length, its checksum, an Event, its checksum."""
    (file,) = folder.glob("events.out.tfevents.*")
    raw, at, found = file.read_bytes(), 0, {}
    while at < len(raw):
        (length,) = struct.unpack_from("<Q", raw, at)
        event = Event.FromString(raw[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            found[value.tag, event.step] = (value.simple_value, event.wall_time)
    return found

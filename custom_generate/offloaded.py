from .stream import Stream
class OffloadedStream(Stream):
    pass

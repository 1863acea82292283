from .stream import Stream
class Quantization:
    pass
class QuantizedStream(Stream):
    pass

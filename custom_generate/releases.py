from .old_core import *  # noqa
from .old_core import CACHE_NAME, CACHE_NAMES, input_device, shallow_copy, stop_counting, uncompiled_copy, unwrapped  # noqa

from .old_core import *  # noqa
from .old_core import _inverse_frequencies, _named_states, _own_cache, HAS_ALL_BEAM_SEARCHES  # noqa
from .releases import CACHE_NAME  # noqa
from .probe import *  # noqa
from .plan import *  # noqa
from .options import *  # noqa
from .prompt import *  # noqa
from .history import *  # noqa
from .feed import *  # noqa
from .drafting import *  # noqa
from .guidance import *  # noqa
from .generate_function import generate  # noqa

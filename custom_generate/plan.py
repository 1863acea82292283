from .old_core import count_tokens  # noqa

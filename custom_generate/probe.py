from .old_core import check_is_decoder  # noqa

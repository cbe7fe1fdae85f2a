"""Values as JSON has them."""

import math
from typing import Any


def plain(value: Any) -> Any:
    """The same without what JSON has no words for: NaN and infinities become None, tuples lists."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

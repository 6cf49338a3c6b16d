"""The tokens of a tokenizer that a text may not have in it, since a model takes them for turns or images."""

import re
from functools import lru_cache


@lru_cache(maxsize=8)
def find_control_tokens(tokenizer, size: int) -> re.Pattern:
    """Finds the control tokens of a tokenizer in a text. It is asked anew when the tokenizer has another `size`."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

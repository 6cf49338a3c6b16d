"""What the installed PEFT allows."""

import peft
import pytest
from packaging.version import parse
from transformers.integrations.peft import MIN_PEFT_VERSION

# A release of Transformers may ask for a PEFT that is not released yet.
needs_peft_of_transformers = pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION), reason=f"Transformers asks for PEFT {MIN_PEFT_VERSION}"
)

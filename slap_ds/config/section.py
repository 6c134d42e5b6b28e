"""What every group of settings is made of."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

# A file, folder or name; `~` is the user's home.
PathText = Annotated[str, AfterValidator(os.path.expanduser)]


class Section(BaseModel):
    """A group of settings: unknown keys are errors, and values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )

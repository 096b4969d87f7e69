"""The base that every configuration shares."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen configuration that refuses unknown keys and documents every field."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

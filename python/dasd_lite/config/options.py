"""Options given as keyword arguments: a table of the recipe, built in Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from dasd_lite.config.explain import Places, explain, shorten
from dasd_lite.config.models import Table
from dasd_lite.errors import ConfigError

T = TypeVar("T", bound=Table)


def with_options(table: type[T], config: T | None, options: Mapping[str, Any], name: str) -> T:
    """Return `config`, or the defaults of `table`, with `options` in place of its own.

    Args:
        table: The table's class, for example SampleConfig.
        config: Options so far; None: the defaults.
        options: Fields of `table` with new values.
        name: The table's name in errors.

    Raises:
        ConfigError: An option that the table does not have, or a wrong value; a line for each.
    """
    if not isinstance(config, table | None):
        raise ConfigError(f"{name}: config = {shorten(repr(config))}: should be a {table.__name__}")
    if config is not None and not options:
        return config
    values = {field: getattr(config, field) for field in config.model_fields_set} if config is not None else {}
    try:
        return table.model_validate({**values, **options})
    except ValidationError as error:
        mistakes = explain(error, (), Places(table, table=name))
        raise ConfigError("\n".join(line for _, line in mistakes)) from None

"""References in docstrings, ``:class:`RoSE.Grid```, as links where the reference has a page, else as code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([\w.]+)`")


class Roles(Extension):
    """For griffe, which reads the sources."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda match: link(obj, match[1]), obj.docstring.value)


def link(obj: Object, name: str) -> str:
    """HTML of a reference; one that leads nowhere stays text."""
    return f'<autoref identifier="{target(obj, name)}" optional><code>{name.lstrip(".")}</code></autoref>'


def target(obj: Object, name: str) -> str:
    """The full name of what a docstring means: relative to its package, to its scope, or as it stands."""
    if name.startswith("."):
        return f"{obj.package.path}.{name.lstrip('.')}"
    try:
        return obj.resolve(name)
    except Exception:  # griffe has several; an unknown name is no error here
        scope = obj if obj.is_class else obj.parent
        return f"{scope.path}.{name}" if scope is not None and name in scope.members else name

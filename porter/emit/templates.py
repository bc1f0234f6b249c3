"""Jinja templates for skeletons. Undefined variables are errors."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateNotFound, TemplateSyntaxError, UndefinedError

from porter.model import Diagnostic, PorterError
from porter.resources import TEMPLATES


@lru_cache(maxsize=4)
def _environment(root: Path) -> Environment:
    return Environment(
        loader=FileSystemLoader(root), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )


def render(name: str, **values: object) -> str:
    """Render `templates/<name>`. Raises PorterError (PORT602) for a missing or broken template or a missing variable."""
    try:
        return _environment(TEMPLATES).get_template(name).render(**values)
    except TemplateNotFound:
        raise PorterError(Diagnostic("PORT602", f"there is no template {name}")) from None
    except TemplateSyntaxError as error:
        raise PorterError(Diagnostic("PORT602", f"template {error.name}:{error.lineno}: {error.message}")) from None
    except UndefinedError as error:
        raise PorterError(Diagnostic("PORT602", f"template {name}: {error.message}")) from None

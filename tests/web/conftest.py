"""The fixtures, where playwright is installed; where it is not, each file of tests says so."""

from importlib.util import find_spec

if find_spec("playwright") is not None:
    from tests.web.fixtures import (
        api,
        axe,
        browser,
        context,
        import_answer,
        new_session,
        open_page,
        server,
    )

    __all__ = [
        "api",
        "axe",
        "browser",
        "context",
        "import_answer",
        "new_session",
        "open_page",
        "server",
    ]

"""What may be shown of a URL that a user gave."""

from __future__ import annotations

import re

# The scheme, and what stands before an "@" in the authority. AWS's secrets may have a slash, so a password may; and a
# URL that pathlib has read has one slash less.
_USER = re.compile(r"([A-Za-z][\w+.-]*:/{1,2})(?:[^/?#]*|[^/?#:@]*:[^@]*)@")


def shown(url: object) -> str:
    """A URL that nobody has checked yet, or any other text, for a message: without user information and parameters,
    where somebody may have put a secret.
    """
    place, mark, _ = str(url).partition("?")
    return _USER.sub(r"\1", place, count=1) + (mark and "?...")

"""Mask secrets in logs: passwords in URIs, signatures in queries, settings that are credentials."""

import re

MASK = "***"
_USER_INFO = re.compile(
    r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.\-]*://)[^\s/@\"':]*:[^\s/@\"']*@"  # user:password@ of any scheme
    r"|(?P<web>\b(?:https?|ftp|ssh)://)[^\s/@\"']+@"  # a user without a password in a web address is often a token
)
_SECRET_WORD = r"password|passwd|secret|token|signature|sig|api[_-]?key|access[_-]?key(?:[_-]?id)?|credentials?"
_QUERY = re.compile(rf"(?P<name>[?&;][\w\-]*(?:{_SECRET_WORD})=)[^\s&;\"']+", re.IGNORECASE)
_SECRET_NAME = re.compile(rf"(?:^|[._\-])(?:{_SECRET_WORD})$", re.IGNORECASE)
_FLAG = re.compile(rf"(?P<name>--(?:[\w.\-]*[._\-])?(?:{_SECRET_WORD})[= ])\S+", re.IGNORECASE)
_JSON = re.compile(rf"(?P<name>\"(?:[\w.\-]*[._\-])?(?:{_SECRET_WORD})\"\s*:\s*)\"(?:[^\"\\]|\\.)+\"", re.IGNORECASE)


def masked(text: str) -> str:
    """``text`` with ``***`` in place of ``user:password@`` in URIs and of the values of secret names.

    Secret names are matched in query strings, command-line flags and JSON members.

    >>> masked("https://me:pw@host/x?X-Amz-Signature=abc&y=1")
    'https://***@host/x?X-Amz-Signature=***&y=1'
    """
    text = _USER_INFO.sub(lambda found: f"{found['scheme'] or found['web']}{MASK}@", text)
    text = _QUERY.sub(rf"\g<name>{MASK}", text)
    text = _FLAG.sub(rf"\g<name>{MASK}", text)
    return _JSON.sub(rf'\g<name>"{MASK}"', text)


def masked_value(name: str, value: object) -> str:
    """The text of a setting, or ``***`` if it is set and its name is that of a credential."""
    if isinstance(value, str) and value and _SECRET_NAME.search(name):
        return MASK
    return masked(str(value))

"""Escape text for terminals and logs: a path may contain control characters and newlines."""


def printable(text: str) -> str:
    """Return text with control characters and invalid UTF-8 as backslash escapes."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(char: str) -> str:
    if char.isprintable():
        return char
    if "\udc80" <= char <= "\udcff":  # a byte under surrogateescape
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()

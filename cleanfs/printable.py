"""Paths hold any bytes; a terminal obeys some of them, and a line ends at one."""


def printable(text: str) -> str:
    """What is not printable as backslash escapes: controls, and bytes that are no UTF-8."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(char: str) -> str:
    if char.isprintable():
        return char
    if "\udc80" <= char <= "\udcff":  # a byte, as surrogateescape has it
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
